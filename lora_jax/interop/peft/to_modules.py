"""From adapters to modules: the format that holds them all, and what each of torch's modules holds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import KeyMap, ParameterMatch, parts_by_tensor
from lora_jax.interop.peft.adapter_axes import with_axes
from lora_jax.interop.peft.formats.format import Arrays, Format, Module, Modules
from lora_jax.interop.peft.formats.registry import FORMATS, LORA
from lora_jax.interop.peft.module_parts import joined
from lora_jax.interop.peft.parameters import shapes_of


class TorchModules(NamedTuple):
    """What torch's modules hold of some adapters."""

    format: Format
    modules: Modules
    matches: dict[str, ParameterMatch]  # of each module one of the parameters that it is


def modules_to_save(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> TorchModules:
    """Return the modules in the format in which one folder can hold all of these adapters.

    Raises:
        LoraError: as `torch_modules`; some adapters are of a kind that is no LoRA, and others are of another kind or of
            modules that PEFT does not have it for.
    """
    found = torch_modules(adapters, key_map, params, _format_for(adapters, key_map))
    fitted = found.format.fit(found.modules)
    return torch_modules(adapters, key_map, params, LORA) if fitted is None else found._replace(modules=fitted)


def _format_for(adapters: Mapping[str, Adapter], key_map: KeyMap) -> Format:
    """Return the format that holds all of these as they are, or else LoRA's."""
    matches = key_map.match({path: _shape_of(path, adapter) for path, adapter in adapters.items()})
    for format in FORMATS.values():
        if format.holds(adapters, matches):
            return format
    for path, adapter in adapters.items():
        own = next((format for format in FORMATS.values() if isinstance(adapter, format.adapter)), None)
        if own is not None and not own.is_lora:
            other = next((path for path, other in adapters.items() if type(other) is not type(adapter)), None)
            raise LoraError(f"{path!r} {own.refusal(other)}.")
    return LORA


def torch_modules(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any, format: Format) -> TorchModules:
    """Return what each module holds in a format; LoRA's takes all kinds that are LoRA in another form.

    Raises:
        LoraError: an adapter that has no such form; a path that the key map lacks; a module with parameters that are
            not known, or, for DoRA, without the weights of those that have no adapter.
    """
    adapters = {path: _converted(path, adapter, format) for path, adapter in adapters.items()}
    matches = key_map.match({path: _shape_of(path, adapter) for path, adapter in adapters.items()})
    known = {} if params is None else key_map.match(shapes_of(params), strict=False)
    groups = parts_by_tensor(matches | known)
    parts: dict[str, dict[int, Module]] = {}
    first: dict[str, ParameterMatch] = {}
    for path, match in matches.items():
        adapter = with_axes(adapters[path], match.axes, path, "the key map")
        for name, arrays in _adapted(format, _arrays_of_modules(format, match, adapter)).items():
            module = Module(arrays, float(getattr(adapter, "scale", 1.0)))
            parts.setdefault(name, {})[match.entry.part or 0] = module
            first.setdefault(name, match)
    modules = {}
    for name, found in parts.items():
        entry = first[name].entry
        is_whole = entry.part is None
        modules[name] = found[0] if is_whole else joined(format, name, found, groups[name + entry.suffix], params)
    return TorchModules(format, modules, first)


def _converted(path: str, adapter: Any, format: Format) -> Adapter:
    found = format.convert(adapter) if isinstance(adapter, Adapter) else None
    if found is None:
        raise LoraError(
            f"{path!r} is a {type(adapter).__name__}; this version writes what is W + s A B: merge it instead."
        )
    return found


def _shape_of(path: str, adapter: Any) -> tuple[int, ...]:
    """Return the shape of an adapter's weight."""
    if not isinstance(adapter, Adapter):
        raise LoraError(f"{path!r} is a {type(adapter).__name__}, expected an adapter as lora.init makes it.")
    try:
        return adapter.kernel_shape()
    except LoraError as error:
        raise LoraError(f"the adapter for {path!r} {error}") from None


def _arrays_of_modules(format: Format, match: ParameterMatch, adapter: Adapter) -> dict[str, Arrays]:
    """Return the arrays of each module of a parameter, in torch's layout."""
    own = {field: array for field, array in adapter.arrays().items() if field in format.endings}
    ours = {field: np.asarray(array) for field, array in jax.device_get(own).items()}
    modules = {}
    for index, name in match.names.items():
        where = tuple(match.where(index)[axis] for axis in match.axes.stack)
        modules[name] = format.to_torch(match, {field: array[where] for field, array in ours.items()})
    return modules


def _adapted(format: Format, modules: dict[str, Arrays]) -> dict[str, Arrays]:
    """Return the modules whose arrays are not all zero, or all: the others are layers of a stack without adapters."""
    if not format.zeros_change_nothing:
        return modules
    changed = {name: arrays for name, arrays in modules.items() if any(array.any() for array in arrays.values())}
    return changed or modules
