"""Partition specs: their entries, and whether a shape can be split so."""

import math
from typing import Any

import jax
from jax import P
from jax.sharding import NamedSharding

from lora_jax.core.errors import LoraError

BATCH_AXES = ("data", "dp", "batch", "replica", "fsdp", "zero")  # mesh axes that usually split the batch


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a partition spec.

    >>> names_of(None), names_of("data"), names_of(("data", "fsdp"))
    ((), ('data',), ('data', 'fsdp'))
    """
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def size_of(entry: Any, mesh: Any) -> int:
    """Into how many parts an entry of a partition spec splits an axis."""
    return math.prod(mesh.shape[name] for name in names_of(entry))


def full_spec(path: str, spec: P, ndim: int, mesh: Any) -> P:
    """A spec with an entry for every axis, each a tuple of names or None, all of them names of the mesh."""
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
    """A weight can be split so.

    Raises:
        LoraError: more entries than axes; an axis that is split unevenly.
    """
    spec = full_spec(path, sharding.spec, len(shape), sharding.mesh)
    check_divisible(f"{path!r} of shape {list(shape)}", shape, spec, sharding.mesh, "or leave it whole")


def check_divisible(what: str, shape: tuple[int, ...], spec: P, mesh: Any, otherwise: str) -> None:
    for axis, names in enumerate(spec):
        parts = size_of(names, mesh)
        if shape[axis] % parts:
            raise LoraError(
                f"{what}: axis {axis} of size {shape[axis]} cannot be split evenly over the mesh axes "
                f"{quoted_names(names)} of size {parts}. Split another axis of it, {otherwise}."
            )


def quoted_names(entry: Any) -> str:
    return ", ".join(map(repr, names_of(entry)))


def device_ids(mesh: Any) -> Any:
    return () if isinstance(mesh, jax.sharding.AbstractMesh) else tuple(d.id for d in mesh.devices.flat)


def described_mesh(mesh: Any) -> str:
    devices = device_ids(mesh)
    return f"{dict(mesh.shape)} of devices {list(devices)}" if devices else str(dict(mesh.shape))
