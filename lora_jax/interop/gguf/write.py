"""Adapters by their modules as a GGUF file, one module in memory at a time: see `adapters`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.gguf import file as gguf_file
from lora_jax.interop.gguf.base import Base, ModelFacts, facts_of
from lora_jax.interop.gguf.factors import ALPHA, ENDS, HEAD, TABLE, Pair, Tensors, to_pairs
from lora_jax.interop.gguf.names import Architecture, Slot, slot_of
from lora_jax.interop.key_map import Array
from lora_jax.interop.module_adapters import ModuleAdapters
from lora_jax.interop.peft.dtypes import cast, common_dtype
from lora_jax.interop.peft.formats.registry import LORA

LONGEST_NAME = 63  # bytes; llama.cpp has 64, with a zero at the end


def write_gguf(path: Path, found: ModuleAdapters, *, base: Base, dtype: Any = None, tied: bool | None = None) -> None:
    """Write adapters by their modules; further arguments and errors as of `save_gguf`."""
    facts = facts_of("write_gguf(path, found, base=...)", base)
    if found.format.name != LORA.name:
        raise LoraError(
            f"{path}: {found.format.name} has no place in GGUF, which holds LoRA alone: merge it and convert the model."
        )
    plan = _planned(path, found, facts, tied)
    dtypes = [_dtype_of(path, tensors, found, dtype) for tensors in plan]
    outlines = {name: module._replace(scale=1.0) for name, module in found.outlines.items()}  # nothing to compute
    forms: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensors, own in zip(plan, dtypes, strict=True):
        for name, array in _named(tensors, to_pairs(tensors, outlines, facts)):
            if len(name.encode()) > LONGEST_NAME:
                raise LoraError(f"{path}: {short(name)} is longer than the 63 bytes that llama.cpp has for a name.")
            forms[name] = (own, array.shape)
        _check_shapes(tensors, forms, facts)

    def arrays() -> Iterator[tuple[str, Array]]:
        for tensors, own in zip(plan, dtypes, strict=True):
            target = np.dtype(gguf_file.DTYPES[own])
            for name, array in _named(tensors, to_pairs(tensors, found.modules, facts)):
                yield name, array if array.dtype == target else cast({name: array}, target)[name]

    about = {"general.architecture": facts.architecture.name, "general.type": "adapter", "adapter.type": "lora"}
    gguf_file.write(path, {**about, ALPHA: 0.0}, forms, arrays())


def _planned(path: Path, found: ModuleAdapters, facts: ModelFacts, tied: bool | None) -> list[Tensors]:
    """Return the tensors of the file, and the modules that each is made of."""
    plan: dict[tuple[str, ...], Tensors] = {}
    for name in found.outlines:
        slot = slot_of(facts.architecture, name)
        _check_kind(name, slot, found, facts.architecture)
        known = plan.get(slot.tensors)
        if known is not None and _is_taken(slot, known):
            raise LoraError(f"{short(name)} and {short(next(iter(known.slots)))} are both {slot.tensors[0]} in a GGUF.")
        slots = {**(known.slots if known else {}), name: slot}
        plan[slot.tensors] = Tensors(slot.tensors, slots, found.experts.get(name))
    for names, tensors in plan.items():
        if tensors.slots and next(iter(tensors.slots.values())).expert is not None:
            plan[names] = tensors._replace(experts=_count_of_experts(tensors, facts))
    seen: dict[str, None] = {}
    for name in [name for names in plan for name in names]:
        if name in seen:
            raise LoraError(f"{path}: {name} is given twice, by experts together and by experts apart.")
        seen[name] = None
    return [*_with_ends(plan, facts, tied).values()]


def _is_taken(slot: Slot, known: Tensors) -> bool:
    """Return whether the place of a module in a file is that of a module which is there already."""
    return any(None in (slot.expert, own.expert) or slot.expert == own.expert for own in known.slots.values())


def _check_kind(name: str, slot: Slot, found: ModuleAdapters, architecture: Architecture) -> None:
    """Raise unless a module is of the kind that its place in the file is for."""
    expected = "experts" if slot.together else "embedding" if slot.tensors == (TABLE,) else "linear"
    if architecture.transposed and slot.tensors not in ((TABLE,), (HEAD,)):
        expected = "conv1d"
    if found.kinds[name] != expected:
        raise LoraError(
            f"{short(name)} is of the kind {found.kinds[name]!r} by the key map, and in the architecture "
            f"{architecture.name!r} it is {expected!r}: mend the key map, or give the `base` of this model."
        )


def _count_of_experts(tensors: Tensors, facts: ModelFacts) -> int:
    name, slot = max(tensors.slots.items(), key=lambda item: item[1].expert or 0)
    if facts.experts is None:
        raise LoraError(
            f"{facts.where} does not say how many experts a layer has, and {short(name)} is one: num_experts."
        )
    if (slot.expert or 0) >= facts.experts:
        raise LoraError(f"{short(name)} is an expert of a layer that has {facts.experts} by {facts.where}.")
    return facts.experts


def _with_ends(
    plan: dict[tuple[str, ...], Tensors], facts: ModelFacts, tied: bool | None
) -> dict[tuple[str, ...], Tensors]:
    """Return the plan in which a table that is the head is written as both, where the model's GGUF has both.

    Raises:
        LoraError: it has one alone, which llama.cpp cannot adapt; it is not known whether the table is the head.
    """
    table, head = plan.get((TABLE,)), plan.get((HEAD,))
    if table is None and head is None:
        return plan
    name = next(iter((table or head).slots))  # type: ignore[union-attr]
    why = facts.where if tied is None else f"tied={tied}"
    tied = facts.tied if tied is None else tied
    if tied and not (facts.shapes and facts.own_head):
        raise LoraError(
            f"{short(name)} is the table of tokens and the head in one by {why}, and llama.cpp adapts neither: "
            "leave it out, adapters = {path: a for path, a in adapters.items() if ...}; or give base= as a GGUF of the "
            "model that has an output.weight of its own; or merge, and convert the model."
        )
    if not tied and not facts.own_head:
        raise LoraError(f"{facts.where} has no output.weight: its head is the table, and llama.cpp adapts neither.")
    if table is None or head is not None:
        return plan
    if tied is None:
        raise LoraError(
            f"{facts.where} has a head of its own, and does not say whether it is a copy of the table, which has an "
            f"adapter, {short(name)}: say tied=True, and both are written, or tied=False, and the lookups alone change."
        )
    return {**plan, (TABLE,): table._replace(names=(TABLE, HEAD))} if tied else plan


def _dtype_of(path: Path, tensors: Tensors, found: ModuleAdapters, dtype: Any) -> str:
    """Return the type in which tensors are written, a key of `gguf_file.DTYPES`."""
    arrays = (array for name in tensors.slots for array in found.outlines[name].arrays.values())
    own = common_dtype(arrays) if dtype is None else np.dtype(dtype)
    names = {np.dtype(known): name for name, known in gguf_file.DTYPES.items()}
    if own not in names:
        name = next(iter(tensors.slots))
        raise LoraError(f"{path}: {short(name)} is {own.name}, which llama.cpp does not read: say dtype=jnp.float32.")
    return names[own]


def _named(tensors: Tensors, pairs: list[Pair]) -> Iterator[tuple[str, Array]]:
    for name, pair in zip(tensors.names, pairs, strict=True):
        yield name + ENDS["a"], pair.a
        yield name + ENDS["b"], pair.b


def _check_shapes(tensors: Tensors, forms: Mapping[str, tuple[str, tuple[int, ...]]], facts: ModelFacts) -> None:
    """Raise unless pairs have one rank, and fit the tensors of the model's GGUF if that is at hand."""
    module = short(next(iter(tensors.slots)))
    for name in tensors.names:
        a, b = (forms[name + end][1] for end in ENDS.values())
        weight = (a[0], b[0]) if name == TABLE else (*a[:-2], b[-2], a[-1])
        if b[-1] != (a[-1] if name == TABLE else a[-2]):
            raise LoraError(f"{module} has factors {list(a)} and {list(b)}, of no common rank.")
        known = None if facts.shapes is None else facts.shapes.get(f"{name}.weight", ())
        if known is not None and known != weight:
            held = f"is {list(known)} there" if known else "is not there"
            raise LoraError(
                f"{module} is {name}.weight {list(weight)} in {facts.where}, and that {held}: `base` is another model."
            )
