"""The lines of a key map: which module of torch a parameter is, and what its axes are there."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_jax.core.errors import LoraError
from lora_jax.interop.name_templates import placeholders


class ModuleKind(NamedTuple):
    """How torch stores the weight of one kind of module."""

    axes: str  # the weight's axes in torch's order
    suffix: str  # what the tensor's name has after the module's


MODULE_KINDS = {
    "linear": ModuleKind("out in", ".weight"),
    "conv1d": ModuleKind("in out", ".weight"),  # transformers' Conv1D, of GPT-2
    "embedding": ModuleKind("in out", ".weight"),
    "conv": ModuleKind("out in window", ".weight"),
    "experts": ModuleKind("expert out in", ""),  # one parameter for all experts
    "experts_transposed": ModuleKind("expert in out", ""),
    "array": ModuleKind("keep out", ""),
}


HEAD_FACTOR = "1/sqrt(head_dim)"
Factor = float | Literal["1/sqrt(head_dim)"]  # head_dim is the size of the last axis of outputs


@dataclass(frozen=True)
class Entry:
    """One line of a key map. Made by `linear`, `embedding`, `conv`, `conv1d`, `experts` or `array`."""

    path: str  # of the parameter, such as "layer_{i}/query/kernel"
    name: str  # of the module, such as "encoder.layer.{i}.attention.self.query"; of arrays and experts, of the tensor
    axes: str  # a word for each axis of the JAX array
    kind: str  # of the module, a key of MODULE_KINDS
    part: int | None = None  # which part of the module's outputs it is, if torch joins several parameters in one module
    interleaved: bool = False  # the last axis of outputs holds pairs, which torch keeps as two halves
    factor: Factor = 1.0  # what torch's numbers are times this

    def __post_init__(self) -> None:
        words, known = self.axes.split(), placeholders(self.path)
        if named := [word for word in known if "|" in word]:
            raise LoraError(
                f"{self.path!r} has {{{named[0]}}}, which stands for the names of modules along an axis of a parameter."
            )
        if self.factor != HEAD_FACTOR and (isinstance(self.factor, str) or not 0 < abs(self.factor) < math.inf):
            raise LoraError(f"the factor of {self.path!r} is {self.factor!r}, expected a number or {HEAD_FACTOR!r}.")
        unknown = [name for name in placeholders(self.name) if name not in known and name not in words]
        unknown += [name for i, name in enumerate(known) if name in known[:i]]  # which of the two numbers it would be
        plain = [word.removesuffix("*") for word in words]
        foreign = [w for w in plain if w not in ("in", "out", "window", "expert", "keep", *placeholders(self.name))]
        if not words or sum(word.endswith("*") for word in words) > 1 or unknown or foreign:
            found = f"unknown are {', '.join([*unknown, *foreign])}" if unknown or foreign else "one * at most"
            raise LoraError(
                f"the axes {self.axes!r} of {self.path!r} for {self.name!r}: {found}. Expected words such as 'in out', "
                "with a {name} of the module that is not in the path as an axis."
            )

    @property
    def suffix(self) -> str:
        """Return what the name of the weight has after that of the module."""
        return MODULE_KINDS[self.kind].suffix

    @property
    def moves_outputs(self) -> bool:
        """Return whether the outputs have another order or size than torch's."""
        return self.interleaved or self.factor != 1

    def factor_of(self, head_dim: int, inverse: bool = False) -> float:
        """Return what torch's numbers are times, or with `inverse` what ours are times to be torch's."""
        if self.factor == HEAD_FACTOR:
            return math.sqrt(head_dim) if inverse else 1 / math.sqrt(head_dim)
        return 1 / float(self.factor) if inverse else float(self.factor)

    @property
    def is_of_experts(self) -> bool:
        """Return whether torch keeps the weights of all experts in one parameter."""
        return self.kind.startswith("experts")

    def words(self, ndim: int) -> tuple[str, ...] | None:
        """Return a word for each of `ndim` axes, or None if there cannot be that many."""
        words = self.axes.split()
        more = ndim - len(words)
        starred = next((i for i, word in enumerate(words) if word.endswith("*")), None)
        if more < 0 or (more and starred is None):
            return None
        if starred is not None:
            words[starred : starred + 1] = [words[starred][:-1]] * (more + 1)
        return tuple(words)


def linear(
    path: str,
    name: str,
    axes: str = "in out",
    part: int | None = None,
    *,
    interleaved: bool = False,
    factor: Factor = 1.0,
) -> Entry:
    """Describe a weight of `torch.nn.Linear`, which torch keeps as [out, in].

    Args:
        path: of the parameter.
        name: of the module; with `{k|v}`, of several, which an axis `k|v` of the parameter holds one after the other.
        axes: a word for each axis of the parameter.
        part: which part of the module's outputs it is, if torch joins several parameters in one module.
        interleaved: the last axis of outputs, of the size of a head, is x0 y0 x1 y1 ..., where torch has x0 x1 ... y0
            y1 ...: the two orders of rotary embeddings.
        factor: what torch's numbers are times here; "1/sqrt(head_dim)" for queries whose scale is in their weights.
    """
    return Entry(path, name, axes, "linear", part, interleaved, factor)


def conv1d(path: str, name: str, axes: str = "in out", part: int | None = None) -> Entry:
    """Describe a weight of transformers' `Conv1D`, kept as [in, out] (GPT-2)."""
    return Entry(path, name, axes, "conv1d", part)


def embedding(path: str, name: str, axes: str = "in out") -> Entry:
    """Describe a table of `torch.nn.Embedding`, [entries, features] in JAX and in torch."""
    return Entry(path, name, axes, "embedding")


def conv(path: str, name: str, axes: str = "window* in out") -> Entry:
    """Describe a kernel of a convolution, [out, in, *window] in torch."""
    return Entry(path, name, axes, "conv")


def experts(
    path: str, name: str, axes: str = "expert in out", part: int | None = None, transposed: bool = False
) -> Entry:
    """Describe one parameter for all experts, [experts, out, in] in torch, or [experts, in, out] if transposed."""
    return Entry(path, name, axes, "experts_transposed" if transposed else "experts", part)


def array(path: str, name: str, axes: str = "out*", part: int | None = None) -> Entry:
    """Describe an array that has no factors, such as a bias or a scale.

    `name` is that of the tensor; the axes "keep*" keep its shape as it is.
    """
    return Entry(path, name, axes, "array", part)
