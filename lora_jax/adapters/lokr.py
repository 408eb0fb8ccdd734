"""LoKr: W' = W + (alpha / r) W1 (x) W2, a Kronecker product of a small matrix and one of low rank.

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
arXiv 2309.14859. With d = p m and k = q n, W1 [p, q] and W2 [m, n]: the entry (i m + j, u n + v) of the product is
W1[i, u] W2[j, v]. So x @ (W1 (x) W2) takes two products with small matrices, x being seen as [T, p, m].
"""

import dataclasses
import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.factored import Compact, CompactOperand
from lora_jax.adapters.lora import Lora, LoraAdapter
from lora_jax.adapters.scaled import OF_RATIO, Scaled
from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import accumulator, matmul_highest
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.factor_products import matmul
from lora_jax.core.kinds import register_kind
from lora_jax.core.products import Matmul, Product, as_matrices


@dataclass(frozen=True)
class Lokr(Lora):
    """W' = W + (alpha / rank) W1 (x) W2, where W2 = A B of this rank, or whole if that is no smaller.

    W1 starts at zero, A and B as `init_a` says. d and k are each taken apart into the two factors that are nearest to
    their square root, the smaller one for W1. W2 is whole where the rank is at least half of its larger side.

    Other arguments are those of `Lora`. Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS
    Fine-Tuning to Model Evaluation", arXiv 2309.14859.

    Args:
        factor: what W1's sides are at most, instead; the largest divisors up to it.

    Raises:
        LoraError: a factor below 1; what `Lora` raises.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lokr(rank=1)})
    >>> lora.init(jax.random.key(0), params, plan)["w"]  # 6 = 2 * 3, and 4 = 2 * 2
    LokrAdapter(w1 2x2, a 3x1, inputs (6,), outputs (4,), b 1x2)
    """

    factor: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is not None and (
            isinstance(self.factor, bool) or not isinstance(self.factor, int) or self.factor < 1
        ):
            raise LoraError(f"Lokr(factor={self.factor!r}): W1's sides are whole numbers of at least 1, such as 8.")

    def problem(self, shape: tuple[int, ...], axes: KernelAxes) -> str | None:
        return None

    def sides(self, d: int, k: int) -> tuple[int, int, int, int]:
        """Return p, m, q and n: d = p m and k = q n.

        Args:
            d: the number of inputs.
            k: the number of outputs.
        """
        (p, m), (q, n) = (_taken_apart(size, self.factor) for size in (d, k))
        return p, m, q, n

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        stack, inputs, outputs = axes.sizes(w.shape)
        p, m, q, n = self.sides(math.prod(inputs), math.prod(outputs))
        r, dtype, one, two = int(self.rank), self.dtype, *jax.random.split(key)  # type: ignore[arg-type]
        w1 = jnp.zeros((*stack, p, q), dtype)
        is_whole = r >= max(m, n) / 2
        a = self.init_a(one, (*stack, m, n if is_whole else r), m, dtype)
        b = None if is_whole else jnp.moveaxis(self.init_a(two, (*stack, n, r), r, dtype), -1, len(stack))
        return LokrAdapter(w1, a, axes, self.scale, inputs, outputs, b)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        _, d, k = axes.fans(shape)
        p, m, q, n = self.sides(d, k)
        r = int(self.rank)  # type: ignore[arg-type]
        if r >= max(m, n) / 2:
            return 2 * (rows[0] * p * m * n + rows[1] * p * q * n)
        return 2 * (rows[0] * p * r * (m + q) + rows[1] * q * r * n)


@register_kind("lokr")
@dataclass(frozen=True)
class LokrAdapter(Scaled, Compact):
    """The factors of one weight's change, scale * W1 (x) (A B); without B, scale * W1 (x) A.

    Attributes:
        w1: W1, fp32 [*stack, p, q].
        a: A, fp32 [*stack, m, r], or W2 [*stack, m, n].
        axes: which axes of W are stacked, inputs and outputs.
        ratio: the scale. A number is kept as two of which the quotient counts, fp32 [2]; None is 1. Not trained.
        inputs: the sizes of W's axes of inputs.
        outputs: the sizes of W's axes of outputs.
        b: B, fp32 [*stack, r, n], or None where W2 is whole.
    """

    w1: jax.Array  # [*stack, p, q]
    a: jax.Array  # [*stack, m, r], or W2 [*stack, m, n]
    axes: KernelAxes = field(metadata={"static": True})
    ratio: Any  # f32 [2], or None for 1
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})
    b: jax.Array | None = None  # [*stack, r, n]

    layout = MappingProxyType(
        {"w1": ("stack", "p", "q"), "a": ("stack", "m", "r"), "b": ("stack", "r", "n"), "ratio": OF_RATIO}
    )

    def to_lora(self) -> LoraAdapter:
        """Return W1 (x) A B as (W1 (x) A) (I (x) B), of rank q r; where B is missing it is the unit matrix."""
        stack, q, r = self.w1.shape[:-2], self.w1.shape[-1], self.a.shape[-1]
        b = jnp.eye(r, dtype=self.a.dtype) if self.b is None else self.b
        a = self.w1[..., :, None, :, None] * self.a[..., None, :, None, :]
        unit = jnp.eye(q, dtype=b.dtype).reshape(*[1] * len(stack), q, 1, q, 1)
        b = unit * jnp.broadcast_to(b, (*stack, *b.shape[-2:]))[..., None, :, None, :]
        a, b = a.reshape(*stack, *self.inputs, q * r), b.reshape(*stack, q * r, *self.outputs)
        return LoraAdapter(a, b, self.axes, 1.0 if self.ratio is None else self.ratio)

    def lower(self, w: Any) -> CompactOperand:
        """Return the operand, in which W1 has the scale."""
        return CompactOperand(dataclasses.replace(self, w1=self.scaled(self.w1, w), ratio=None), self.axes)

    def merge(self, w: jax.Array) -> jax.Array:
        w2 = self.a if self.b is None else matmul_highest(self.a, self.b)
        delta = self.scaled(self.w1, w)[..., :, None, :, None] * w2[..., None, :, None, :]
        delta = delta.reshape(*self.w1.shape[:-2], *self.inputs, *self.outputs)
        return w + delta.transpose(self.axes.from_canonical()).astype(w.dtype)

    def apply(self, product: Product) -> jax.Array:
        """Return x @ W': x, seen as [T, p, m], is multiplied by A, then by W1 and at last by B."""
        if not isinstance(product, Matmul):
            return super().apply(product)
        n, x, y = len(self.axes.stack), product.x, product.y
        stack, tokens, sides = y.shape[:n], product.token_axes(), (self.w1.shape[-2], self.a.shape[-2])
        w1 = self.scaled(self.w1, product.y)

        def times(h: jax.Array, w: jax.Array) -> jax.Array:
            """Return h [*s, *T, rows, i] @ w [*s, i, j]."""
            flat = as_matrices(h, n, h.ndim - n - 1) if product.flat() else h
            return matmul(flat, w, product.precision, n).astype(x.dtype).reshape(*h.shape[:-1], w.shape[-1])

        h = times(x.reshape(*stack, *tokens, *sides), self.a).swapaxes(-1, -2)  # [*s, *T, r, p]
        h = times(h, w1).swapaxes(-1, -2)  # [*s, *T, q, r]
        if self.b is not None:
            h = times(h, self.b)
        wide = accumulator(y.dtype, h.dtype)
        return (y.astype(wide) + h.reshape(y.shape).astype(wide)).astype(y.dtype)

    def scale_by(self, factor: jax.Array) -> "LokrAdapter":
        return dataclasses.replace(self, w1=self.w1 * factor.astype(self.w1.dtype))


def _taken_apart(size: int, factor: int | None) -> tuple[int, int]:
    """Return the divisors of a size nearest to its square root, the smaller one first and at most `factor`."""
    most = math.isqrt(size) if factor is None else min(factor, math.isqrt(size))
    smaller = next(n for n in range(most, 0, -1) if size % n == 0)
    return smaller, size // smaller
