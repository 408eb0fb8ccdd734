"""Kinds whose change of W is of low rank, and is used as LoRA's is: as A and B made of fewer, or other, numbers."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.adapter import Adapter, Entering, Layout
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError


class Factored(Entering):
    """An adapter that says which LoRA it is. It becomes that where its weight comes into a program."""

    @abc.abstractmethod
    def factors(self) -> LoraAdapter:
        """The adapter as A and B."""

    def enter(self, w: jax.Array) -> Adapter:
        return self.factors()

    def explicit(self) -> Adapter:
        return self.factors()

    def merge(self, w: jax.Array) -> jax.Array:
        return self.factors().merge(w)


class Compact(Factored):
    """A factored adapter that is much smaller than A and B, and stays as it is on its way to a product.

    It follows what programs do to stacks of weights, slices of a scan above all. Whatever is done to inputs or outputs
    makes it the LoRA that it is.
    """

    inputs: tuple[int, ...]  # the sizes of one matrix's axes
    outputs: tuple[int, ...]

    def enter(self, w: jax.Array) -> Adapter:
        return self

    def transpose(self) -> Adapter:
        return self.factors().transpose()

    def rebuild(
        self, axes: KernelAxes, change: Callable[[jax.Array, Layout], Any], stack_only: bool = False
    ) -> Adapter:
        return super().rebuild(axes, change) if stack_only else self.factors().rebuild(axes, change)

    def concatenate(self, parts: Sequence[Adapter | None], sizes: Sequence[int], axis: int) -> Adapter | None:
        return self.factors().concatenate([p and p.explicit() for p in parts], sizes, axis)

    def kernel_shape(self) -> tuple[int, ...]:
        sizes = dict(zip((*self.axes.inputs, *self.axes.outputs), (*self.inputs, *self.outputs), strict=True))
        stacks = {name: array.shape[: len(self.axes.stack)] for name, array in self.arrays().items()}
        if len(set(stacks.values())) > 1:
            raise LoraError(f"is not of one piece: its stacked axes are {stacks}.")
        sizes |= zip(self.axes.stack, next(iter(stacks.values())), strict=True)
        return tuple(sizes[axis] for axis in sorted(sizes))
