"""Dtypes of what files hold: adapters are trained in fp32, and many are saved in bf16 or fp16."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.arrays import accumulator
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array


def widened(array: Array) -> Array:
    """Return an array of a thin dtype in fp32, which holds all of its values, and others as they are."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def in_fp32(tree: Any) -> Any:
    """Return the same adapters and arrays with numbers of fp32 or wider."""
    return jax.tree.map(lambda array: array.astype(accumulator(array.dtype)), tree)


def times(array: Array, factor: float) -> Array:
    """Return the product in the array's dtype, computed in fp32 or better and rounded once."""
    wide = widened(array)
    return (wide * np.asarray(factor, wide.dtype)).astype(array.dtype, copy=False)


def divided(array: Array, divisor: float) -> Array:
    """Return the quotient, as `times` returns the product."""
    wide = widened(array)
    return (wide / np.asarray(divisor, wide.dtype)).astype(array.dtype, copy=False)


def widest(arrays: Iterable[Array]) -> Any:
    """Return the dtype that holds the values of all arrays."""
    return jnp.result_type(*(array.dtype for array in arrays))


def cast(tensors: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
    """Return tensors in a dtype, or as they are for None.

    Raises:
        LoraError: a number is beyond the dtype.
    """
    if dtype is None:
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        with np.errstate(over="ignore"):
            found[name] = tensor.astype(dtype)
        if np.isfinite(tensor).all() and not np.isfinite(found[name]).all():
            raise LoraError(f"{name!r} holds numbers beyond {np.dtype(dtype).name}: save it in a wider dtype.")
    return found


def common_dtype(arrays: Iterable[Array]) -> np.dtype[Any]:
    """Return the dtype of all arrays, or one that holds the values of each."""
    found = [*dict.fromkeys(array.dtype for array in arrays)]
    if len(found) == 1:
        return found[0]
    return np.dtype(np.float64 if any(dtype.itemsize > 4 for dtype in found) else np.float32)
