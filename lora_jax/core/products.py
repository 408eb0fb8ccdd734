"""One use of a weight, reduced to y = x @ W: all that an operand sees of a program.

x @ A and h @ B are all that an adapter needs of x. Each kind of product computes them in the way that the program
computes x @ W: a matrix product, a convolution, a product of ragged groups. So nothing is unfolded.

Axes: s stacked matrices, T rows, d inputs, k outputs, n columns of a factor.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax.core.arrays import accumulator, is_whole
from lora_jax.core.axes import KernelAxes
from lora_jax.core.backward_order import awaited
from lora_jax.core.dropout_mask import dropped
from lora_jax.core.factor_products import as_columns, as_rows, in_turn, matmul
from lora_jax.core.factor_products import contract as product_of_factor
from lora_jax.core.remade import Remade, thin_product

STATIC = {"static": True}


@dataclass(frozen=True)
class Product(abc.ABC):
    """The product y = x @ W, along these axes of W."""

    axes: KernelAxes = field(metadata=STATIC)
    x: jax.Array
    y: jax.Array  # [*s, *T, *outputs]; [T, k] where the kind of product says so
    precision: Any = field(metadata=STATIC)
    origin: Remade | None = field(default=None, kw_only=True)  # of x, if a derivative can make it again
    h: jax.Array | None = field(default=None, kw_only=True)  # x @ A, where it was taken with those of other weights

    @abc.abstractmethod
    def contract(self, a: jax.Array) -> jax.Array:
        """Return h = x @ A for a [*stack, *inputs, n]; the last axis of h is n."""

    @abc.abstractmethod
    def expand(self, h: jax.Array, b: jax.Array) -> jax.Array:
        """Return h @ B of y's shape, for h as `contract` gives it and b [*stack, n, *outputs]."""

    @abc.abstractmethod
    def rows(self) -> tuple[int, int]:
        """Return the numbers of rows in x @ A and in h @ B, over all stacked matrices."""

    def for_each_output(self, gain: jax.Array) -> jax.Array:
        """Return gain [*stack, *outputs] with y's shape."""
        return jnp.broadcast_to(gain.reshape(-1), self.y.shape)  # [T, k]

    def token_axes(self) -> tuple[int, ...]:
        """Return the sizes of the token axes of x, which `split` and `join` are for."""
        return ()

    def split(self, counts: Sequence[int], axes: KernelAxes) -> Self:
        """Split the i-th token axis into counts[i] parts, which become the last stacked axes of x and y.

        `axes` are those of a weight that has these axes too; a count of 1 makes none.
        """
        raise NotImplementedError

    def join(self, y: jax.Array, counts: Sequence[int]) -> jax.Array:
        """Return y with the parts of a `split` put back in their places."""
        raise NotImplementedError

    def keep(self, keys: jax.Array, probability: Any) -> Self:
        """Keep each entry of x with a probability, and divide by it; both [*s], or the probability a number."""
        return self.with_x(dropped(self.given(), keys, probability))

    def with_x(self, x: Remade) -> Self:
        """Return the product of another x."""
        return dataclasses.replace(self, x=x.value, origin=x.origin(), h=None)

    def given(self) -> Remade:
        """Return x, with that of which it can be made."""
        return self.origin or Remade(self.x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matmul(Product):
    """A matrix product: x [*s, *T, *inputs] and y [*s, *T, *outputs], with the axes that the program gave them."""

    def contract(self, a: jax.Array) -> jax.Array:
        stack, x = self._stacked(), self.x
        if self.flat():
            x, a = as_matrices(x, stack, x.ndim - stack - len(self.axes.inputs)), as_columns(a, stack)
        return product_of_factor(x, a, self.precision, stack)

    def expand(self, h: jax.Array, b: jax.Array) -> jax.Array:
        stack = self._stacked()
        if self.flat():
            return matmul(h, as_rows(b, stack), self.precision, stack).reshape(self.y.shape)
        return matmul(h, b, self.precision, stack, like=self.y)

    def rows(self) -> tuple[int, int]:
        return (math.prod(self.x.shape[: self.x.ndim - len(self.axes.inputs)]),) * 2

    def for_each_output(self, gain: jax.Array) -> jax.Array:
        n, tokens = self._stacked(), self.y.ndim - gain.ndim
        return jnp.broadcast_to(jnp.expand_dims(gain, range(n, n + tokens)), self.y.shape)

    def keep(self, keys: jax.Array, probability: Any) -> Self:
        return self.with_x(dropped(self.given(), keys, probability, self._stacked()))

    def token_axes(self) -> tuple[int, ...]:
        return self.x.shape[self._stacked() : self.x.ndim - len(self.axes.inputs)]

    def split(self, counts: Sequence[int], axes: KernelAxes) -> Self:
        at = self._stacked()

        def parts(array: jax.Array) -> jax.Array:
            moved = 0
            for i, n in enumerate(counts):
                if n > 1:
                    axis = at + moved + i
                    size = array.shape[axis] // n
                    array = array.reshape(*array.shape[:axis], n, size, *array.shape[axis + 1 :])
                    array = jnp.moveaxis(array, axis, at + moved)
                    moved += 1
            return array

        return dataclasses.replace(self.with_x(self.given().map(parts)), axes=axes, y=parts(self.y))

    def join(self, y: jax.Array, counts: Sequence[int]) -> jax.Array:
        at, split = self._stacked(), [i for i, n in enumerate(counts) if n > 1]
        for moved, i in reversed(list(enumerate(split))):
            first = at + moved + i
            y = jnp.moveaxis(y, at + moved, first)
            y = y.reshape(*y.shape[:first], y.shape[first] * y.shape[first + 1], *y.shape[first + 2 :])
        return y

    def _stacked(self) -> int:
        return len(self.axes.stack)

    def flat(self) -> bool:
        """Return whether T and d are flattened to one axis each.

        Thin products with more axes are slow on XLA's CPU backend. But on a mesh that the compiler partitions for, an
        axis may be sharded that would then lie inside another one, and would be gathered.
        """
        return is_whole(self.x, self.y)


def as_matrices(x: jax.Array, stack: int, rows: int) -> jax.Array:
    """Return x [*s, *rows, *columns] as matrices [*s, T, d]."""
    shape, first_column = x.shape, stack + rows
    return x.reshape(*shape[:stack], math.prod(shape[stack:first_column]), math.prod(shape[first_column:]))


def product_dtype(x: Any, w: Any) -> Any:
    """Return the dtype that x @ W is computed in: that of both, or where they differ one that holds both."""
    return x if x == w and jnp.dtype(x).itemsize > 1 else accumulator(x, w)


def add_lowrank(
    product: Product, a: jax.Array, b: jax.Array, of_y: Callable[[jax.Array], jax.Array] = lambda y: y
) -> jax.Array:
    """Return y + x @ A @ B in y's dtype, computed from left to right, so that nothing of A B's shape exists.

    a is [*stack, *inputs, r] and b [*stack, r, *outputs]; a rank of 0 is no change. The sum is taken in at least fp32,
    with of_y(y) in the place of y.

    The factors are used in x's dtype, matrix products accumulate in fp32 (convolutions in x's dtype), and gradients
    keep the factors' own dtype. B has the scale, in fp32 or wider: no product over tokens is touched again, and none
    overflows fp16 by it. x @ A is named `lora_h` for the policies of `jax.checkpoint`: keeping it costs r/d of x and
    saves a pass over x.

    h @ B waits for y. XLA's compiler for TPUs then adds y within that product. Without, it may take h @ B first, write
    it out in fp32 and add y in passes of their own, which cost more than the thin products do.
    """
    if a.shape[-1] == 0:
        return of_y(product.y).astype(product.y.dtype)
    y, h = in_turn(product.y, thin_product(product, a) if product.h is None else product.h)
    change, y = product.expand(awaited(h), b), of_y(y)
    wide = accumulator(y.dtype, change.dtype)
    return (y.astype(wide) + change.astype(wide)).astype(product.y.dtype)
