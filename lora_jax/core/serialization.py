"""The library's pytree nodes as arguments of programs that `jax.export` writes to disk.

The structure of a program's arguments is written with it, and of each node its static facts: here as JSON, under a name
that has to stay the same for as long as there are such files.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.flax_states import register_with_flax
from lora_jax.core.layout import field_names

N = TypeVar("N", bound=type)

_nodes: dict[str, type] = {}  # by the names that exported programs know them under


def register_node(name: str) -> Callable[[N], N]:
    """Make a dataclass of arrays and static facts a pytree node, which is written under this name.

    Of a class that is defined again, as in a notebook, programs are written with the first definition alone.
    """

    def register(cls: N) -> N:
        jax.tree_util.register_dataclass(cls)
        if name not in _nodes:
            export.register_pytree_node_serialization(
                cls,
                serialized_name=name,
                serialize_auxdata=lambda facts: _serialized(cls, facts),
                deserialize_auxdata=lambda data: _deserialized(cls, data),
            )
            _nodes[name] = cls
        register_with_flax(cls)
        return cls

    return register


def _serialized(cls: type, facts: Sequence[Any]) -> bytes:
    try:
        named = {name: _encoded(fact) for name, fact in zip(field_names(cls, static=True), facts, strict=True)}
    except TypeError as error:
        raise LoraError(
            f"{cls.__name__} has a static field that is no JSON, {error}: keep numbers, strings and tuples of them."
        ) from error
    return json.dumps(named).encode()


def _deserialized(cls: type, data: bytes) -> tuple[Any, ...]:
    named, expected = json.loads(data), field_names(cls, static=True)
    if sorted(named) != sorted(expected):
        raise LoraError(
            f"the exported program takes a {cls.__name__} with the static fields {sorted(named)}, and here it has "
            f"{sorted(expected)}: it is of another version of lora_jax. Export it again with this one."
        )
    return tuple(_decoded(named[name]) for name in expected)


def _encoded(fact: Any) -> Any:
    if isinstance(fact, KernelAxes):
        return {"axes": fact}
    if isinstance(fact, tuple | list):
        return [_encoded(part) for part in fact]
    if isinstance(fact, NamedSharding):
        return {"sharding": _encoded_sharding(fact)}
    if isinstance(fact, np.generic):
        fact = fact.item()
    if fact is None or isinstance(fact, bool | int | float | str):
        return fact
    if isinstance(fact, np.dtype) or hasattr(fact, "dtype"):
        return {"dtype": str(jnp.dtype(fact))}
    raise TypeError(f"a {type(fact).__name__}")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_decoded, value))
    if not isinstance(value, Mapping):
        return value
    [(kind, content)] = value.items()
    if kind == "axes":
        return KernelAxes(*map(tuple, content))
    return jnp.dtype(content) if kind == "dtype" else _decoded_sharding(content)


def _encoded_sharding(sharding: NamedSharding) -> Any:
    mesh = sharding.mesh
    types = [kind.name for kind in mesh.axis_types]
    devices = [device.id for device in mesh.devices.flat]
    return {"axes": list(mesh.shape.items()), "types": types, "devices": devices, "spec": list(sharding.spec)}


def _decoded_sharding(content: Any) -> NamedSharding:
    """Return a sharding over the devices of the same numbers."""
    here, (names, sizes) = {device.id: device for device in jax.devices()}, zip(*content["axes"], strict=True)
    if missing := [number for number in content["devices"] if number not in here]:
        raise LoraError(
            f"the exported program takes packed weights on a mesh with the device {missing[0]}, and here are "
            f"{len(here)} devices: call it on as many as it was exported for."
        )
    devices = np.array([here[number] for number in content["devices"]]).reshape(sizes)
    mesh = Mesh(devices, names, axis_types=tuple(AxisType[name] for name in content["types"]))
    return NamedSharding(mesh, jax.P(*(tuple(e) if isinstance(e, list) else e for e in content["spec"])))
