"""The operand of LoRA: W' = W + s A B, as two thin products beside x @ W."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.arrays import accumulator, matmul_highest
from lora_jax.core.axes import KernelAxes
from lora_jax.core.operand import Leaf, Operand
from lora_jax.core.products import Product, lowrank


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Leaf):
    """The factors of one weight's change, scale * A B. A rank of 0 is no change."""

    a: jax.Array  # [*stack, *inputs, r]
    b: jax.Array  # [*stack, r, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    scale: float = field(metadata={"static": True})

    layout = MappingProxyType({"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs")})

    def merge(self, w: jax.Array) -> jax.Array:
        return add_low_rank(w, self.a, self.b, self.axes, self.scale)

    def apply(self, product: Product) -> jax.Array:
        if self.a.shape[-1] == 0:
            return product.y
        y, delta = product.y, lowrank(product, self.a, self.b, self.scale)
        wide = accumulator(y.dtype, delta.dtype)
        return (y.astype(wide) + delta.astype(wide)).astype(y.dtype)

    def transpose(self) -> "LowRank":
        n = len(self.axes.stack)
        a, b = jnp.moveaxis(self.b, n, -1), jnp.moveaxis(self.a, -1, n)
        return LowRank(a, b, self.axes.transpose(), self.scale)

    def scale_by(self, factor: jax.Array) -> "LowRank":
        return dataclasses.replace(self, b=self.b * factor.astype(self.b.dtype))

    def concatenate(self, parts: Sequence[Operand | None], sizes: Sequence[int], axis: int) -> "LowRank | None":
        """Join outputs, [W1 | W2]' = [W1 | W2] + [A1 | A2] diag(B1, B2); inputs the other way round; stack stacks."""
        if any(p is not None and (type(p) is not type(self) or p.axes != self.axes) for p in parts):
            return None
        if axis in self.axes.inputs:
            joined = self.transpose().concatenate([p and p.transpose() for p in parts], sizes, axis)
            return joined and joined.transpose()
        return self._stacked(parts, sizes, axis) if axis in self.axes.stack else self._side_by_side(parts, sizes, axis)

    def _side_by_side(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> "LowRank":
        at = len(self.axes.stack) + 1 + self.axes.outputs.index(axis)
        ends = list(itertools.accumulate(sizes))
        a, b = [], []
        for part, size, end in zip(parts, sizes, ends, strict=True):
            if part is not None:
                padding = [(0, 0)] * part.b.ndim
                padding[at] = (end - size, ends[-1] - end)
                a.append(part.a)
                b.append(jnp.pad(part.b * part.scale, padding))
        rank_axis = len(self.axes.stack)
        return LowRank(jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=rank_axis), self.axes, 1.0)

    def _stacked(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> "LowRank":
        at, rank_axis = self.axes.stack.index(axis), len(self.axes.stack)
        ranks = [0 if part is None else part.a.shape[-1] for part in parts]

        def padded(array: jax.Array, where: int) -> jax.Array:
            missing = max(ranks) - array.shape[where]
            return jnp.pad(array, [(0, missing if i == where % array.ndim else 0) for i in range(array.ndim)])

        a, b = [], []
        for part, size in zip(parts, sizes, strict=True):
            if part is None:
                part = self.replace_axes(axis, 1, 1, functools.partial(_zeros_along, size=size))
            a.append(padded(part.a, -1))
            b.append(padded(part.b * part.scale, rank_axis))
        return LowRank(jnp.concatenate(a, axis=at), jnp.concatenate(b, axis=at), self.axes, 1.0)


def add_low_rank(w: jax.Array, a: jax.Array, b: jax.Array, axes: KernelAxes, scale: float) -> jax.Array:
    """Return W + scale A B with W's own axes and dtype; a [*stack, *inputs, r], b [*stack, r, *outputs]."""
    if a.shape[-1] == 0:
        return w
    n = len(axes.stack)
    a = a.reshape(*a.shape[:n], -1, a.shape[-1])
    b = b.reshape(*b.shape[: n + 1], -1)
    delta = matmul_highest(a.astype(w.dtype), b.astype(w.dtype)) * scale
    stack, inputs, outputs = axes.sizes(w.shape)
    return w + delta.reshape(stack + inputs + outputs).transpose(axes.from_canonical())


def _zeros_along(array: jax.Array, axis: int, size: int) -> jax.Array:
    return jnp.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
