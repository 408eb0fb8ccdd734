"""Adapters by their modules from a GGUF file, each read when it is asked for: see `adapters`."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.adapters.arguments import is_usable_alpha
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.gguf import file as gguf_file
from lora_jax.interop.gguf.base import Base, ModelFacts, architecture_of, facts_of
from lora_jax.interop.gguf.factors import ALPHA, ENDS, HEAD, TABLE, Pair, all_experts, from_pair, rotary_heads
from lora_jax.interop.gguf.file import Place
from lora_jax.interop.gguf.names import STYLES, Architecture, Experts, source_of
from lora_jax.interop.key_map import Array
from lora_jax.interop.module_adapters import Lazy, ModuleAdapters, outline, outlined
from lora_jax.interop.peft.formats.format import Module
from lora_jax.interop.peft.formats.registry import LORA

INVOCATION = "adapter.alora.invocation_tokens"


def read_gguf(path: Path, *, base: Base | None = None, experts: Experts = "together") -> ModuleAdapters:
    """Read a GGUF file by modules, each when it is asked for; errors as of `load_gguf`.

    Args:
        path: of the file.
        base: the model, as in `save_gguf`; the architecture llama needs it.
        experts: how the model has the experts of a layer: "together" in parameters, as transformers 5; "apart", as
            modules of their own; or so with the names of "mixtral".
    """
    if experts not in STYLES:
        raise LoraError(f"read_gguf(experts={experts!r}): expected one of {', '.join(map(repr, STYLES))}.")
    header = gguf_file.header(path)
    architecture, alpha = _checked(path, header.facts)
    pairs = _paired(path, gguf_file.places(path, header))
    facts = None if base is None else facts_of("load_gguf", base)
    if facts is not None and facts.architecture != architecture:
        raise LoraError(
            f"{path} is for the architecture {architecture.name!r}, and {facts.where} is {facts.architecture.name!r}."
        )
    reader = _Reader(path, architecture, alpha, pairs, facts)
    for tensor in pairs:
        reader.add(tensor, experts)
    return reader.result()


def _checked(path: Path, facts: Mapping[str, Any]) -> tuple[Architecture, float]:
    """Return the architecture and alpha of an adapter's file."""
    for key, expected in {"general.type": "adapter", "adapter.type": "lora"}.items():
        if facts.get(key) != expected:
            raise LoraError(f"{path} holds no LoRA: {key} is {short(facts.get(key))}, expected {expected!r}.")
    if INVOCATION in facts:
        raise LoraError(
            f"{path} is an activated LoRA (aLoRA), which acts from certain tokens on; this version has no such adapter."
        )
    alpha = facts.get(ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise LoraError(f"{path}: {ALPHA} is {short(alpha)}, expected a finite number.")
    return architecture_of(str(path), facts), float(alpha)


def _paired(path: Path, places: Mapping[str, Place]) -> dict[str, dict[str, Place]]:
    """Return the places of a and b of each tensor of the model."""
    found: dict[str, dict[str, Place]] = {}
    for name, place in places.items():
        field = next((field for field, end in ENDS.items() if name.endswith(end)), None)
        if field is None:
            raise LoraError(
                f"{path} holds {short(name)}, and expected are pairs, such as blk.0.attn_q.weight.lora_a and .lora_b. "
                "llama.cpp reads norms among them and does not use them: write the adapter without modules_to_save."
            )
        found.setdefault(name.removesuffix(ENDS[field]), {})[field] = place
    if not found:
        raise LoraError(f"{path} holds no tensors: llama.cpp takes it for an adapter that changes nothing.")
    for name, own in found.items():
        if len(own) < 2:
            raise LoraError(f"{path} has only {short(name + ENDS[next(iter(own))])}, and not its partner.")
        a, b = own["a"].shape, own["b"].shape
        rank = a[-1] if name == TABLE else a[-2] if len(a) > 1 else None
        if not 2 <= len(a) == len(b) <= 3 or rank != b[-1] or a[:-2] != b[:-2]:
            raise LoraError(f"{path}: {short(name)} has factors {list(a)} and {list(b)}, of no common rank.")
    return found


class _Reader:
    """The modules of a file, by what each is made of."""

    def __init__(
        self,
        path: Path,
        architecture: Architecture,
        alpha: float,
        pairs: Mapping[str, Mapping[str, Place]],
        facts: ModelFacts | None,
    ) -> None:
        self.path, self.architecture, self.alpha, self.pairs, self.facts = path, architecture, alpha, pairs, facts
        self.tensors: dict[str, tuple[str, ...]] = {}  # of each module
        self.stacks: dict[str, tuple[str, int]] = {}  # of modules that are one expert: the tensor and the number
        self.kinds: dict[str, str] = {}
        self.experts: dict[str, int] = {}
        self.shared: dict[str, bool] = {}  # whether all tensors of a module have one a

    def add(self, tensor: str, style: Experts) -> None:
        """Note the module, or the modules, that a tensor is.

        Raises:
            LoraError: adapters have no such tensor, or not with so many axes; tensors of one module do not fit.
        """
        source = source_of(self.architecture, tensor, style)
        if source is None:
            raise LoraError(
                f"{self.path} has a pair for {short(tensor)}, which this version does not know in the architecture "
                f"{self.architecture.name!r}."
            )
        a = self.pairs[tensor]["a"].shape
        if (len(a) == 3) != tensor.endswith("_exps"):
            raise LoraError(f"{self.path}: {short(tensor)} has factors of {len(a)} axes.")
        if "{e}" in source.module:
            for expert in range(a[0]):
                name = source.module.replace("{e}", str(expert))
                self.stacks[name], self.kinds[name] = (tensor, expert), "linear"
        elif len(a) == 3:
            self._add_all_experts(source.module, source.tensors)
        else:
            plain = "conv1d" if self.architecture.transposed else "linear"
            self.tensors[source.module] = (tensor,)
            self.kinds[source.module] = {TABLE: "embedding", HEAD: "linear"}.get(tensor, plain)

    def _add_all_experts(self, module: str, tensors: tuple[str, ...]) -> None:
        if module in self.tensors:
            return
        places = [self.pairs[tensor] for tensor in tensors if tensor in self.pairs]
        first = places[0]
        for own in places:
            a, b = own["a"].shape, own["b"].shape
            if (a[0], a[2], b[1]) != (first["a"].shape[0], first["a"].shape[2], first["b"].shape[1]):
                raise LoraError(f"{self.path}: {', '.join(tensors)} are of experts of different numbers or sizes.")
        self.tensors[module], self.kinds[module] = tensors, "experts"
        self.experts[module] = first["a"].shape[0]
        self.shared[module] = len(places) == len(tensors) and all(self._same_a(first, own) for own in places[1:])

    def _same_a(self, one: Mapping[str, Place], other: Mapping[str, Place]) -> bool:
        same_form = one["a"].shape == other["a"].shape and one["a"].dtype == other["a"].dtype
        same_b = one["b"].dtype == other["b"].dtype
        return (
            same_form
            and same_b
            and np.array_equal(gguf_file.read(self.path, one["a"]), gguf_file.read(self.path, other["a"]))
        )

    def result(self) -> ModuleAdapters:
        """Return the modules, each of which is read when it is asked for."""
        names = [*self.tensors, *self.stacks]
        outlines = {name: outlined({name: self._module(name, _outline)})[name] for name in names}
        lazy = Lazy(names, lambda name: self._module(name, self._read))
        return ModuleAdapters(LORA, lazy, outlines, self.kinds, self.experts)

    def _module(self, name: str, array_of: Callable[[Place], Array]) -> Module:
        if name in self.stacks:
            tensor, expert = self.stacks[name]
            own = {field: _of_expert(place, expert) for field, place in self.pairs[tensor].items()}
            return Module({field: array_of(place) for field, place in own.items()}, self._scale(tensor))
        tensors = self.tensors[name]
        pairs = [self._pair(tensor, array_of) if tensor in self.pairs else None for tensor in tensors]
        scales = [self._scale(tensor) if tensor in self.pairs else 1.0 for tensor in tensors]
        if name in self.experts:
            return all_experts(pairs, scales, self.shared[name])
        (pair,) = pairs
        assert pair is not None
        return Module(from_pair(tensors[0], pair, self._heads(tensors[0])), scales[0])

    def _pair(self, tensor: str, array_of: Callable[[Place], Array]) -> Pair:
        return Pair(*(array_of(self.pairs[tensor][field]) for field in ENDS))

    def _read(self, place: Place) -> Array:
        return gguf_file.read(self.path, place)

    def _scale(self, tensor: str) -> float:
        rank = self.pairs[tensor]["b"].shape[-1]
        if not self.alpha:
            return 1.0
        if not is_usable_alpha(self.alpha, rank):
            raise LoraError(f"{self.path}: {ALPHA} is {self.alpha}, of which fp32 has no scale for rank {rank}.")
        return self.alpha / rank

    def _heads(self, tensor: str) -> int | None:
        needs = self.architecture.permuted and tensor.endswith((".attn_q", ".attn_k"))
        if needs and self.facts is None:
            raise LoraError(
                f"{self.path} is for the architecture {self.architecture.name!r}, in which the rows of {short(tensor)} "
                "are in the order of heads, and does not say how many there are: say base=, or --base, the folder of "
                'the model with its config.json, its GGUF, or base={"model_type": "llama", "num_attention_heads": 32, '
                '"num_key_value_heads": 8}.'
            )
        return None if self.facts is None else rotary_heads(tensor, self.facts)


def _outline(place: Place) -> Array:
    return outline(place.shape, place.dtype)


def _of_expert(place: Place, expert: int) -> Place:
    """Return the place of one of the experts that a tensor stacks."""
    size = place.size // place.shape[0]
    return Place(place.type, place.shape[1:], place.start + expert * size, size)
