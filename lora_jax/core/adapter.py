"""What every kind of adapter can do.

A kind is two classes in one file: a rule, which is what the user writes (`Lora(rank=8)`), and an adapter, which
holds the arrays of one weight. The adapter's `merge` is its definition; every other method is an optimisation that
must equal it.

Axes: s stacked matrices, T rows of x, d inputs and k outputs of one matrix, r rank.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lora_jax.core._compat import JaxprEqn
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import is_array, nearest
from lora_jax.core.products import Product

Layout = tuple[str, ...]  # the groups of W's axes that an array has, in order; any other name is one axis of its own


class Rule(abc.ABC):
    """What to do with the weights that a pattern matches. Checked when made, before any work."""

    whole: ClassVar[bool] = False  # it is for arrays of any kind, used in any way
    reads_weight: ClassVar[bool] = False  # `init` looks at the numbers in W, not at its shape alone

    @abc.abstractmethod
    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> "Adapter":
        """A fresh adapter for a weight, of which only the shape is known unless the rule `reads_weight`."""

    @abc.abstractmethod
    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        """FLOPs that the adapter adds to a product with so many rows of x @ A and of h @ B, over all of a stack."""

    def at(self, path: str, shape: tuple[int, ...]) -> Self:
        """The rule for one weight, where it depends on the weight."""
        return self

    def among(self, fans: Iterable[tuple[int, int]]) -> Self:
        """The rule, where it depends on the inputs and outputs of all the matrices that it is used for."""
        return self

    def problem(self, shape: tuple[int, ...], axes: KernelAxes) -> str | None:
        """Why it cannot be used for a weight along these axes."""
        return None


class Adapter(abc.ABC):
    """A small change of one frozen weight W, as a pytree of its own beside W.

    Every array of an adapter begins with W's stack axes, so that `scan` and `vmap` slice it along with W.
    """

    axes: KernelAxes
    layout: ClassVar[Mapping[str, Layout]]  # of each array
    frozen: ClassVar[tuple[str, ...]] = ()  # fields that are never trained
    additive: ClassVar[bool] = True  # W' is W and a sum that W is no part of
    reads_weight: bool = False  # `enter` looks at W
    traced_once: ClassVar[bool] = True  # equal products with equal adapters share a trace

    @abc.abstractmethod
    def merge(self, w: jax.Array) -> jax.Array:
        """W -> W', both in fp32 or better and with W's own axes."""

    @abc.abstractmethod
    def apply(self, product: Product) -> jax.Array:
        """y = x @ W [*s, T, k] -> x @ W' [*s, T, k], in y's dtype, without forming W'."""

    def enter(self, w: jax.Array) -> "Adapter | jax.Array":
        """What stands for W' in a program, made once where W comes in: an adapter of W with the same `merge`, in a form
        that follows all that programs do to weights; or W' itself, where that is no larger than the adapter.
        """
        return self

    def explicit(self) -> "Adapter":
        """The same adapter in a form that others can be joined with, and that can be cut along inputs and outputs."""
        return self

    @abc.abstractmethod
    def transpose(self) -> "Adapter":
        """The adapter of W with inputs and outputs exchanged, for programs that also compute y @ W^T."""

    # What a program does to a weight on its way to a product, done to the adapter: each of these commutes with
    # `merge`. All follow from the layout.

    @abc.abstractmethod
    def scale_by(self, factor: jax.Array) -> "Adapter":
        """The adapter of factor * W, for a scalar factor."""

    @abc.abstractmethod
    def concatenate(self, parts: Sequence["Adapter | None"], sizes: Sequence[int], axis: int) -> "Adapter | None":
        """The adapter of [W0 | W1 | ...], or None where this kind has none. A part without adapter is frozen.

        `self` is the first of the parts that is an adapter; `sizes` are those of the parts along the axis.
        """

    def arrays(self) -> dict[str, jax.Array]:
        """Its arrays, by the names of their fields. Some kinds can do without one of theirs."""
        found = {name: getattr(self, name) for name in field_names(self, static=False)}
        return {name: array for name, array in found.items() if array is not None}

    def rebuild(
        self, axes: KernelAxes, change: Callable[[jax.Array, Layout], Any], stack_only: bool = False
    ) -> "Adapter":
        """The adapter with every array changed, and with these axes. With `stack_only` each matrix stays as it is."""
        arrays = {name: change(array, self.layout[name]) for name, array in self.arrays().items()}
        return dataclasses.replace(self, axes=axes, **arrays)  # type: ignore[type-var]

    def stop(self) -> Self:
        """The adapter of stop_gradient(W)."""
        return jax.tree.map(jax.lax.stop_gradient, self)

    def permute(self, permutation: tuple[int, ...]) -> "Adapter":
        """The adapter of W transposed by a permutation."""

        def change(array: jax.Array, layout: Layout) -> jax.Array:
            order: list[int] = []
            for _, start, group in spans(layout, self.axes):
                places = [0 if axis is None else permutation.index(axis) for axis in group]
                order += [start + i for i in sorted(range(len(group)), key=places.__getitem__)]
            return array if order == sorted(order) else array.transpose(order)

        groups = [[permutation.index(axis) for axis in group] for group in (self.axes.inputs, self.axes.outputs)]
        in_order = all(group == sorted(group) for group in groups)
        return self.rebuild(self.axes.permute(permutation), change, stack_only=in_order)

    def replace_axes(self, first: int, count: int, n: int, fn: Callable[[jax.Array, int], jax.Array]) -> "Adapter":
        """The adapter of W with `count` neighbouring axes of one group made into n axes.

        `fn(array, position)` does that to an array which has these axes from `position` on.
        """
        name, axes = self.axes.group(first), self.axes
        for _ in range(count):
            axes = axes.drop(first)
        for i in range(n):
            axes = axes.insert(first + i, name)

        def change(array: jax.Array, layout: Layout) -> jax.Array:
            for part, start, group in spans(layout, self.axes):
                if part == name:
                    return fn(array, start + group.index(first))
            return array

        return self.rebuild(axes, change, stack_only=name == "stack")

    def rows(
        self, axis: int, n: int, fn: Callable[[jax.Array, int], jax.Array], stack: Sequence[int] = ()
    ) -> "Adapter":
        """The adapter of single rows of W, or single matrices of a stack, picked along an axis into n axes.

        Each matrix along the axes `stack` has rows of its own picked.
        """
        return self.replace_axes(axis, 1, n, fn)

    def insert_axis(self, axis: int, name: str = "stack") -> "Adapter":
        """The adapter of W with a new axis of size 1."""

        def change(array: jax.Array, layout: Layout) -> jax.Array:
            for part, start, group in spans(layout, self.axes):
                if part == name:
                    return jnp.expand_dims(array, start + sum(i is not None and i < axis for i in group))
            return array

        return self.rebuild(self.axes.insert(axis, name), change, stack_only=name == "stack")

    def used_as(self, axes: KernelAxes, eqn: JaxprEqn) -> "Adapter | None":
        """This adapter for a product along these axes; None if it was made for other ones.

        The weight may be used the other way round, and its axes of size 1 may be read in any way.
        """
        if axes in (self.axes, self.axes.transpose()):
            return self if axes == self.axes else self.transpose()
        shape = self.kernel_shape()
        wanted, own = axes.without_units(shape), self.axes.without_units(shape)
        if wanted not in (own, own.transpose()):
            return None
        adapter: Adapter = self if wanted == own else self.transpose()
        for axis in range(len(shape)):
            if adapter.axes.group(axis) != axes.group(axis):
                adapter = adapter.replace_axes(axis, 1, 0, jnp.squeeze).insert_axis(axis, axes.group(axis))
        return adapter

    def specs(self, spec: jax.P) -> "Adapter":
        """The partition specs of the arrays, where W's has an entry for each of its axes."""

        def follow(_: jax.Array, layout: Layout) -> jax.P:
            groups = [group for *_, group in spans(layout, self.axes)]
            return jax.P(*(None if axis is None else spec[axis] for group in groups for axis in group))

        return self.rebuild(self.axes, follow, stack_only=True)

    def group(self, axis: int) -> str:
        """The group that an axis of the weight is in."""
        return self.axes.group(axis)

    def repeat(self, times: int) -> Self:
        """The adapter inside a loop that runs so many times."""
        return self

    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the weight that this adapter fits.

        Raises:
            LoraError: its arrays do not fit one another.
        """
        sizes: dict[int, dict[str, int]] = {}
        ranks: dict[str, int] = {}
        for name, layout in self.layout.items():
            shape = getattr(self, name).shape
            axes = sum(len(group) for *_, group in spans(layout, self.axes))
            if len(shape) != axes:
                raise LoraError(
                    f"has {name} of shape {list(shape)}, expected {axes} axes. Several sets of adapters at once go "
                    "through jax.vmap(apply, in_axes=(None, 0, ...))."
                )
            for part, start, group in spans(layout, self.axes):
                for i, axis in enumerate(group):
                    found = ranks if part == "rank" else sizes.setdefault(axis, {})  # type: ignore[arg-type]
                    found[name] = shape[start + i]
        for what, found in [("rank", ranks), *((f"axis {axis}", sizes[axis]) for axis in sorted(sizes))]:
            if len(set(found.values())) > 1:
                entries = ", ".join(
                    f"{n} {'entries ' if i == 0 else ''}in {name}" for i, (name, n) in enumerate(found.items())
                )
                raise LoraError(f"is not of one piece: its {what} has {entries}.")
        return tuple(next(iter(sizes[axis].values())) for axis in range(len(sizes)))

    def trainable(self) -> "Adapter":
        """The same tree with True at what is trained and False at what is frozen."""
        arrays = {name: name not in self.frozen for name in self.arrays()}
        return dataclasses.replace(self, **arrays)  # type: ignore[type-var]


class Entering(Adapter):
    """An adapter that no program ever meets: `enter` puts another one, or W' itself, in its place."""

    def apply(self, product: Product) -> jax.Array:
        raise self._never_met()

    def transpose(self) -> Adapter:
        raise self._never_met()

    def scale_by(self, factor: jax.Array) -> Adapter:
        raise self._never_met()

    def concatenate(self, parts: Sequence[Adapter | None], sizes: Sequence[int], axis: int) -> Adapter | None:
        raise self._never_met()

    def _never_met(self) -> Exception:
        return AssertionError(f"{type(self).__name__} is in a program, where what its `enter` gives belongs")


def spans(layout: Layout, axes: KernelAxes) -> Iterator[tuple[str, int, tuple[int | None, ...]]]:
    """Each part of a layout, the array axis that it starts at, and W's axes in it; (None,) if they are none of W's."""
    start = 0
    for part in layout:
        group = getattr(axes, part) if part in axes._fields else (None,)
        yield part, start, group
        start += len(group)


def field_names(adapter: Any, static: bool) -> list[str]:
    """The fields of an adapter, or of its class, that are arrays; or those that are static facts about them."""
    return [f.name for f in dataclasses.fields(adapter) if bool(f.metadata.get("static")) == static]


def is_adapter(node: Any) -> bool:
    """Whether a node of a tree is an adapter: the `is_leaf` of every walk over adapters."""
    return isinstance(node, Adapter)


def check_adapters(adapters: Mapping[str, Adapter], names: list[str], leaves: list[Any]) -> None:
    """Every adapter has its weight, and fits it.

    Raises:
        LoraError: the adapters are no `{path: adapter}`; a path is not among the parameters, or is no array of floats
            there; shapes differ.
    """
    if not isinstance(adapters, Mapping):
        raise LoraError(
            f"adapters are a dict {{path: adapter}} as lora.init makes it, found {type(adapters).__name__}."
        )
    weights = dict(zip(names, leaves, strict=True))
    for path, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            raise LoraError(
                f"adapters[{path!r}] is a {type(adapter).__name__}, expected an adapter as lora.init makes it."
            )
        if path not in weights:
            near = ", ".join(map(repr, nearest(path, names)))
            raise LoraError(
                f"there is an adapter for {path!r}, but the parameters have no such path; the nearest are {near}. "
                "These adapters belong to another model: make new ones with lora.plan and lora.init."
            )
        weight = weights[path]
        if not (is_array(weight) and jnp.issubdtype(weight.dtype, jnp.floating)):
            found = weight.dtype if is_array(weight) else type(weight).__name__
            raise LoraError(f"there is an adapter for {path!r}, but that is {found}, expected an array of floats.")
        dtypes = sorted({str(a.dtype) for a in jax.tree.leaves(adapter) if _is_counted(a.dtype)})
        if dtypes:
            raise LoraError(
                f"the adapter for {path!r} holds {', '.join(dtypes)} arrays, expected floats: cast them back with "
                "jax.tree.map(lambda array: array.astype(jnp.float32), adapters)."
            )
        try:
            found, expected = adapter.kernel_shape(), tuple(weight.shape)
        except LoraError as error:
            raise LoraError(f"the adapter for {path!r} {error} lora.init makes one that fits.") from None
        if found != expected:
            raise LoraError(
                f"the adapter for {path!r} fits a weight of shape {list(found)}, "
                f"but the parameter has {list(expected)}. "
                "These adapters belong to another model: make new ones with lora.plan and lora.init."
            )


def _is_counted(dtype: Any) -> bool:
    return not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jax.dtypes.prng_key))
