import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, trained

import lora_jax as lora
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


# The scale is data ----------------------------------------------------------------------------------------------------

SCALED = {"lora": Lora, "rslora": lora.RsLora, "lora_fa": lora.LoraFa, "dora": lora.Dora, "adalora": lora.AdaLora,
          "loha": lora.Loha, "lokr": lora.Lokr}  # fmt: skip


def of_alphas(rule, alphas):
    """A model, its weights and adapters of several alphas that differ in nothing else."""

    def model(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    params = {
        "up": jnp.asarray(normal((0,), (6, 8)), jnp.float32),
        "down": jnp.asarray(normal((1,), (8, 6)), jnp.float32),
    }
    x = jnp.asarray(normal((2,), (3, 6)), jnp.float32)
    plans = [lora.plan(model, params, x, rules={".*": rule(rank=2, alpha=alpha)}) for alpha in alphas]
    return model, params, x, [trained(lora.init(jax.random.key(0), params, plan), 3) for plan in plans]


@pytest.mark.parametrize("rule", SCALED.values(), ids=SCALED)
def test_adapters_of_any_alpha_share_one_program(rule):
    model, params, x, several = of_alphas(rule, (4, 8, 16))
    traces = []

    @jax.jit
    def apply(params, adapters, x):
        traces.append(1)
        return lora.lora_apply(model)(params, adapters, x)

    found = [apply(params, adapters, x) for adapters in several]
    assert len(traces) == 1
    for one, adapters in zip(found, several, strict=True):
        np.testing.assert_allclose(one, model(lora.merge(params, adapters), x), rtol=2e-5, atol=2e-5)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *several)
    at_once = jax.vmap(lora.lora_apply(model), in_axes=(None, 0, None))(params, stacked, x)
    np.testing.assert_allclose(at_once, jnp.stack(found), rtol=2e-5, atol=2e-5)
    assert not jnp.allclose(found[0], found[2], rtol=1e-2)


@pytest.mark.parametrize("rule", SCALED.values(), ids=SCALED)
def test_no_optimizer_moves_the_scale(rule):
    """Neither with a mask nor without one: its gradient is zero, and decay shrinks both of its numbers alike."""
    model, params, x, [adapters] = of_alphas(rule, (5,))

    def loss(adapters):
        return (lora.lora_apply(model)(params, adapters, x) ** 2).mean()

    for optimizer, exact in [(optax.adamw(1e-2, weight_decay=0.1), False), (lora.freeze_base(optax.adamw(1e-2)), True)]:
        moved, state = adapters, optimizer.init(adapters)
        for _ in range(3):
            updates, state = jax.jit(optimizer.update)(jax.jit(jax.grad(loss))(moved), state, moved)
            moved = optax.apply_updates(moved, updates)
        for path, adapter in adapters.items():
            assert not jnp.allclose(jax.tree.leaves(moved[path])[1], jax.tree.leaves(adapter)[1])
            np.testing.assert_allclose(moved[path].scale, adapter.scale, rtol=0 if exact else 1e-6)


def test_a_scale_given_by_hand():
    """As a number of Python's or an array, traced or not; trees of the adapter's form keep what is in them."""
    axes = lora.KernelAxes((), (0,), (1,))
    a, b = jnp.ones((4, 1)), jnp.ones((1, 4))
    for scale in (2, 2.0, np.float32(2), jnp.float32(2)):
        adapter = lora.LoraAdapter(a, b, axes, scale)
        assert (adapter.ratio.shape, adapter.ratio.dtype, adapter.scale) == ((2,), jnp.float32, 2)
    merged = jax.jit(lambda s: lora.LoraAdapter(a, b, axes, s).merge(jnp.zeros((4, 4))))(2.0)
    np.testing.assert_array_equal(merged, 2 * jnp.ones((4, 4)))
    assert jax.tree.leaves(jax.tree.map(jnp.size, adapter)) == [4, 4, 2]
    assert jax.tree.leaves(jax.tree.map(lambda array: "x", adapter)) == ["x", "x", "x"]


def test_zeros_change_nothing_and_a_ratio_is_two_numbers():
    model, params, x, [adapters] = of_alphas(Lora, (5,))
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    np.testing.assert_array_equal(lora.lora_apply(model)(params, zeros, x), model(params, x))
    np.testing.assert_array_equal(lora.merge(params, zeros)["up"], params["up"])
    wrong = adapters | {"up": dataclasses.replace(adapters["up"], ratio=jnp.ones(4))}
    with pytest.raises(LoraError, match=r"'up' has a ratio of shape \[4\], expected \[2\], or a number"):
        lora.merge(params, wrong)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), adapters)
    with pytest.raises(LoraError, match=r"'down' is a stack of 2 adapters: add them up one by one"):
        lora.combine([(stacked, 0.5)])
