"""How the factor A starts. B starts at zero, so that a fresh adapter changes nothing.

Each takes a key, the shape `[*stack, *inputs, r]`, the fan-in (the inputs of one matrix: stacked layers and
experts do not count) and a dtype.
"""

import math

import jax
import jax.numpy as jnp


def kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> jax.Array:
    """A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)): He et al. 2015 (arXiv 1502.01852) with a = sqrt(5), as in HF PEFT.

    Args:
        key: a random key.
        shape: of A, [*stack, *inputs, r].
        fan_in: the number of inputs, the product of those axes.
        dtype: of A.

    Returns:
        A, of this shape and dtype.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> a = lora.initializers.kaiming(jax.random.key(0), (100, 4), 100, jnp.float32)
    >>> bool(0.09 < abs(a).max() <= 0.1)
    True
    """
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def gaussian(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> jax.Array:
    """A ~ N(0, 1/r^2): the random Gaussian of LoRA (Hu et al. 2021, arXiv 2106.09685), scaled as in HF PEFT.

    Args:
        key: a random key.
        shape: of A, [*stack, *inputs, r].
        fan_in: the number of inputs, which this start does not look at.
        dtype: of A.

    Returns:
        A, of this shape and dtype.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> a = lora.initializers.gaussian(jax.random.key(0), (1000, 4), 1000, jnp.float32)
    >>> round(float(a.std()), 2)
    0.25
    """
    del fan_in
    return jax.random.normal(key, shape, dtype) / shape[-1]
