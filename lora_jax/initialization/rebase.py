"""What the starts share: put factors into adapters, and subtract what they add from the base."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.bases.merge import repacked
from lora_jax.core.arrays import placed
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import as_given, is_packed, unpacked
from lora_jax.core.paths import flatten_with_names
from lora_jax.initialization.svd import Factors, to_fp32, to_matrices

Adapters = Mapping[str, LoraAdapter]


def rebase(
    params: Any,
    weights: Mapping[str, Any],
    adapters: Adapters,
    factors: Callable[[str, LoraAdapter, jax.Array], Factors],
) -> tuple[Any, dict[str, LoraAdapter]]:
    """Start every adapter with the factors for its weight, and subtract what they add from the weight.

    Args:
        params: the parameters.
        weights: `{path: W}` of the adapted weights, arrays or packed, as `check_weights` returns them.
        adapters: `{path: adapter}`, fresh.
        factors: called with a path, its adapter and W [n, d, k]; returns A [n, d, r] and B [n, r, k].

    Returns:
        The parameters with W - s A B for each adapted W, and the started adapters.
    """
    started: dict[str, LoraAdapter] = {}
    rest: dict[str, Any] = {}
    for path, adapter in adapters.items():
        weight = weights[path]
        w = unpacked(weight)
        started[path] = new = with_factors(path, adapter, *factors(path, adapter, to_matrices(w, adapter.axes)))
        without = subtract(w, new)
        if is_packed(weight):
            rest[path] = repacked(weight, check_overflow(path, without))
        else:
            rest[path] = placed(check_overflow(path, without.astype(w.dtype)), w)
    return with_weights(params, rest), started


def subtract(w: jax.Array, adapter: LoraAdapter) -> jax.Array:
    """Return W - s A B in fp32 or wider, with A and B as stored: what rounding them loses stays in the base."""
    return dataclasses.replace(adapter, ratio=-adapter.scale).merge(to_fp32(w))


def with_weights(params: Any, weights: Mapping[str, Any]) -> Any:
    """Return the parameters with the weights at these paths replaced."""
    names, leaves, treedef = flatten_with_names(params)
    return treedef.unflatten([as_given(weights.get(name, leaf)) for name, leaf in zip(names, leaves, strict=True)])


def with_factors(path: str, adapter: LoraAdapter, a: jax.Array, b: jax.Array) -> LoraAdapter:
    """Return the adapter with A [n, d, r] and B [n, r, k], in the shapes, dtypes and placement of its own factors.

    Its rank becomes r.
    """
    stack, inputs, outputs = adapter.axes.sizes(adapter.kernel_shape())
    rank = a.shape[-1]
    a = check_overflow(path, a.reshape(*stack, *inputs, rank).astype(adapter.a.dtype))
    b = check_overflow(path, b.reshape(*stack, rank, *outputs).astype(adapter.b.dtype))
    return dataclasses.replace(adapter, a=placed(a, adapter.a), b=placed(b, adapter.b))


def check_overflow(path: str, array: jax.Array) -> jax.Array:
    """Return an array that a start computed, if it is finite.

    Raises:
        LoraError: it is not.
    """
    if not jnp.isfinite(to_fp32(array)).all():
        raise LoraError(
            f"the start of {path!r} overflows {array.dtype}: what it is made of is too large, scale that down."
        )
    return array
