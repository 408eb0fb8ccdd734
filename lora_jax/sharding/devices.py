"""The devices and meshes that arrays are on."""

from typing import Any

import jax
from jax.sharding import NamedSharding

from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.partition import device_ids
from lora_jax.core.paths import flatten_with_names


def on_mesh(tree: Any) -> Any:
    """Return the mesh of several devices that holds a tree's arrays; None if there is none."""
    for leaf in jax.tree.leaves(tree):
        sharding = sharding_of(leaf)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def check_together(trainable: Any, params: Any) -> None:
    """Check that what is trained and the base are on the same devices. Uncommitted arrays may be anywhere.

    Raises:
        LoraError: a weight of the base is on other devices; the message says how to move one of the two.
    """
    here = next(filter(None, map(_committed_to, jax.tree.leaves(trainable))), None)
    names, leaves, _ = flatten_with_names(params)
    for name, leaf in zip(names, leaves, strict=True):
        there = _committed_to(leaf)
        if here and there and here != there:
            raise LoraError(
                f"the base weight {name!r} is on the devices {list(there)}, but the adapters are on {list(here)}; "
                "bring them together: lora.init(key, params, plan) makes adapters where the base is, "
                "jax.device_put(adapters, lora.adapter_shardings(params, adapters)) moves them there."
            )


def _committed_to(leaf: Any) -> tuple[int, ...]:
    """Return the ids of the devices that an array is committed to, in the order of its mesh."""
    if is_packed(leaf):
        leaf = next(iter(leaf.arrays().values()))
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.committed:
        return ()
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        return device_ids(sharding.mesh)
    devices: Any = sharding.device_set
    return tuple(sorted(device.id for device in devices))


def sharding_of(place: Any) -> Any:
    """Return the sharding of an array, a packed weight or a sharding itself; None of tracers and all else."""
    if isinstance(place, jax.core.Tracer):
        return None
    return place if isinstance(place, jax.sharding.Sharding) else getattr(place, "sharding", None)
