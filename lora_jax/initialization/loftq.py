"""LoftQ: pack each weight, and start with the best low-rank approximation of what packing loses."""

from typing import Any

import jax.numpy as jnp

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.bases.format import Format, check_weight
from lora_jax.bases.placement import pack_there
from lora_jax.core.arrays import placed
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, is_packed
from lora_jax.initialization.checks import check_weights
from lora_jax.initialization.rebase import Adapters, subtract, with_factors, with_weights
from lora_jax.initialization.svd import balanced_factors, svd, to_matrices


def loftq(
    params: Any, adapters: Adapters, format: Format, *, iterations: int = 1
) -> tuple[Any, dict[str, LoraAdapter]]:
    """Pack each weight as Q, and start with s A B the best rank-r approximation of what that loses, W - Q.

    Q is W packed; each further iteration packs W - s A B instead, with A and B of the iteration before.
    Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659. HF PEFT
    leaves the scale out, so that its s A B is s times what it should be.

    Args:
        params: the parameters; no adapted weight is packed yet.
        adapters: fresh ones, `{path: LoraAdapter}`, as `lora.init` makes them.
        format: to pack the adapted weights in, such as `lora.bases.Nf4()`. `lora.bases.quantize` packs others.
        iterations: at least 1.

    Returns:
        The parameters with packed weights, and the started adapters.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a weight is not finite, or
            packed already; no such format; iterations below 1.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jax.random.normal(jax.random.key(0), (64, 4))}, jnp.ones((1, 64))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> fresh = lora.init(jax.random.key(1), params, plan)
    >>> base, adapters = lora.starts.loftq(params, fresh, lora.bases.Nf4())
    >>> loss = lambda base, adapters: float(jnp.linalg.norm(lora.merge(base, adapters)["w"] - params["w"]))
    >>> loss(base, adapters) < loss(base, fresh)
    True
    """
    if not isinstance(format, Format):
        raise LoraError(f"loftq(format={format!r}): expected a format such as lora.bases.Nf4().")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise LoraError(f"loftq(iterations={iterations!r}): expected a whole number of at least 1.")
    weights = check_weights(params, adapters)
    if packed_already := [path for path, w in weights.items() if is_packed(w)]:
        raise LoraError(
            f"{packed_already[0]!r} is packed already, and LoftQ makes up for what packing loses, of which that has no "
            "trace: start from the parameters as they were before they were packed."
        )
    stacks = {path: check_weight(path, w, format.stack) for path, w in weights.items()}
    started: dict[str, LoraAdapter] = {}
    packed: dict[str, Packed] = {}
    for path, adapter in adapters.items():
        w, axes, rank = weights[path], adapter.axes, adapter.a.shape[-1]
        rest = w
        for _ in range(iterations):
            packed[path], _ = pack_there(format, rest, stacks[path], jnp.dtype(format.dtype or w.dtype))
            lost = to_matrices(w, axes) - to_matrices(packed[path].dense(), axes)
            factors = balanced_factors(*svd(lost, slice(rank)), float(adapter.scale))
            started[path] = with_factors(path, adapter, *factors)
            rest = placed(subtract(w, started[path]).astype(w.dtype), w)
    return with_weights(params, packed), started
