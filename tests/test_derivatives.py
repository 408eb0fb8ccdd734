"""Derivatives of every order and mode, with respect to everything: the merged function's, and no silent zeros."""

import jax
import jax.numpy as jnp
import pytest
from helpers import MODELS, RULES, D, K, assert_trees_close, total, trained, trained_leaves

import lora_jax as lora

CASES = {case.name: case for case in MODELS}
some = pytest.mark.parametrize(
    "name", ["attention_kernels", "scan_over_remat", "tied_embedding", "convolution", "condition", "split_outputs"]
)


def both(name):
    """The adapted function and the merged one, as functions of (adapters, base, input)."""
    case = CASES[name]
    apply = lora.lora_apply(case.fn)
    at = case.adapters(RULES["lora"]), case.params(), case.input()
    return (lambda a, p, x: total(apply(p, a, x))), (lambda a, p, x: total(case.fn(lora.merge(p, a), x))), at


@some
def test_reverse_with_respect_to_adapters_base_and_input(name):
    adapted, merged, at = both(name)
    found, expected = jax.jit(lambda *at: tuple(jax.grad(f, argnums=(0, 1, 2))(*at) for f in (adapted, merged)))(*at)
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4)
    for gradient in (*trained_leaves(found[0]), found[2]):
        assert jnp.any(gradient != 0)


@some
def test_forward_with_respect_to_adapters_base_and_input(name):
    adapted, merged, at = both(name)
    along = jax.tree.map(lambda v: jnp.cos(1 + v), at)

    def tangents(f, *at):
        linear = jax.linearize(f, *at)[1]
        return jax.jvp(f, at, along)[1], linear(*along)

    found, expected = jax.jit(lambda *at: tuple(tangents(f, *at) for f in (adapted, merged)))(*at)
    assert_trees_close(found, expected, rtol=1e-3)
    assert found[0] != 0


def test_second_order():
    params, x = {"w": jax.random.normal(jax.random.key(0), (4, 3))}, jax.random.normal(jax.random.key(1), (2, 4))

    def fn(params, x):
        return jnp.tanh(x @ params["w"]).sum()

    plan = lora.plan(fn, params, x, rules={"w": lora.Lora(2, alpha=3)})
    adapters = trained(lora.init(jax.random.key(0), params, plan), key=1)
    apply = lora.lora_apply(fn)
    found, expected = jax.jit(
        lambda a: (
            jax.hessian(lambda a: apply(params, a, x))(a),
            jax.hessian(lambda a: fn(lora.merge(params, a), x))(a),
        )
    )(adapters)
    assert_trees_close(found, expected, rtol=1e-4)
    mixed = found["w"].a["w"].b  # d2 / dA dB, which only the product of the factors has
    assert jnp.any(mixed != 0)


def test_a_stopped_adapter_has_a_gradient_of_zero_because_the_program_says_so():
    def fn(params, x):
        return (x @ jax.lax.stop_gradient(params["w"])) ** 2 + x @ params["w"]

    params, x = {"w": jnp.ones((D, K))}, jnp.ones((3, D))
    adapters = trained(lora.init(jax.random.key(0), params, lora.plan(fn, params, x, rules={"w": lora.Lora(1)})), 1)
    found = jax.grad(lambda a: lora.lora_apply(fn)(params, a, x).sum())(adapters)
    expected = jax.grad(lambda a: (x @ lora.merge(params, a)["w"]).sum())(adapters)
    assert_trees_close(found, expected, rtol=1e-4)


def test_adapters_of_adapters():
    """`lora_apply` of a function of base and adapters: the factors are weights like any other."""
    params, x = {"w": jnp.ones((D, K))}, jnp.ones((3, D))

    def linear(params, x):
        return x @ params["w"]

    inner = trained(lora.init(jax.random.key(0), params, lora.plan(linear, params, x, rules={"w": lora.Lora(4)})), 1)

    def adapted(everything, x):
        return lora.lora_apply(linear)(everything["base"], everything["adapters"], x)

    everything = {"base": params, "adapters": inner}
    plan = lora.plan(adapted, everything, x, rules={"adapters/w/a": lora.Lora(2), "base/w": lora.Lora(1)})
    outer = trained(lora.init(jax.random.key(2), everything, plan), key=3)
    found = lora.lora_apply(adapted)(everything, outer, x)
    assert_trees_close(found, adapted(lora.merge(everything, outer), x), rtol=1e-4)
