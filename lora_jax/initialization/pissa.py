"""PiSSA: start with the largest singular values and vectors of each weight."""

from typing import Any

import jax

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.argument_checks import check_key
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import path_key
from lora_jax.initialization.checks import check_weights
from lora_jax.initialization.rebase import Adapters, rebase
from lora_jax.initialization.svd import Factors, balanced_factors, randomised_svd, svd


def pissa(
    params: Any, adapters: Adapters, *, iterations: int | None = None, key: jax.Array | None = None
) -> tuple[Any, dict[str, LoraAdapter]]:
    """Start with the best rank-r approximation of W: A = U_r sqrt(S_r / |s|), B = sign(s) sqrt(S_r / |s|) V_r^T.

    W = U S V^T, and the base becomes W - s A B.
    Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", arXiv
    2404.02948.

    For a packed base (the paper's QPiSSA), start from W, then pack the new base with `lora.bases.quantize`: the
    residual is smaller than W where few singular values are large, and so is what packing it loses. A weight that is
    packed already keeps its error, and packing its residual adds another.

    Args:
        params: the parameters; adapted weights may be packed.
        adapters: fresh ones, `{path: LoraAdapter}`, as `lora.init` makes them.
        iterations: None for the exact SVD. Otherwise a randomised one with this many steps of subspace iteration, which
            is much faster for large weights and near the exact one after a few (Halko et al. 2009, arXiv 0909.4061).
        key: of the random numbers of the randomised SVD.

    Returns:
        The new parameters, and the started adapters.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a weight is not finite; a key
            is missing.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jax.random.normal(jax.random.key(0), (6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> base, adapters = lora.starts.pissa(params, lora.init(jax.random.key(1), params, plan))
    >>> bool(jnp.allclose(lora.merge(base, adapters)["w"], params["w"], atol=1e-4))
    True
    """
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0):
        raise LoraError(f"pissa(iterations={iterations!r}): expected a whole number such as 4, or None for exact SVD.")
    if iterations is not None and key is None:
        raise LoraError(f"pissa(iterations={iterations}) draws random numbers: give it key=jax.random.key(0).")
    if key is not None:
        check_key("pissa(params, adapters, key=key)", key)
    weights = check_weights(params, adapters)

    def factors(path: str, adapter: LoraAdapter, w: jax.Array) -> Factors:
        rank = adapter.a.shape[-1]
        if key is None or iterations is None:
            return balanced_factors(*svd(w, slice(rank)), float(adapter.scale))
        return balanced_factors(*randomised_svd(path_key(key, path), w, rank, iterations), float(adapter.scale))

    return rebase(params, weights, adapters, factors)
