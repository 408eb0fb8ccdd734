"""LoRA: W' = W + (alpha / r) A B, with A [d, r] and B [r, k] in the place of a full [d, k] change.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. The paper writes W' = W + B A
for weights [k, d] that multiply from the left; here weights multiply from the right, as in Flax.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax.adapters import initializers
from lora_jax.adapters.arguments import check_dtype, check_rank, is_usable_alpha, rank_above
from lora_jax.adapters.low_rank import LowRank, add_low_rank
from lora_jax.adapters.scaled import OF_RATIO, Scaled
from lora_jax.adapters.stacked_rule import StackedRule
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import register_kind

Rank = int | Callable[[str, tuple[int, ...]], int]


@dataclass(frozen=True)
class Lora(StackedRule):
    """W' = W + (alpha / rank) A B.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Args:
        rank: r, the width of the factors; at most min(d, k) of every weight that it is used for. Or a function of a
            weight's path and shape that says its rank.
        alpha: the numerator of the scale; None stands for the rank, that is a scale of 1.
        init_a: how A starts, one of `lora_jax.initializers` or a function like them; B starts at zero.
        dtype: of A and B. fp32 by default, also on a bf16 base: Adam's updates vanish in bf16.
        stack: axes of W, as `stack=0`, with a matrix at each index that has factors of its own: experts, members.

    Raises:
        LoraError: rank below 1; a scale that is zero or not finite in fp32; a dtype that is not a floating one;
            an `init_a` that is not a function.

    >>> Lora(rank=8, alpha=16).scale
    2.0
    """

    rank: Rank
    alpha: float | None = None
    init_a: Callable[..., jax.Array] = initializers.kaiming
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_rank(name, self.rank)
        if self.alpha is not None and not is_usable_alpha(self.alpha, 1 if callable(self.rank) else self.rank):
            raise LoraError(f"{name}(alpha={self.alpha!r}): alpha is a finite number other than 0, for example 16.")
        check_dtype(name, self.dtype)
        if not callable(self.init_a):
            raise LoraError(f"{name}(init_a={self.init_a!r}): give a function, such as lora.initializers.gaussian.")

    @property
    def scale(self) -> float:
        """Return what A B is multiplied by: alpha / rank."""
        return 1.0 if self.alpha is None else float(self.alpha) / int(self.rank)  # type: ignore[arg-type]

    def at(self, path: str, shape: tuple[int, ...]) -> Self:
        return dataclasses.replace(self, rank=self.rank(path, shape)) if callable(self.rank) else self

    def problem(self, shape: tuple[int, ...], axes: KernelAxes) -> str | None:
        _, d, k = axes.fans(shape)
        return rank_above(self.rank, d, k)

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        return self.factors(key, w.shape, axes)

    def factors(self, key: jax.Array, shape: tuple[int, ...], axes: KernelAxes) -> "LoraAdapter":
        """Return A and B as they start.

        Args:
            key: a random key.
            shape: of the weight.
            axes: which of its axes are stacked, inputs and outputs.
        """
        stack, inputs, outputs = axes.sizes(shape)
        a = self.init_a(key, (*stack, *inputs, self.rank), math.prod(inputs), self.dtype)
        b = jnp.zeros((*stack, self.rank, *outputs), self.dtype)
        return LoraAdapter(a, b, axes, self.scale)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        _, d, k = axes.fans(shape)
        return 2 * int(self.rank) * (rows[0] * d + rows[1] * k)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RsLora(Lora):
    """`Lora` with the scale alpha / sqrt(rank), so that outputs and gradients keep their size as r grows.

    Arguments and errors are those of `Lora`. Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning
    with LoRA", arXiv 2312.03732.

    >>> RsLora(rank=16, alpha=8).scale
    2.0
    """

    @property
    def scale(self) -> float:
        """Return what A B is multiplied by: alpha / sqrt(rank)."""
        return 1.0 if self.alpha is None else float(self.alpha) / math.sqrt(int(self.rank))  # type: ignore[arg-type]


@register_kind("lora")
@dataclass(frozen=True)
class LoraAdapter(Scaled):
    """The factors of one weight's change, scale * A B.

    Attributes:
        a: A, fp32 [*stack, *inputs, r].
        b: B, fp32 [*stack, r, *outputs].
        axes: which axes of W are stacked, inputs and outputs.
        ratio: the scale. A number is kept as two of which the quotient counts, fp32 [2]; None is 1. Not trained.
    """

    a: jax.Array  # [*stack, *inputs, r]
    b: jax.Array  # [*stack, r, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    ratio: Any  # f32 [2]

    layout = MappingProxyType({**LowRank.layout, "ratio": OF_RATIO})

    def merge(self, w: jax.Array) -> jax.Array:
        return add_low_rank(w, self.a, self.b, self.axes, self.ratio)

    def lower(self, w: Any) -> LowRank:
        return LowRank(self.a, self.scaled(self.b, w), self.axes)

    def to_lora(self) -> "LoraAdapter":
        return self

    def transpose(self) -> "LoraAdapter":
        """Return the adapter of W with inputs and outputs exchanged, as a table that is also a head needs it."""
        other = LowRank(self.a, self.b, self.axes).transpose()
        return LoraAdapter(other.a, other.b, other.axes, self.ratio)
