"""A folder of mlx-lm as adapters by torch's modules, one of which is in memory at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax.checkpoints.reading import identity
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array
from lora_jax.interop.mlx.write import CONFIG, EXPERTS, WEIGHTS
from lora_jax.interop.module_adapters import Lazy, ModuleAdapters, outlined
from lora_jax.interop.peft.expert_projections import (
    HALVES,
    PROJECTIONS,
    have_one_a,
    of_all_experts,
    together,
    without_one,
)
from lora_jax.interop.peft.files import places_of_tensors
from lora_jax.interop.peft.formats.format import Arrays, Module
from lora_jax.interop.peft.formats.registry import FORMATS
from lora_jax.interop.peft.options import Options
from lora_jax.interop.safetensors_index import DTYPES, Tensor, read

_FIELDS = {"lora_a": "a", "lora_b": "b", "m": "m"}
_EXPERTS = (EXPERTS, "switch_glu", "experts")  # the modules of mlx-lm's models that hold all experts
# Modules that are tables. Their factors have the shapes of those of a linear module, so that only the name tells.
_TABLES = (
    *("embed_tokens", "embed_tokens_per_layer", "embed_in", "embedding", "embeddings", "word_embeddings"),
    *("token_embeddings", "tok_embeddings", "position_embedding_table", "wte", "wpe"),
)


class _Projection(NamedTuple):
    """The tensors of one module of MLX."""

    name: str
    places: Mapping[str, Tensor]  # by the names of our fields

    @property
    def is_of_experts(self) -> bool:
        return len(self.places["a"].shape) == 3


class _Source(NamedTuple):
    """The modules of MLX that one module of torch's is."""

    projections: tuple[_Projection, ...]
    halves: tuple[str, ...]  # the projections that a parameter of experts joins; none of other modules
    share: bool  # the halves have one A


def read_mlx(folder: Path) -> ModuleAdapters:
    """Return the adapters of a folder that mlx-lm loads; experts as transformers' joined parameters.

    Raises:
        LoraError: as `load_mlx`, but for what is wrong with a key map.
    """
    before = identity(folder)
    kind, rank, scale = _config(folder / CONFIG)
    projections = _projections(folder, rank, with_lengths=kind == "dora")
    sources = _sources(folder, projections)

    def make(name: str) -> Module:
        if identity(folder) != before:
            raise LoraError(f"{folder} was replaced while it was read: call this again.")
        return Module(_arrays(folder, sources[name], zeros=False), scale)

    outlines: dict[str, Module] = {}
    for name, source in sources.items():
        outlines |= outlined({name: Module(_arrays(folder, source, zeros=True), scale)})
    kinds = {name: _kind(name, source) for name, source in sources.items()}
    experts = {name: source.projections[0].places["a"].shape[0] for name, source in sources.items() if source.halves}
    return ModuleAdapters(FORMATS[kind.upper()], Lazy([*sources], make), outlines, kinds, experts)


def _config(path: Path) -> tuple[str, int, float]:
    """Return the kind, the rank and the scale of all adapters."""
    options = Options(path)
    kind = options.entries.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise options.error(f"fine_tune_type is {short(kind)}, expected 'lora' or 'dora': others are no adapters.")
    parameters = options.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise options.error(f"lora_parameters is {short(parameters)}, expected an object with rank and scale.")
    inner = Options(path, parameters)
    if "rank" not in parameters or "scale" not in parameters:
        raise options.error("lora_parameters lacks rank or scale, and mlx-lm takes no alpha in the place of its scale.")
    return kind, inner.whole_number("rank", 1), inner.number("scale", 1.0)


def _projections(folder: Path, rank: int, with_lengths: bool) -> dict[str, _Projection]:
    """Return the modules of MLX, whose tensors fit one another and the config."""
    places: dict[str, dict[str, Tensor]] = {}
    for name, place in places_of_tensors(folder / WEIGHTS).items():
        module, _, ending = name.rpartition(".")
        if not module or ending not in _FIELDS or (ending == "m" and not with_lengths):
            raise LoraError(f"{folder / WEIGHTS}: {short(name)} is no tensor of {'DoRA' if with_lengths else 'LoRA'}.")
        places.setdefault(module, {})[_FIELDS[ending]] = place
    if not places:
        raise LoraError(f"{folder / WEIGHTS} holds no factors of any module.")
    for module, own in places.items():
        if why := _problem(own, rank, with_lengths):
            raise LoraError(f"{folder / WEIGHTS}: {short(module)} has {why}.")
    return {module: _Projection(module, own) for module, own in places.items()}


def _problem(places: Mapping[str, Tensor], rank: int, with_lengths: bool) -> str | None:
    """Return what is wrong with the tensors of one module, or None."""
    wanted = _FIELDS if with_lengths else ("lora_a", "lora_b")
    if missing := [ending for ending in wanted if _FIELDS[ending] not in places]:
        return f"no {missing[0]}"
    a, b = places["a"].shape, places["b"].shape
    fits = len(a) == len(b) == 2 and a[1] == b[0]
    if len(a) == len(b) == 3 and not with_lengths:  # [experts, r, in] and [experts, out, r]
        fits = a[0] == b[0] and a[1] == b[2]
    if not fits or 0 in (*a, *b):
        return f"factors {list(a)} and {list(b)}, of no common rank"
    if a[1] != rank:
        return f"rank {a[1]}, by the config {rank}: the two files do not belong together"
    if places["a"].dtype != places["b"].dtype:
        return f"factors of {places['a'].dtype} and of {places['b'].dtype}"
    if with_lengths and places["m"].shape != b[1:]:
        return f"m of shape {list(places['m'].shape)}, expected {list(b[1:])}"
    return None


def _sources(folder: Path, projections: Mapping[str, _Projection]) -> dict[str, _Source]:
    """Return what each module of torch's is made of."""
    sources: dict[str, _Source] = {}
    layers: dict[str, dict[str, _Projection]] = {}
    gated = any(name.endswith(".gate_proj") for name, one in projections.items() if one.is_of_experts)
    for name, projection in projections.items():
        if not projection.is_of_experts:
            sources[name] = _Source((projection,), (), True)
            continue
        parent, _, last = name.rpartition(".")
        above, _, holder = parent.rpartition(".")
        if holder not in _EXPERTS or last not in (*HALVES, "down_proj"):
            raise LoraError(
                f"{folder / WEIGHTS}: {short(name)} is of experts, expected {', '.join((*HALVES, 'down_proj'))} of "
                f"{' or '.join(_EXPERTS)}."
            )
        layers.setdefault(f"{above}.experts" if above else "experts", {})[last] = projection
    for parent, layer in layers.items():
        for last in ("gate_up_proj" if gated else "up_proj", "down_proj"):
            own = tuple(layer[half] for half in PROJECTIONS[last] if half in layer)
            if own:
                sources[f"{parent}.{last}"] = _of_experts(folder, own, PROJECTIONS[last])
    return sources


def _of_experts(folder: Path, projections: tuple[_Projection, ...], halves: Sequence[str]) -> _Source:
    """Return the source of a parameter that joins these projections.

    Raises:
        LoraError: they are not of the same experts, inputs and outputs.
    """
    first = projections[0].places
    for one in projections[1:]:
        if any(one.places[x].shape != first[x].shape or one.places[x].dtype != first[x].dtype for x in "ab"):
            raise LoraError(
                f"{folder / WEIGHTS}: {short(projections[0].name)} and {short(one.name)} have factors of different "
                "shapes or dtypes, and are of the same experts."
            )
    # Compared in the file's own numbers, one factor of each half in memory.
    share = have_one_a([{"a": _read(folder, one.places["a"])} for one in projections])
    return _Source(projections, tuple(halves), share)


def _arrays(folder: Path, source: _Source, zeros: bool) -> Arrays:
    """Return the arrays of one module of torch's, or zeros in their shapes."""
    found = [
        {field: _zeros(place) if zeros else _read(folder, place) for field, place in one.places.items()}
        for one in source.projections
    ]
    if not source.halves:
        own = found[0]
        return own | {"a": own["a"].T, "b": own["b"].T}
    names = [one.name.rpartition(".")[2] for one in source.projections]
    by_name = dict(zip(names, found, strict=True))
    halves = [by_name.get(half) or without_one(found[0]) for half in source.halves]
    return of_all_experts(together(halves, source.share))


def _read(folder: Path, place: Tensor) -> Array:
    return read(folder, place, DTYPES[place.dtype]).reshape(place.shape)


def _zeros(place: Tensor) -> Array:
    return np.broadcast_to(np.zeros((), DTYPES[place.dtype]), place.shape)


def _kind(name: str, source: _Source) -> str:
    if source.halves:
        return "experts"
    return "embedding" if name.rpartition(".")[2] in _TABLES else "linear"
