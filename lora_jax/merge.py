"""Adapters into weights: the end of training, at no cost at inference."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.base import Adapter
from lora_jax.lowrank import accumulator
from lora_jax.paths import flatten_with_names
from lora_jax.transform import check_adapters


def merge(params: Any, adapters: Mapping[str, Adapter]) -> Any:
    """W -> W' for each adapted weight: the same tree, dtypes and shardings, for the unchanged function.

    Computed in fp32 (or better) and cast once to W's dtype. `params` are left as they are: keep them, and there is
    no need to ever take a merge back, which rounding makes inexact.

    Raises:
        LoraError: an adapter has no weight, or does not fit it.
    """
    names, leaves, treedef = flatten_with_names(params)
    check_adapters(adapters, names, leaves)
    merged = [
        _merge(leaf, adapters[name]) if name in adapters else leaf for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, merged)


def _merge(leaf: Any, adapter: Adapter) -> jax.Array:
    w = jnp.asarray(leaf)  # numpy's float64 is JAX's default float, as it would be in the function itself
    merged = adapter.merge(w.astype(accumulator(w.dtype))).astype(w.dtype)
    if _concrete(w) and _concrete(merged) and merged.sharding != w.sharding:
        return jax.device_put(merged, w.sharding)
    return merged


def _concrete(array: jax.Array) -> bool:
    return not isinstance(array, jax.core.Tracer)
