"""One adapter out of a bank, chosen by a number that is data: an adapter itself, and its operand.

A bank is an adapter all of whose arrays have a leading axis of slots. `lora.select` makes these.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter, AdapterWrapper
from lora_jax.core.axes import KernelAxes
from lora_jax.core.layout import Layout
from lora_jax.core.operand import Operand, Wrapper
from lora_jax.core.picked import is_used, picked
from lora_jax.core.products import Product
from lora_jax.core.serialization import register_node
from lora_jax.core.slots import ChosenFactor

Axes = int | None | tuple[Any, ...]  # of arguments or results, as those of `jax.vmap`; tuples may have tuples in them


@register_node("lora_jax.selected")
@dataclass(frozen=True)
class SelectedAdapter(AdapterWrapper):
    """The adapter in a slot of a bank; the base alone where there is no such slot.

    With a slot for each example of a batch it is applied by `over_examples` of `transform/per_example.py`, which hands
    it on with one slot, and with the number of the selection that it is of. `arranged` says that the examples come in
    the `order` of blocks.
    """

    inner: Adapter  # the bank
    slot: jax.Array  # i32 [] or [examples]
    axes: KernelAxes = field(metadata={"static": True})
    in_axes: Axes = field(default=0, metadata={"static": True})
    out_axes: Axes = field(default=0, metadata={"static": True})
    selection: int | None = field(default=None, metadata={"static": True})
    arranged: bool = field(default=False, metadata={"static": True})

    def chosen(self) -> Adapter:
        """Return the adapter itself, with zeros in all arrays where there is no such slot."""
        return picked(self.inner, self.slot)

    def one(self) -> Any:
        """Return an adapter of the bank, of which only the shapes are known."""
        return one_of(self.inner)

    def kernel_shape(self) -> tuple[int, ...]:
        return tuple(self.one().kernel_shape())

    def merge(self, w: jax.Array) -> jax.Array:
        return jnp.where(is_used(self.inner, self.slot), self.chosen().merge(w), w)

    def to_lora(self) -> Adapter | None:
        return self.chosen().to_lora()

    def lower(self, w: Any) -> Operand | jax.Array:
        """Lower all of the bank, of which products pick; of kinds that look at W, the chosen one alone."""
        if not (self.inner.reads_weight or self.inner.forms_weight):
            return _selected(jax.vmap(lambda adapter: adapter.lower(w))(self.inner), self)
        used, operand = is_used(self.inner, self.slot), self.chosen().lower(w)
        if not isinstance(operand, Operand):
            return jnp.where(used, operand, w)
        alone = jax.tree.map(lambda array: array[None], operand)
        return _selected(alone, dataclasses.replace(self, slot=jnp.where(used, 0, -1)))


def one_of(bank: Any, at: int = 0) -> Any:
    """Return the shapes and dtypes of one adapter or operand of a bank, whose slots are along an axis."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct((*array.shape[:at], *array.shape[at + 1 :]), array.dtype), bank
    )


def _selected(bank: Operand, adapter: SelectedAdapter) -> "SelectedOperand":
    stack = adapter.axes.sizes(adapter.kernel_shape())[0]
    slots = BankOperand(_moved(bank, 0, len(stack)), adapter.axes)
    return SelectedOperand(
        slots, jnp.broadcast_to(adapter.slot, stack), adapter.axes, adapter.selection, adapter.arranged
    )


def _moved(bank: Any, start: int, end: int) -> Any:
    """Return a bank with its axis of slots elsewhere."""
    return bank if start == end else jax.tree.map(lambda array: jnp.moveaxis(array, start, end), bank)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SelectedOperand(Wrapper):
    """The operand of a `SelectedAdapter`."""

    inner: Operand  # a `BankOperand`
    slot: jax.Array  # i32 [*stack], the same number throughout, so that a scan has it in each step
    axes: KernelAxes = field(metadata={"static": True})
    selection: int | None = field(metadata={"static": True})
    arranged: bool = field(metadata={"static": True})

    layout = MappingProxyType({"slot": ("stack",)})

    def _bank(self) -> tuple[Any, jax.Array]:
        """Return the bank, slots first, and the slot."""
        return self.inner.slots_first(), self.slot.reshape(-1)[0]  # type: ignore[attr-defined]

    def merge(self, w: jax.Array) -> jax.Array:
        bank, slot = self._bank()
        return jnp.where(is_used(bank, slot), picked(bank, slot).merge(w), w)

    def apply(self, product: Product) -> jax.Array:
        bank, slot = self._bank()
        apply: Any = Operand.apply_slot if self.selection is None else type(bank).apply_slot
        y: jax.Array = apply(bank, product, slot, self.arranged)
        return y

    def first_factor(self) -> Any:
        """Return the first factors of a bank that `jax.vmap` maps over examples."""
        bank, slot = self._bank()
        a = bank.first_factor()
        return None if a is None or self.selection is None else ChosenFactor(a, slot, self.selection, self.arranged)

    def concatenate(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> Operand | None:
        """Join what each part has chosen, where zeros change nothing: sums of factors."""
        chosen = [picked(*part._bank()) if isinstance(part, SelectedOperand) else part for part in parts]
        if any(part is not None and part.first_factor() is None for part in chosen):
            return None
        joined: Operand | None = next(part for part in chosen if part is not None).concatenate(chosen, sizes, axis)
        return joined


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BankOperand(Wrapper):
    """Operands of one weight. All arrays of `inner` have an axis of slots behind the stack axes.

    What it answers for all slots at once is what they say; what is done to it is done to each of them.
    """

    inner: Operand
    axes: KernelAxes = field(metadata={"static": True})

    layout = MappingProxyType({})

    def slots_first(self) -> Operand:
        """Return the operand whose arrays begin with the axis of slots."""
        first: Operand = _moved(self.inner, len(self.axes.stack), 0)
        return first

    def _each(self, change: Callable[[Any], Operand], sliced: int = 0) -> Operand:
        """Return the bank with a change of each operand; `sliced` axes in front are no stack axes any more."""
        bank = jax.vmap(change, in_axes=len(self.axes.stack))(self.inner)
        return BankOperand(_moved(bank, 0, len(bank.axes.stack) + sliced), bank.axes)

    def merge(self, w: jax.Array) -> jax.Array:
        raise NotImplementedError("a bank is no change of one weight")

    def apply(self, product: Product) -> jax.Array:
        raise NotImplementedError("a bank is no change of one weight")

    def concatenate(self, parts: Sequence[Operand | None], sizes: Sequence[int], axis: int) -> None:
        """Return None: `SelectedOperand` joins what is chosen."""

    def transpose(self) -> Operand:
        return self._each(lambda operand: operand.transpose())

    def scale_by(self, factor: jax.Array) -> Operand:
        return self._each(lambda operand: operand.scale_by(factor))

    def to_lora(self) -> Operand:
        return self._each(lambda operand: operand.to_lora())

    def kernel_shape(self) -> tuple[int, ...]:
        return tuple(one_of(self.inner, len(self.axes.stack)).kernel_shape())

    def with_axes(self, axes: KernelAxes, change: Callable[[jax.Array, Layout], Any]) -> Operand:
        return self._each(lambda operand: operand.with_axes(axes, change))

    def permute(self, permutation: tuple[int, ...]) -> Operand:
        return self._each(lambda operand: operand.permute(permutation))

    def replace_axes(self, first: int, count: int, n: int, fn: Callable[[jax.Array, int], jax.Array]) -> Operand:
        return self._each(lambda operand: operand.replace_axes(first, count, n, fn))

    def sliced(self) -> Operand:
        return self._each(lambda operand: operand.sliced(), sliced=1)

    def rows(self, axis: int, n: int, fn: Callable[[jax.Array, int], jax.Array], stack: Sequence[int] = ()) -> Operand:
        return self._each(lambda operand: operand.rows(axis, n, fn, stack))

    def insert_axis(self, axis: int, name: str = "stack") -> Operand:
        return self._each(lambda operand: operand.insert_axis(axis, name))

    def specs(self, spec: jax.P) -> Operand:
        n = len(self.axes.stack)
        specs = self.inner.specs(spec)
        is_spec = lambda node: isinstance(node, jax.P)  # noqa: E731
        return BankOperand(jax.tree.map(lambda s: jax.P(*s[:n], None, *s[n:]), specs, is_leaf=is_spec), self.axes)
