"""Key maps: tables that say which tensor of a torch model each parameter of a JAX model is.

    KeyMap(
        linear("layer_{i}/query/kernel", "encoder.layer.{i}.attention.self.query"),
        linear("layer_{i}/out/kernel", "encoder.layer.{i}.attention.output.dense", "in* out"),
        array("layer_{i}/norm/scale", "encoder.layer.{i}.attention.output.LayerNorm.weight"),
    )

An entry pairs the path of a parameter with the name of a module. A `{name}` stands for a number, and `{{` for a brace.
The axes are those of the JAX array, in order: `in` and `out` are inputs and outputs of the product, `window` is the
window of a convolution, and `in*` or `out*` stands for one axis or more, such as the heads of an attention and their
size. A `{name}` that the module has and the path lacks is an axis: `"i in out"` is for layers that are stacked along
the first axis. `{k|v}` in the module's name, and `k|v` as an axis, is a parameter that holds these modules.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.argument_checks import check_each
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.core.text import printable
from lora_jax.interop.entries import MODULE_KINDS, Entry
from lora_jax.interop.name_templates import NameTable, choose, fill, placeholders

Array = np.ndarray[Any, Any]


_FLATTENED = ("in", "out")  # torch has a single axis where we have several of these in a row


class KeyMap:
    """A table that pairs the parameters of a JAX model with the modules of the same model in torch.

    Args:
        entries: of several that match a path, the first one counts.

    Raises:
        LoraError: one of them is no entry.
    """

    def __init__(self, *entries: Entry) -> None:
        check_each("KeyMap(*entries)", "entries", entries, Entry, 'entries, such as key_maps.linear("up", "mlp.up")')
        self.entries = entries

    def __add__(self, other: "KeyMap") -> "KeyMap":
        return KeyMap(*self.entries, *other.entries)

    def under(self, path: str = "", name: str = "") -> "KeyMap":
        """Return the key map for the same model inside another one: all paths and names get these prefixes.

        Args:
            path: what comes before each path, such as "encoder/".
            name: what comes before each name, such as "bert.".

        Raises:
            LoraError: an entry does not go with these prefixes, as where both have a `{name}`.
        """
        return KeyMap(*(dataclasses.replace(e, path=path + e.path, name=name + e.name) for e in self.entries))

    def renamed(self, old: str, new: str) -> "KeyMap":
        """Return the key map in which names that begin with `old` begin with `new`, such as of a model inside another.

        Args:
            old: the beginning of names.
            new: what takes its place.

        Raises:
            LoraError: an entry does not go with its new name, as where that has another `{name}`.

        >>> KeyMap(Entry("up/kernel", "model.up", "in out", "linear")).renamed("model.", "text.model.").entries[0].name
        'text.model.up'
        """
        return KeyMap(
            *(
                dataclasses.replace(e, name=new + e.name.removeprefix(old)) if e.name.startswith(old) else e
                for e in self.entries
            )
        )

    def stacked(self, placeholder: str = "i", axis: int = 0) -> "KeyMap":
        """Return the key map for layers that are stacked along an axis: `layers/{i}/kernel` is `layers/kernel`.

        Args:
            placeholder: the name in braces in the paths of the entries.
            axis: of the stacked parameters, along which the layers are.

        Raises:
            LoraError: an entry has `in*` or `out*` before that axis, which would not say where it is.
        """
        mark = "{" + placeholder + "}"

        def change(entry: Entry) -> Entry:
            if placeholder not in placeholders(entry.path):
                return entry
            path = re.sub(rf"/{re.escape(mark)}(?=/|$)|[_.]?(?<!{{){re.escape(mark)}", "", entry.path)
            before, after = entry.axes.split()[:axis], entry.axes.split()[axis:]
            if axis < 0 or len(before) < axis or any(word.endswith("*") for word in before):
                raise LoraError(
                    f"stacked(axis={axis}): {entry.path!r} has the axes {entry.axes!r}, which do not say where that "
                    "is; write a word for each axis before it."
                )
            return dataclasses.replace(entry, path=path, axes=" ".join([*before, placeholder, *after]))

        return KeyMap(*map(change, self.entries))

    def match(self, shapes: Mapping[str, tuple[int, ...]], strict: bool = True) -> "dict[str, ParameterMatch]":
        """Find the torch tensors of each parameter.

        Args:
            shapes: `{path: shape}` of the parameters.
            strict: raise for a parameter that no entry matches, instead of leaving it out.

        Returns:
            `{path: ParameterMatch}`: the entry, its tensors and the parameter's axes.

        Raises:
            LoraError: no entry matches a path; the axes do not fit its shape; two parameters are one tensor.
        """
        matches: dict[str, ParameterMatch] = {}
        taken: dict[tuple[str, int | None], str] = {}
        for path, shape in shapes.items():
            if (found := self._match(path, shape)) is None and strict:
                known = nearest(path, [entry.path for entry in self.entries], n=3)
                raise LoraError(
                    f"the key map has no entry for {path!r}; the nearest are {', '.join(map(repr, known)) or 'none'}. "
                    'Add one, such as key_maps.linear("layer_{i}/query/kernel", "encoder.layer.{i}.self.query").'
                )
            if found is None:
                continue
            matches[path] = found
            for name in found.tensors().values():
                key = (name, found.entry.part)
                if key in taken:
                    raise LoraError(f"the key map gives {path!r} and {taken[key]!r} the same tensor {name!r}.")
                taken[key] = path
        return matches

    @functools.cached_property
    def _table(self) -> NameTable:
        return NameTable([entry.path for entry in self.entries])

    def _match(self, path: str, shape: tuple[int, ...]) -> "ParameterMatch | None":
        """Return the match of the first entry whose path fits."""
        if (first := self._table.first(path)) is None:
            return None
        order, numbers = first
        entry = self.entries[order]
        words = entry.words(len(shape))
        if words is None:
            raise LoraError(
                f"{path!r} has shape {list(shape)}, but the key map says that its axes are {entry.axes!r}: mend "
                "that entry, where 'in*' and 'out*' stand for one axis or more."
            )
        indices = placeholders(entry.name)
        unstacked = tuple(i for i, word in enumerate(words) if word in indices)
        for i in unstacked:
            if "|" in words[i] and shape[i] != len(words[i].split("|")):
                raise LoraError(
                    f"{path!r} has shape {list(shape)}, but the key map says that its axis {i} holds the modules "
                    f"{words[i]!r}: mend that entry."
                )
        names = {}
        for index in itertools.product(*(range(shape[i]) for i in unstacked)):
            own = {words[i]: choose(words[i], n) for i, n in zip(unstacked, index, strict=True)}
            names[index] = fill(entry.name, numbers | own)
        return ParameterMatch(path, shape, entry, order, words, unstacked, names)


class ParameterMatch(NamedTuple):
    """A parameter of the JAX model that an entry of a key map matches, and its modules in torch.

    Axes that torch has a module of its own for at each index, such as those of stacked layers, are `unstacked`.
    """

    path: str
    shape: tuple[int, ...]
    entry: Entry
    order: int  # the position of the entry in the key map
    words: tuple[str, ...]  # what each axis is: "in", "out", "window", "expert", "keep" or a placeholder
    unstacked: tuple[int, ...]  # the axes of the parameter that its modules do not have
    names: dict[tuple[int, ...], str]  # of its modules, by the index along the unstacked axes

    @property
    def axes(self) -> KernelAxes:
        """Return which axes of the parameter are inputs, outputs and stacked."""
        groups: dict[str, list[int]] = {"stack": [], "inputs": [], "outputs": []}
        for i, word in enumerate(self.words):
            groups[{"in": "inputs", "window": "inputs", "out": "outputs"}.get(word, "stack")].append(i)
        return KernelAxes(*map(tuple, groups.values()))

    @property
    def outputs(self) -> int:
        """Return the number of outputs, that is the product of the output axes."""
        return math.prod(n for n, word in zip(self.shape, self.words, strict=True) if word == "out")

    def module_axes(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the words and the sizes of the parameter's axes that a single module has."""
        kept = [i for i in range(len(self.shape)) if i not in self.unstacked]
        return tuple(self.words[i] for i in kept), tuple(self.shape[i] for i in kept)

    def sizes_of(self, word: str) -> tuple[int, ...]:
        """Return the sizes of a module's axes of one kind, such as those of its "window"."""
        words, sizes = self.module_axes()
        return tuple(size for own, size in zip(words, sizes, strict=True) if own == word)

    def tensors(self) -> dict[tuple[int, ...], str]:
        """Return the names of its tensors, by the index along the unstacked axes."""
        return {index: name + self.entry.suffix for index, name in self.names.items()}

    @property
    def experts(self) -> int:
        """Return the number of experts in one tensor."""
        return math.prod(self.sizes_of("expert"))

    def output_axis(self, ndim: int) -> int:
        """Return the axis of the outputs in a torch tensor of `ndim` axes."""
        return ndim - 1 if self.entry.kind == "array" else MODULE_KINDS[self.entry.kind].axes.split().index("out")

    def outputs_of(self, tensor: Array, start: int) -> Array:
        """Cut the outputs of this parameter, which begin at `start`, out of a tensor of its module."""
        if self.entry.part is None:
            return tensor
        where: list[Any] = [slice(None)] * tensor.ndim
        where[self.output_axis(tensor.ndim)] = slice(start, start + self.outputs)
        return tensor[tuple(where)]

    def factors_from_torch(self, a: Array, b: Array, start: int) -> tuple[Array, Array]:
        """Convert torch's A [r, in] and B [out, r] of one module to [*experts, *inputs, r] and [*experts, r, *outputs].

        Args:
            start: where the outputs of this parameter begin among those of the module.

        Raises:
            LoraError: the shapes are not those of the parameter's factors.
        """
        words, sizes = self.module_axes()
        inputs, n = self._inputs_in_torch(), self.outputs
        experts, count = self.sizes_of("expert"), self.experts
        rank = a.shape[0] // count
        expected = (rank * count, *_flattened([words[i] for i in inputs], [sizes[i] for i in inputs]))
        fits = b.shape[0] == n if self.entry.part is None else b.shape[0] >= start + n
        if a.shape != expected or not fits or b.size != b.shape[0] * rank * count:
            raise LoraError(
                f"{printable(next(iter(self.names.values())))} has factors {list(a.shape)} and {list(b.shape)}, which "
                f"do not fit {self.path!r} of shape {list(self.shape)}: another model, or another key map."
            )
        a = a.reshape(*experts, rank, *(sizes[i] for i in inputs))
        e = len(experts)
        a = a.transpose(*range(e), *(e + 1 + np.argsort(inputs)), e)
        b = b.reshape(b.shape[0], rank, *experts)[start : start + n]
        b = b.transpose(*range(2, 2 + e), 1, 0)
        return a, self.in_our_order(b.reshape(*experts, rank, *self.sizes_of("out")))

    def factors_to_torch(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Convert A and B of one module to torch's A [r, in] and B [out, r], the inverse of `factors_from_torch`."""
        words, sizes = self.module_axes()
        inputs, e = self._inputs_in_torch(), words.count("expert")
        rank = a.shape[-1]
        positions = np.argsort(np.argsort(inputs))  # of each of torch's inputs among ours
        a = a.transpose(*range(e), a.ndim - 1, *(e + positions))
        a = a.reshape(-1, *_flattened([words[i] for i in inputs], [sizes[i] for i in inputs]))
        b = self.in_torch_order(b)
        b = b.reshape(*b.shape[:e], rank, -1).transpose(e + 1, e, *range(e)).reshape(self.outputs, -1)
        return a, b.reshape(*b.shape, *(1 for word in words if word == "window"))

    def _inputs_in_torch(self) -> list[int]:
        """Return the input axes of a module's part of the parameter, in torch's order."""
        words, _ = self.module_axes()
        return [i for i in _order(words, self.entry.kind) if words[i] in ("in", "window")]

    def where(self, index: tuple[int, ...]) -> tuple[Any, ...]:
        """Return the index of one module's part in an array with the parameter's axes."""
        where: list[Any] = [slice(None)] * len(self.shape)
        for axis, i in zip(self.unstacked, index, strict=True):
            where[axis] = i
        return tuple(where)

    def to_torch(self, ours: Array) -> Array:
        """Convert one module's part of the parameter to its torch tensor, or to this parameter's outputs of that."""
        words, _ = self.module_axes()
        ours = self.in_torch_size(self.in_torch_order(ours, _last_output(words)))
        moved = ours.transpose(order := _order(words, self.entry.kind))
        return moved.reshape(_flattened([words[i] for i in order], moved.shape))

    def from_torch(self, tensor: Array, index: tuple[int, ...]) -> Array:
        """Convert a torch tensor, or this parameter's outputs of it, to one module's part of the parameter.

        Raises:
            LoraError: the tensor does not have the parameter's shape.
        """
        words, sizes = self.module_axes()
        order = _order(words, self.entry.kind)
        moved = tuple(sizes[i] for i in order)
        expected = _flattened([words[i] for i in order], moved)
        if tensor.shape != expected:
            raise LoraError(
                f"{printable(self.tensors()[index])} has shape {list(tensor.shape)}, but {self.path!r} of shape "
                f"{list(self.shape)} needs {list(expected)}: another model, or another key map."
            )
        ours = tensor.reshape(moved).transpose(np.argsort(order))
        return self.in_our_size(self.in_our_order(ours, _last_output(words)))

    def in_our_order(self, array: Array, axis: int = -1) -> Array:
        """Return an array whose axis of a head's size is in torch's order in our order."""
        return _taken(array, np.argsort(_halves(array.shape[axis])), axis) if self.entry.interleaved else array

    def in_torch_order(self, array: Array, axis: int = -1) -> Array:
        """Return an array whose axis of a head's size is in our order in torch's order."""
        return _taken(array, _halves(array.shape[axis]), axis) if self.entry.interleaved else array

    def in_our_size(self, array: Array) -> Array:
        """Return torch's numbers times the entry's factor."""
        return array if self.entry.factor == 1 else _times(array, self.entry.factor_of(self.sizes_of("out")[-1]))

    def in_torch_size(self, array: Array) -> Array:
        """Return our numbers without the entry's factor."""
        return array if self.entry.factor == 1 else _times(array, self.entry.factor_of(self.sizes_of("out")[-1], True))


def parts_by_tensor(matches: Mapping[str, ParameterMatch]) -> dict[str, list[ParameterMatch]]:
    """Return the parameters that each torch tensor consists of, in the order of its outputs, by the tensor's name."""
    groups: dict[str, list[ParameterMatch]] = {}
    for match in matches.values():
        for name in match.tensors().values():
            groups.setdefault(name, []).append(match)
    return {name: sorted(parts, key=lambda match: match.entry.part or 0) for name, parts in groups.items()}


def output_offsets(matches: Mapping[str, ParameterMatch]) -> dict[str, int]:
    """Return where the outputs of each parameter begin among those of its module, by the parameter's path."""
    offsets = {}
    for parts in parts_by_tensor(matches).values():
        offset = 0
        for match in parts:
            offsets[match.path] = offset
            offset += match.outputs
    return offsets


def parameter_parts(
    matches: Mapping[str, ParameterMatch], tensors: Mapping[str, Array]
) -> dict[str, dict[tuple[int, ...], Array]]:
    """Return what these tensors hold of each parameter, converted from torch, by path and index of the module."""
    offsets = output_offsets(matches)
    found: dict[str, dict[tuple[int, ...], Array]] = {}
    for path, match in matches.items():
        for index, name in match.tensors().items():
            if name in tensors:
                part = match.from_torch(match.outputs_of(tensors[name], offsets[path]), index)
                found.setdefault(path, {})[index] = part
    return found


def _last_output(words: Sequence[str]) -> int:
    """Return the last axis of outputs, or the last one of all if there is none."""
    return max((i for i, word in enumerate(words) if word == "out"), default=-1)


def _halves(size: int) -> list[int]:
    """Return where the entries of two halves are among pairs: the even ones, and then the odd ones."""
    return [*range(0, size, 2), *range(1, size, 2)]


def _taken(array: Array, order: Any, axis: int) -> Array:
    """Return the entries of one axis in this order."""
    where: list[Any] = [slice(None)] * (axis % array.ndim)
    return array[(*where, np.asarray(order))]


def _times(array: Array, factor: float) -> Array:
    """Return the product, in fp32 or wider and then rounded once to the array's dtype."""
    wide = np.dtype(np.float64 if array.dtype == np.float64 else np.float32)
    return (array.astype(wide) * np.asarray(factor, wide)).astype(array.dtype)


def _order(words: Sequence[str], kind: str) -> list[int]:
    """Return the positions of these axes in torch's order."""
    order = MODULE_KINDS[kind].axes.split()
    return sorted(range(len(words)), key=lambda i: (order.index(words[i]), i))


def _flattened(words: Sequence[str], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of the axes that torch has, in which neighbouring inputs, or outputs, are one axis."""
    found: list[int] = []
    for i, (word, size) in enumerate(zip(words, sizes, strict=True)):
        if i and word in _FLATTENED and words[i - 1] == word:
            found[-1] *= size
        else:
            found.append(size)
    return tuple(found)
