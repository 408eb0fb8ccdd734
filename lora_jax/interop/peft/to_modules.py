"""Adapters as what torch's modules hold: the way back from `{path: adapter}`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.interop.key_map import Array, KeyMap, Placed, groups_of
from lora_jax.interop.peft.formats import KINDS, Arrays, Kind, Module, decompose_factor, to_torch
from lora_jax.interop.peft.from_modules import shapes_of, turned


def modules_to_save(
    adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any
) -> tuple[str, dict[str, Module], dict[str, Placed]]:
    """What one folder of PEFT can hold all of these as: the kind, and what `torch_modules` gives."""
    kind = _kind_of(adapters, key_map)
    modules, placed = torch_modules(adapters, key_map, params, kind)
    if kind == "LOKR" and decompose_factor([module.arrays for module in modules.values()]) is None:
        return "LORA", *torch_modules(adapters, key_map, params)
    return kind, modules, placed


def _kind_of(adapters: Mapping[str, Adapter], key_map: KeyMap) -> str:
    """The kind that one folder of PEFT can hold all of these as: their own, or LoRA if that is what they are.

    Raises:
        LoraError: some are of DoRA and some are not, or of modules that PEFT has no DoRA for; a kind that is no LoRA.
    """
    placed = key_map.place({path: shape_of(path, adapter) for path, adapter in adapters.items()})
    for name, kind in KINDS.items():
        if all(type(adapters[path]) is kind.adapter and _is_held(place, kind) for path, place in placed.items()):
            return name if name != "VERA" or _is_of_one_vera(adapters, placed) else "LORA"
    for path, adapter in adapters.items():
        if isinstance(adapter, KINDS["DORA"].adapter):
            other = next((p for p, a in adapters.items() if type(a) is not type(adapter)), None)
            why = (
                f"{other!r} is not, and a folder of PEFT is all of one kind: save them to folders of their own"
                if other is not None
                else "PEFT has DoRA for linear layers, convolutions and embeddings: merge it instead"
            )
            raise LoraError(f"{path!r} is of DoRA; {why}.")
    return "LORA"


def _is_held(place: Placed, kind: Kind) -> bool:
    return place.entry.kind in kind.modules and (kind.parts or place.entry.part is None)


def _is_of_one_vera(adapters: Mapping[str, Any], placed: Mapping[str, Placed]) -> bool:
    """Whether all share the projections that PEFT makes for these modules: as wide as the widest of them."""
    facts = {(adapter.seed, adapter.widths, adapter.d.shape[-1]): None for adapter in adapters.values()}
    _, *fans = zip(*(place.axes.fans(place.shape) for place in placed.values()), strict=True)
    return len(facts) == 1 and next(iter(facts))[1] == tuple(map(max, fans))


def shape_of(path: str, adapter: Any) -> tuple[int, ...]:
    """The shape of W."""
    if not isinstance(adapter, Adapter):
        raise LoraError(f"{path!r} is a {type(adapter).__name__}, expected an adapter as lora.init makes it.")
    try:
        return adapter.kernel_shape()
    except LoraError as error:
        raise LoraError(f"the adapter for {path!r} {error}") from None


def torch_modules(
    adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any, kind: str = "LORA"
) -> tuple[dict[str, Module], dict[str, Placed]]:
    """What each module holds, and one of the parameters that it is; for LoRA all kinds that are LoRA in another form.

    Raises:
        LoraError: an adapter that is not of the kind; a path that the key map lacks; a module with parameters that are
            not known, or, for DoRA, without the weights of those that have no adapter.
    """
    if kind == "LORA":
        adapters = {path: (a.to_lora() or a) if isinstance(a, Adapter) else a for path, a in adapters.items()}
    for path, adapter in adapters.items():
        if not isinstance(adapter, KINDS[kind].adapter):
            raise LoraError(
                f"{path!r} is a {type(adapter).__name__}; this version writes what is W + s A B: merge it instead."
            )
    placed = key_map.place({path: shape_of(path, adapter) for path, adapter in adapters.items()})
    known = {} if params is None else key_map.place(shapes_of(params), strict=False)
    groups = groups_of(placed | known)
    found: dict[str, dict[int, Module]] = {}
    first: dict[str, Placed] = {}
    for path, place in placed.items():
        adapter = turned(adapters[path], place.axes, path, "the key map")
        modules = _modules(kind, place, adapter)
        changed = [name for name, arrays in modules.items() if any(array.any() for array in arrays.values())]
        for name in changed or modules:  # the others are layers of a stack that were not adapted
            module = Module(modules[name], getattr(adapter, "scale", 1.0))
            found.setdefault(name, {})[place.entry.part or 0] = module
            first.setdefault(name, place)
    joined = {}
    for name, parts in found.items():
        place = first[name]
        if place.entry.part is None:
            joined[name] = parts[0]
        else:
            joined[name] = _join(kind, name, parts, groups[name + place.entry.suffix], params)
    return joined, first


def _modules(kind: str, place: Placed, adapter: Adapter) -> dict[str, Arrays]:
    """The arrays of each module that a parameter is in, in torch's layout."""
    arrays = {field: getattr(adapter, field) for field in KINDS[kind].names}
    ours = {field: np.asarray(array) for field, array in jax.device_get(arrays).items() if array is not None}
    modules = {}
    for index, name in place.names.items():
        where = tuple(place.where(index)[axis] for axis in place.axes.stack)
        modules[name] = to_torch(kind, place, {field: array[where] for field, array in ours.items()})
    return modules


def _join(kind: str, name: str, found: Mapping[int, Module], parts: Sequence[Placed], params: Any) -> Module:
    """[W0 | W1 | ...] as one module: one A if they share it, else [A0; A1; ...] and B of blocks."""
    if [part.entry.part for part in parts] != list(range(len(parts))):
        known = ", ".join(repr(part.path) for part in parts)
        raise LoraError(
            f"{name} holds several parameters, of which only {known} are known. Give all parameters: "
            "save_peft(..., params=params)."
        )
    scales = {module.scale: None for module in found.values()}
    scale = next(iter(scales)) if len(scales) == 1 else 1.0
    folded = {i: module.folded(KINDS[kind], scale).arrays for i, module in found.items()}
    blocks = [b for _, b in KINDS[kind].pairs]
    along_rank = [field for field in KINDS[kind].names if field not in (*blocks, "m")]
    first = next(iter(folded.values()))
    shared = all(np.array_equal(one[field], first[field]) for one in folded.values() for field in along_rank)
    experts = parts[0].experts
    joined = {
        field: first[field] if shared else _along_rank([one[field] for one in folded.values()], experts)
        for field in along_rank
    }
    joined |= {b: _blocks({i: one[b] for i, one in folded.items()}, parts, shared) for b in blocks}
    if kind == "DORA":
        lengths = [folded[i]["m"] if i in folded else _lengths(name, part, params) for i, part in enumerate(parts)]
        joined["m"] = np.concatenate(lengths)
    return Module(joined, scale)


def _along_rank(pieces: Sequence[Array], experts: int) -> Array:
    """[A0; A1; ...] along the rank: A is [experts * r, ...]."""
    apart = [piece.reshape(experts, -1, *piece.shape[1:]) for piece in pieces]
    whole = np.concatenate(apart, axis=1)
    return whole.reshape(-1, *whole.shape[2:])


def _blocks(found: Mapping[int, Array], parts: Sequence[Placed], shared: bool) -> Array:
    """B [out, r * experts] of all outputs: one below the other, and beside one another if their A are not the same."""
    experts, some = parts[0].experts, next(iter(found.values()))
    apart = {i: b.reshape(len(b), -1, experts) for i, b in found.items()}
    ranks = [b.shape[1] for b in apart.values()]
    blocks, start = [], 0
    for i, part in enumerate(parts):
        block = np.zeros((part.outputs, ranks[0] if shared else sum(ranks), experts), some.dtype)
        if i in apart:
            block[:, start : start + apart[i].shape[1]] = apart[i]
            start += 0 if shared else apart[i].shape[1]
        blocks.append(block)
    whole = np.concatenate(blocks)
    return whole.reshape(len(whole), -1, *some.shape[2:])


def _lengths(name: str, part: Placed, params: Any) -> Array:
    """Of the outputs of a parameter without DoRA in a module that has it: those that W has, so that nothing changes."""
    weight = arrays_of(params).get(part.path)
    if weight is None:
        raise LoraError(
            f"{name} holds {part.path!r}, which has no adapter, and DoRA writes the length of each of its outputs: "
            "give the parameters, save_peft(..., params=params)."
        )
    index = next(index for index, own in part.names.items() if own == name)
    w = part.to_torch(np.asarray(jax.device_get(weight), np.float32)[part.where(index)])
    inputs = tuple(axis for axis in range(w.ndim) if axis != part.output_axis(w.ndim))
    return np.sqrt(np.sum(np.square(w), axis=inputs))


def arrays_of(params: Any) -> dict[str, Any]:
    """The parameters that are there as arrays, not as shapes alone, by their paths."""
    names, leaves, _ = flatten_with_names({} if params is None else params)
    return {
        name: leaf
        for name, leaf in zip(names, leaves, strict=True)
        if is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
    }
