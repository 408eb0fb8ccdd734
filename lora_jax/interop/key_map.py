"""Which tensor of a torch model each parameter is: tables from pytree paths to module names, with the axes of both.

    KeyMap(
        linear("layer_{i}/query/kernel", "encoder.layer.{i}.attention.self.query"),
        linear("layer_{i}/out/kernel", "encoder.layer.{i}.attention.output.dense", "in* out"),
        array("layer_{i}/norm/scale", "encoder.layer.{i}.attention.output.LayerNorm.weight"),
    )

A `{name}` stands for a number. In the axes, which are those of our array in order, `in` and `out` are inputs and
outputs of the product, `window` the window of a convolution, and `in*` or `out*` one or more such axes, as the heads of
an attention. A `{name}` of the module that the path lacks is an axis: `"i in out"` for layers that are stacked along
the first one.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest

Array = np.ndarray[Any, Any]

# Torch's axes of each kind of module's weight, and what its name ends with.
KINDS = {
    "linear": ("out in", ".weight"),
    "conv1d": ("in out", ".weight"),  # transformers' Conv1D, of GPT-2
    "embedding": ("in out", ".weight"),
    "conv": ("out in window", ".weight"),
    "experts": ("expert out in", ""),  # one parameter for all experts
    "experts_transposed": ("expert in out", ""),
    "array": ("keep out", ""),
}
_FLAT = ("in", "out")  # such axes are one axis in torch


@dataclass(frozen=True)
class Entry:
    """One line of a table. Made by `linear`, `embedding`, `conv`, `conv1d`, `experts`, `array`."""

    path: str  # of the parameter, as "layer_{i}/query/kernel"
    name: str  # of the module, as "encoder.layer.{i}.attention.self.query"; of an array or of experts all of its name
    axes: str
    kind: str
    part: int | None = None  # its outputs are this part of the module's, which are in one piece there

    def __post_init__(self) -> None:
        words, known = self.axes.split(), _placeholders(self.path)
        unknown = [name for name in _placeholders(self.name) if name not in known and name not in words]
        plain = [word.removesuffix("*") for word in words]
        foreign = [w for w in plain if w not in ("in", "out", "window", "expert", "keep", *_placeholders(self.name))]
        if not words or sum(word.endswith("*") for word in words) > 1 or unknown or foreign:
            found = f"unknown are {', '.join([*unknown, *foreign])}" if unknown or foreign else "one * at most"
            raise LoraError(
                f"the axes {self.axes!r} of {self.path!r} for {self.name!r}: {found}. Expected words such as 'in out', "
                "with a {name} of the module that is not in the path as an axis."
            )

    @property
    def suffix(self) -> str:
        """What the name of the weight itself has beyond that of the module."""
        return KINDS[self.kind][1]

    @property
    def is_of_experts(self) -> bool:
        return self.kind.startswith("experts")

    def words(self, ndim: int) -> tuple[str, ...] | None:
        """What each of so many axes is; None if there cannot be so many."""
        words = self.axes.split()
        more = ndim - len(words)
        starred = next((i for i, word in enumerate(words) if word.endswith("*")), None)
        if more < 0 or (more and starred is None):
            return None
        if starred is not None:
            words[starred : starred + 1] = [words[starred][:-1]] * (more + 1)
        return tuple(words)


def linear(path: str, name: str, axes: str = "in out", part: int | None = None) -> Entry:
    """A weight of `torch.nn.Linear`, which torch keeps as [out, in]."""
    return Entry(path, name, axes, "linear", part)


def conv1d(path: str, name: str, axes: str = "in out", part: int | None = None) -> Entry:
    """A weight of transformers' `Conv1D`, kept as [in, out] (GPT-2)."""
    return Entry(path, name, axes, "conv1d", part)


def embedding(path: str, name: str, axes: str = "in out") -> Entry:
    """A table of `torch.nn.Embedding`, [entries, features] here and there."""
    return Entry(path, name, axes, "embedding")


def conv(path: str, name: str, axes: str = "window* in out") -> Entry:
    """A kernel of a convolution, [out, in, *window] in torch."""
    return Entry(path, name, axes, "conv")


def experts(
    path: str, name: str, axes: str = "expert in out", part: int | None = None, transposed: bool = False
) -> Entry:
    """One parameter for all experts, [experts, out, in] in torch, or transposed."""
    return Entry(path, name, axes, "experts_transposed" if transposed else "experts", part)


def array(path: str, name: str, axes: str = "out*", part: int | None = None) -> Entry:
    """An array that is never adapted: a bias, a scale. `name` is that of the tensor; "keep*" keeps its shape."""
    return Entry(path, name, axes, "array", part)


class KeyMap:
    """A table between the parameters of a JAX model and the modules of its torch twin.

    Args:
        entries: the first one that matches a path counts.
    """

    def __init__(self, *entries: Entry) -> None:
        self.entries = entries

    def __add__(self, other: "KeyMap") -> "KeyMap":
        return KeyMap(*self.entries, *other.entries)

    def under(self, path: str = "", name: str = "") -> "KeyMap":
        """The same table for a model that is a part of another one: all paths and names begin with these."""
        return KeyMap(*(dataclasses.replace(e, path=path + e.path, name=name + e.name) for e in self.entries))

    def stacked(self, placeholder: str = "i") -> "KeyMap":
        """The same table for layers that are stacked along the first axis: `layers/{i}/kernel` is `layers/kernel`."""
        mark = "{" + placeholder + "}"

        def change(entry: Entry) -> Entry:
            if mark not in entry.path:
                return entry
            path = re.sub(rf"/{re.escape(mark)}(?=/|$)|[_.]?{re.escape(mark)}", "", entry.path)
            return dataclasses.replace(entry, path=path, axes=f"{placeholder} {entry.axes}")

        return KeyMap(*map(change, self.entries))

    def place(self, shapes: Mapping[str, tuple[int, ...]], strict: bool = True) -> "dict[str, Placed]":
        """Where each of these parameters is. If not strict, those without an entry are left out.

        Raises:
            LoraError: no entry matches a path; the axes do not fit its shape; two parameters are one tensor.
        """
        placed: dict[str, Placed] = {}
        taken: dict[tuple[str, int | None], str] = {}
        for path, shape in shapes.items():
            found = self._place(path, shape)
            if found is None and strict:
                known = nearest(path, [entry.path for entry in self.entries], n=3)
                raise LoraError(
                    f"the key map has no entry for {path!r}; the nearest are {', '.join(map(repr, known)) or 'none'}. "
                    'Add one, such as key_maps.linear("layer_{i}/query/kernel", "encoder.layer.{i}.self.query").'
                )
            if found is None:
                continue
            placed[path] = found
            for name in found.tensors().values():
                place = (name, found.entry.part)
                if place in taken:
                    raise LoraError(f"the key map gives {path!r} and {taken[place]!r} the same tensor {name!r}.")
                taken[place] = path
        return placed

    def _place(self, path: str, shape: tuple[int, ...]) -> "Placed | None":
        for order, entry in enumerate(self.entries):
            if (match := _pattern(entry.path).fullmatch(path)) is None:
                continue
            words = entry.words(len(shape))
            if words is None:
                raise LoraError(
                    f"{path!r} has shape {list(shape)}, but the key map says that its axes are {entry.axes!r}: mend "
                    "that entry, where 'in*' and 'out*' stand for one axis or more."
                )
            unstacked = tuple(i for i, word in enumerate(words) if word in _placeholders(entry.name))
            names = {}
            for index in itertools.product(*(range(shape[i]) for i in unstacked)):
                numbers = match.groupdict() | {words[i]: str(n) for i, n in zip(unstacked, index, strict=True)}
                names[index] = entry.name.format(**numbers)
            return Placed(path, shape, entry, order, words, unstacked, names)
        return None


class Placed(NamedTuple):
    """One parameter, and the modules that it is in torch: one for each index of the stacked axes."""

    path: str
    shape: tuple[int, ...]
    entry: Entry
    order: int  # of the entry in the key map
    words: tuple[str, ...]
    unstacked: tuple[int, ...]  # axes of ours, along which each index is a module of its own
    names: dict[tuple[int, ...], str]

    @property
    def axes(self) -> KernelAxes:
        groups: dict[str, list[int]] = {"stack": [], "inputs": [], "outputs": []}
        for i, word in enumerate(self.words):
            groups[{"in": "inputs", "window": "inputs", "out": "outputs"}.get(word, "stack")].append(i)
        return KernelAxes(*map(tuple, groups.values()))

    @property
    def outputs(self) -> int:
        """The number of outputs, all axes of them together."""
        return math.prod(n for n, word in zip(self.shape, self.words, strict=True) if word == "out")

    def inner(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The words and the sizes of the axes that a single module has."""
        kept = [i for i in range(len(self.shape)) if i not in self.unstacked]
        return tuple(self.words[i] for i in kept), tuple(self.shape[i] for i in kept)

    def tensors(self) -> dict[tuple[int, ...], str]:
        return {index: name + self.entry.suffix for index, name in self.names.items()}

    @property
    def experts(self) -> int:
        """The number of experts in one tensor."""
        words, sizes = self.inner()
        return math.prod(size for word, size in zip(words, sizes, strict=True) if word == "expert")

    def output_axis(self, ndim: int) -> int:
        """Torch's axis of the outputs."""
        return ndim - 1 if self.entry.kind == "array" else KINDS[self.entry.kind][0].split().index("out")

    def outputs_of(self, tensor: Array, start: int) -> Array:
        """The part of a module's tensor that is ours."""
        if self.entry.part is None:
            return tensor
        where: list[Any] = [slice(None)] * tensor.ndim
        where[self.output_axis(tensor.ndim)] = slice(start, start + self.outputs)
        return tensor[tuple(where)]

    def factors_from_torch(self, a: Array, b: Array, start: int) -> tuple[Array, Array]:
        """Our A [*stack, *inputs, r] and B [*stack, r, *outputs] of one module; our outputs are torch's from `start`.

        Raises:
            LoraError: the shapes are not those of our parameter's factors.
        """
        words, sizes = self.inner()
        inputs, n = self._inputs_in_torch(), self.outputs
        experts = tuple(size for word, size in zip(words, sizes, strict=True) if word == "expert")
        count = self.experts
        rank = a.shape[0] // count
        expected = (rank * count, *_flat([words[i] for i in inputs], [sizes[i] for i in inputs]))
        fits = b.shape[0] == n if self.entry.part is None else b.shape[0] >= start + n
        if a.shape != expected or not fits or b.size != b.shape[0] * rank * count:
            raise LoraError(
                f"{next(iter(self.names.values()))} has factors {list(a.shape)} and {list(b.shape)}, which do not fit "
                f"{self.path!r} of shape {list(self.shape)}: another model, or another key map."
            )
        a = a.reshape(*experts, rank, *(sizes[i] for i in inputs))
        e = len(experts)
        a = a.transpose(*range(e), *(e + 1 + np.argsort(inputs)), e)
        b = b.reshape(b.shape[0], rank, *experts)[start : start + n]
        b = b.transpose(*range(2, 2 + e), 1, 0)
        outputs = tuple(size for word, size in zip(words, sizes, strict=True) if word == "out")
        return a, b.reshape(*experts, rank, *outputs)

    def factors_to_torch(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Torch's A [r, in] and B [out, r] of one module, from ours."""
        words, sizes = self.inner()
        inputs, e = self._inputs_in_torch(), words.count("expert")
        rank = a.shape[-1]
        places = np.argsort(np.argsort(inputs))  # of each of torch's inputs among ours
        a = a.transpose(*range(e), a.ndim - 1, *(e + places))
        a = a.reshape(-1, *_flat([words[i] for i in inputs], [sizes[i] for i in inputs]))
        b = b.reshape(*b.shape[:e], rank, -1).transpose(e + 1, e, *range(e)).reshape(self.outputs, -1)
        return a, b.reshape(*b.shape, *(1 for word in words if word == "window"))

    def _inputs_in_torch(self) -> list[int]:
        """Our axes that are inputs, in torch's order."""
        words, _ = self.inner()
        return [i for i in _order(words, self.entry.kind) if words[i] in ("in", "window")]

    def where(self, index: tuple[int, ...]) -> tuple[Any, ...]:
        """Of an array with our axes, where the part is that is one module."""
        where: list[Any] = [slice(None)] * len(self.shape)
        for axis, i in zip(self.unstacked, index, strict=True):
            where[axis] = i
        return tuple(where)

    def to_torch(self, ours: Array) -> Array:
        """The tensor of one module, or of our part of it, from our array."""
        words, _ = self.inner()
        order = _order(words, self.entry.kind)
        moved = ours.transpose(order)
        return moved.reshape(_flat(tuple(words[i] for i in order), moved.shape))

    def from_torch(self, tensor: Array, index: tuple[int, ...]) -> Array:
        """Our array from the tensor of one module, or of our part of it.

        Raises:
            LoraError: the tensor has another shape than our parameter.
        """
        words, sizes = self.inner()
        order = _order(words, self.entry.kind)
        moved = tuple(sizes[i] for i in order)
        expected = _flat(tuple(words[i] for i in order), moved)
        if tensor.shape != expected:
            raise LoraError(
                f"{self.tensors()[index]} has shape {list(tensor.shape)}, but {self.path!r} of shape "
                f"{list(self.shape)} needs {list(expected)}: another model, or another key map."
            )
        return tensor.reshape(moved).transpose(np.argsort(order))


def _order(words: Sequence[str], kind: str) -> list[int]:
    """Our axes in torch's order."""
    order = KINDS[kind][0].split()
    return sorted(range(len(words)), key=lambda i: (order.index(words[i]), i))


def groups_of(placed: Mapping[str, Placed]) -> dict[str, list[Placed]]:
    """The parameters that are parts of one module, in order, by the names of modules."""
    groups: dict[str, list[Placed]] = {}
    for place in placed.values():
        for name in place.tensors().values():
            groups.setdefault(name, []).append(place)
    return {name: sorted(parts, key=lambda place: place.entry.part or 0) for name, parts in groups.items()}


def starts_of(placed: Mapping[str, Placed]) -> dict[str, int]:
    """Where the outputs of each parameter begin among those of its module."""
    starts = {}
    for parts in groups_of(placed).values():
        start = 0
        for place in parts:
            starts[place.path] = start
            start += place.outputs
    return starts


def _flat(words: Sequence[str], sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes in torch: inputs and outputs are one axis each."""
    found: list[int] = []
    for i, (word, size) in enumerate(zip(words, sizes, strict=True)):
        if i and word in _FLAT and words[i - 1] == word:
            found[-1] *= size
        else:
            found.append(size)
    return tuple(found)


def _placeholders(text: str) -> list[str]:
    return re.findall(r"{(\w+)}", text)


def _pattern(path: str) -> re.Pattern[str]:
    parts = re.split(r"{(\w+)}", path)
    return re.compile("".join(rf"(?P<{part}>\d+)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))
