"""Weights that read the same x share one product x @ [A1 | A2 | ...], and the derivatives of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, equations, normal, total, trained
from jax import P
from jax.sharding import NamedSharding

import lora_jax as lora
from benchmarks.collectives import collectives
from lora_jax.transform.together import Together

T, D, K, HEADS, HEAD, LAYERS, RANK = 8, 12, 10, 2, 5, 3, 2


def three(p, x):
    x = jnp.tanh(x)
    return (x @ p["q"]) * jnp.tanh(x @ p["k"]) + x @ p["v"]


def heads_beside_a_matrix(p, x):
    """Kernels [d, h, k] and [d, k], and one that multiplies from the left."""
    q = jnp.einsum("td,dhk->thk", x, p["heads"]).reshape(x.shape[0], -1)
    return q * (x @ p["k"]) + jax.lax.dot_general(p["q"], x, (((0,), (1,)), ((), ()))).T


def layers(body, p, x):
    def layer(x, p):
        return jnp.tanh(three(p, x) @ p["o"]), None

    return jax.lax.scan(body(layer), x, p)[0]


def bf16(p, x):
    return three(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16)).astype(jnp.float32)


def nested(p, x):
    return jax.jit(three)(p, x)


def looped(p, x):
    return jax.lax.fori_loop(0, 2, lambda _, y: y + three(p, y) @ p["o"], x)


def matrices(*names, stack=()):
    shapes = {"o": (K, D), "heads": (D, HEADS, HEAD)}
    return {n: jnp.asarray(normal((i,), (*stack, *shapes.get(n, (D, K)))) / 4) for i, n in enumerate(names)}


FIRST = jnp.asarray(normal((9,), (T, D)))
PROGRAMS = {
    "three": (three, matrices("q", "k", "v")),
    "heads": (heads_beside_a_matrix, matrices("heads", "k", "q")),
    "scan": (functools.partial(layers, lambda f: f), matrices("q", "k", "v", "o", stack=(LAYERS,))),
    "remat": (functools.partial(layers, jax.checkpoint), matrices("q", "k", "v", "o", stack=(LAYERS,))),
    "bf16": (bf16, matrices("q", "k", "v")),
    "jit": (nested, matrices("q", "k", "v")),
    "loop": (looped, matrices("q", "k", "v", "o")),
}


def ranks(path, shape):
    del shape
    return {"k": RANK + 1, "v": 1}.get(path, RANK)


def adapters_of(fn, params, rule=lora.Lora(rank=RANK)):  # noqa: B008
    plan = lora.plan(fn, params, FIRST, rules={".*": rule})
    return trained(lora.init(jax.random.key(0), params, plan), 1)


@pytest.fixture
def alone(monkeypatch):
    """Return the loss of a program in which each weight has a thin product of its own."""

    def run(make):
        with monkeypatch.context() as patch:
            patch.setattr(Together, "given", lambda self, i, values, env: values)
            return make()

    return run


def run_of(kind, fn, keep="inputs"):
    """Some way to call or to differentiate the adapted program; all of them are traced when they are called."""
    apply = lora.lora_apply(fn, keep=keep)

    def value(adapters, params, x):
        return total(apply(params, adapters, x))

    def forward_mode(adapters, params, x):
        return jax.jvp(lambda a, x: apply(params, a, x), (adapters, x), (jax.tree.map(jnp.ones_like, adapters), x))

    def stacked(adapters, params, x):
        two = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), adapters)
        return jax.vmap(lambda a: apply(params, a, x))(two)

    kinds = {"forward": value, "gradient": jax.grad(value, (0, 2)), "jvp": forward_mode, "vmap": stacked}
    return jax.jit(kinds[kind])


def check(alone, kind, fn, params, adapters, rtol=2e-5, **options):
    together = run_of(kind, fn, **options)(adapters, params, FIRST)
    one_by_one = alone(lambda: run_of(kind, fn, **options)(adapters, params, FIRST))
    assert_trees_close(together, one_by_one, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_values_and_gradients_are_those_of_products_one_by_one(alone, name, kind):
    fn, params = PROGRAMS[name]
    check(alone, kind, fn, params, adapters_of(fn, params), rtol=2e-2 if name == "bf16" else 2e-5)


@pytest.mark.parametrize("kind", ["jvp", "vmap"])
@pytest.mark.parametrize("name", ["three", "scan"])
def test_in_forward_mode_and_for_a_stack_of_adapters(alone, kind, name):
    fn, params = PROGRAMS[name]
    check(alone, kind, fn, params, adapters_of(fn, params))


def test_ranks_may_differ_and_what_is_made_again_is_made_once_for_all(alone):
    fn, params = PROGRAMS["three"]
    adapters = adapters_of(fn, params, lora.Lora(rank=ranks))
    assert {a.a.shape[-1] for a in adapters.values()} == {1, RANK, RANK + 1}
    check(alone, "gradient", fn, params, adapters)
    check(alone, "gradient", fn, params, adapters, keep="thin")


def dots(fn, *args):
    """The shapes of the results of all matrix products in a program."""
    program = jax.make_jaxpr(fn)(*args)
    return [e.outvars[0].aval.shape for e in equations(program) if e.primitive.name == "dot_general"]


def test_there_is_one_thin_product_forward_and_two_backward():
    fn, params = PROGRAMS["three"]
    adapters, joined = adapters_of(fn, params), 3 * RANK
    forward = dots(run_of("forward", fn), adapters, params, FIRST)
    assert len(forward) == 1 + 3 + 3  # h of all; x W and h B of each
    assert forward.count((T, joined)) == 1
    both = dots(run_of("gradient", fn), adapters, params, FIRST)
    assert len(both) == len(forward) + 3 + 3 + 3 + 2  # dy W^T, dB and dh of each; dA and the part of dx of all
    assert both.count((joined, D)) + both.count((D, joined)) == 1


def test_no_operation_is_added(alone):
    fn, params = PROGRAMS["scan"]
    adapters = adapters_of(fn, params)

    def flops():
        return run_of("gradient", fn).lower(adapters, params, FIRST).compile().cost_analysis()["flops"]

    assert flops() <= alone(flops)


def thin(fn, params, adapters):
    """How many columns the thin products of a forward pass have."""
    shapes = dots(run_of("forward", fn), adapters, params, FIRST)
    return sorted(shape[-1] for shape in shapes if shape[0] == T and shape[-1] < HEAD + 2)


def test_what_does_not_read_the_same_numbers_is_not_joined():
    fn, params = PROGRAMS["three"]
    adapters = adapters_of(fn, params)
    assert thin(fn, params, adapters) == [3 * RANK]
    assert thin(fn, params, lora.with_dropout(adapters, jax.random.key(0), 0.5)) == [RANK] * 3
    half = dataclasses.replace(adapters["k"], a=adapters["k"].a.astype(jnp.bfloat16))
    assert thin(fn, params, adapters | {"k": half}) == [RANK, 2 * RANK]
    without = {name: adapters[name] for name in ("q", "v")}
    assert thin(fn, params, without) == [2 * RANK]
    assert thin(lambda p, x: fn({n: jnp.tanh(x[0, 0]) * w for n, w in p.items()}, x), params, adapters) == [3 * RANK]


def test_a_weight_that_is_not_there_yet_has_a_product_of_its_own(alone):
    def cast_late(p, x):
        return (x @ p["q"]) * (x @ p["k"]) + x @ p["v"].T.T

    _, params = PROGRAMS["three"]
    adapters = adapters_of(cast_late, params)
    assert thin(cast_late, params, adapters) == [RANK, 2 * RANK]
    check(alone, "gradient", cast_late, params, adapters)


def test_inside_a_checkpoint_each_has_a_product_of_its_own():
    fn, params = PROGRAMS["three"]
    adapters = adapters_of(fn, params)
    assert thin(jax.checkpoint(fn), params, adapters) == [RANK] * 3


def test_an_eager_call_takes_each_by_itself(alone):
    fn, params = PROGRAMS["three"]
    adapters = adapters_of(fn, params)
    eager = lora.lora_apply(fn)(params, adapters, FIRST)
    np.testing.assert_array_equal(eager, alone(lambda: lora.lora_apply(fn)(params, adapters, FIRST)))


PLACES = {"data 8": {"data": 8}, "data 2, tensor 4": {"data": 2, "tensor": 4}, "fsdp 8": {"fsdp": 8}}


@pytest.mark.parametrize("name", PLACES)
def test_devices_send_no_more(alone, name):
    """Column-parallel q, k, v, of which x is whole on each device of the tensor axis; or weights split over fsdp."""
    sizes = PLACES[name]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    fsdp, tensor = (axis if axis in mesh.shape else None for axis in ("fsdp", "tensor"))
    rows = P(tuple(axis for axis in mesh.shape if axis != "tensor"))
    params = jax.device_put({n: jnp.ones((16, 24)) for n in "qkv"}, NamedSharding(mesh, P(fsdp, tensor)))
    x = jax.device_put(jnp.asarray(normal((3,), (16, 16))), NamedSharding(mesh, rows))
    plan = lora.plan(three, params, x, rules={".*": lora.Lora(rank=RANK)})
    adapters = trained(lora.init(jax.random.key(0), params, plan), 1)
    adapters = jax.device_put(adapters, lora.adapter_shardings(params, adapters))

    def sent():
        step = run_of("gradient", three)
        found = collectives(step.lower(adapters, params, x).compile().as_text())
        return sum(c.nbytes * c.times for c in found), len(found), step(adapters, params, x)

    (nbytes, count, grads), (nbytes_alone, count_alone, grads_alone) = sent(), alone(sent)
    assert_trees_close(grads, grads_alone)
    assert nbytes <= nbytes_alone
    assert count <= count_alone


def test_under_shard_map(alone):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    fn, params = PROGRAMS["three"]
    adapters, x = adapters_of(fn, params), jnp.tile(FIRST, (4, 1))

    def gradient():
        apply = lora.lora_apply(fn)

        def local(adapters, x):
            return jax.lax.psum(total(apply(params, adapters, x)), "data")

        return jax.jit(jax.grad(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())))(adapters, x)

    assert_trees_close(gradient(), alone(gradient))
