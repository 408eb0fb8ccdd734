"""The low-rank product x A B: two thin matrix products in the place of one wide one."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

if TYPE_CHECKING:
    from lora_jax.products import Product


def lowrank(product: "Product", a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """scale * x @ A @ B, from left to right, so that nothing of A B's shape exists.

    a [*stack, *inputs, r], b [*stack, r, *outputs] -> y's shape, in at least fp32 (in x's dtype for convolutions).

    The factors are used in x's dtype and matrix products accumulate in fp32. The scale meets B, in fp32 or wider: no
    product over tokens is touched again, and none overflows fp16 by it.
    x @ A is named `lora_h` for the policies of `jax.checkpoint`: keeping it costs r/d of x and saves a pass over x.
    """
    h = checkpoint_name(product.contract(a).astype(product.x.dtype), "lora_h")
    return product.expand(h, b if scale == 1.0 else b.astype(accumulator(b.dtype, h.dtype)) * scale)


def matmul(x: jax.Array, w: jax.Array, precision: Any, stack: int = 0, like: jax.Array | None = None) -> jax.Array:
    """x [*s, *T, d] @ w [*s, d, *k], s being `stack` axes, in x's dtype, accumulated in fp32 or better.

    On a mesh with explicit axes the result is sharded as `like` is.
    """
    place = None if like is None else _explicit(like)
    return _dot(x, w, ((x.ndim - 1,), (stack,)), precision, stack, place)


def contract(x: jax.Array, a: jax.Array, precision: Any, stack: int = 0) -> jax.Array:
    """x [*s, *T, *d] @ a [*s, *d, r], for a thin a.

    A is laid out as [*s, r, *d] first, and the barrier keeps it so: XLA's CPU backend reads a thin matrix along d
    several times faster (benchmarks/train_step.py), and elsewhere a copy of A costs nothing to speak of.
    """
    rows = lax.optimization_barrier(jnp.moveaxis(a.astype(x.dtype), -1, stack))
    inputs = a.ndim - stack - 1
    dims = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(stack + 1, a.ndim))
    place = _explicit(x)
    return _dot(x, rows, dims, precision, stack, place and jax.P(*place[: x.ndim - inputs], None))


def _dot(x: jax.Array, w: jax.Array, dims: Any, precision: Any, stack: int, place: jax.P | None) -> jax.Array:
    return lax.dot_general(
        x,
        w.astype(x.dtype),
        (dims, (tuple(range(stack)),) * 2),
        precision=precision,
        preferred_element_type=accumulator(x.dtype),
        out_sharding=place,
    )


def _explicit(x: jax.Array) -> jax.P | None:
    """How an array is sharded, where its type says so: on a mesh with explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding.spec if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None


def accumulator(*dtypes: Any) -> Any:
    """fp32, or what is wider if a dtype is. Floats of 8 bits promote to nothing by themselves; fp32 holds them."""
    return jnp.result_type(jnp.float32, *(dtype for dtype in dtypes if jnp.dtype(dtype).itemsize > 1))
