"""The library's pytree nodes in files of `flax.serialization`, which nobody has to import for that.

Flax writes arrays alone, and takes the static facts of a node from the target that it restores into.
"""

import dataclasses
import importlib.abc
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.arrays import is_key
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import field_names

MODULE = "flax.serialization"

_waiting: list[type] = []  # for it to be imported


def register_with_flax(cls: type) -> None:
    """Let `flax.serialization` write and restore a dataclass, once it is imported."""
    if MODULE in sys.modules:
        _register(cls, sys.modules[MODULE])
    else:
        _waiting.append(cls)


class _OnceImported(importlib.abc.MetaPathFinder):
    """Registers what waits when somebody imports the module: to import Flax here would take everybody seconds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            for cls in _waiting:
                _register(cls, module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if MODULE not in sys.modules:
    sys.meta_path.insert(0, _OnceImported())


def _register(cls: type, serialization: Any) -> None:
    names = field_names(cls, static=False)

    def to_state(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(_as_numbers(getattr(node, name))) for name in names}

    def from_state(node: Any, state: Mapping[str, Any]) -> Any:
        if sorted(state) != sorted(names):
            raise LoraError(
                f"the state of a {cls.__name__} has the fields {sorted(state)}, expected {sorted(names)}: restore it "
                "into a target as it was when it was written."
            )
        fields = {name: _restored(serialization, getattr(node, name), state[name], name) for name in names}
        return dataclasses.replace(node, **fields)

    serialization.register_serialization_state(cls, to_state, from_state, override=True)


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and is_key(value)


def _as_numbers(value: Any) -> Any:
    """Return a random key as its numbers, which files can hold, and all else as it is."""
    return jax.random.key_data(value) if _is_key(value) else value


def _restored(serialization: Any, target: Any, state: Any, name: str) -> Any:
    if _is_key(target):
        return jax.random.wrap_key_data(jnp.asarray(state), impl=jax.random.key_impl(target))
    return serialization.from_state_dict(target, state, name=name)
