"""Packed weights on a mesh: sharded as the weights that they stand for, and gathered in packed form."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.bases.change import Change, change
from lora_jax.bases.format import Format
from lora_jax.core.aliases import same
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, is_packed, move
from lora_jax.core.partition import BATCH_AXES, check_spec
from lora_jax.core.paths import flatten_with_names


def place(params: Any, shardings: Any, *, batch_axes: Sequence[str] = BATCH_AXES) -> Any:
    """Move parameters to a mesh, packed weights among them, as `jax.device_put` does for arrays.

    The packed arrays are split as the weight would be, as far as no block of a format is cut. Over mesh axes that also
    split the batch (fsdp), they are gathered when the weight is used: what is sent is packed. `quantize` does all this
    for weights that are on a mesh.

    Args:
        params: a tree of arrays and packed weights, or of their shapes, which then say where they would be.
        shardings: a `NamedSharding` for each parameter, as for a base of arrays.
        batch_axes: the names of the mesh axes that split the batch.

    Returns:
        The same tree on the mesh.

    Raises:
        LoraError: the trees have different paths; a packed weight has no `NamedSharding`, or one that splits an axis
            unevenly or does not fit its shape.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> mesh = jax.make_mesh((1,), ("tp",))
    >>> base = lora.bases.quantize({"w": jnp.ones((64, 4))}, {"w": lora.bases.Nf4()})
    >>> placed = lora.bases.place(base, {"w": jax.NamedSharding(mesh, jax.P(None, "tp"))})
    >>> placed["w"].codes.sharding.spec == jax.P(None, "tp")
    True
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
    moved: dict[Any, Any] = {}  # two leaves that are one array stay one
    keys = [(same(leaf), where[name]) for name, leaf in zip(names, leaves, strict=True)]
    for key, leaf in zip(keys, leaves, strict=True):
        if key not in moved:
            moved[key] = leaf.placed(key[1], batch_axes) if is_packed(leaf) else move(leaf, key[1])
    return treedef.unflatten([moved[key] for key in keys])


def pack_there(format: Format, w: Any, stack: int, dtype: Any) -> tuple[Packed, Change | None]:
    """Pack an array, shard the packed weight as the array is sharded, and measure how much that changes it."""
    sharding = None if isinstance(w, jax.core.Tracer) else w.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        packed = format.pack(w, stack, dtype)
        return packed, change(w, packed)
    if AxisType.Explicit not in sharding.mesh.axis_types:
        packed = format.pack(w, stack, dtype).placed(sharding, BATCH_AXES)
        return packed, change(w, packed)
    auto = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)  # formats state no shardings of what they compute
    with jax.set_mesh(auto):
        there = NamedSharding(auto, sharding.spec)
        w = jax.device_put(w, there)
        packed = format.pack(w, stack, dtype).placed(there, BATCH_AXES)
        changed = change(w, packed)
    return packed.placed(sharding, BATCH_AXES), changed
