"""From modules to adapters: parts of a module's outputs, stacks of layers, and the fields of the adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.scaled import OF_RATIO
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.core.layout import Layout
from lora_jax.interop.entries import Entry
from lora_jax.interop.key_map import Array, ParameterMatch, output_offsets, parts_by_tensor
from lora_jax.interop.name_templates import literal
from lora_jax.interop.peft.dtypes import widest
from lora_jax.interop.peft.experts import names_in_files
from lora_jax.interop.peft.formats.format import Arrays, Config, Format, Module

Index = tuple[int, ...]  # of a module, along the unstacked axes of its parameter


def adapters_of(
    matches: Mapping[str, ParameterMatch], modules: Mapping[str, Module], config: Config, shared: Mapping[str, Any]
) -> dict[str, Adapter]:
    """Return the adapters of those parameters that have modules among these.

    Args:
        shared: the facts that all adapters of the folder have in common.

    Raises:
        LoraError: shapes or ranks do not fit; a parameter is a part of a module whose other parts are not known.
    """
    files = names_in_files(matches, config.target_parameters)
    parts, offsets = parts_by_tensor(matches), output_offsets(matches)
    adapters: dict[str, Adapter] = {}
    for path, match in matches.items():
        found: dict[Index, Module] = {}
        for index, name in match.names.items() if match.entry.kind != "array" else ():
            module = modules.get(files.get(name, name))
            if module is not None:
                if match.entry.part is not None:
                    _check_parts(match, parts[match.tensors()[index]], config.format.outputs_of(module.arrays))
                ours = config.format.from_torch(match, module.arrays, offsets[path])
                _check_rank(match, name, config.format.rank_of(module.arrays), config)
                found[index] = Module(ours, module.scale)
        if found:
            adapters[path] = _adapter(match, found, config, shared)
    return adapters


def named_module(
    format: Format, name: str, kind: str, arrays: Arrays, experts: int | None = None
) -> tuple[Entry, tuple[int, ...]]:
    """Return the entry of a key map from a module's name to itself, and the shape that its weight has here.

    Args:
        kind: of the module, a key of MODULE_KINDS.
        experts: how many, of a module that is experts in one parameter.
    """
    sizes = (format.inputs_of(arrays), format.outputs_of(arrays))
    if experts is not None:
        return Entry(literal(name), literal(name), "expert in out", kind), (experts, *sizes)
    window = next(iter(arrays.values())).shape[2:]
    axes = "window* in out" if kind == "conv" else "in out"
    return Entry(literal(name), literal(name), axes, kind), (*window, *sizes)


def module_names(matches: Mapping[str, ParameterMatch], config: Config) -> list[str]:
    """Return the names in the file of all modules that these parameters have."""
    files = names_in_files(matches, config.target_parameters)
    own = [name for match in matches.values() if match.entry.kind != "array" for name in match.names.values()]
    return [files.get(name, name) for name in own]


def _check_parts(match: ParameterMatch, parts: Sequence[ParameterMatch], outputs: int) -> None:
    """Raise unless all parts of a module are known: only then is it known which outputs are this parameter's."""
    total = sum(part.outputs for part in parts)
    if total != outputs or [p.entry.part for p in parts] != list(range(len(parts))):
        known = ", ".join(f"{part.path!r} ({part.outputs})" for part in parts)
        raise LoraError(
            f"{match.path!r} is part {match.entry.part} of a module with {outputs} outputs, of which these are "
            f"known: {known}. Give all parameters, not only a plan, and a key map with all parts."
        )


def _check_rank(match: ParameterMatch, name: str, rank: int | None, config: Config) -> None:
    """Raise if a module has another rank than the config says."""
    name = name.rpartition(".")[0] if match.entry.is_of_experts else name
    if config.says_ranks and rank is not None and rank // match.experts != config.rank_of(name):
        raise LoraError(
            f"{short(name)} has rank {rank // match.experts}, by the config {config.rank_of(name)}: the two files do "
            "not belong together."
        )


def _adapter(
    match: ParameterMatch, found: Mapping[Index, Module], config: Config, shared: Mapping[str, Any]
) -> Adapter:
    """Return the adapter of one parameter from its modules; modules of a stack that have no adapter do not change."""
    format = config.format
    if why := format.problem_of_layers(match, len(found)):
        raise _stacked_layers(match, why)
    scales = list(dict.fromkeys(module.scale for module in found.values()))
    scale = scales[0] if len(scales) == 1 else 1.0
    parts = {index: format.rescaled(module, scale).arrays for index, module in found.items()}
    arrays: dict[str, jax.Array | None] = {}
    for field, layout in format.layout.items():
        if layout == OF_RATIO:
            continue  # which the config says
        own = {index: part[field] for index, part in parts.items() if field in part}
        arrays[field] = jnp.asarray(_stack(match, own, layout, parts)) if own else None
    return format.build(match, arrays, scale, shared)


def _stack(match: ParameterMatch, found: Mapping[Index, Array], layout: Layout, parts: Mapping[Index, Arrays]) -> Array:
    """Stack one array of several modules along the parameter's own axes; modules that are not there have zeros."""
    experts = [axis for axis in match.axes.stack if axis not in match.unstacked]
    found = _padded(found, _rank_axis(layout, len(experts)))
    first = next(iter(found.values()))
    if len(found) < len(parts) or any(part.shape != first.shape for part in found.values()):
        raise _stacked_layers(match, "has layers with factors of different shapes")
    whole = np.zeros((*(match.shape[axis] for axis in match.unstacked), *first.shape), widest(found.values()))
    for index, part in found.items():
        whole[index] = part
    order = [[*match.unstacked, *experts].index(axis) for axis in match.axes.stack]
    return whole.transpose(*order, *range(len(order), whole.ndim))


def _stacked_layers(match: ParameterMatch, why: str) -> LoraError:
    return LoraError(f"{match.path!r} {why}: load into parameters in which layers are not stacked.")


def _rank_axis(layout: Layout, experts: int) -> int | None:
    """Return the axis of the rank in an array of a single module, which has so many axes of experts."""
    name = next((part for part in layout if part in ("rank", "r")), None)
    if name is None:
        return None
    return -1 if layout[-1] == name else experts


def _padded(parts: Mapping[Index, Array], rank_axis: int | None) -> dict[Index, Array]:
    """Pad all to the largest rank, and to 1 at least: AdaLoRA leaves nothing of some modules."""
    if rank_axis is None:
        return dict(parts)
    rank = max(1, *(array.shape[rank_axis] for array in parts.values()))
    sizes = {index: [(0, 0)] * array.ndim for index, array in parts.items()}
    for index, array in parts.items():
        sizes[index][rank_axis] = (0, rank - array.shape[rank_axis])
    return {index: np.pad(array, sizes[index]) for index, array in parts.items()}
