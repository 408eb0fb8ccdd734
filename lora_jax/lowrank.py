"""The low-rank product x A B: two thin matrix products in the place of one wide one.

Axes: s stacked matrices, T rows of x (all tokens of the batch), d inputs, k outputs, r rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def lowrank(x: jax.Array, a: jax.Array, b: jax.Array, scale: float, precision: Any = None) -> jax.Array:
    """scale * x @ A @ B, from left to right, so that nothing of A B's shape exists.

    x [*s, T, d], a [*s, d, r], b [*s, r, k] -> [*s, T, k] in at least fp32.

    The factors are used in x's dtype and both products accumulate in fp32. x comes in with its token axes
    flattened: XLA's CPU backend is several times slower in the backward pass of thin products with more axes.
    The scale meets B, in B's own dtype: no product over tokens is touched again, and none overflows fp16 by it.
    x @ A is named `lora_h` for the policies of `jax.checkpoint`: keeping it costs r/d of x and saves a pass over x.
    """
    h = checkpoint_name(_matmul(x, a.astype(x.dtype), precision).astype(x.dtype), "lora_h")
    scaled = b if scale == 1.0 else b * scale
    return _matmul(h, scaled.astype(x.dtype), precision)


def _matmul(x: jax.Array, w: jax.Array, precision: Any) -> jax.Array:
    """x [*s, T, d] @ w [*s, d, k], accumulated in fp32 or better."""
    stack = tuple(range(x.ndim - 2))
    dims = (((x.ndim - 1,), (x.ndim - 2,)), (stack, stack))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=accumulator(x.dtype))


def accumulator(*dtypes: Any) -> Any:
    """fp32, or what is wider if a dtype is. Floats of 8 bits promote to nothing by themselves; fp32 holds them."""
    return jnp.result_type(jnp.float32, *(dtype for dtype in dtypes if jnp.dtype(dtype).itemsize > 1))
