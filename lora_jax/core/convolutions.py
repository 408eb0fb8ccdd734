"""Uses of a weight that are no plain matrix product, reduced to y = x @ W: convolutions and ragged groups.

x @ A and h @ B are computed in the way that the program computes x @ W, so nothing is unfolded.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.factor_products import as_columns, as_rows, matmul, of_one_dtype, with_factor
from lora_jax.core.products import STATIC, Product
from lora_jax.core.ragged import ragged_product

Settings = tuple[tuple[str, Any], ...]  # strides, padding and dilations of a convolution, by JAX's names


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conv(Product):
    """A convolution. W's inputs are the window and the channels that one output sees, its outputs the new channels.

    With feature groups, group g of the outputs sees group g of x's channels. A is the same for each group: h has n
    columns for each of them, which is no saving where there are as many groups as channels (depthwise).
    """

    dims: lax.ConvDimensionNumbers = field(metadata=STATIC)
    groups: int = field(metadata=STATIC)
    settings: Settings = field(metadata=STATIC)

    def contract(self, a: jax.Array) -> jax.Array:
        out = self.dims.rhs_spec[0]
        kernel = jnp.concatenate([jnp.moveaxis(a, -1, out)] * self.groups, axis=out)
        h = conv(self.x, kernel, self.dims, self.groups, self.precision, self.settings)
        return channels_last(h, self.dims)

    def expand(self, h: jax.Array, b: jax.Array) -> jax.Array:
        if self.groups == 1:
            return matmul(h, b, self.precision)
        grouped = matmul(
            h.reshape(len(h), self.groups, len(b)).swapaxes(0, 1),  # [g, T, n]
            b.reshape(len(b), self.groups, -1).swapaxes(0, 1),  # [g, n, k / g]
            self.precision,
            stack=1,
        )
        return grouped.swapaxes(0, 1).reshape(self.y.shape)

    def rows(self) -> tuple[int, int]:
        return len(self.y) * self.groups, len(self.y)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BackwardConv(Product):
    """The convolution that a derivative of one computes: W's outputs are the window and the channels of the result."""

    dims: lax.ConvDimensionNumbers = field(metadata=STATIC)
    settings: Settings = field(metadata=STATIC)

    def contract(self, a: jax.Array) -> jax.Array:
        return matmul(channels_last(self.x, self.dims, of=0), a, self.precision)

    def expand(self, h: jax.Array, b: jax.Array) -> jax.Array:
        channels = self.dims.lhs_spec[1]
        shape = [size for i, size in enumerate(self.x.shape) if i != channels]
        image = jnp.moveaxis(h.reshape(*shape, len(b)), -1, channels).astype(self.x.dtype)
        kernel = jnp.moveaxis(b, 0, self.dims.rhs_spec[1])
        return channels_last(conv(image, kernel, self.dims, 1, self.precision, self.settings), self.dims)

    def rows(self) -> tuple[int, int]:
        return math.prod(self.x.shape) // self.x.shape[self.dims.lhs_spec[1]], len(self.y)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ragged(Product):
    """x [T, d], its rows sorted by expert: the first group_sizes[0] of them are the first expert's, and so on."""

    group_sizes: jax.Array

    def contract(self, a: jax.Array) -> jax.Array:
        return self._dot(self.x, as_columns(a, 1))

    def expand(self, h: jax.Array, b: jax.Array) -> jax.Array:
        return self._dot(h, as_rows(b, 1))

    def rows(self) -> tuple[int, int]:
        return len(self.x), len(self.x)

    def for_each_output(self, gain: jax.Array) -> jax.Array:
        """Return for each row the gain of its own expert."""
        experts = jnp.repeat(jnp.arange(len(gain)), self.group_sizes, total_repeat_length=len(self.x))
        return gain.reshape(len(gain), -1)[experts]

    def _dot(self, x: jax.Array, w: jax.Array) -> jax.Array:
        def product(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
            return ragged_product(x, w, group_sizes, precision=self.precision)

        return with_factor(of_one_dtype(product), x, w, self.group_sizes)


def conv(x: jax.Array, w: jax.Array, dims: Any, groups: int, precision: Any, settings: Settings) -> jax.Array:
    """Convolve in x's dtype. JAX cannot differentiate a convolution of a narrow x with a wider result."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, w, dimension_numbers=dims, feature_group_count=groups, precision=precision, **dict(settings)
        )

    return with_factor(of_one_dtype(product), x, w)


def channels_last(image: jax.Array, dims: lax.ConvDimensionNumbers, of: int = 2) -> jax.Array:
    """Return the result of a convolution (or its x, for `of` = 0) as [T, channels]."""
    channels = dims[of][1]
    return jnp.moveaxis(image, channels, -1).reshape(-1, image.shape[channels])
