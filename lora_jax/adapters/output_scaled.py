"""The operand of a LoRA whose outputs are scaled: DoRA and (IA)^3."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.low_rank import LowRank
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.layout import Layout
from lora_jax.core.operand import Leaf, Operand
from lora_jax.core.products import Product, add_lowrank


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputScaled(Leaf):
    """W' = g * (W + s A B), with a factor for each output; for each input where W is used the other way round."""

    inner: LowRank
    gain: jax.Array  # [*stack, *outputs], or [*stack, *inputs]
    axes: KernelAxes = field(metadata={"static": True})
    side: str = field(default="outputs", metadata={"static": True})

    is_additive = False

    @property
    def layout(self) -> Mapping[str, Layout]:  # type: ignore[override]
        return {"gain": ("stack", self.side)}

    @property
    def can_multiply(self) -> bool:  # type: ignore[override]
        """x @ (g W) with a factor for each input is another product with W: not of the x that the program has."""
        return self.side == "outputs"

    def merge(self, w: jax.Array) -> jax.Array:
        axes = self.axes if self.side == "outputs" else self.axes.transpose()
        return along_outputs(self.gain.astype(w.dtype), axes) * self.inner.merge(w)

    def apply(self, product: Product) -> jax.Array:
        """Return g y + x A (g B).

        B takes the gain where it is small. The backward pass keeps y and g, and not g for each row of y.
        """
        b = self.inner.b
        wide = accumulator(product.y.dtype, b.dtype, self.gain.dtype)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def scaled(y: jax.Array, gain: jax.Array) -> jax.Array:
            return y.astype(wide) * product.for_each_output(gain)

        gain = self.gain.astype(wide)
        b = b.astype(wide) * jnp.expand_dims(gain, len(self.axes.stack))
        return add_lowrank(product, self.inner.a, b, lambda y: scaled(y, gain))

    def transpose(self) -> "OutputScaled":
        other = {"outputs": "inputs", "inputs": "outputs"}[self.side]
        return OutputScaled(self.inner.transpose(), self.gain, self.axes.transpose(), other)

    def scale_by(self, factor: jax.Array) -> "OutputScaled":
        return dataclasses.replace(self, inner=self.inner.scale_by(factor))

    def concatenate(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> Operand | None:
        if any(p is not None and not (isinstance(p, OutputScaled) and p.side == self.side) for p in parts):
            return None
        if axis not in self.axes.stack and axis not in getattr(self.axes, self.side):
            return None
        inner = self.inner.concatenate([p and p.inner for p in parts], sizes, axis)
        at = (*self.axes.stack, *getattr(self.axes, self.side)).index(axis)
        gains = [
            jnp.ones((*self.gain.shape[:at], n, *self.gain.shape[at + 1 :]), self.gain.dtype) if p is None else p.gain
            for p, n in zip(parts, sizes, strict=True)
        ]
        return inner and dataclasses.replace(self, inner=inner, gain=jnp.concatenate(gains, at))

    def kernel_shape(self) -> tuple[int, ...]:
        return self.inner.kernel_shape()


def along_outputs(gain: jax.Array, axes: KernelAxes) -> jax.Array:
    """Return [*stack, *outputs] with W's axes, of size 1 along the inputs."""
    wide = gain.reshape(*gain.shape, *[1] * len(axes.inputs))
    order = (*axes.stack, *axes.outputs, *axes.inputs)
    return wide.transpose([order.index(i) for i in range(len(order))])
