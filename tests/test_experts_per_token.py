"""Experts whose weights are gathered for each token, as a mixture of experts decodes a few of them: all factored."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_trees_close, formed, normal, total, trained

import lora_jax as lora

EXPERTS, D, INNER, TOKENS, CHOSEN, RANK = 7, 11, 13, 5, 2, 3
SHAPES = {"up": (EXPERTS, D, INNER), "down": (EXPERTS, INNER, D), "router": (D, EXPERTS)}


def chosen(p, x):
    return jax.lax.top_k(jax.nn.softmax(x @ p["router"]), CHOSEN)


def gathered(p, x):
    gate, i = chosen(p, x)
    u = jax.nn.silu(jnp.einsum("td,tkdf->tkf", x, p["up"][i]))
    return jnp.einsum("tkf,tkfd,tk->td", u, p["down"][i], gate)


def per_expert(p, x):
    gate, i = chosen(p, x)
    each = jnp.broadcast_to(x[:, None], (TOKENS, CHOSEN, D))
    u = jax.nn.silu(jnp.einsum("tkd,tkdf->tkf", each, p["up"][i]))
    return (jnp.einsum("tkf,tkfd->tkd", u, p["down"][i]) * gate[..., None]).sum(1)


def vmapped(p, x):
    def one(x):
        gate, i = chosen(p, x)
        return (jax.vmap(lambda i: jax.nn.silu(x @ p["up"][i]) @ p["down"][i])(i) * gate[:, None]).sum(0)

    return jax.vmap(one)(x)


def taken(p, x):
    """One expert for each token, by jnp.take, with the experts' outputs read the other way round."""
    i = jnp.argmax(x @ p["router"], axis=-1)
    up = jnp.take(p["up"], i, axis=0).transpose(0, 2, 1)
    return jnp.einsum("tf,tfd->td", jax.nn.silu(jnp.einsum("tfd,td->tf", up, x)), jnp.take(p["down"], i, axis=0))


def sliced(p, x):
    """Expert by expert in a loop, as a small batch is decoded."""

    def one(_, x):
        i = jnp.argmax(x @ p["router"])
        return None, jax.nn.silu(x @ p["up"][i]) @ p["down"][i]

    return jax.lax.scan(one, None, x)[1]


LORA = lora.Lora(RANK, alpha=2)
FORMS = [gathered, per_expert, vmapped, taken, sliced]


def setup(fn, rule=LORA):
    params = {name: jnp.asarray(normal((i,), shape), jnp.float32) / 3 for i, (name, shape) in enumerate(SHAPES.items())}
    x = jnp.asarray(normal((9,), (TOKENS, D)), jnp.float32)
    plan = lora.plan(fn, params, x, rules={"up|down": rule})
    assert [target.axes for target in plan.values()] == [lora.KernelAxes((0,), (1,), (2,))] * 2
    return params, trained(lora.init(jax.random.key(0), params, plan), 1), x


@pytest.mark.parametrize("fn", FORMS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("materialize", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_applying_is_merging(fn, materialize):
    params, adapters, x = setup(fn)
    apply = lora.lora_apply(fn, materialize=materialize)

    @jax.jit
    def both(a, p, x):
        factored = jax.value_and_grad(lambda a: total(apply(p, a, x)))(a)
        return factored, jax.value_and_grad(lambda a: total(fn(lora.merge(p, a), x)))(a)

    found, expected = both(adapters, params, x)
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [lora.Dora(RANK), lora.Ia3(), lora.Lokr(RANK), lora.Vera(rank=RANK)], ids=str)
@pytest.mark.parametrize("fn", [per_expert, vmapped], ids=lambda fn: fn.__name__)
@pytest.mark.sampled(5)
def test_applying_is_merging_for_other_kinds(fn, kind):
    params, adapters, x = setup(fn, kind)
    found = jax.jit(lora.lora_apply(fn))(params, adapters, x)
    assert_trees_close(found, fn(lora.merge(params, adapters), x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fn", FORMS, ids=lambda fn: fn.__name__)
def test_factored_stays_factored(fn):
    """No value of the size of all experts, or of those of the tokens, is formed that the program does not form."""
    params, adapters, x = setup(fn)
    apply = lora.lora_apply(fn)
    program = jax.make_jaxpr(jax.value_and_grad(lambda a, p: total(apply(p, a, x))))(adapters, params)
    base = jax.make_jaxpr(jax.value_and_grad(lambda x, p: total(fn(p, x))))(x, params)
    for experts in ((EXPERTS,), (TOKENS, CHOSEN), (TOKENS,), (CHOSEN,), ()):
        shape = (*experts, D, INNER)
        assert Counter(formed(program, shape)) <= Counter(formed(base, shape)), shape
