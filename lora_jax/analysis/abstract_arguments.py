"""The arguments of a program that is compiled for another machine: checks, and their bytes on one device by part."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_jax.analysis.topologies import Topology
from lora_jax.core.adapter import is_adapter
from lora_jax.core.arrays import is_key
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import bits
from lora_jax.core.partition import described_mesh
from lora_jax.training.state import TrainState

PARTS = ("base", "adapters", "optimizer", "other arguments")


def check_arguments(args: tuple[Any, ...], machine: Topology) -> None:
    """Check that all arguments are shapes on a mesh of this machine.

    Raises:
        LoraError: one has no sharding, is an array on real devices, or on a mesh of other devices.
    """
    slices = f"slices={machine.slices}, " if machine.slices > 1 else ""
    mend = f'lora.abstract(tree, lora.topology_mesh("{machine.name}", {slices}...), specs) makes shapes that are on it'
    devices = dict.fromkeys(machine.devices)
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        name = _named(path)
        if isinstance(leaf, bool | int | float | complex) or (isinstance(leaf, np.generic) and not leaf.ndim):
            continue
        if isinstance(leaf, jax.Array):
            where = sorted(leaf.devices(), key=lambda device: device.id)[0]
            raise LoraError(
                f"{name} is an array on {where.platform} devices, not a shape on a mesh of {machine}: {mend}."
            )
        sharding = getattr(leaf, "sharding", None)
        if isinstance(leaf, str) or callable(leaf):
            raise LoraError(f"{name} is {leaf!r}, and no array: give what is static by its name, mode='train'.")
        if sharding is None:
            raise LoraError(f"{name} is a {type(leaf).__name__} without a sharding: {mend}.")
        if not isinstance(sharding, NamedSharding):
            raise LoraError(f"the sharding of {name} is {sharding!r}, expected a NamedSharding: {mend}.")
        found = sharding.mesh.devices.flat if isinstance(sharding.mesh, jax.sharding.Mesh) else ()
        there = dict.fromkeys(found)
        if there.keys() != devices.keys():
            kind = next((device.device_kind for device in there), "no devices")
            raise LoraError(
                f"{name} is on the mesh {dict(sharding.mesh.shape)} of {len(there)} x {kind}, which is not one of all "
                f"{len(devices)} devices of {machine}: {mend}."
                if isinstance(sharding.mesh, jax.sharding.Mesh)
                else f"{name} is on the abstract mesh {described_mesh(sharding.mesh)}: {mend}."
            )


def argument_bytes(args: tuple[Any, ...]) -> dict[str, int]:
    """Return the bytes of the arguments on one device, without padding, by part.

    The largest tree beside states and adapters is the base; a single array is none.
    """
    found = dict.fromkeys(PARTS, 0)
    others: list[tuple[int, bool]] = []  # bytes, and whether it is a tree
    for part, tree in _parts(args):
        n = sum(map(_on_one_device, jax.tree.leaves(tree)))
        if part:
            found[part] += n
        else:
            others.append((n, not jax.tree_util.all_leaves([tree])))
    trees = [n for n, is_tree in others if is_tree]
    found["base"] = max(trees, default=0)
    found["other arguments"] += sum(n for n, _ in others) - found["base"]
    return found


def _parts(args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the part of a program that each tree is, as far as its types say it, and the tree."""
    for arg in args:
        if isinstance(arg, TrainState):
            yield "adapters", arg.trainable
            yield "optimizer", arg.opt_state
            yield "other arguments", (arg.step, arg.skipped, arg.key, arg.loss_scale, arg.model_state)
            continue
        nodes = jax.tree.leaves(arg, is_leaf=is_adapter)
        adapters = [node for node in nodes if is_adapter(node)]
        is_moments = isinstance(arg, tuple) and any(hasattr(node, "_fields") for node in (arg, *arg))
        if is_moments:
            yield "optimizer", arg
        elif adapters:
            yield "adapters", adapters
            yield "other arguments", [node for node in nodes if not is_adapter(node)]
        else:
            yield "", arg


def _on_one_device(leaf: Any) -> int:
    shape = getattr(leaf, "shape", ())
    sharding = getattr(leaf, "sharding", None)
    if str(getattr(sharding, "memory_kind", "")).endswith("_host"):
        return 0  # in the memory of its host
    own = sharding.shard_shape(shape) if sharding is not None else shape
    return -(-int(np.prod(own)) * _bits(leaf) // 8)


def _bits(leaf: Any) -> int:
    if not hasattr(leaf, "dtype"):
        return bits(jnp.result_type(leaf))
    return 64 if is_key(leaf) else bits(leaf.dtype)


def _named(path: tuple[Any, ...]) -> str:
    """Return the argument and the path in it, as a message names them."""
    first, *rest = path
    inside = jax.tree_util.keystr(tuple(rest), simple=True, separator="/")
    return f"argument {first.idx + 1}" + (f", {inside!r}," if inside else "")
