"""DoRA: W' = (m / n) (W + s A B), with a trained length m for each output and n the length that W + s A B has.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353. No gradient passes n (their section
4.3). In a program n^2 = |W|^2 + 2 s B . (A^T W) + s^2 B . (A^T A B), with the dots over each output's own numbers:
nothing of W's shape is formed. Dropout meets x on its way to A alone, where HF PEFT also drops what the change of
length multiplies: that would take a second product with W.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.lora import Lora, LoraAdapter
from lora_jax.core._compat import JaxprEqn
from lora_jax.core.adapter import Adapter, Entering, Layout
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.products import Product


@dataclass(frozen=True)
class Dora(Lora):
    """W' = (m / n) (W + (alpha / rank) A B); arguments and errors are those of `Lora`.

    m starts as the lengths that W's outputs have, so that nothing changes.
    """

    reads_weight = True

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        factors = self.factors(key, w.shape, axes)
        return DoraAdapter(factors.a, factors.b, _lengths(w, factors), axes, factors.scale)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        stack, d, k = axes.fans(shape)
        return super().flops(shape, axes, rows) + rows[1] * k + 2 * stack * d * k * (int(self.rank) + 1)  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoraAdapter(Entering):
    """The factors and lengths of one weight. In a program it is a `Gained` LoRA."""

    a: jax.Array  # [*stack, *inputs, r]
    b: jax.Array  # [*stack, r, *outputs]
    m: jax.Array  # [*stack, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    scale: float = field(metadata={"static": True})

    reads_weight = True
    layout = MappingProxyType(
        {"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs"), "m": ("stack", "outputs")}
    )
    additive = False

    def merge(self, w: jax.Array) -> jax.Array:
        v = LoraAdapter(self.a, self.b, self.axes, self.scale).merge(w)
        n = jnp.sqrt(jnp.sum(jnp.square(lax.stop_gradient(v)), axis=self.axes.inputs, keepdims=True))
        return along_outputs(_gain(self.m.astype(w.dtype), _as_m(n, self.axes)), self.axes) * v

    def enter(self, w: jax.Array) -> "Gained":
        factors = LoraAdapter(self.a, self.b, self.axes, self.scale)
        return Gained(factors, _gain(self.m, _lengths(w, factors)), self.axes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gained(Adapter):
    """W' = g * (the inner adapter's W'), a factor for each output; for each input where W is used the other way."""

    inner: LoraAdapter
    gain: jax.Array  # [*stack, *outputs], or [*stack, *inputs]
    axes: KernelAxes = field(metadata={"static": True})
    side: str = field(default="outputs", metadata={"static": True})

    layout = MappingProxyType({})
    additive = False

    def merge(self, w: jax.Array) -> jax.Array:
        axes = self.axes if self.side == "outputs" else self.axes.transpose()
        return along_outputs(self.gain.astype(w.dtype), axes) * self.inner.merge(w)

    def apply(self, product: Product) -> jax.Array:
        """g y + x A (g B): B takes the gain where it is small. A derivative keeps y and g, not g for each row of y."""
        y, b = product.y, self.inner.b
        wide = accumulator(y.dtype, b.dtype, self.gain.dtype)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def gained(y: jax.Array, gain: jax.Array) -> jax.Array:
            return y.astype(wide) * product.for_each_output(gain)

        gain = self.gain.astype(wide)
        inner = dataclasses.replace(self.inner, b=b.astype(wide) * jnp.expand_dims(gain, len(self.axes.stack)))
        return inner.apply(dataclasses.replace(product, y=gained(y, gain))).astype(y.dtype)

    def explicit(self) -> "Gained":
        return dataclasses.replace(self, inner=self.inner.explicit())  # type: ignore[arg-type]

    def transpose(self) -> "Gained":
        other = {"outputs": "inputs", "inputs": "outputs"}[self.side]
        return Gained(self.inner.transpose(), self.gain, self.axes.transpose(), other)

    def scale_by(self, factor: jax.Array) -> "Gained":
        return dataclasses.replace(self, inner=self.inner.scale_by(factor))

    def used_as(self, axes: KernelAxes, eqn: JaxprEqn) -> "Adapter | None":
        """x @ (g W) with a factor for each input is another product with W: not of the x that the program has."""
        used = super().used_as(axes, eqn)
        return None if isinstance(used, Gained) and used.side == "inputs" else used

    def concatenate(self, parts: Sequence[Adapter | None], sizes: Sequence[int], axis: int) -> Adapter | None:
        if any(p is not None and not (isinstance(p, Gained) and p.side == self.side) for p in parts):
            return None
        if axis not in self.axes.stack and axis not in getattr(self.axes, self.side):
            return None
        inner = self.inner.concatenate([p and p.inner for p in parts], sizes, axis)  # type: ignore[attr-defined]
        at = (*self.axes.stack, *getattr(self.axes, self.side)).index(axis)
        gains = [
            jnp.ones((*self.gain.shape[:at], n, *self.gain.shape[at + 1 :]), self.gain.dtype) if p is None else p.gain  # type: ignore[attr-defined]
            for p, n in zip(parts, sizes, strict=True)
        ]
        return inner and dataclasses.replace(self, inner=inner, gain=jnp.concatenate(gains, at))

    def rebuild(
        self, axes: KernelAxes, change: Callable[[jax.Array, Layout], Any], stack_only: bool = False
    ) -> "Gained":
        gain = change(self.gain, ("stack", self.side))
        return dataclasses.replace(self, inner=self.inner.rebuild(axes, change, stack_only), gain=gain, axes=axes)  # type: ignore[arg-type]

    def kernel_shape(self) -> tuple[int, ...]:
        return self.inner.kernel_shape()


def _gain(m: jax.Array, n: jax.Array) -> jax.Array:
    """m / n; 1 for an output that is zero, and stays so."""
    return jnp.where(n == 0, jnp.ones_like(m), m / jnp.where(n == 0, jnp.ones_like(n), n).astype(m.dtype))


@functools.partial(jax.jit, inline=True)  # weights of equal shapes share a trace
def _lengths(w: jax.Array, factors: LoraAdapter) -> jax.Array:
    """n [*stack, *outputs], without a value of W's shape; no gradient passes it."""
    axes, scale, n = factors.axes, factors.scale, len(factors.axes.stack)
    a, b = lax.stop_gradient((factors.a, factors.b))
    wide = accumulator(w.dtype, a.dtype)
    stack, inputs, each = tuple(range(n)), tuple(range(n, a.ndim - 1)), (*axes.stack, *axes.outputs)

    def dot(x: jax.Array, y: jax.Array, contracted: Any, stacked: Any) -> jax.Array:
        return lax.dot_general(x, y, (contracted, stacked), precision="highest", preferred_element_type=wide)

    squares = dot(w, w, (axes.inputs, axes.inputs), (each, each))  # no matrix product: one pass over W
    aw = dot(a.astype(w.dtype), w, (inputs, axes.inputs), (stack, axes.stack))  # A^T W [*stack, r, *outputs]
    a, b = a.astype(wide), b.astype(wide)
    aab = dot(dot(a, a, (inputs, inputs), (stack, stack)), b, ((n + 1,), (n,)), (stack, stack))
    change = jnp.sum(b * (2 * scale * aw + scale * scale * aab), axis=n)
    return lax.stop_gradient(jnp.sqrt(jnp.maximum(squares + change, 0)))


def _as_m(n: jax.Array, axes: KernelAxes) -> jax.Array:
    """n with W's axes, of size 1 along the inputs -> [*stack, *outputs]."""
    order = (*axes.stack, *axes.outputs, *axes.inputs)
    kept = n.transpose(order)
    return kept.reshape(kept.shape[: len(axes.stack) + len(axes.outputs)])


def along_outputs(gain: jax.Array, axes: KernelAxes) -> jax.Array:
    """[*stack, *outputs] -> W's axes, of size 1 along the inputs."""
    wide = gain.reshape(*gain.shape, *[1] * len(axes.inputs))
    order = (*axes.stack, *axes.outputs, *axes.inputs)
    return wide.transpose([order.index(i) for i in range(len(order))])
