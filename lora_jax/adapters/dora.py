"""DoRA: W' = (m / n) (W + s A B), with a trained length m for each output and n the length that W + s A B has.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353. No gradient passes n (their section
4.3). In a program n^2 = |W|^2 + 2 s B . (A^T W) + s^2 B . (A^T A B), with the dots over each output's own numbers:
nothing of W's shape is formed. Dropout meets x on its way to A alone, where HF PEFT also drops what the change of
length multiplies: that would take a second product with W.
"""

import functools
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.lora import Lora
from lora_jax.adapters.low_rank import LowRank, add_low_rank
from lora_jax.adapters.output_scaled import OutputScaled, along_outputs
from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class Dora(Lora):
    """W' = (m / n) (W + (alpha / rank) A B); arguments and errors are those of `Lora`.

    m starts as the lengths that W's outputs have, so that nothing changes.
    """

    reads_weight = True

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        factors = self.factors(key, w.shape, axes)
        return DoraAdapter(factors.a, factors.b, _lengths(w, factors.lower(w)), axes, factors.scale)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        stack, d, k = axes.fans(shape)
        return super().flops(shape, axes, rows) + rows[1] * k + 2 * stack * d * k * (int(self.rank) + 1)  # type: ignore[arg-type]


@register_kind("dora")
@dataclass(frozen=True)
class DoraAdapter(Adapter):
    """The factors and lengths of one weight. In a program it is an `OutputScaled` LoRA."""

    a: jax.Array  # [*stack, *inputs, r]
    b: jax.Array  # [*stack, r, *outputs]
    m: jax.Array  # [*stack, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    scale: float = field(metadata={"static": True})

    reads_weight = True
    layout = MappingProxyType(
        {"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs"), "m": ("stack", "outputs")}
    )

    def merge(self, w: jax.Array) -> jax.Array:
        v = add_low_rank(w, self.a, self.b, self.axes, self.scale)
        n = jnp.sqrt(jnp.sum(jnp.square(lax.stop_gradient(v)), axis=self.axes.inputs, keepdims=True))
        return along_outputs(length_gain(self.m.astype(w.dtype), _as_m(n, self.axes)), self.axes) * v

    def lower(self, w: jax.Array) -> OutputScaled:
        factors = LowRank(self.a, self.b, self.axes, self.scale)
        return OutputScaled(factors, length_gain(self.m, _lengths(w, factors)), self.axes)


def length_gain(m: jax.Array, n: jax.Array) -> jax.Array:
    """Return m / n, which gives outputs of length n the length m; 1 for an output that is zero, and stays so."""
    return jnp.where(n == 0, jnp.ones_like(m), m / jnp.where(n == 0, jnp.ones_like(n), n).astype(m.dtype))


@functools.partial(jax.jit, inline=True)  # weights of equal shapes share a trace
def _lengths(w: jax.Array, factors: LowRank) -> jax.Array:
    """Return n [*stack, *outputs] without forming a value of W's shape; no gradient passes it."""
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
    """Return n, which has W's axes and size 1 along the inputs, as [*stack, *outputs]."""
    order = (*axes.stack, *axes.outputs, *axes.inputs)
    kept = n.transpose(order)
    return kept.reshape(kept.shape[: len(axes.stack) + len(axes.outputs)])
