"""Adapters from what torch's modules hold: heads apart, layers stacked, several parameters in one module."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError, short
from lora_jax.core.layout import field_names
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.targets import Plan
from lora_jax.interop.key_map import Array, Placed, groups_of, starts_of
from lora_jax.interop.peft.config_read import Config
from lora_jax.interop.peft.formats import KINDS, Module, from_torch, outputs_of, rank_of, ranks_along


def shapes_of(plan_or_params: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(plan_or_params, Plan):
        return {path: target.shape for path, target in plan_or_params.items()}
    names, leaves, _ = flatten_with_names(plan_or_params)
    return {name: tuple(leaf.shape) for name, leaf in zip(names, leaves, strict=True) if hasattr(leaf, "shape")}


def adapters_of(
    placed: Mapping[str, Placed],
    modules: Mapping[str, Module],
    config: Config,
    widths: tuple[int, int] | None = None,
) -> tuple[dict[str, Adapter], dict[str, None]]:
    """The adapters of those parameters whose modules have some; and the names of these."""
    files = names_in_files(placed, config.target_parameters)
    groups, starts = groups_of(placed), starts_of(placed)
    adapters: dict[str, Adapter] = {}
    used: dict[str, None] = {}
    for path, place in placed.items():
        found = {}
        for index, name in place.names.items():
            file = files.get(name, name)
            if place.entry.kind != "array" and file in modules:
                arrays, scale = modules[file]
                _check_parts(place, groups[place.tensors()[index]], outputs_of(config.kind, arrays))
                ours = from_torch(config.kind, place, arrays, starts[path])
                _check_rank(place, name, rank_of(config.kind, arrays), config)
                found[index] = Module(ours, scale)
                used[file] = None
        if found:
            adapters[path] = _adapter(place, found, config, widths)
    return adapters, used


def _check_rank(place: Placed, name: str, rank: int | None, config: Config) -> None:
    name = name.rpartition(".")[0] if place.entry.is_of_experts else name
    if rank is not None and rank // place.experts != config.rank_of(name):
        raise LoraError(
            f"{short(name)} has rank {rank // place.experts}, by the config {config.rank_of(name)}: the two files do "
            "not belong together."
        )


def _adapter(
    place: Placed, found: Mapping[tuple[int, ...], Module], config: Config, widths: tuple[int, int] | None
) -> Adapter:
    """The adapter of one parameter, from the modules that it is in; those that have none do not change."""
    kind = KINDS[config.kind]
    if config.kind == "DORA" and len(found) < len(place.names):
        raise LoraError(
            f"{place.path!r} has layers with DoRA and layers without, which have no magnitudes: load into parameters "
            "in which layers are not stacked."
        )
    scales = list(dict.fromkeys(module.scale for module in found.values()))
    scale = scales[0] if len(scales) == 1 else 1.0
    parts = {index: module.folded(kind, scale).arrays for index, module in found.items()}
    arrays: dict[str, jax.Array | None] = {}
    for field, layout in kind.adapter.layout.items():
        rank_axis = ranks_along(layout, len(place.axes.stack) - len(place.unstacked))
        ours = {index: part[field] for index, part in parts.items() if field in part}
        arrays[field] = jnp.asarray(_stacked(place, _padded(ours, rank_axis), len(parts))) if ours else None
    words, sizes = place.inner()
    inputs, outputs = (tuple(n for w, n in zip(words, sizes, strict=True) if w == group) for group in ("in", "out"))
    facts = {"axes": place.axes, "scale": scale, "inputs": inputs, "outputs": outputs}
    facts |= {"seed": config.seed, "widths": widths}
    return kind.adapter(**arrays, **{name: facts[name] for name in field_names(kind.adapter, static=True)})


def _padded(parts: Mapping[tuple[int, ...], Array], axis: int | None) -> dict[tuple[int, ...], Array]:
    """All with the largest rank, and one of at least 1: AdaLoRA leaves nothing of some modules."""
    if axis is None:
        return dict(parts)
    rank = max(1, *(array.shape[axis] for array in parts.values()))
    sizes = {i: [(0, 0)] * array.ndim for i, array in parts.items()}
    for i, array in parts.items():
        sizes[i][axis] = (0, rank - array.shape[axis])
    return {i: np.pad(array, sizes[i]) for i, array in parts.items()}


def _stacked(place: Placed, parts: Mapping[tuple[int, ...], Array], count: int) -> Array:
    """The arrays of single modules in one, along the parameter's own axes of the stack; zeros for the others."""
    stacks = tuple(place.shape[i] for i in place.unstacked)
    first = next(iter(parts.values()))
    if len(parts) < count or any(part.shape != first.shape for part in parts.values()):
        raise LoraError(
            f"{place.path!r} has layers with factors of different shapes: load into parameters in which layers are not "
            "stacked."
        )
    whole = np.zeros((*stacks, *first.shape), first.dtype)
    for index, part in parts.items():
        whole[index] = part
    experts = [axis for axis in place.axes.stack if axis not in place.unstacked]
    order = [[*place.unstacked, *experts].index(axis) for axis in place.axes.stack]
    return whole.transpose(*order, *range(len(order), whole.ndim))


def names_in_files(placed: Mapping[str, Placed], targets: Sequence[str]) -> dict[str, str]:
    """What PEFT calls the factors of experts: the module, with `.base_layer` for each later parameter beside it.

    Its wrappers are nested, the first parameter innermost, and their names do not tell which one they are of: the order
    of the entries in the key map does.
    """
    modules: dict[str, dict[str, None]] = {}
    for place in sorted(placed.values(), key=lambda place: place.order):
        for name in place.names.values() if place.entry.is_of_experts else ():
            if any(name == target or name.endswith(f".{target}") for target in targets):
                modules.setdefault(name.rpartition(".")[0], {})[name] = None
    return {
        name: module + ".base_layer" * (len(names) - 1 - i)
        for module, names in modules.items()
        for i, name in enumerate(names)
    }


def biases_of(placed: Mapping[str, Placed], added: Mapping[str, Array]) -> tuple[dict[str, Adapter], dict[str, None]]:
    """What is added to biases, as adapters of these; and the names of these."""
    found, taken = _collected(placed, added)
    adapters: dict[str, Adapter] = {}
    for path, parts in found.items():
        delta = np.zeros(placed[path].shape, next(iter(parts.values())).dtype)
        for index, part in parts.items():
            delta[placed[path].where(index)] = part
        adapters[path] = FullAdapter(jnp.asarray(delta), KernelAxes((), (), tuple(range(delta.ndim))))
    return adapters, taken


def rows_of(
    placed: Mapping[str, Placed], tables: Mapping[str, Array], config: Config
) -> tuple[dict[str, Adapter], dict[str, None]]:
    """What some rows of tables are now, as adapters of these; and the names of these."""
    adapters: dict[str, Adapter] = {}
    taken: dict[str, None] = {}
    for path, place in placed.items():
        name = next((name for name in place.tensors().values() if name in tables), None)
        if name is None:
            continue
        indices, values = config.tokens_of(name.removesuffix(".weight")), tables[name]
        rows = "in" if place.entry.kind == "embedding" else "out"  # torch has these first
        if len(place.words) != 2 or place.unstacked or rows not in place.words:
            raise LoraError(f"{path!r} of shape {list(place.shape)} is no table, and the file holds rows of it.")
        axis = place.words.index(rows)
        size, d = place.shape[axis], place.shape[1 - axis]
        if values.shape != (len(indices), d) or len({*indices}) < len(indices) or not indices or max(indices) >= size:
            raise LoraError(
                f"{short(name)} has {list(values.shape)} as rows {short(list(indices))}, expected as many different "
                f"rows, of those of {path!r} of shape {list(place.shape)}: another model, or another key map."
            )
        adapters[path] = RowsAdapter(jnp.asarray(values), place.axes, indices, size, axis)
        taken[name] = None
    return adapters, taken


def others_of(placed: Mapping[str, Placed], whole: Mapping[str, Array]) -> tuple[dict[str, jax.Array], dict[str, None]]:
    """The parameters that the file holds whole; and the names of the tensors."""
    found, taken = _collected(placed, whole)
    others = {}
    for path, parts in found.items():
        place = placed[path]
        missing = [name for index, name in place.tensors().items() if index not in parts]
        if missing:
            raise LoraError(f"the file holds a part of {path!r} whole, but not {short(missing[0])}.")
        array = np.zeros(place.shape, next(iter(parts.values())).dtype)
        for index, part in parts.items():
            array[place.where(index)] = part
        others[path] = jnp.asarray(array)
    return others, taken


def _collected(
    placed: Mapping[str, Placed], tensors: Mapping[str, Array]
) -> tuple[dict[str, dict[tuple[int, ...], Array]], dict[str, None]]:
    """The parts of each parameter among these tensors, in our layout; and the names of the tensors."""
    starts = starts_of(placed)
    found: dict[str, dict[tuple[int, ...], Array]] = {}
    taken: dict[str, None] = {}
    for path, place in placed.items():
        for index, name in place.tensors().items():
            if name in tensors:
                taken[name] = None
                part = place.from_torch(place.outputs_of(tensors[name], starts[path]), index)
                found.setdefault(path, {})[index] = part
    return found, taken


def _check_parts(place: Placed, parts: Sequence[Placed], outputs: int) -> None:
    """All of a module's outputs have to be known, to know which are ours."""
    total = sum(part.outputs for part in parts)
    if place.entry.part is not None and (total != outputs or [p.entry.part for p in parts] != list(range(len(parts)))):
        known = ", ".join(f"{part.path!r} ({part.outputs})" for part in parts)
        raise LoraError(
            f"{place.path!r} is part {place.entry.part} of a module with {outputs} outputs, of which these are "
            f"known: {known}. Give all parameters, not only a plan, and a key map with all parts."
        )


def turned(adapter: Adapter, axes: KernelAxes, path: str, whose: str) -> Adapter:
    """With these axes: a table may be used the other way round, if its adapter is of LoRA."""
    if isinstance(adapter, FullAdapter | RowsAdapter) and not axes.stack:
        return dataclasses.replace(adapter, axes=axes)
    for candidate in (adapter, adapter.transpose()) if isinstance(adapter, LoraAdapter) else (adapter,):
        if candidate.axes == axes:
            return candidate
    raise LoraError(
        f"{path!r} has {axes} by {whose}, but its adapter has {adapter.axes}: mend its entry in the key map."
    )
