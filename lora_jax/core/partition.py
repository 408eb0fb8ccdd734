"""Partition specs: the mesh axes in their entries, and checks that a shape can be split by them."""

import math
from typing import Any

import jax
from jax import P
from jax.sharding import NamedSharding

from lora_jax.core.errors import LoraError

BATCH_AXES = ("data", "dp", "batch", "replica", "fsdp", "zero")  # mesh axes that usually split the batch


def names_of(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes in one entry of a partition spec.

    >>> names_of(None), names_of("data"), names_of(("data", "fsdp"))
    ((), ('data',), ('data', 'fsdp'))
    """
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def size_of(entry: Any, mesh: Any) -> int:
    """Return into how many parts an entry of a partition spec splits an axis."""
    return math.prod(mesh.shape[name] for name in names_of(entry))


def full_spec(path: str, spec: P, ndim: int, mesh: Any) -> P:
    """Return the spec with an entry for each of `ndim` axes.

    Raises:
        LoraError: it is no spec, has more entries, or names an axis that the mesh lacks.
    """
    if not isinstance(spec, P) or len(spec) > ndim:
        raise LoraError(f"the spec of {path!r} is {spec!r}, expected a PartitionSpec of at most {ndim} entries.")
    for name in (name for entry in spec for name in names_of(entry)):
        if name not in mesh.shape:
            raise LoraError(
                f"the spec of {path!r} is {spec}, but the mesh has no axis {name!r}, only {described_mesh(mesh)}. "
                "If it is a logical name, translate it first: flax.linen.logical_to_mesh(specs, rules)."
            )
    return P(*(entry or None for entry in spec), *[None] * (ndim - len(spec)))


def check_spec(path: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    """Check that a weight of this shape can have this sharding.

    Raises:
        LoraError: the spec has more entries than the weight has axes, or splits an axis unevenly.
    """
    spec = full_spec(path, sharding.spec, len(shape), sharding.mesh)
    check_divisible(f"{path!r} of shape {list(shape)}", shape, spec, sharding.mesh, "or leave it whole")


def check_divisible(what: str, shape: tuple[int, ...], spec: P, mesh: Any, otherwise: str) -> None:
    """Check that a full spec splits every axis evenly; `what` and `otherwise` are words for the message."""
    for axis, names in enumerate(spec):
        parts = size_of(names, mesh)
        if shape[axis] % parts:
            raise LoraError(
                f"{what}: axis {axis} of size {shape[axis]} cannot be split evenly over the mesh axes "
                f"{quoted_names(names)} of size {parts}. Split another axis of it, {otherwise}."
            )


def quoted_names(entry: Any) -> str:
    """Return the mesh axes in one entry, quoted, for messages."""
    return ", ".join(map(repr, names_of(entry)))


def device_ids(mesh: Any) -> Any:
    """Return the ids of a mesh's devices in its order; of an abstract mesh, none."""
    return () if isinstance(mesh, jax.sharding.AbstractMesh) else tuple(d.id for d in mesh.devices.flat)


def described_mesh(mesh: Any) -> str:
    """Return the sizes and devices of a mesh, for messages."""
    devices = device_ids(mesh)
    return f"{dict(mesh.shape)} of devices {list(devices)}" if devices else str(dict(mesh.shape))
