"""LoRA-GA: start with singular vectors of each weight's gradient."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.argument_checks import check_key
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import path_key
from lora_jax.initialization.checks import check_choice, check_data, check_weights
from lora_jax.initialization.rebase import Adapters, rebase
from lora_jax.initialization.svd import Factors, svd, to_matrices

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd_scale", "weight_svd", "unit")


def lora_ga(
    params: Any,
    adapters: Adapters,
    gradients: Any,
    *,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    scale: str = "stable",
    key: jax.Array | None = None,
) -> tuple[Any, dict[str, LoraAdapter]]:
    """Start so that the first steps of A and B move W as its own gradient would: A = U_r, B = c S_2r V_2r^T.

    dL/dW = U S V^T; U_r are the first r columns, S_2r V_2r^T the r rows after the first r. The base becomes W - s A B.
    Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000.

    The singular values in B are from HF PEFT, as are the names of directions and scales. With them the size of B
    follows that of the gradient, and so depends on how the loss is scaled; with "weight_svd" it does not.

    Args:
        params: the parameters; adapted weights may be packed.
        adapters: fresh ones, `{path: LoraAdapter}`, as `lora.init` makes them.
        gradients: dL/dW of the full weights, each with its weight's own axes, averaged over some batches:
            `{path: dL/dW}` or a tree like `params`.
        gamma: of "stable".
        direction: which singular vectors A and B have. "ArB2r": A the first r and B the next r; "A2rBr": the other way
            round; "ArBr": A every second one from the second on, and B the others of the first 2r; "random": the same
            random r of the first 2r, which needs a key.
        scale: c. "stable": k^(1/4) / sqrt(gamma); "weight_svd": what makes the largest singular value of B that of W;
            "gd_scale": 1 / s, and A is divided by s too; "unit": 1.
        key: of the random directions.

    Returns:
        The new parameters, and the started adapters.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a gradient is missing, not
            finite or of another shape than its weight; a weight has fewer than 2r singular values; a name is unknown.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jax.random.normal(jax.random.key(0), (6, 4))}, jax.random.normal(jax.random.key(1), (32, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> gradients = jax.grad(lambda params: jnp.mean((x @ params["w"]) ** 2))(params)
    >>> base, adapters = lora.starts.lora_ga(params, lora.init(jax.random.key(2), params, plan), gradients)
    >>> bool(jnp.allclose(lora.merge(base, adapters)["w"], params["w"], atol=1e-4))
    True
    """
    check_choice("lora_ga", "direction", direction, DIRECTIONS)
    check_choice("lora_ga", "scale", scale, SCALES)
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 < gamma < math.inf:
        raise LoraError(f"lora_ga(gamma={gamma!r}): expected a finite number above 0, for example 16.0.")
    if direction == "random" and key is None:
        raise LoraError("lora_ga(direction='random') draws random numbers: give it key=jax.random.key(0).")
    if key is not None:
        check_key("lora_ga(params, adapters, gradients, key=key)", key)
    weights = check_weights(params, adapters)
    grads = check_data("gradients", gradients, {path: weights[path].shape for path in adapters})
    for path, adapter in adapters.items():
        _, d, k = adapter.axes.fans(weights[path].shape)
        if 2 * (rank := adapter.a.shape[-1]) > min(d, k):
            raise LoraError(
                f"{path!r} has rank {rank}, and LoRA-GA takes twice as many singular vectors of a gradient that has "
                f"min({d}, {k}): take a rank of at most {min(d, k) // 2}."
            )

    def factors(path: str, adapter: LoraAdapter, w: jax.Array) -> Factors:
        rank = adapter.a.shape[-1]
        for_a, for_b = _directions(direction, rank, None if key is None else path_key(key, path))
        u, values, vt = svd(to_matrices(grads[path], adapter.axes), slice(2 * rank))
        a, b, values = u[:, :, for_a], vt[:, for_b], values[:, for_b]
        b = values[:, :, None] * b
        if scale == "stable":
            return a, b * (w.shape[-1] ** 0.25 / gamma**0.5)
        if scale == "weight_svd":
            top, own = jnp.linalg.norm(w, 2, axis=(-2, -1)), values.max(-1)
            return a, b * jnp.where(own > 0, top / jnp.where(own > 0, own, 1), 1)[:, None, None]
        return (a / float(adapter.scale), b / float(adapter.scale)) if scale == "gd_scale" else (a, b)

    return rebase(params, weights, adapters, factors)


def _directions(direction: str, rank: int, key: jax.Array | None) -> tuple[Any, Any]:
    """Return which of the first 2r singular vectors A has, and which B has."""
    both = np.arange(2 * rank)
    if key is not None and direction == "random":
        some = jax.random.permutation(key, both)[:rank]
        return some, some
    first, second = both[:rank], both[rank:]
    return {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (both[1::2], both[::2])}[direction]
