import math

import jax.numpy as jnp
import pytest

from lora_jax import Lora, LoraError


@pytest.mark.parametrize("rank", [0, -1, 1.5, "8", None, True])
def test_a_rank_is_a_whole_number(rank):
    with pytest.raises(LoraError, match="rank is a whole number of at least 1"):
        Lora(rank=rank)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 0, "16", True, 1e308, 1e-50])
def test_alpha_is_finite(alpha):
    with pytest.raises(LoraError, match="alpha is a finite number other than 0"):
        Lora(rank=8, alpha=alpha)


@pytest.mark.parametrize("dtype", [jnp.int32, None, "foo", "int8"])
def test_factors_are_floats(dtype):
    with pytest.raises(LoraError, match="floating dtype"):
        Lora(rank=8, dtype=dtype)


def test_a_start_is_a_function():
    with pytest.raises(LoraError, match="init_a='kaiming'"):
        Lora(rank=8, init_a="kaiming")


def test_scale():
    assert Lora(rank=8).scale == 1.0
    assert Lora(rank=8, alpha=16).scale == 2.0
