"""LoRA: W' = W + (alpha / r) A B, with A [d, r] and B [r, k] in the place of a full [d, k] change.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. The paper writes W' = W + B A
for weights [k, d] that multiply from the left; here weights multiply from the right, as in Flax.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import initializers
from lora_jax.adapters.base import Adapter, Rule
from lora_jax.axes import KernelAxes
from lora_jax.errors import LoraError
from lora_jax.lowrank import accumulator, lowrank


@dataclass(frozen=True)
class Lora(Rule):
    """W' = W + (alpha / rank) A B.

    Args:
        rank: r, the width of the factors; at most min(d, k) of every weight that it is used for.
        alpha: the numerator of the scale; None stands for the rank, that is a scale of 1.
        init_a: how A starts, one of `lora_jax.initializers` or a function like them; B starts at zero.
        dtype: of A and B. fp32 by default, also on a bf16 base: Adam's updates vanish in bf16.

    Raises:
        LoraError: rank below 1; a scale that is zero or not finite in fp32; a dtype that is not a floating one;
            an `init_a` that is not a function.
    """

    rank: int
    alpha: float | None = None
    init_a: Callable[..., jax.Array] = initializers.kaiming
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int | np.integer) or self.rank < 1:
            raise LoraError(f"Lora(rank={self.rank!r}): the rank is a whole number of at least 1, for example 8.")
        if self.alpha is not None and not _is_usable(self.alpha, self.rank):
            raise LoraError(
                f"Lora(alpha={self.alpha!r}): alpha is a finite number other than 0, for example {2 * self.rank}."
            )
        if not _is_floating(self.dtype):
            raise LoraError(
                f"Lora(dtype={self.dtype!r}): adapters are trained, give a floating dtype such as jnp.float32."
            )
        if not callable(self.init_a):
            raise LoraError(f"Lora(init_a={self.init_a!r}): give a function, such as lora_jax.initializers.gaussian.")

    def __str__(self) -> str:
        return f"Lora(rank={self.rank}, alpha={self.alpha})"

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else float(self.alpha) / int(self.rank)

    def init(self, key: jax.Array, shape: tuple[int, ...], axes: KernelAxes) -> "LoraAdapter":
        stack, inputs, outputs = axes.sizes(shape)
        a = self.init_a(key, (*stack, *inputs, self.rank), math.prod(inputs), self.dtype)
        b = jnp.zeros((*stack, self.rank, *outputs), self.dtype)
        return LoraAdapter(a, b, axes, self.scale)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, tokens: int) -> int:
        stack, d, k = axes.fans(shape)
        return 2 * stack * tokens * self.rank * (d + k)


def _is_usable(alpha: Any, rank: int) -> bool:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.number):
        return False
    scale = abs(float(alpha)) / rank
    return float(jnp.finfo(jnp.float32).tiny) <= scale <= float(jnp.finfo(jnp.float32).max)  # NaN is neither


def _is_floating(dtype: Any) -> bool:
    try:
        return dtype is not None and bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:  # no name of a dtype
        return False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraAdapter(Adapter):
    """The factors of one weight's change, scale * A B."""

    a: jax.Array  # [*stack, *inputs, r]
    b: jax.Array  # [*stack, r, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    scale: float = field(metadata={"static": True})

    def kernel_shape(self) -> tuple[int, ...]:
        n = len(self.axes.stack)
        return self.axes.shape(self.a.shape[:n], self.a.shape[n:-1], self.b.shape[n + 1 :])

    def merge(self, w: jax.Array) -> jax.Array:
        a, b = self._matrices()
        delta = jnp.matmul(a.astype(w.dtype), b.astype(w.dtype), precision="highest") * self.scale
        stack, inputs, outputs = self.axes.sizes(w.shape)
        return w + delta.reshape(stack + inputs + outputs).transpose(self.axes.from_canonical())

    def apply(self, x: jax.Array, y: jax.Array, precision: Any = None) -> jax.Array:
        delta = lowrank(x, *self._matrices(), self.scale, precision)
        wide = accumulator(y.dtype, delta.dtype)
        return (y.astype(wide) + delta.astype(wide)).astype(y.dtype)

    def transpose(self) -> "LoraAdapter":
        rank_axis = self.a.ndim - len(self.axes.inputs) - 1  # of b; a has it last
        b = jnp.moveaxis(self.a, -1, rank_axis)
        return LoraAdapter(jnp.moveaxis(self.b, rank_axis, -1), b, self.axes.transpose(), self.scale)

    def _matrices(self) -> tuple[jax.Array, jax.Array]:
        """A [*s, d, r] and B [*s, r, k], with the axes of inputs and of outputs flattened."""
        n = self.a.ndim - len(self.axes.inputs) - 1  # stack axes: those that a scan has taken are gone
        stack, r = self.a.shape[:n], self.a.shape[-1]
        return self.a.reshape(*stack, math.prod(self.a.shape[n:-1]), r), self.b.reshape(
            *stack, r, math.prod(self.b.shape[n + 1 :])
        )
