"""Operands: adapters in the form in which a traced program uses them.

`Adapter.lower(w)` makes the operand of a weight once, where the weight enters the program. From there on the program
transposes, reshapes, slices and joins weights, and every such operation is done to the operand too, until a product
asks it for x @ W'. So each method here commutes with `merge`, which says what the operand means.

Two kinds of methods:

- structural ones, marked `@structural`, change the weight's axes. They are written once, in `Operand`: own arrays
  follow by their layouts, and operands inside an operand by the same method.
- all others are asked of the kind. A `Wrapper` hands them to the operand inside it, all of them: this is checked when
  the module is imported, so that a method which is added later cannot be forgotten.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp

from lora_jax.core._compat import JaxprEqn
from lora_jax.core.axes import KernelAxes
from lora_jax.core.layout import Layout, field_names, spans, weight_shape
from lora_jax.core.picked import is_used, picked
from lora_jax.core.products import Product

F = TypeVar("F", bound=Callable[..., Any])


def structural(method: F) -> F:
    """Mark a method of `Operand` that a wrapper inherits: it is about axes, or reaches the operand inside itself."""
    method.__dict__["is_structural"] = True
    return method


class Operand(abc.ABC):
    """The change of one weight W inside a program. Every array of it begins with W's stack axes."""

    axes: KernelAxes
    layout: Mapping[str, Layout]  # of each array
    is_additive: bool  # W' is W plus a sum that W is no part of, so that what W is padded with stays as it is
    can_multiply: bool  # `apply` works along the present axes: a scale for each input cannot be applied to y
    shares_traces: bool  # equal products with equal operands may share one trace

    # Asked of the kind -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def merge(self, w: jax.Array) -> jax.Array:
        """Return W', for W in fp32 or wider and with its own axes."""

    @abc.abstractmethod
    def apply(self, product: Product) -> jax.Array:
        """Return x @ W' [*s, *T, *outputs] in y's dtype, given y = x @ W, without forming W'."""

    @abc.abstractmethod
    def transpose(self) -> "Operand":
        """Return the operand of W with inputs and outputs exchanged, for programs that also compute y @ W^T."""

    @abc.abstractmethod
    def scale_by(self, factor: jax.Array) -> "Operand":
        """Return the operand of factor * W, for a scalar factor."""

    @abc.abstractmethod
    def concatenate(self, parts: Sequence["Operand | None"], sizes: Sequence[int], axis: int) -> "Operand | None":
        """Return the operand of [W0 | W1 | ...], or None where these parts have no common form.

        `self` is the first part that has an operand; a part without one is frozen. `sizes` are those of the parts along
        the axis.
        """

    @abc.abstractmethod
    def to_lora(self) -> "Operand":
        """Return the same operand with its low-rank part as explicit A and B, which can be joined and cut."""

    @abc.abstractmethod
    def kernel_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that this operand fits."""

    # Structural: written once ----------------------------------------------------------------------------------------

    @structural
    def with_axes(self, axes: KernelAxes, change: Callable[[jax.Array, Layout], Any]) -> "Operand":
        """Return the operand with these axes, and `change(array, layout)` in the place of every array."""
        return self._follow("with_axes", (axes, change), axes, change)

    @structural
    def permute(self, permutation: tuple[int, ...]) -> "Operand":
        """Return the operand of W transposed by a permutation."""

        def change(array: jax.Array, layout: Layout) -> jax.Array:
            order: list[int] = []
            for _, start, group in spans(layout, self.axes):
                positions = [0 if axis is None else permutation.index(axis) for axis in group]
                order += [start + i for i in sorted(range(len(group)), key=positions.__getitem__)]
            return array if order == sorted(order) else array.transpose(order)

        return self._follow("permute", (permutation,), self.axes.permute(permutation), change)

    @structural
    def replace_axes(self, first: int, count: int, n: int, fn: Callable[[jax.Array, int], jax.Array]) -> "Operand":
        """Return the operand of W with `count` neighbouring axes of one group made into n axes.

        `fn(array, position)` does that to an array which has these axes from `position` on.
        """
        return self._replace("replace_axes", (first, count, n, fn), first, count, n, fn)

    @structural
    def sliced(self) -> "Operand":
        """Return the operand as the body of a scan over the first axis sees it; the arrays are not sliced yet."""
        return self.replace_axes(0, 1, 0, lambda array, _: array)

    @structural
    def rows(
        self, axis: int, n: int, fn: Callable[[jax.Array, int], jax.Array], stack: Sequence[int] = ()
    ) -> "Operand":
        """Return the operand of single rows of W, or single matrices of a stack, picked along an axis into n axes.

        Each matrix along the axes `stack` has rows of its own picked.
        """
        return self._replace("rows", (axis, n, fn, stack), axis, 1, n, fn)

    @structural
    def insert_axis(self, axis: int, name: str = "stack") -> "Operand":
        """Return the operand of W with a new axis of size 1 in this group."""

        def change(array: jax.Array, layout: Layout) -> jax.Array:
            for part, start, group in spans(layout, self.axes):
                if part == name:
                    return jnp.expand_dims(array, start + sum(i is not None and i < axis for i in group))
            return array

        return self._follow("insert_axis", (axis, name), self.axes.insert(axis, name), change)

    @structural
    def specs(self, spec: jax.P) -> "Operand":
        """Return the partition specs of the arrays, where W's has an entry for each of its axes."""
        return self._follow("specs", (spec,), self.axes, spec_follower(spec, self.axes))

    @structural
    def stop(self) -> Self:
        """Return the operand of stop_gradient(W)."""
        return jax.tree.map(jax.lax.stop_gradient, self)

    @structural
    def repeat(self, times: int) -> Self:
        """Return the operand inside a loop that runs so many times."""
        return self

    @structural
    def first_factor(self) -> Any:
        """Return A [*stack, *inputs, r], if x @ A is all that is needed of x. A wrapper changes x, and has none.

        Of a bank whose slots are chosen for each example it is a `ChosenFactor`.
        """
        return None

    @structural
    def apply_slot(self, product: Product, slot: jax.Array, arranged: bool = False) -> jax.Array:
        """Return x @ W' of one slot, where every array of this operand has a leading axis of slots; else y.

        `arranged` says that `jax.vmap` maps this over examples in the `order` of blocks.
        """
        return jnp.where(is_used(self, slot), picked(self, slot).apply(product), product.y)

    @structural
    def group(self, axis: int) -> str:
        """Return the group that an axis of the weight is in."""
        return self.axes.group(axis)

    @structural
    def used_as(self, axes: KernelAxes, eqn: JaxprEqn) -> "Operand | None":
        """Return this operand for a product along these axes; None if it was made for other ones.

        The weight may be used the other way round, and its axes of size 1 may be read in any way. In a matrix product,
        axes that the operand has stacked may be inputs or outputs: `core/restacked.py` says how that is computed.
        """
        operand = self._along(axes)
        if operand is None and eqn.primitive.name == "dot_general":
            operand = self._stacking_more(axes)
        return operand if operand is None or operand.can_multiply else None

    def _stacking_more(self, axes: KernelAxes) -> "Operand | None":
        wanted = axes.with_stack(self.axes.stack)
        operand = None if wanted == axes else self._along(wanted)
        sums = any(axis in wanted.stack for axis in axes.inputs)  # y is a sum over matrices, which no factor can scale
        return None if operand is None or (sums and not operand.is_additive) else operand

    def _along(self, axes: KernelAxes) -> "Operand | None":
        if axes in (self.axes, self.axes.transpose()):
            return self if axes == self.axes else self.transpose()
        shape = self.kernel_shape()
        wanted, own = axes.without_units(shape), self.axes.without_units(shape)
        if wanted not in (own, own.transpose()):
            return None
        operand: Operand = self if wanted == own else self.transpose()
        for axis in range(len(shape)):
            if operand.axes.group(axis) != axes.group(axis):
                operand = operand.replace_axes(axis, 1, 0, jnp.squeeze).insert_axis(axis, axes.group(axis))
        return operand

    def _replace(self, method: str, args: Any, first: int, count: int, n: int, fn: Callable[..., Any]) -> "Operand":
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

        return self._follow(method, args, axes, change)

    def _follow(
        self, method: str, args: tuple[Any, ...], axes: KernelAxes, change: Callable[[jax.Array, Layout], Any]
    ) -> "Operand":
        """Apply a structural method: to own arrays by `change`, to operands inside by the method itself."""
        fields = {}
        for name in field_names(self, static=False):
            value = getattr(self, name)
            if isinstance(value, Operand):
                fields[name] = getattr(value, method)(*args)
            elif value is not None:  # some operands can do without one of their arrays
                fields[name] = change(value, self.layout[name])
        return dataclasses.replace(self, axes=axes, **fields)  # type: ignore[type-var]


class Leaf(Operand):
    """An operand that has arrays of its own and nothing inside, with the answers that most of these give."""

    is_additive = True
    can_multiply = True
    shares_traces = True

    def to_lora(self) -> Operand:
        return self

    def kernel_shape(self) -> tuple[int, ...]:
        arrays = {name: getattr(self, name) for name in field_names(self, static=False)}
        return weight_shape(arrays, self.layout, self.axes)


class Wrapper(Operand):
    """An operand that changes how the one inside meets a product, as dropout does. It says how, and how it is joined.

    Everything else is what the operand inside says.
    """

    inner: Operand

    def around(self, inner: Operand) -> Self:
        """Return the same wrapper around another operand."""
        return dataclasses.replace(self, inner=inner, axes=inner.axes)  # type: ignore[type-var]

    def sliced(self) -> Operand:
        return self._follow("sliced", (), self.axes.drop(0), lambda array, _: array)

    def merge(self, w: jax.Array) -> jax.Array:
        return self.inner.merge(w)

    def transpose(self) -> Operand:
        return self.around(self.inner.transpose())

    def scale_by(self, factor: jax.Array) -> Operand:
        return self.around(self.inner.scale_by(factor))

    def to_lora(self) -> Operand:
        return self.around(self.inner.to_lora())

    def kernel_shape(self) -> tuple[int, ...]:
        return self.inner.kernel_shape()

    @property
    def is_additive(self) -> bool:  # type: ignore[override]
        return self.inner.is_additive

    @property
    def can_multiply(self) -> bool:  # type: ignore[override]
        return self.inner.can_multiply

    @property
    def shares_traces(self) -> bool:  # type: ignore[override]
        return self.inner.shares_traces


def check_delegation(wrapper: type, of: type, own: Sequence[str]) -> None:
    """Check that a wrapper hands every member of a class on, but for the structural ones and its own."""
    for name in [*of.__annotations__, *vars(of)]:
        inherited = name.startswith("_") or getattr(vars(of).get(name), "is_structural", False)
        if not inherited and name not in own and name not in vars(wrapper):
            raise TypeError(f"{wrapper.__name__} has to hand {of.__name__}.{name} on to what is inside it.")


check_delegation(Wrapper, of=Operand, own=("axes", "layout", "apply", "concatenate"))


def spec_follower(spec: jax.P, axes: KernelAxes) -> Callable[[Any, Layout], jax.P]:
    """Return the function of (array, layout) that gives the array's spec, where the weight's has all its entries."""

    def follow(_: Any, layout: Layout) -> jax.P:
        groups = [group for *_, group in spans(layout, axes)]
        return jax.P(*(None if axis is None else spec[axis] for group in groups for axis in group))

    return follow
