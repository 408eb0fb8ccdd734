"""A sum of adapters is the sum of their changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, RULES

import lora_jax as lora


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
@pytest.mark.sampled(5)
def test_a_sum_is_the_sum_of_changes(case):
    """Of several ranks and scales; where one part has no adapter, the other one counts."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), case.params())  # of changes alone
    one, other = case.adapters(RULES["lora"], key=1), case.adapters(RULES["lora"], key=2)
    other = {path: dataclasses.replace(adapter, ratio=-1.75) for path, adapter in other.items()}
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
    with pytest.raises(lora.LoraError, match=r"adapters\['w'\] is 'x', expected an adapter"):
        lora.combine([({"w": "x"}, 1.0)])


def sum_of(weight, dtype=jnp.float32, **arrays):
    """One adapter with B = 4, and a scale of 2, and its sum with another one."""
    axes = lora.KernelAxes((), (0,), (1,))
    arrays = {"a": jnp.ones((4, 2)), "b": jnp.full((2, 3), 4.0)} | arrays
    adapter = lora.LoraAdapter(*(array.astype(dtype) for array in arrays.values()), axes, 2.0)
    other = dataclasses.replace(adapter, a=jnp.ones((4, 1)), b=jnp.ones((1, 3)))
    alone = [({"layer/w": adapter}, weight)]
    return lora.combine(alone), lora.combine([({"layer/w": other}, 1.0), *alone])


@pytest.mark.parametrize(
    ("weight", "dtype", "says"),
    [
        (
            1e38,
            jnp.float32,
            r"'layer/w' with the weight 1e\+38 has .*that float32 cannot hold: .* a smaller",
        ),
        (-1e308, jnp.float32, r"'layer/w' with the weight -1e\+308 has .*float32 cannot hold: the scale is -inf"),
        (1e40, jnp.bfloat16, r"with the weight 1e\+40 .* bfloat16 cannot hold"),
        (1e4, jnp.float16, r"with the weight 10000.0 .* float16 cannot hold: the scale is 2e\+04"),
        (float("inf"), jnp.float32, "a weight is inf, expected a finite number"),
        (float("nan"), jnp.float32, "a weight is nan, expected a finite number"),
        ("0.5", jnp.float32, "a weight is '0.5', expected a finite number"),
        (None, jnp.float32, "a weight is None, expected a finite number"),
    ],
)
def test_sums_that_are_not_finite_are_refused(weight, dtype, says):
    with pytest.raises(lora.LoraError, match=says):
        sum_of(weight, dtype)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(name, number):
    shape = {"a": (4, 2), "b": (2, 3)}[name]
    with pytest.raises(lora.LoraError, match=r"'layer/w' holds infinity or NaN, in the part with the weight 0.5"):
        sum_of(0.5, **{name: jnp.ones(shape).at[1, 1].set(number)})


@pytest.mark.parametrize("weight", [1e3, np.float32(0.5), jnp.float32(-2), 3, 0])
def test_what_a_dtype_holds_is_summed(weight):
    for found in sum_of(weight, jnp.float16):
        assert jnp.isfinite(found["layer/w"].b * found["layer/w"].scale).all()


def test_sums_under_jit():
    """There are no numbers to look at yet: the sum is what it is."""
    found = jax.jit(lambda b: sum_of(2.0, b=b)[1]["layer/w"].b)(jnp.ones((2, 3)))
    np.testing.assert_array_equal(found, [[2] * 3, [4] * 3, [4] * 3])
