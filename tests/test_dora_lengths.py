"""DoRA's lengths, in a program and in a merge: also where W + s A B is short beside W, and the terms of n^2 cancel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import eight_devices, formed, total

import lora_jax as lora
from lora_jax.adapters import dora
from lora_jax.analysis import hlo
from lora_jax.analysis.hlo_costs import collectives

D, K = 48, 8
SHORT = [1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4]
axes_of_two = lora.KernelAxes((), (0,), (1,))


def mostly_slow(values, often):
    return [pytest.param(value, marks=[] if value in often else pytest.mark.slow) for value in values]


def linear(p, x):
    return x @ p["w"]


def shortened(w, short, axes=axes_of_two, scale=0.5):
    """An adapter of the rank of W's outputs, with W + s A B = short * W, and lengths of one."""
    stack, inputs, outputs = axes.sizes(w.shape)
    a = jnp.asarray(w, jnp.float32).transpose([*axes.stack, *axes.inputs, *axes.outputs])
    a = a.reshape(*stack, *inputs, -1)
    b = -(1 - short) / scale * jnp.eye(a.shape[-1])
    b = jnp.broadcast_to(b, (*stack, *b.shape)).reshape(*stack, a.shape[-1], *outputs)
    return lora.DoraAdapter(a, b, jnp.ones((*stack, *outputs)), axes, scale)


def exact(w, adapter):
    """The lengths of W + s A B in float64, of the fp32 factors as they are."""
    (stack, inputs, outputs), axes = adapter.axes.sizes(w.shape), adapter.axes
    w = np.asarray(w, np.float64).transpose([*axes.stack, *axes.inputs, *axes.outputs])
    w = w.reshape(*stack, int(np.prod(inputs)), -1)
    a, b = (np.asarray(array, np.float64) for array in (adapter.a, adapter.b))
    v = w + adapter.scale * a.reshape(*stack, -1, a.shape[-1]) @ b.reshape(*stack, b.shape[len(stack)], -1)
    return np.linalg.norm(v, axis=-2).reshape(*stack, *outputs)


AXES = {
    "a matrix": ((D, K), axes_of_two),
    "outputs first": ((K, D), lora.KernelAxes((), (1,), (0,))),
    "heads": ((D, 2, 4), lora.KernelAxes((), (0,), (1, 2))),
    "inputs around outputs": ((6, K, 8), lora.KernelAxes((), (0, 2), (1,))),
    "stacked in the middle": ((D, 3, K), lora.KernelAxes((1,), (0,), (2,))),
    "a prime number of inputs": ((47, K), axes_of_two),
    "a window of one": ((1, 1, D, K), lora.KernelAxes((), (0, 1, 2), (3,))),
}


@pytest.mark.parametrize("name", mostly_slow(AXES, ["a matrix", "heads"]))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.sampled(1)
def test_lengths_are_right_however_short(name, dtype):
    shape, axes = AXES[name]
    w = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    lengths = jax.jit(lambda w, adapter: 1 / adapter.lower(w).gain)
    for short in SHORT:
        adapter = shortened(w, short, axes)
        rounding = 1e-3 if dtype == jnp.float32 or short < 0.3 else 0.01  # A^T W takes A in W's dtype
        np.testing.assert_allclose(lengths(w, adapter), exact(w, adapter), rtol=rounding, err_msg=str(short))


@pytest.mark.parametrize("dtype", mostly_slow([jnp.float32, jnp.bfloat16], [jnp.float32]))
@pytest.mark.parametrize("short", mostly_slow(SHORT, [1.0, 1e-3]))
@pytest.mark.sampled(1)
def test_applying_is_merging_however_short(short, dtype):
    """Of fp32 activations over a base of either dtype: values and gradients."""
    w = jax.random.normal(jax.random.key(0), (D, K)).astype(dtype)
    x = jax.random.normal(jax.random.key(1), (5, D))
    adapter = shortened(w, short)

    def applied(adapter):
        return lora.lora_apply(linear)({"w": w}, {"w": adapter}, x)

    def merged(adapter):
        return x @ adapter.merge(w.astype(jnp.float32))

    found, expected = (jax.jit(jax.value_and_grad(lambda a, f=f: total(f(a))))(adapter) for f in (applied, merged))
    rounding = 2e-5 + 5e-7 / short + (5e-3 if dtype == jnp.bfloat16 and short >= 0.3 else 0)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=rounding, atol=rounding * np.abs(e).max())


def test_one_short_output_of_many():
    """The others are not touched by it, nor those of other sets under `vmap`."""
    w = jax.random.normal(jax.random.key(0), (D, K))
    whole, short = shortened(w, 1.0), shortened(w, 1e-3)
    one = dataclasses.replace(whole, b=whole.b.at[:, 2].set(short.b[:, 2]))
    lengths = jax.jit(lambda adapter: 1 / adapter.lower(w).gain)
    np.testing.assert_allclose(lengths(one), exact(w, one), rtol=1e-4)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), whole, one, short)
    np.testing.assert_allclose(jax.vmap(lengths)(stacked), [exact(w, a) for a in (whole, one, short)], rtol=1e-3)


def test_what_is_zero_stays_zero():
    w = jax.random.normal(jax.random.key(0), (D, K)).at[:, 3].set(0)
    adapter = shortened(w, 1.0)
    assert adapter.lower(w).gain[3] == 1
    gone = dataclasses.replace(adapter, a=jnp.ones((D, 1)), b=-w[:1] / 0.5, m=jnp.ones(K))
    params = {"w": jnp.tile(w[:1], (D, 1))}
    np.testing.assert_array_equal(lora.merge(params, {"w": gone})["w"], 0)
    np.testing.assert_allclose(lora.lora_apply(linear)(params, {"w": gone}, jnp.ones((2, D))), 0, atol=1e-4)


def test_nothing_of_the_weights_size_is_formed():
    w = jnp.ones((D, K))
    program = jax.make_jaxpr(lambda a: total(lora.lora_apply(linear)({"w": w}, {"w": a}, jnp.ones((5, D)))))
    jaxpr = program(shortened(w, 0.5))
    assert "cond" in str(jaxpr)
    assert not formed(jaxpr, (D, K))


def test_blocks_are_bounded(monkeypatch):
    """Of a large weight no more than a block of so many numbers is formed, whatever the number of stacked matrices."""
    monkeypatch.setattr(dora, "BLOCK", 64)
    dora.output_lengths.clear_cache()
    axes = lora.KernelAxes((0,), (1,), (2,))
    w = jax.random.normal(jax.random.key(0), (2, D, K))
    adapter = shortened(w, 1e-2, axes)
    jaxpr = jax.make_jaxpr(lambda a: a.lower(w).gain)(adapter)
    assert formed(jaxpr, (64,))
    assert not any(formed(jaxpr, (2, D // m, K)) for m in (2, 3, 4))
    np.testing.assert_allclose(1 / adapter.lower(w).gain, exact(w, adapter), rtol=1e-4)
    dora.output_lengths.clear_cache()


@pytest.mark.parametrize(
    ("kind", "spec"), [("Auto", jax.P("data", None)), ("Auto", jax.P(None, "data")), ("Explicit", jax.P(None, "data"))]
)  # of split inputs JAX asks, on a mesh with explicit axes, where a product over them is to be
def test_on_a_mesh(spec, kind):
    """Inputs that are split over devices stay where they are."""
    types = (getattr(jax.sharding.AxisType, kind),)
    mesh = eight_devices() if kind == "Auto" else jax.make_mesh((8,), ("data",), axis_types=types)
    w = jax.random.normal(jax.random.key(0), (D, K))
    with jax.set_mesh(mesh):
        for short in (1.0, 1e-2):
            adapter = shortened(w, short)
            specs = {"a": jax.P(spec[0], None), "b": jax.P(None, spec[1]), "m": jax.P(spec[1]), "ratio": jax.P()}
            places = dataclasses.replace(adapter, **specs)
            here, there = (
                (w, adapter),
                jax.tree.map(
                    lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), (w, adapter), (spec, places)
                ),
            )
            lengths = jax.jit(lambda w, adapter: adapter.lower(w).gain)
            text = lengths.lower(*there).compile().as_text()
            assert "all-gather" not in text
            np.testing.assert_allclose(1 / lengths(*there), exact(*here), rtol=1e-4)


def test_copies_of_an_adapter_share_its_lengths():
    """Over a batch that is split, adapters have copies; lengths of each would take all stacked weights whole."""
    mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    params = {"w": jax.device_put(jnp.ones((2, 64, 64)), jax.NamedSharding(mesh, jax.P(None, "fsdp")))}
    x = jax.device_put(jnp.ones((8, 64)), rows)

    def model(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    plan = lora.plan(model, params, x, rules={"w": lora.Dora(rank=2)})
    adapters, apply = lora.init(jax.random.key(0), params, plan), lora.lora_apply(model)
    step = lora.value_and_grad(lambda adapters, params, x: total(apply(params, adapters, x)), batch_sharding=rows)
    compiled = jax.jit(step).lower(adapters, params, x).compile()
    gathers = [one for one in collectives(hlo.parse(compiled.as_text())) if one.kind == "all-gather"]
    assert [one for one in gathers if "64,64" in one.results], "one layer at a time"
    assert not [one for one in gathers if "2,64,64" in one.results]
