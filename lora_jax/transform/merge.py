"""Merge adapters into weights, so that they cost nothing at inference."""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter
from lora_jax.core.adapter_checks import check_adapters
from lora_jax.core.aliases import Uses, same
from lora_jax.core.arrays import accumulator, concrete, placed
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import as_given, is_packed, unpacked
from lora_jax.core.paths import flatten_with_names

Params = TypeVar("Params")


def merge(params: Params, adapters: Mapping[str, Adapter], *, donate: bool = False) -> Params:
    """Return the parameters with W' in the place of each adapted W: same tree, dtypes and shardings.

    A packed weight that is adapted becomes an array; `lora.bases.merge` packs it again.
    Computed in fp32 (or better) and cast once to W's dtype. `params` are left as they are: keep them, and there is
    no need to ever take a merge back, which rounding makes inexact. Two leaves that are one array, with adapters that
    are one too, are merged once and stay one array.

    Args:
        donate: each merged weight takes the memory of the weight itself, one after the other on its own devices: for
            models of which there is no room for two. The adapted leaves of `params` are gone afterwards, except where
            another leaf lies in the same memory and is still needed, as a tied weight of which one name is adapted.

    Raises:
        LoraError: an adapter has no weight, or does not fit it; `donate` of what is no array on a device.
    """
    names, leaves, treedef = flatten_with_names(params)
    check_adapters(adapters, names, leaves)
    for name, leaf in zip(names, leaves, strict=True):
        if donate and name in adapters and not concrete(leaf):
            raise LoraError(
                f"merge(donate=True) takes the memory of arrays on devices, but {name!r} is a {type(leaf).__name__}: "
                "leave donate out."
            )
    work = {
        name: (same(leaf), same(adapters[name])) for name, leaf in zip(names, leaves, strict=True) if name in adapters
    }
    uses = Uses(names, leaves, work, dict(adapters)) if donate else None
    done: dict[Any, jax.Array] = {}

    def merged(name: str, leaf: Any) -> Any:
        if name not in work:
            return as_given(leaf)
        if work[name] not in done:
            change = _merge_in_place if uses is not None and uses.last(leaf) else _merge
            done[work[name]] = change(leaf, adapters[name])
        return done[work[name]]

    return treedef.unflatten([merged(name, leaf) for name, leaf in zip(names, leaves, strict=True)])


def _merge(leaf: Any, adapter: Adapter) -> jax.Array:
    w = jnp.asarray(unpacked(leaf))  # numpy's float64 is JAX's default float, as it would be in the function itself
    return placed(_merged(w, adapter), leaf if is_packed(leaf) else w)


def _merged(w: jax.Array, adapter: Adapter) -> jax.Array:
    return adapter.merge(w.astype(accumulator(w.dtype))).astype(w.dtype)


def _merge_in_place(w: jax.Array, adapter: Adapter) -> jax.Array:
    return _in_place(w.sharding)(w, adapter)


@functools.cache
def _in_place(sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(_merged, donate_argnums=0, out_shardings=sharding)
