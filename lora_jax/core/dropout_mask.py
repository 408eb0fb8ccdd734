"""The mask of dropout, drawn in few operations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def bernoulli(key: jax.Array, probability: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return what `jax.random.bernoulli` returns for fp32, in fewer operations: compilers see one for each weight.

    That compares 23 random bits with the probability, as floats; here they are compared as they are. The probability
    may be an array, an fp32 scalar, which gives the same numbers.
    """
    if isinstance(probability, jax.Array):
        traced = jnp.ceil(probability * np.float32(2**23)).astype(jnp.uint32)
        return jax.random.bits(key, shape, jnp.uint32) >> np.uint32(9) < traced
    below = math.ceil(float(np.float32(probability)) * 2**23)
    if below >= 2**23:  # 1 in fp32
        return jnp.ones(shape, bool)
    return jax.random.bits(key, shape, jnp.uint32) < np.uint32(below << 9)


def masked(x: jax.Array, mask: jax.Array, probability: Any) -> jax.Array:
    """Return x where the mask is set, divided by its probability, and 0 elsewhere."""
    return jnp.where(mask, x / jnp.asarray(probability, x.dtype), jnp.zeros((), x.dtype))
