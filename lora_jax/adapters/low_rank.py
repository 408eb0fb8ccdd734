"""The operand of LoRA: W' = W + s A B, as two thin products beside x @ W."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.joined_factors import side_by_side, stacked
from lora_jax.adapters.scaled import times_ratio
from lora_jax.core.arrays import matmul_highest
from lora_jax.core.axes import KernelAxes
from lora_jax.core.operand import Leaf
from lora_jax.core.products import Product, add_lowrank
from lora_jax.core.slots import add_chosen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Leaf):
    """The factors of one weight's change, A B, the scale being in B. A rank of 0 is no change."""

    a: jax.Array  # [*stack, *inputs, r]
    b: jax.Array  # [*stack, r, *outputs]
    axes: KernelAxes = field(metadata={"static": True})

    layout = MappingProxyType({"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs")})

    def merge(self, w: jax.Array) -> jax.Array:
        return add_low_rank(w, self.a, self.b, self.axes)

    def apply(self, product: Product) -> jax.Array:
        return add_lowrank(product, self.a, self.b)

    def apply_slot(self, product: Product, slot: jax.Array, arranged: bool = False) -> jax.Array:
        return add_chosen(product, self.a, self.b, slot, arranged)

    def first_factor(self) -> jax.Array:
        return self.a

    def transpose(self) -> "LowRank":
        n = len(self.axes.stack)
        a, b = jnp.moveaxis(self.b, n, -1), jnp.moveaxis(self.a, -1, n)
        return LowRank(a, b, self.axes.transpose())

    def scale_by(self, factor: jax.Array) -> "LowRank":
        return dataclasses.replace(self, b=self.b * factor.astype(self.b.dtype))

    def concatenate(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> "LowRank | None":
        if any(p is not None and (type(p) is not type(self) or p.axes != self.axes) for p in parts):
            return None
        if axis in self.axes.inputs:
            joined = self.transpose().concatenate([p and p.transpose() for p in parts], sizes, axis)
            return joined and joined.transpose()
        n, pairs = len(self.axes.stack), [p and (p.a, p.b) for p in parts]
        if axis in self.axes.stack:
            a, b = stacked(pairs, sizes, n, self.axes.stack.index(axis))
        else:
            a, b = side_by_side(pairs, sizes, n, n + 1 + self.axes.outputs.index(axis))
        return LowRank(a, b, self.axes)


def add_low_rank(w: jax.Array, a: jax.Array, b: jax.Array, axes: KernelAxes, ratio: Any = None) -> jax.Array:
    """Return W + s A B with W's own axes and dtype; a [*stack, *inputs, r], b [*stack, r, *outputs], s of a ratio."""
    if a.shape[-1] == 0:
        return w
    n = len(axes.stack)
    a = a.reshape(*a.shape[:n], -1, a.shape[-1])
    b = b.reshape(*b.shape[: n + 1], -1)
    delta = matmul_highest(a.astype(w.dtype), b.astype(w.dtype))
    delta = delta if ratio is None else times_ratio(delta, ratio)
    stack, inputs, outputs = axes.sizes(w.shape)
    return w + delta.reshape(stack + inputs + outputs).transpose(axes.from_canonical())
