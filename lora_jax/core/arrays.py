"""Facts about arrays: how messages name them, on which devices they are, and in which dtype they are added up."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names, is_array


def describe(leaf: Any) -> str:
    """Return `float32[384, 8]`; for what is no array its type, and of plain values the value."""
    if is_array(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    plain = isinstance(leaf, bool | int | float | complex | str | bytes)  # others may print where they are in memory
    return f"{type(leaf).__name__}({leaf!r})" if plain else type(leaf).__name__


def is_key(array: Any) -> bool:
    """Return whether an array holds random keys of the new style, which are no numbers."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def placed(array: jax.Array, like: Any) -> jax.Array:
    """Return an array on the devices of another one, or of a packed weight; traced arrays stay as they are."""
    known = concrete(array) and all(map(concrete, jax.tree.leaves(like)))
    if not known or array.sharding == like.sharding:
        return array
    return jax.device_put(array, like.sharding)


def concrete(array: Any) -> bool:
    """Return whether this is an array with numbers in it, and not a traced one."""
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def refuse_spread(tree: Any) -> None:
    """Raise if an array is in parts on several hosts, of which this process has some.

    Gathering takes all processes, and saving or comparing is a matter of one: so one that does it waits for no other.
    """
    for name, leaf in zip(*flatten_with_names(tree)[:2], strict=True):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise LoraError(
                f"{name!r} is spread over several hosts, and what is saved or compared has to be whole in one: in "
                "all of them call jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))(tree) "
                "before, on the mesh of the arrays, and take what it returns."
            )


def accumulator(*dtypes: Any) -> Any:
    """Return fp32, or a wider dtype if one of these is. JAX does not promote floats of 8 bits; fp32 holds them."""
    with jax.numpy_dtype_promotion("standard"):  # it is asked for by name, also where the program's mode is strict
        return jnp.result_type(jnp.float32, *(dtype for dtype in dtypes if jnp.dtype(dtype).itemsize > 1))


def matmul_highest(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply matrices with products of full precision on every device, where the default may round to 16 bits."""
    return jnp.matmul(x, y, precision="highest")


def is_whole(*arrays: jax.Array) -> bool:
    """Return whether no compiler partitions arrays.

    Their types name the mesh that they are on. Where they name none they may still be placed by the caller's
    `in_shardings`, unless there is a single device.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    if any(set(mesh.manual_axes) != set(mesh.axis_names) for mesh in meshes):
        return False
    return any(mesh.axis_names for mesh in meshes) or jax.device_count() == 1


def is_on_one_device(*arrays: jax.Array) -> bool:
    """Return whether no compiler partitions arrays, as `is_whole`, or only for a mesh of one device."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    return is_whole(*arrays) or (bool(meshes) and all(mesh.axis_names and mesh.size == 1 for mesh in meshes))
