"""A sum of adapters is the sum of their changes."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import MODELS, RULES

import lora_jax as lora


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
@pytest.mark.sampled(3)
def test_a_sum_is_the_sum_of_changes(case):
    """Of several ranks and scales; where one part has no adapter, the other one counts."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), case.params())  # of changes alone
    one, other = case.adapters(RULES["lora"], key=1), case.adapters(RULES["lora"], key=2)
    other = {path: dataclasses.replace(adapter, scale=-1.75) for path, adapter in other.items()}
    *_, missing = other
    del other[missing]

    def change(adapters):
        return jax.tree.map(
            lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), lora.merge(params, adapters), params
        )

    expected = jax.tree.map(lambda a, b: 0.7 * a - 0.3 * b, change(one), change(other))
    for found, leaf in zip(
        *map(jax.tree.leaves, (change(lora.combine([(one, 0.7), (other, -0.3)])), expected)), strict=True
    ):
        np.testing.assert_allclose(found, leaf, atol=2e-5)


def test_the_other_way_round():
    axes = lora.KernelAxes((), (0,), (1,))
    adapter = lora.Lora(2).factors(jax.random.key(0), (4, 3), axes)
    adapter = dataclasses.replace(adapter, b=jax.random.normal(jax.random.key(1), (2, 3)))
    twice = lora.combine([({"w": adapter}, 1.0), ({"w": adapter.transpose()}, 1.0)])
    w = np.zeros((4, 3), np.float32)
    np.testing.assert_allclose(
        lora.merge({"w": w}, twice)["w"], 2 * lora.merge({"w": w}, {"w": adapter})["w"], rtol=1e-5
    )
    fits_not = lora.Lora(2).factors(jax.random.key(0), (4, 5), axes)
    with pytest.raises(
        lora.LoraError, match=r"'w' has adapters for different weights: inputs 0, outputs 1 with A \[4, 2\]"
    ):
        lora.combine([({"w": adapter}, 1.0), ({"w": fits_not}, 1.0)])
    with pytest.raises(lora.LoraError, match="expected one part at least"):
        lora.combine([])
    with pytest.raises(lora.LoraError, match="'w' is a str"):
        lora.combine([({"w": "x"}, 1.0)])
