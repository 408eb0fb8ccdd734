"""Kinds whose change of W is of low rank: they say which LoRA they are, and are used as that."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.low_rank import LowRank
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout
from lora_jax.core.operand import Leaf, Operand
from lora_jax.core.products import Product


class Factored(Adapter):
    """An adapter whose A and B are made of fewer, or of other, numbers. A kind has to say how: `to_lora`.

    A kind with a W1 W2 W3 in the place of A B, for example, is that much of a class:

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> from dataclasses import dataclass, field
    >>> from typing import Any
    >>> @lora.register_kind("an_example_of_three_factors")
    ... @dataclass(frozen=True)
    ... class ThreeFactors(lora.Factored):
    ...     first: jax.Array
    ...     second: jax.Array
    ...     third: jax.Array
    ...     axes: Any = field(metadata={"static": True})
    ...     layout = {"first": ("inputs", "rank"), "second": ("rank", "width"), "third": ("width", "outputs")}
    ...     def to_lora(self):
    ...         return lora.LoraAdapter(self.first, self.second @ self.third, self.axes, None)
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapter = ThreeFactors(jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.ones((3, 5)), axes)
    >>> float(lora.merge({"w": jnp.zeros((4, 5))}, {"w": adapter})["w"][0, 0])
    6.0
    """

    @abc.abstractmethod
    def to_lora(self) -> LoraAdapter:
        """Return the adapter as A and B."""

    def merge(self, w: jax.Array) -> jax.Array:
        return self.to_lora().merge(w)

    def lower(self, w: Any) -> Operand:
        return self.to_lora().lower(w)


class Compact(Factored):
    """A factored adapter that is much smaller than A and B, and so is kept as it is on its way to a product."""

    inputs: tuple[int, ...]  # the sizes of one matrix's axes
    outputs: tuple[int, ...]
    shares_traces: ClassVar[bool] = True  # as of `Operand`

    def lower(self, w: Any) -> Operand:
        return CompactOperand(self, self.axes)

    @abc.abstractmethod
    def scale_by(self, factor: jax.Array) -> Self:
        """Return the adapter of factor * W, for a scalar factor.

        Args:
            factor: a scalar.
        """

    def apply(self, product: Product) -> jax.Array:
        """Return x @ W', given y = x @ W, as `Operand.apply` does.

        Args:
            product: x, y and how the two are multiplied.
        """
        return self.to_lora().lower(None).apply(product)

    def kernel_shape(self) -> tuple[int, ...]:
        sizes = dict(zip((*self.axes.inputs, *self.axes.outputs), (*self.inputs, *self.outputs), strict=True))
        n, arrays = len(self.axes.stack), self.arrays()
        stacks = {name: array.shape[:n] for name, array in arrays.items() if "stack" in self.layout[name]}
        if len(set(stacks.values())) > 1:
            raise LoraError(f"is not of one piece: its stacked axes are {stacks}.")
        sizes |= zip(self.axes.stack, next(iter(stacks.values())), strict=True)
        return tuple(sizes[axis] for axis in sorted(sizes))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompactOperand(Leaf):
    """A compact adapter in a program.

    It follows what programs do to stacked matrices, slices of a scan above all. Whatever changes the inputs or outputs
    of a matrix makes it the LoRA that it is.
    """

    adapter: Compact
    axes: KernelAxes = field(metadata={"static": True})

    layout = MappingProxyType({})

    @property
    def shares_traces(self) -> bool:  # type: ignore[override]
        return self.adapter.shares_traces

    def merge(self, w: jax.Array) -> jax.Array:
        return self.adapter.merge(w)

    def apply(self, product: Product) -> jax.Array:
        return self.adapter.apply(product)

    def to_lora(self) -> LowRank:
        return self.adapter.to_lora().lower(None)

    def transpose(self) -> Operand:
        return self.to_lora().transpose()

    def scale_by(self, factor: jax.Array) -> Operand:
        return dataclasses.replace(self, adapter=self.adapter.scale_by(factor))

    def concatenate(self, parts: Sequence[Operand | None], sizes: Sequence[int], axis: int) -> Operand | None:
        return self.to_lora().concatenate([part and part.to_lora() for part in parts], sizes, axis)

    def kernel_shape(self) -> tuple[int, ...]:
        return self.adapter.kernel_shape()

    def permute(self, permutation: tuple[int, ...]) -> Operand:
        groups = [[permutation.index(axis) for axis in group] for group in (self.axes.inputs, self.axes.outputs)]
        in_order = all(group == sorted(group) for group in groups)
        return super().permute(permutation) if in_order else self.to_lora().permute(permutation)

    def insert_axis(self, axis: int, name: str = "stack") -> Operand:
        return super().insert_axis(axis, name) if name == "stack" else self.to_lora().insert_axis(axis, name)

    def _replace(self, method: str, args: Any, first: int, *rest: Any) -> Operand:
        if self.axes.group(first) != "stack":
            return getattr(self.to_lora(), method)(*args)
        return super()._replace(method, args, first, *rest)

    def _follow(
        self, method: str, args: tuple[Any, ...], axes: KernelAxes, change: Callable[[jax.Array, Layout], Any]
    ) -> Operand:
        return CompactOperand(self.adapter.replace_arrays(change, axes), axes)
