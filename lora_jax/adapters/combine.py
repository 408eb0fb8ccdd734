"""Exact sums of adapters: [A1 | A2 | ...] and [w1 s1 B1; w2 s2 B2; ...], whose product is the weighted sum of changes.

The rank is the sum of ranks. Adding the factors themselves would be smaller, and wrong: (A1 + A2)(B1 + B2) has cross
terms.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import check_adapter_dict, check_is, refuse
from lora_jax.core.errors import LoraError

CALL = "combine([(adapters, weight), ...])"


def combine(parts: Sequence[tuple[Mapping[str, Adapter], float]]) -> dict[str, Adapter]:
    """Return the adapters whose change is the weighted sum of those of all parts.

    Args:
        parts: `[(adapters, weight), ...]`. A path that a part lacks is one that it does not change.

    Raises:
        LoraError: there are none; a weight is no finite number; an adapter is no LoRA in any form, or holds infinity or
            NaN; two of a path do not fit; a sum has numbers that its dtype cannot hold.

    >>> import jax, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> one = {"w": lora.Lora(2).factors(jax.random.key(0), (4, 3), axes)}
    >>> both = lora.combine([(one, 0.5), (one, -1.5)])["w"]
    >>> both.a.shape, both.b.shape
    ((4, 4), (4, 3))
    """
    if not parts:
        raise LoraError(f"{CALL}: expected one part at least.")
    _check_pairs(parts)
    found: dict[str, list[LoraAdapter]] = {}
    for adapters, weight in parts:
        check_adapter_dict(CALL, adapters)
        if not isinstance(weight, numbers.Real | np.ndarray | jax.Array) or not math.isfinite(weight):
            raise LoraError(f"combine: a weight is {weight!r}, expected a finite number, such as 0.5.")
        for path, adapter in adapters.items():
            factors = adapter.to_lora() if isinstance(adapter, Adapter) else None
            if not isinstance(factors, LoraAdapter):
                raise LoraError(f"{path!r} is a {type(adapter).__name__}; sums are of what is LoRA in some form.")
            found.setdefault(path, []).append(_weighted(path, factors, float(weight)))
    return {path: _sum(path, adapters) for path, adapters in found.items()}


def _check_pairs(parts: Any) -> None:
    """Raise unless these are pairs of adapters and a weight."""
    pairs = "a list of pairs, [(adapters, 1.0), (others, -0.5)]"
    check_is(CALL, "parts", parts, (list, tuple), pairs)
    for part in parts:
        if not isinstance(part, list | tuple) or len(part) != 2:
            refuse(CALL, "parts", parts if isinstance(part, float | int) else part, pairs)


def _weighted(path: str, adapter: LoraAdapter, weight: float) -> LoraAdapter:
    """Return an adapter with its scale times the weight, if the numbers that it stands for are finite."""
    if not (_is_finite(adapter.a) and _is_finite(adapter.b)):
        raise LoraError(
            f"{path!r} holds infinity or NaN, in the part with the weight {weight}: no sum of it has a meaning. "
            "Take the adapters of an earlier checkpoint."
        )
    if adapter.ratio.ndim > 1:
        raise LoraError(
            f"{path!r} is a stack of {len(adapter.ratio)} adapters: add them up one by one, "
            "jax.vmap(lambda a: lora.combine([(a, 0.5)]))(adapters)."
        )
    if isinstance(adapter.ratio, jax.core.Tracer):
        return dataclasses.replace(adapter, ratio=adapter.scale * weight)
    scale = float(adapter.scale) * weight
    fits = abs(scale) <= float(jnp.finfo(jnp.float32).max)
    if not (fits and _is_finite(jnp.asarray(adapter.b) * scale)):
        raise LoraError(
            f"{path!r} with the weight {weight} has numbers that {adapter.b.dtype.name} cannot hold: the scale is "
            f"{scale:.3g}. Give a smaller weight, or adapters of a wider dtype."
        )
    return dataclasses.replace(adapter, ratio=scale)


def _is_finite(array: Any) -> bool:
    """Return whether all numbers are finite; of traced arrays, which have none yet, True."""
    return isinstance(array, jax.core.Tracer) or bool(jnp.isfinite(array).all())


def _sum(path: str, adapters: Sequence[LoraAdapter]) -> LoraAdapter:
    first = adapters[0]
    if len(adapters) == 1:
        return first
    n = len(first.axes.stack)
    turned = [_like(path, first, adapter) for adapter in adapters]
    a = jnp.concatenate([adapter.a for adapter in turned], axis=-1)
    b = jnp.concatenate([adapter.b * jnp.asarray(adapter.scale, adapter.b.dtype) for adapter in turned], axis=n)
    return LoraAdapter(a, b, first.axes, 1.0)


def _like(path: str, first: LoraAdapter, other: LoraAdapter) -> LoraAdapter:
    """Return an adapter with the axes of the first one."""
    for candidate in (other, other.transpose()):
        if candidate.axes == first.axes and _sizes(candidate) == _sizes(first):
            return candidate
    raise LoraError(
        f"{path!r} has adapters for different weights: {first.axes} with A {list(first.a.shape)} and B "
        f"{list(first.b.shape)}, and {other.axes} with {list(other.a.shape)} and {list(other.b.shape)}."
    )


def _sizes(adapter: LoraAdapter) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n = len(adapter.axes.stack)
    return adapter.a.shape[:-1], adapter.b.shape[:n] + adapter.b.shape[n + 1 :]
