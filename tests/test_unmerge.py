"""Merging, and taking it back bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding

import lora_jax as lora

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def model(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def base(dtype):
    up, down = jax.random.split(jax.random.key(0))
    params = {"up": jax.random.normal(up, (64, 128), dtype), "down": jax.random.normal(down, (128, 64), dtype)}
    plan = lora.plan(model, params, jnp.ones((2, 64), dtype), rules={"up|down": lora.Lora(rank=4)})
    draws = iter(jax.random.split(jax.random.key(1), 99))
    fresh = lora.init(jax.random.key(2), params, plan)
    return params, jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(draws), a.shape), fresh)


def bits(tree):
    return jax.tree.map(lambda a: np.asarray(a).tobytes(), tree)


@pytest.mark.parametrize("donate", [False, True], ids=["", "donated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_the_base_comes_back_bit_by_bit(dtype, donate):
    """Where the sum with a weight of -1 does not give it back."""
    params, adapters = base(dtype)
    before, expected = bits(params), lora.merge(params, adapters)
    merged, kept = lora.merge(params, adapters, keep=True, donate=donate)
    for one, other in zip(*map(jax.tree.leaves, (merged, expected)), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=1e-2)
    assert bits(lora.unmerge(merged, kept)) == before
    if dtype == jnp.bfloat16:
        subtracted = lora.merge(expected, lora.combine([(adapters, -1.0)]))
        assert bits(subtracted) != before


def test_adapters_take_turns():
    """As in a server with memory for one set of weights."""
    params, one = base(jnp.bfloat16)
    two, before = jax.tree.map(lambda a: -2 * a, one), bits(params)
    expected = [lora.merge(params, adapters) for adapters in (one, two)]
    for i in (0, 1, 0):
        merged, kept = lora.merge(params, (one, two)[i], keep=True, donate=True)
        np.testing.assert_allclose(merged["up"].astype(jnp.float32), expected[i]["up"].astype(jnp.float32), rtol=1e-2)
        params = lora.unmerge(merged, kept)
        assert bits(params) == before


@pytest.mark.parametrize("donate", [False, True], ids=["", "donated"])
def test_where_the_weights_are(donate):
    params, adapters = base(jnp.bfloat16)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    places = {"up": NamedSharding(mesh, P(None, "model")), "down": NamedSharding(mesh, P("model"))}
    before, params = bits(params), jax.device_put(params, places)
    back = lora.unmerge(*lora.merge(params, adapters, keep=True, donate=donate))
    assert bits(back) == before
    assert jax.tree.map(lambda a: a.sharding, back) == places


def test_a_packed_weight_comes_back_packed():
    params, adapters = base(jnp.float32)
    packed = lora.bases.quantize(params, {"up": lora.bases.Int8()})
    merged, kept = lora.merge(packed, adapters, keep=True)
    back = lora.unmerge(merged, kept)
    assert type(back["up"]) is type(packed["up"])
    assert bits(back) == bits(packed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: {"up": m["up"]}, "'down' was kept, but `merged` has no such path"),
        (
            lambda m: m | {"up": m["up"].T},
            r"'up' was kept as bfloat16\[64, 128\], but `merged` has bfloat16\[128, 64\]",
        ),
        (lambda m: m | {"up": m["up"].astype(jnp.float32)}, "'up' was kept as bfloat16"),
    ],
)
def test_what_was_not_merged_is_refused(change, says):
    merged, kept = lora.merge(*base(jnp.bfloat16), keep=True)
    with pytest.raises(lora.LoraError, match=says):
        lora.unmerge(change(merged), kept)


def test_what_was_one_array_is_one_again():
    params, adapters = base(jnp.bfloat16)
    tied = {"up": params["up"], "again": params["up"]}
    both = {"up": adapters["up"], "again": adapters["up"]}
    for donate in (False, True):
        fresh = jax.tree.map(jnp.copy, tied["up"])
        merged, kept = lora.merge({"up": fresh, "again": fresh}, both, keep=True, donate=donate)
        assert kept["up"] is kept["again"]
        back = lora.unmerge(merged, kept)
        assert back["up"] is back["again"]
        assert bits(back) == bits(tied)


def test_a_base_of_numpy():
    """Whose fp64 is fp32 in JAX."""
    adapters = base(jnp.float32)[1]
    params = {"up": np.ones((64, 128)), "down": np.ones((128, 64), np.float32)}
    back = lora.unmerge(*lora.merge(params, adapters, keep=True))
    np.testing.assert_array_equal(back["up"], params["up"])


def test_what_was_donated_later_is_told():
    params, adapters = base(jnp.float32)
    merged, kept = lora.merge(params, adapters, keep=True)
    lora.merge(lora.unmerge(merged, kept), adapters, keep=True, donate=True)
    with pytest.raises(lora.LoraError, match="was kept, and its memory was donated since then"):
        lora.unmerge(merged, kept)
