"""Small facts about arrays: how to name them in messages, where they are, and the dtype to add them up in."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.paths import is_array


def describe(leaf: Any) -> str:
    """`float32[384, 8]`; for what is no array, its type and, of plain values, the value."""
    if is_array(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    plain = isinstance(leaf, bool | int | float | complex | str | bytes)  # others may print where they are in memory
    return f"{type(leaf).__name__}({leaf!r})" if plain else type(leaf).__name__


def describe_shape(array: Any) -> str:
    """`float32[384, 8]`: one JSON leaf."""
    return f"{array.dtype}{list(array.shape)}"


def placed(array: jax.Array, like: Any) -> jax.Array:
    """An array where another one is, or a packed weight, as far as that is known: of traced ones it is not."""
    known = concrete(array) and all(map(concrete, jax.tree.leaves(like)))
    if not known or array.sharding == like.sharding:
        return array
    return jax.device_put(array, like.sharding)


def concrete(array: Any) -> bool:
    """Whether it is an array that is somewhere."""
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def accumulator(*dtypes: Any) -> Any:
    """fp32, or what is wider if a dtype is. Floats of 8 bits promote to nothing by themselves; fp32 holds them."""
    return jnp.result_type(jnp.float32, *(dtype for dtype in dtypes if jnp.dtype(dtype).itemsize > 1))


def matmul_highest(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply matrices with products of full precision on every device, where the default may round to 16 bits."""
    return jnp.matmul(x, y, precision="highest")
