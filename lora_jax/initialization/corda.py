"""CorDA: start with the part of each weight that matters most, or least, for given data."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.arrays import matmul_highest
from lora_jax.core.errors import LoraError
from lora_jax.initialization.checks import check_choice, check_data, check_weights
from lora_jax.initialization.rebase import Adapters, rebase
from lora_jax.initialization.svd import Factors, balanced_factors, flatten_stack, svd

MODES = ("instruction", "knowledge")


def corda(
    params: Any, adapters: Adapters, covariances: Any, *, mode: str = "instruction"
) -> tuple[Any, dict[str, LoraAdapter]]:
    """Start with a part of W chosen by its effect on data: A = C^-1 U sqrt(S / |s|), B = sign(s) sqrt(S / |s|) V^T.

    C W = U S V^T, and C [d, d] is the covariance X^T X of the inputs of W. It is damped until it can be inverted:
    C + t mean(diag C) I, with t = 0.01 doubled until |C C^-1 - I| < 0.05. The base becomes W - s A B.
    Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
    Parameter-Efficient Fine-tuning", arXiv 2406.05223.

    Scaling C leaves A B as it is, and moves size from A to B. HF PEFT divides the x of each batch by their largest
    entry, and takes the mean of X^T X over batches.

    Args:
        params: the parameters; adapted weights may be packed.
        adapters: fresh ones, `{path: LoraAdapter}`, as `lora.init` makes them.
        covariances: `{path: C [*stack, d, d]}`, several input axes flattened to d.
        mode: "instruction" trains the largest r of the singular values, for data of the new task; "knowledge" the
            smallest r, for data of what is to be kept.

    Returns:
        The new parameters, and the started adapters.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a covariance is missing, not
            finite, not symmetric, zero or of another shape; the mode is unknown.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jax.random.normal(jax.random.key(0), (6, 4))}, jax.random.normal(jax.random.key(1), (32, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> base, adapters = lora.starts.corda(params, lora.init(jax.random.key(2), params, plan), {"w": x.T @ x})
    >>> bool(jnp.allclose(lora.merge(base, adapters)["w"], params["w"], atol=1e-4))
    True
    """
    check_choice("corda", "mode", mode, MODES)
    weights = check_weights(params, adapters)
    expected: dict[str, tuple[int | None, ...]] = {}
    for path, adapter in adapters.items():
        stack, _, _ = adapter.axes.sizes(weights[path].shape)
        _, d, _ = adapter.axes.fans(weights[path].shape)
        expected[path] = (*stack, d, d)
    cs = {path: flatten_stack(c) for path, c in check_data("covariances", covariances, expected).items()}
    for path, c in cs.items():
        _check_covariance(path, c)

    def factors(path: str, adapter: LoraAdapter, w: jax.Array) -> Factors:
        c, inverse = damp(path, cs[path])
        rank, count = adapter.a.shape[-1], min(w.shape[1:])
        which = slice(rank) if mode == "instruction" else slice(count - rank, count)
        u, values, vt = svd(matmul_highest(c, w), which)
        return balanced_factors(matmul_highest(inverse, u), values, vt, float(adapter.scale))

    return rebase(params, weights, adapters, factors)


def damp(path: str, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return C [n, d, d] with as much added to each diagonal as its inverse needs, and the inverses [n, d, d].

    Raises:
        LoraError: no damping makes it invertible.
    """
    eye = jnp.eye(c.shape[-1], dtype=c.dtype)[None]
    mean = jnp.trace(c, axis1=-2, axis2=-1) / c.shape[-1]
    damping = jnp.full_like(mean, 0.01)
    for _ in range(64):  # by then the damping outweighs C
        damped = c + (damping * mean)[:, None, None] * eye
        inverse = jnp.linalg.inv(damped)
        inverted = jnp.linalg.norm(matmul_highest(damped, inverse) - eye, axis=(-2, -1)) < 0.05
        if inverted.all():
            return damped, inverse
        damping = jnp.where(inverted, damping, 2 * damping)
    raise LoraError(f"covariances[{path!r}] has no inverse in {c.dtype}: scale the inputs that it is made of.")


def _check_covariance(path: str, c: jax.Array) -> None:
    """Raise if a covariance is not symmetric or its diagonal is not positive on the whole."""
    skew, largest = jnp.abs(c - c.mT).max(), jnp.abs(c).max()
    if skew > 1e-3 * largest:
        raise LoraError(f"covariances[{path!r}] is not symmetric, C - C^T is up to {skew:.3g}: give X^T X of rows x.")
    if not (jnp.trace(c, axis1=-2, axis2=-1) > 0).all():
        raise LoraError(
            f"covariances[{path!r}] has no variance on its diagonal: give X^T X of rows x that are not zero."
        )
