"""Packed weights over a mesh: split as the weights that they stand for, and gathered packed."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from lora_jax.errors import LoraError
from lora_jax.packed import is_packed
from lora_jax.paths import flatten_with_names
from lora_jax.sharding import BATCH_AXES, check_spec


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
    if names != there:
        path = next(path for path in (*names, *there) if path not in names or path not in there)
        raise LoraError(f"{path!r} is not in both trees: give a sharding for each parameter, as of the dense ones.")
    for name, leaf, where in zip(names, leaves, places, strict=True):
        if is_packed(leaf):
            if not isinstance(where, NamedSharding):
                raise LoraError(f"the sharding of {name!r} is {where!r}, expected a NamedSharding.")
            check_spec(name, leaf.shape, where)
    placed = [
        leaf.placed(where, batch_axes) if is_packed(leaf) else jax.device_put(leaf, where)
        for leaf, where in zip(leaves, places, strict=True)
    ]
    return treedef.unflatten(placed)


def placed_as(packed: Any, w: Any, batch_axes: Sequence[str] = BATCH_AXES) -> Any:
    """A packed weight where the array is that it was made of."""
    sharding = getattr(w, "sharding", None) if not isinstance(w, jax.core.Tracer) else None
    on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return packed.placed(sharding, batch_axes) if on_mesh else packed
