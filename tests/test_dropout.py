import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, RULES, D, K, assert_trees_close, assert_trees_equal, eight_devices, total

import lora_jax as lora
from lora_jax.core import dropout_mask
from lora_jax.core.paths import path_key

CASES = {case.name: case for case in MODELS}
RULE = RULES["lora"]
KEY = jax.random.key(7)
# Lookups have no x, and what is behind stop_gradient, or materialized, is not of this file.
names = [
    "two_layers",
    "transposed",
    "experts",
    "scan_over_layers",
    "scan_over_layers_of_experts",
    "split_outputs",
    "concatenated",
    "stacked_into_a_scan",
    "unrolled_layers",
    "gathered_experts",
    "convolution",
    "grouped_convolution",
    "ragged",
    "condition",
    "tensor_parallel",
    "behind_a_barrier",
    "scaled",
]


def linear(params, x):
    return x @ params["w"]


def adapters_of(fn, params, x):
    plan = lora.plan(fn, params, x, rules={".*": RULE})
    return jax.tree.map(lambda a: a + 0.3, lora.init(KEY, params, plan))


@pytest.mark.parametrize("name", names)
@pytest.mark.sampled(6)
def test_dropout_runs_everywhere_and_is_deterministic(name):
    case = CASES[name]
    params, x, adapters = case.params(), case.input(), case.adapters(RULE)
    apply = lora.lora_apply(case.fn)

    def loss(adapters, key, rate):
        return total(apply(params, lora.with_dropout(adapters, key, rate), x))

    plain, grads = jax.value_and_grad(lambda a: total(apply(params, a, x)))(adapters)
    value, dropped = jax.value_and_grad(loss)(adapters, KEY, 0.4)
    assert jax.tree.structure(dropped) == jax.tree.structure(adapters)
    assert not jnp.isclose(value, plain, rtol=1e-6)
    assert_trees_close(jax.jit(jax.value_and_grad(loss), static_argnums=2)(adapters, KEY, 0.4), (value, dropped), 1e-4)
    assert not jnp.isclose(loss(adapters, jax.random.key(8), 0.4), value, rtol=1e-6)
    assert_trees_equal(jax.grad(loss)(adapters, KEY, 0), grads)


def test_the_formula():
    """x @ W + scale * (mask * x / keep) @ A @ B: with A = 1 and B = 1, y - x @ W counts what was kept."""
    params, x = {"w": jnp.ones((D, K))}, jnp.ones((200, D))
    adapters = adapters_of(linear, params, x)
    ones = {
        path: lora.LoraAdapter(jnp.ones_like(one.a), jnp.ones_like(one.b), one.axes, RULE.scale)
        for path, one in adapters.items()
    }
    y = lora.lora_apply(linear)(params, lora.with_dropout(ones, KEY, 0.25), x) - linear(params, x)
    kept = np.asarray(y) * 0.75 / (RULE.scale * RULE.rank)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert 0.72 * D < kept.mean() < 0.78 * D
    assert (kept == kept[:, :1]).all(), "one mask for all outputs"


def test_the_mean_over_keys_is_the_product_without_dropout():
    params, x = {"w": jax.random.normal(KEY, (D, K))}, jax.random.normal(KEY, (3, D))
    adapters = adapters_of(linear, params, x)
    apply = lora.lora_apply(linear)
    keys = jax.random.split(KEY, 4000)
    mean = jax.vmap(lambda key: apply(params, lora.with_dropout(adapters, key, 0.5), x))(keys).mean(0)
    assert_trees_close(mean, apply(params, adapters, x), rtol=0.02, atol=0.15)


def test_each_layer_of_a_scan_has_a_mask_of_its_own():
    def layers(params, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0, params["w"])[1]

    params, x = {"w": jnp.zeros((3, D, K))}, jnp.ones((4, D))
    adapters = jax.tree.map(jnp.ones_like, adapters_of(layers, params, x))
    a, b, c = lora.lora_apply(layers)(params, lora.with_dropout(adapters, KEY, 0.5), x)
    assert not jnp.array_equal(a, b)
    assert not jnp.array_equal(b, c)


def test_remat_draws_the_same_masks():
    case = CASES["scan_over_layers"]
    params, x, adapters = case.params(), case.input(), case.adapters(RULE)
    apply = lora.lora_apply(case.fn)

    def loss(adapters, apply):
        return total(apply(params, lora.with_dropout(adapters, KEY, 0.3), x))

    assert_trees_close(jax.grad(loss)(adapters, jax.checkpoint(apply)), jax.grad(loss)(adapters, apply), rtol=1e-5)


def test_placement_does_not_change_the_masks():
    case = CASES["two_layers"]
    params, adapters, apply = case.params(), case.adapters(RULE), lora.lora_apply(case.fn)
    x = jnp.concatenate([case.input()] * 8)
    split = jax.device_put(x, jax.NamedSharding(eight_devices(), jax.P("data")))
    run = jax.jit(lambda x: apply(params, lora.with_dropout(adapters, KEY), x))
    assert_trees_close(run(split), run(x), rtol=1e-5)


def test_old_style_keys_and_twice():
    params, x = {"w": jnp.ones((D, K))}, jnp.ones((3, D))
    adapters = adapters_of(linear, params, x)
    old = lora.with_dropout(adapters, jax.random.PRNGKey(7))
    assert_trees_equal(
        lora.lora_apply(linear)(params, lora.with_dropout(old, KEY), x),
        lora.lora_apply(linear)(params, lora.with_dropout(adapters, KEY), x),
    )
    assert_trees_equal(lora.merge(params, old), lora.merge(params, adapters))


@pytest.mark.parametrize("rate", [1, -0.1, 1.5, True, "0.1", float("nan")])
def test_bad_rates(rate):
    with pytest.raises(lora.LoraError, match="the rate is a number of at least 0 and below 1"):
        lora.with_dropout({}, KEY, rate)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_depend_on_the_path_alone(impl):
    def fn(params, x):
        return jnp.stack([x @ params["c"][0], x @ params["c"][1]]) @ params["a"] @ params["b"]

    key = jax.random.key(3, impl=impl)
    params = {"a": jnp.ones((K, D)), "b": jnp.ones((D, K)), "c": jnp.ones((2, D, K))}
    adapters = adapters_of(fn, params, jnp.ones((3, D)))
    for some in (adapters, {"b": adapters["b"]}):
        for path, adapter in lora.with_dropout(some, key).items():
            n = 2 if adapter.axes.stack else 1
            expected = jax.random.split(path_key(key, path), n).reshape(adapter.keys.shape)
            assert jnp.array_equal(jax.random.key_data(adapter.keys), jax.random.key_data(expected))


def test_a_program_hashes_the_paths_of_all_layers_once():
    adapters = {
        f"w{i}": lora.LoraAdapter(jnp.ones((D, 1)), jnp.ones((1, K)), lora.KernelAxes((), (0,), (1,)), 1.0)
        for i in range(24)
    }
    text = jax.jit(lambda a, key: lora.with_dropout(a, key)).lower(adapters, KEY).as_text()
    assert text.count("call @_threefry_fold_in") == 1
    assert text.count("call @_threefry_split") == 1


@pytest.mark.parametrize("probability", [0.9, 0.5, 0.3, 1e-3, 1 - 2**-23, 1 - 2**-30])
def test_masks_are_those_of_jax(probability):
    key = jax.random.key(5)
    expected = jax.random.bernoulli(key, probability, (300, 70))
    np.testing.assert_array_equal(dropout_mask.bernoulli(key, probability, (300, 70)), expected)


@pytest.mark.parametrize("name", ["two_layers", "scan_over_remat", "ragged", "experts"])
@pytest.mark.parametrize("keep", ["inputs", "thin"])
@pytest.mark.slow
def test_a_rate_that_is_data_draws_the_same_masks(name, keep):
    """Values and gradients, and several rates under vmap as each by itself, in one program."""
    case = next(case for case in MODELS if case.name == name)
    params, x, adapters, key = case.params(), case.input(), case.adapters(RULES["lora"]), jax.random.key(3)
    apply = lora.lora_apply(case.fn, keep=keep)

    def loss(adapters, rate):
        return total(apply(params, lora.with_dropout(adapters, key, rate), x))

    rates = jnp.array([0.0, 0.25, 0.6], jnp.float32)
    found = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(adapters, rates)
    for i, rate in enumerate([0, 0.25, 0.6]):
        expected = jax.jit(jax.value_and_grad(functools.partial(loss, rate=rate)))(adapters)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-4, atol=1e-4)


def test_rates_that_are_arrays():
    case = next(case for case in MODELS if case.name == "two_layers")
    adapters, key = case.adapters(RULES["lora"]), jax.random.key(0)
    for rate in (jnp.float32(1.0), jnp.ones(2) / 4, jnp.int32(0), jnp.float32(jnp.nan)):
        with pytest.raises(lora.LoraError, match="expected a number, or float32"):
            lora.with_dropout(adapters, key, rate)
    dropped = lora.with_dropout(adapters, key, jnp.float32(0.5))
    mask = lora.trainable_mask(dropped)
    assert jax.tree.structure(mask) == jax.tree.structure(dropped)
