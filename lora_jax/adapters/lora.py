"""LoRA: W' = W + (alpha / r) A B, with A [d, r] and B [r, k] in the place of a full [d, k] change.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. The paper writes W' = W + B A
for weights [k, d] that multiply from the left; here weights multiply from the right, as in Flax.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import initializers
from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.products import Product, lowrank

Rank = int | Callable[[str, tuple[int, ...]], int]


@dataclass(frozen=True)
class Lora(Rule):
    """W' = W + (alpha / rank) A B.

    Args:
        rank: r, the width of the factors; at most min(d, k) of every weight that it is used for. Or a function of a
            weight's path and shape that says its rank.
        alpha: the numerator of the scale; None stands for the rank, that is a scale of 1.
        init_a: how A starts, one of `lora_jax.initializers` or a function like them; B starts at zero.
        dtype: of A and B. fp32 by default, also on a bf16 base: Adam's updates vanish in bf16.

    Raises:
        LoraError: rank below 1; a scale that is zero or not finite in fp32; a dtype that is not a floating one;
            an `init_a` that is not a function.
    """

    rank: Rank
    alpha: float | None = None
    init_a: Callable[..., jax.Array] = initializers.kaiming
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_rank(name, self.rank)
        if self.alpha is not None and not _is_usable(self.alpha, 1 if callable(self.rank) else self.rank):
            raise LoraError(f"{name}(alpha={self.alpha!r}): alpha is a finite number other than 0, for example 16.")
        check_dtype(name, self.dtype)
        if not callable(self.init_a):
            raise LoraError(f"{name}(init_a={self.init_a!r}): give a function, such as lora.initializers.gaussian.")

    def __str__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, alpha={self.alpha})"

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else float(self.alpha) / int(self.rank)  # type: ignore[arg-type]

    def at(self, path: str, shape: tuple[int, ...]) -> Self:
        return dataclasses.replace(self, rank=self.rank(path, shape)) if callable(self.rank) else self

    def problem(self, shape: tuple[int, ...], axes: KernelAxes) -> str | None:
        _, d, k = axes.fans(shape)
        return rank_above(self.rank, d, k)

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        return self.factors(key, w.shape, axes)

    def factors(self, key: jax.Array, shape: tuple[int, ...], axes: KernelAxes) -> "LoraAdapter":
        """A and B as they start."""
        stack, inputs, outputs = axes.sizes(shape)
        a = self.init_a(key, (*stack, *inputs, self.rank), math.prod(inputs), self.dtype)
        b = jnp.zeros((*stack, self.rank, *outputs), self.dtype)
        return LoraAdapter(a, b, axes, self.scale)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        _, d, k = axes.fans(shape)
        return 2 * int(self.rank) * (rows[0] * d + rows[1] * k)  # type: ignore[arg-type]


def check_rank(name: str, rank: Any) -> None:
    if not callable(rank) and (isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1):
        raise LoraError(f"{name}(rank={rank!r}): the rank is a whole number of at least 1, for example 8.")


def check_dtype(name: str, dtype: Any) -> None:
    if not _is_floating(dtype):
        raise LoraError(f"{name}(dtype={dtype!r}): adapters are trained, give a floating dtype such as jnp.float32.")


def rank_above(rank: Any, d: int, k: int) -> str | None:
    return f"rank {rank} is above min({d}, {k}), give it at most {min(d, k)}" if rank > min(d, k) else None


def _is_usable(alpha: Any, rank: Any) -> bool:
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

    layout = MappingProxyType({"a": ("stack", "inputs", "rank"), "b": ("stack", "rank", "outputs")})

    def merge(self, w: jax.Array) -> jax.Array:
        if self.a.shape[-1] == 0:  # of rank 0: no change
            return w
        n = len(self.axes.stack)
        a = self.a.reshape(*self.a.shape[:n], -1, self.a.shape[-1])
        b = self.b.reshape(*self.b.shape[: n + 1], -1)
        delta = jnp.matmul(a.astype(w.dtype), b.astype(w.dtype), precision="highest") * self.scale
        stack, inputs, outputs = self.axes.sizes(w.shape)
        return w + delta.reshape(stack + inputs + outputs).transpose(self.axes.from_canonical())

    def apply(self, product: Product) -> jax.Array:
        if self.a.shape[-1] == 0:
            return product.y
        y, delta = product.y, lowrank(product, self.a, self.b, self.scale)
        wide = accumulator(y.dtype, delta.dtype)
        return (y.astype(wide) + delta.astype(wide)).astype(y.dtype)

    def transpose(self) -> "LoraAdapter":
        n = len(self.axes.stack)
        a, b = jnp.moveaxis(self.b, n, -1), jnp.moveaxis(self.a, -1, n)
        return LoraAdapter(a, b, self.axes.transpose(), self.scale)

    def scale_by(self, factor: jax.Array) -> "LoraAdapter":
        return dataclasses.replace(self, b=self.b * factor.astype(self.b.dtype))

    def concatenate(self, parts: Sequence[Adapter | None], sizes: Sequence[int], axis: int) -> "LoraAdapter | None":
        """[W1 | W2]' = [W1 | W2] + [A1 | A2] diag(B1, B2), and the same the other way round; stacks are stacked."""
        if any(p is not None and (type(p) is not type(self) or p.axes != self.axes) for p in parts):
            return None
        if axis in self.axes.inputs:
            turned = self.transpose().concatenate([p and p.transpose() for p in parts], sizes, axis)
            return turned and turned.transpose()
        return self._stacked(parts, sizes, axis) if axis in self.axes.stack else self._joined(parts, sizes, axis)

    def _joined(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> "LoraAdapter":
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
        return LoraAdapter(jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=rank_axis), self.axes, 1.0)

    def _stacked(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> "LoraAdapter":
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
        return LoraAdapter(jnp.concatenate(a, axis=at), jnp.concatenate(b, axis=at), self.axes, 1.0)


def _zeros_along(array: jax.Array, axis: int, size: int) -> jax.Array:
    return jnp.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
