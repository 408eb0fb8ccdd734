"""The mask of dropout, drawn in few operations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.remade import Remade


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


def dropped(x: Remade, keys: jax.Array, probability: Any, stack: int | None = None) -> Remade:
    """Return x with each entry kept with a probability, and divided by it. A derivative draws the masks again.

    Args:
        x: `[*s, ...]`.
        keys: [*s], random keys.
        probability: a number, or an array f32 [*s].
        stack: how many axes s there are, with a mask for each matrix; None for one mask, by the first key.
    """

    def kept(x: jax.Array, keys: jax.Array, *arrays: jax.Array) -> jax.Array:
        each = arrays[0].reshape(-1) if arrays else None
        if stack is None:
            one = probability if each is None else each[0]
            return masked(x, bernoulli(keys.reshape(-1)[0], one, x.shape), one)
        draw = jax.vmap(lambda key, own: bernoulli(key, probability if own is None else own, x.shape[stack:]))
        mask = draw(keys.reshape(-1), each).reshape(x.shape)
        own = probability if each is None else each.reshape(*x.shape[:stack], *(1,) * (x.ndim - stack))
        return masked(x, mask, own)

    return x.masked(kept, keys, *([probability] if isinstance(probability, jax.Array) else []))
