"""Products of x with the factor of an adapter: computed in x's dtype, with a gradient in the factor's own.

An fp32 factor is cast to bf16 where x is bf16. JAX's derivative of that cast would round the gradient of the factor to
bf16 as well: a sum over all tokens, accumulated in fp32, of which 8 bits are left, and which devices add up in bf16. So
the derivative by a wider factor is stated here, as the product of x with a wide array. Nothing else changes: the
products of the forward pass, and the derivative by x, have narrow operands.

Axes: s stacked matrices, T rows, d inputs, k outputs, r columns of a thin factor.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lora_jax.core.arrays import accumulator

FACTOR_PRODUCT = "lora_factor_product"  # by this name the interpreter knows the call
BilinearProduct = Callable[..., jax.Array]  # (x, w, *others), linear in x and in w


def matmul(x: jax.Array, w: jax.Array, precision: Any, stack: int = 0, like: jax.Array | None = None) -> jax.Array:
    """Return x [*s, *T, d] @ w [*s, d, *k], with `stack` axes s, in x's dtype and accumulated in fp32 or wider.

    On a mesh with explicit axes the result is sharded as `like` is.
    """
    place = None if like is None else _explicit(like)
    return dot(x, w, ((x.ndim - 1,), (stack,)), precision, stack, place)


def contract(x: jax.Array, a: jax.Array, precision: Any, stack: int = 0) -> jax.Array:
    """Return x [*s, *T, *d] @ a [*s, *d, r], for a thin a.

    A is laid out as [*s, r, *d] first, and the barrier keeps it so: XLA's CPU backend reads a thin matrix along d
    several times faster (benchmarks/train_step.py), and elsewhere a copy of A costs nothing to speak of.
    """
    rows = lax.optimization_barrier(jnp.moveaxis(a, -1, stack))
    inputs = a.ndim - stack - 1
    dims = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(stack + 1, a.ndim))
    place = _explicit(x)
    return dot(x, rows, dims, precision, stack, place and jax.P(*place[: x.ndim - inputs], None))


def dot(x: jax.Array, w: jax.Array, dims: Any, precision: Any, stack: int, place: jax.P | None = None) -> jax.Array:
    """Return the product of x [*s, ...] and w [*s, ...] along pairs of axes, in x's dtype and accumulated in fp32."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(
            x,
            w,
            (dims, (tuple(range(stack)),) * 2),
            precision=precision,
            preferred_element_type=accumulator(x.dtype),
            out_sharding=place,
        )

    return with_factor(product, x, w)


def as_columns(a: jax.Array, stack: int) -> jax.Array:
    """Return A [*s, *inputs, n] as matrices [*s, d, n]."""
    return a.reshape(*a.shape[:stack], math.prod(a.shape[stack:-1]), a.shape[-1])


def as_rows(b: jax.Array, stack: int) -> jax.Array:
    """Return B [*s, n, *outputs] as matrices [*s, n, k]."""
    return b.reshape(*b.shape[: stack + 1], math.prod(b.shape[stack + 1 :]))


def _explicit(x: jax.Array) -> jax.P | None:
    """Return how an array is sharded, where its type says so: on a mesh with explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding.spec if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None


def with_factor(product: BilinearProduct, x: jax.Array, w: jax.Array, *others: jax.Array) -> jax.Array:
    """Return product(x, w, *others) with w cast to x's dtype, and a gradient of w that is not rounded to that dtype.

    The product is taken of a narrow x and a wide w for the derivative alone.
    """
    if w.dtype.itemsize <= x.dtype.itemsize:
        return product(x, w.astype(x.dtype), *others)
    if _is_derivative.get():
        return product(x, w, *others)
    return lora_factor_product(product, x, w, *others)


@contextlib.contextmanager
def as_derivative() -> Iterator[None]:
    """Take products as the derivative along w does: what is computed inside is linear in w, and has a transpose."""
    token = _is_derivative.set(True)
    try:
        yield
    finally:
        _is_derivative.reset(token)


_is_derivative: contextvars.ContextVar[bool] = contextvars.ContextVar("is derivative", default=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def lora_factor_product(product: BilinearProduct, x: jax.Array, w: jax.Array, *others: jax.Array) -> jax.Array:
    """Return product(x, w, *others) for a w that is wider than x."""
    return product(x, w.astype(x.dtype), *others)


def _tangent(product: BilinearProduct, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Return the product and its derivative. The product is the plain one, which policies of `jax.checkpoint` see."""
    (x, w, *others), (dx, dw, *_) = primals, tangents
    narrow = w.astype(x.dtype)
    y = product(x, narrow, *others)
    if isinstance(dw, SymbolicZero):
        return y, product(dx, narrow, *others)
    along_w = product(x, dw, *others)
    return y, along_w if isinstance(dx, SymbolicZero) else product(dx, narrow, *others) + along_w


lora_factor_product.defjvp(_tangent, symbolic_zeros=True)


def of_one_dtype(product: BilinearProduct) -> BilinearProduct:
    """Return the product of operands of two dtypes, for an operation that takes only one, with a result of x's.

    What it keeps for its derivative is x and not the wide copy of x.
    """

    def run(x: jax.Array, w: jax.Array, *others: jax.Array) -> jax.Array:
        if x.dtype == w.dtype:
            return product(x, w, *others)
        return jax.checkpoint(lambda x, w: product(x.astype(w.dtype), w, *others).astype(x.dtype))(x, w)

    return run


@jax.custom_jvp
def in_turn(y: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both, h when y is there. Where a derivative needs h alone, XLA computes no y for it.

    The derivative knows no order: on a tensor axis, sums of the gradients of y and h over devices are one reduction.
    """
    y, h = jax.lax.optimization_barrier((y, h))
    return y, h


in_turn.defjvp(lambda primals, tangents: (in_turn(*primals), tuple(tangents)), symbolic_zeros=True)
