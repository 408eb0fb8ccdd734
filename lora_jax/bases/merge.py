"""Merge adapters into packed weights, and pack the result again."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter
from lora_jax.core.adapter_checks import check_adapters
from lora_jax.core.aliases import Uses, same
from lora_jax.core.arrays import accumulator, concrete, placed
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, as_given, is_packed, unpacked
from lora_jax.core.paths import flatten_with_names


def merge(params: Any, adapters: Mapping[str, Adapter], *, donate: bool = False) -> tuple[Any, dict[str, float]]:
    """Replace each adapted weight W by pack(W'), in its own format, for use with the unchanged function.

    Weights are dequantized, merged in fp32 and packed again one after the other. Arrays stay arrays, and a weight that
    its adapter does not change stays as it is. `lora.merge` keeps W' as an array instead. Two weights that are the same
    arrays, with adapters that are the same too, are packed once and stay one.

    Packing rounds W', and all values of W are values of the format already: where an adapter changes a value by less
    than half the step between codes, the value is rounded back to what it was. After a short training that is most of
    them, in 8 bits too, so look at the second result. If it is near 1, keep the adapter beside the base, or merge into
    the weights as they were before they were packed, and pack the result.

    Args:
        params: a tree of arrays and packed weights.
        adapters: `{path: adapter}`.
        donate: delete the arrays of each adapted weight as soon as the merged ones are computed, except where another
            leaf lies in the same memory and is still needed.

    Returns:
        The parameters, and for each adapted weight the loss |pack(W') - W'| / |W' - W|, of Frobenius norms, as of
        `lora.merge_checkpoint`: 1 is the loss if W had not been changed at all. It is 0 where W' = W.

    Raises:
        LoraError: before anything is packed or deleted: an adapter has no weight, or does not fit it; arrays are
            traced; an adapter or a merged weight is not finite, or overflows its dtype. Later: the values of a merged
            weight overflow by being packed.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    >>> base = lora.bases.quantize(params, {"w": lora.bases.Int8()})
    >>> plan = lora.plan(lambda p, x: x @ p["w"], base, jnp.ones((1, 64)), rules={"w": lora.Lora(rank=2)})
    >>> adapters = jax.tree.map(lambda array: array + 0.1, lora.init(jax.random.key(1), base, plan))
    >>> merged, losses = lora.bases.merge(base, adapters)
    >>> type(merged["w"]).__name__, losses["w"] < 0.5
    ('EightBits', True)
    """
    names, leaves, treedef = flatten_with_names(params)
    check_adapters(adapters, names, leaves)
    weights = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name in adapters}
    for name, weight in weights.items():
        _check(name, weight, adapters[name])
    work = {name: (same(weight), same(adapters[name])) for name, weight in weights.items()}
    uses = Uses(names, leaves, work, dict(adapters))
    done: dict[Any, tuple[Any, float]] = {}
    for name, weight in weights.items():
        if work[name] not in done:
            done[work[name]] = new, _ = _merged(name, weight, adapters[name])
            if donate and new is not weight and uses.last(weight):
                jax.block_until_ready(new)
                _delete(weight)
    merged = [done[work[name]][0] if name in work else leaf for name, leaf in zip(names, leaves, strict=True)]
    return treedef.unflatten(map(as_given, merged)), {name: done[key][1] for name, key in work.items()}


def _check(name: str, weight: Any, adapter: Adapter) -> None:
    """Raise if a weight or its adapter is traced, or what they make together is not finite in the weight's dtype."""
    arrays = jax.tree.leaves(adapter)
    if any(isinstance(array, jax.core.Tracer) for array in (*arrays, *jax.tree.leaves(weight))):
        raise LoraError(f"{name!r} or its adapter is traced, and packing looks at numbers: merge outside jax.jit.")
    old, exact = _exact(weight, adapter)
    if not _finite(exact):
        sound = all(_finite(array) for array in arrays if jnp.issubdtype(array.dtype, jnp.floating))
        why = "the weight has them, or the sum overflows" if sound else "the adapter has them, its training diverged"
        raise LoraError(f"{name!r} holds NaN or infinity once its adapter is merged, which cannot be packed: {why}.")
    if not _finite(exact.astype(old.dtype)):
        raise LoraError(_overflow(name, exact, old.dtype))


def _finite(array: jax.Array) -> bool:
    return bool(jnp.isfinite(array).all())


def _overflow(name: str, exact: jax.Array, dtype: Any) -> str:
    largest, most = float(jnp.abs(exact).max()), float(jnp.finfo(dtype).max)
    return (
        f"{name!r} overflows {dtype} once its adapter is merged: the largest |W'| is {largest:.4g}, expected at most "
        f"{most:.4g}. Keep the adapter beside the base, or merge into weights of a wider dtype."
    )


def _exact(weight: Any, adapter: Adapter) -> tuple[jax.Array, jax.Array]:
    """Return W as an array, and W' in fp32 or wider."""
    old = jnp.asarray(unpacked(weight))
    return old, adapter.merge(old.astype(accumulator(old.dtype)))


def _merged(name: str, weight: Any, adapter: Adapter) -> tuple[Any, float]:
    """Return W' in the format of W, and the loss."""
    old, exact = _exact(weight, adapter)
    changed = float(jnp.linalg.norm((exact - old.astype(exact.dtype)).reshape(-1)))
    if changed == 0:
        return weight, 0.0
    new = repacked(weight, exact) if is_packed(weight) else placed(exact.astype(old.dtype), old)
    lost = float(jnp.linalg.norm((unpacked(new).astype(exact.dtype) - exact).reshape(-1)))
    if not math.isfinite(lost):
        raise LoraError(_overflow(name, exact, old.dtype))
    return new, lost / changed


def repacked(weight: Packed, w: jax.Array) -> Packed:
    """Pack another weight as this one is packed, with the same shardings."""
    return jax.tree.map(placed, weight.repack_like(w), weight)


def _delete(weight: Any) -> None:
    for array in jax.tree.leaves(weight):
        if concrete(array):
            array.delete()
