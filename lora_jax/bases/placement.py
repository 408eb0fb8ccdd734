"""Packed weights over a mesh: split as the weights that they stand for, and gathered packed."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.bases.format import Format
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, is_packed
from lora_jax.core.partition import BATCH_AXES, check_spec
from lora_jax.core.paths import flatten_with_names


def place(params: Any, shardings: Any, *, batch_axes: Sequence[str] = BATCH_AXES) -> Any:
    """Parameters on a mesh, packed weights among them: `jax.device_put` that knows what is packed.

    Packed arrays are split where the weight is to be, as far as no block of a format is cut. The axes of the mesh that
    split the batch as well (fsdp) come together when the weight is used: what is sent is packed.
    `quantize` does this by itself to weights that are on a mesh.

    Args:
        shardings: a `NamedSharding` for each parameter, as of the dense ones.
        batch_axes: the names of the mesh axes that split the batch.

    Raises:
        LoraError: the trees have other paths; a packed weight has no `NamedSharding`, or one that cannot be its.
    """
    names, leaves, treedef = flatten_with_names(params)
    there, places, _ = flatten_with_names(shardings, is_leaf=lambda node: isinstance(node, jax.sharding.Sharding))
    if sorted(names) != sorted(there):
        path = next(path for path in (*names, *there) if path not in names or path not in there)
        raise LoraError(f"{path!r} is not in both trees: give a sharding for each parameter, as of the dense ones.")
    where = dict(zip(there, places, strict=True))
    for name, leaf in zip(names, leaves, strict=True):
        if is_packed(leaf):
            if not isinstance(where[name], NamedSharding):
                raise LoraError(f"the sharding of {name!r} is {where[name]!r}, expected a NamedSharding.")
            check_spec(name, leaf.shape, where[name])
    placed = [
        leaf.placed(where[name], batch_axes) if is_packed(leaf) else jax.device_put(leaf, where[name])
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return treedef.unflatten(placed)


def pack_there(format: Format, w: Any, stack: int, dtype: Any) -> Packed:
    """A packed weight where the array is that it is made of."""
    sharding = None if isinstance(w, jax.core.Tracer) else w.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return format.pack(w, stack, dtype)
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return format.pack(w, stack, dtype).placed(sharding, BATCH_AXES)
    auto = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)  # a format does not say what is where on the way
    with jax.set_mesh(auto):
        packed = format.pack(jax.device_put(w, NamedSharding(auto, sharding.spec)), stack, dtype)
    return packed.placed(sharding, BATCH_AXES)
