"""DoRA: W' = (m / n) (W + s A B), with a trained length m for each output and n the length that W + s A B has.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353. No gradient passes n (their section
4.3). In a program n^2 = |W|^2 + 2 s B . (A^T W) + s^2 B . (A^T A B), with the dots over each output's own numbers:
nothing of W's shape is formed. Where an output of W + s A B is short beside W, these terms cancel; then n^2 is the sum
of squares of W + s A B, formed block by block. Dropout meets x on its way to A alone, where HF PEFT also drops what the
change of length multiplies: that would take a second product with W.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.lora import Lora
from lora_jax.adapters.low_rank import LowRank, add_low_rank
from lora_jax.adapters.output_scaled import OutputScaled, along_outputs
from lora_jax.adapters.scaled import OF_RATIO, Scaled
from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import register_kind

CANCELS = 0.1  # |W + s A B|^2 beside |W|^2 + |s A B|^2, below which the terms of n^2 are not to be trusted
BLOCK = 2**22  # entries of W + s A B that are formed at a time


@dataclass(frozen=True)
class Dora(Lora):
    """W' = (m / n) (W + (alpha / rank) A B); arguments and errors are those of `Lora`.

    m starts as the lengths that W's outputs have, so that nothing changes.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Dora(rank=2)})
    >>> lora.init(jax.random.key(0), params, plan)["w"]
    DoraAdapter(a 6x2, b 2x4, m 4)
    """

    reads_weight = True

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        factors = self.factors(key, w.shape, axes)
        return DoraAdapter(factors.a, factors.b, output_lengths(w, factors.lower(w)), axes, factors.ratio)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        stack, d, k = axes.fans(shape)
        return super().flops(shape, axes, rows) + rows[1] * k + 2 * stack * d * k * (int(self.rank) + 1)  # type: ignore[arg-type]


@register_kind("dora")
@dataclass(frozen=True)
class DoraAdapter(Scaled):
    """The factors and lengths of one weight. In a program it is an `OutputScaled` LoRA.

    Attributes:
        a: A, fp32 [*stack, *inputs, r].
        b: B, fp32 [*stack, r, *outputs].
        m: the lengths of the outputs, fp32 [*stack, *outputs].
        axes: which axes of W are stacked, inputs and outputs.
        ratio: the scale. A number is kept as two of which the quotient counts, fp32 [2]; None is 1. Not trained.
    """

    a: jax.Array  # [*stack, *inputs, r]
    b: jax.Array  # [*stack, r, *outputs]
    m: jax.Array  # [*stack, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    ratio: Any  # f32 [2]

    reads_weight = True
    layout = MappingProxyType(
        {
            "a": ("stack", "inputs", "rank"),
            "b": ("stack", "rank", "outputs"),
            "m": ("stack", "outputs"),
            "ratio": OF_RATIO,
        }
    )

    def merge(self, w: jax.Array) -> jax.Array:
        v = add_low_rank(w, self.a, self.b, self.axes, self.ratio)
        n = jnp.sqrt(jnp.sum(jnp.square(lax.stop_gradient(v)), axis=self.axes.inputs, keepdims=True))
        return along_outputs(length_gain(self.m.astype(w.dtype), _as_m(n, self.axes)), self.axes) * v

    def lower(self, w: jax.Array) -> OutputScaled:
        return self.lowering(w)(self)

    def lowering(self, w: jax.Array) -> Callable[["DoraAdapter"], OutputScaled]:
        lengths = output_lengths(w, self._factors(w))  # no gradient passes them, so copies share them

        def lower(adapter: DoraAdapter) -> OutputScaled:
            return OutputScaled(adapter._factors(w), length_gain(adapter.m, lengths), adapter.axes)

        return lower

    def _factors(self, w: jax.Array) -> LowRank:
        return LowRank(self.a, self.scaled(self.b, w), self.axes)


def length_gain(m: jax.Array, n: jax.Array) -> jax.Array:
    """Return m / n, which gives outputs of length n the length m; 1 for an output that is zero, and stays so."""
    return jnp.where(n == 0, jnp.ones_like(m), m / jnp.where(n == 0, jnp.ones_like(n), n).astype(m.dtype))


@functools.partial(jax.jit, inline=True)  # weights of equal shapes share a trace
def output_lengths(w: jax.Array, factors: LowRank) -> jax.Array:
    """Return n [*stack, *outputs] without forming a value of W's shape; no gradient passes it. B has the scale."""
    axes, n = factors.axes, len(factors.axes.stack)
    w, a, b = lax.stop_gradient((w, factors.a, factors.b))
    wide = accumulator(w.dtype, a.dtype)
    stack, inputs, each = tuple(range(n)), tuple(range(n, a.ndim - 1)), (*axes.stack, *axes.outputs)

    def dot(x: jax.Array, y: jax.Array, contracted: Any, stacked: Any) -> jax.Array:
        return lax.dot_general(x, y, (contracted, stacked), precision="highest", preferred_element_type=wide)

    squares = dot(w, w, (axes.inputs, axes.inputs), (each, each))  # no matrix product: one pass over W
    a, b = a.astype(wide), b.astype(wide)

    def thin(a: jax.Array, w: jax.Array) -> jax.Array:  # A^T W [*stack, r, *outputs]
        return dot(a, w, (inputs, axes.inputs), (stack, axes.stack))

    # XLA's CPU backend fails for most shapes of bf16 here, and multiplies in fp32 in any case.
    aw = lax.platform_dependent(a, w, cpu=thin, default=lambda a, w: thin(a.astype(w.dtype), w))
    aab = dot(dot(a, a, (inputs, inputs), (stack, stack)), b, ((n + 1,), (n,)), (stack, stack))
    mixed, change = (jnp.sum(b * term, axis=n) for term in (2 * aw, aab))
    n2 = squares + mixed + change
    cancels = _in_any_set(jnp.any(n2 < CANCELS * (squares + change)))
    n2 = lax.cond(cancels, lambda: _squares_in_blocks(w, a, b, axes), lambda: n2)
    return jnp.sqrt(jnp.maximum(n2, 0))


@jax.custom_batching.custom_vmap
def _in_any_set(cancels: jax.Array) -> jax.Array:
    """Return whether this is so in any set of adapters under `vmap`, which would else compute both branches for each.

    Blocks give the right lengths for all of them.
    """
    return cancels


@_in_any_set.def_vmap
def _in_any_set_of_a_stack(size: int, is_batched: Any, cancels: jax.Array) -> tuple[jax.Array, bool]:
    return _in_any_set(jnp.any(cancels, axis=0)), False


def _squares_in_blocks(w: jax.Array, a: jax.Array, b: jax.Array, axes: KernelAxes) -> jax.Array:
    """Return the sums of squares [*stack, *outputs] of W + A B, of which one block of inputs is formed at a time.

    A block has every m-th input, so that inputs that are split over devices stay where they are.
    """
    axis, stack = max(axes.inputs, key=lambda i: w.shape[i]), tuple(range(len(axes.stack)))
    of_a, size = len(stack) + axes.inputs.index(axis), w.shape[axis]
    m = next((m for m in range(max(2, w.size // BLOCK), size) if size % m == 0), size)
    w, a = (x.reshape(*x.shape[:i], size // m, m, *x.shape[i + 1 :]) for x, i in ((w, axis), (a, of_a)))
    contracted = ((a.ndim - 2,), (len(stack),))  # the rank, of a block of A and of B

    def squares(j: Any) -> jax.Array:
        part, of_part = (lax.dynamic_index_in_dim(x, j, i + 1, keepdims=False) for x, i in ((w, axis), (a, of_a)))
        change = lax.dot_general(of_part, b, (contracted, (stack, stack)), precision="highest")
        v = part.astype(b.dtype) + change.transpose(axes.from_canonical())
        return _as_m(jnp.sum(jnp.square(v), axis=axes.inputs, keepdims=True), axes)

    return lax.fori_loop(1, m, lambda j, total: total + squares(j), squares(0))


def _as_m(n: jax.Array, axes: KernelAxes) -> jax.Array:
    """Return n, which has W's axes and size 1 along the inputs, as [*stack, *outputs]."""
    order = (*axes.stack, *axes.outputs, *axes.inputs)
    kept = n.transpose(order)
    return kept.reshape(kept.shape[: len(axes.stack) + len(axes.outputs)])
