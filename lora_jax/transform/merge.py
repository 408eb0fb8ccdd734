"""Merge adapters into weights, so that they cost nothing at inference."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter
from lora_jax.core.adapter_checks import check_adapters
from lora_jax.core.arrays import accumulator, concrete, placed
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import as_given, is_packed, unpacked
from lora_jax.core.paths import flatten_with_names


def merge(params: Any, adapters: Mapping[str, Adapter], *, donate: bool = False) -> Any:
    """Return the parameters with W' in the place of each adapted W: same tree, dtypes and shardings.

    A packed weight that is adapted becomes an array; `lora.bases.merge` packs it again.
    Computed in fp32 (or better) and cast once to W's dtype. `params` are left as they are: keep them, and there is
    no need to ever take a merge back, which rounding makes inexact.

    Args:
        donate: each merged weight takes the memory of the weight itself, one after the other on its own devices: for
            models of which there is no room for two. The adapted leaves of `params` are gone afterwards.

    Raises:
        LoraError: an adapter has no weight, or does not fit it; `donate` of what is no array on a device.
    """
    names, leaves, treedef = flatten_with_names(params)
    check_adapters(adapters, names, leaves)
    change = _merge_in_place if donate else _merge
    for name, leaf in zip(names, leaves, strict=True):
        if donate and name in adapters and not concrete(leaf):
            raise LoraError(
                f"merge(donate=True) takes the memory of arrays on devices, but {name!r} is a {type(leaf).__name__}: "
                "leave donate out."
            )
    merged = [
        change(leaf, adapters[name]) if name in adapters else as_given(leaf)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, merged)


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
