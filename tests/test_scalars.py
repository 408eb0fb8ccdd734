"""Scalars that a program computes and multiplies a weight by: nothing overflows that the program does not overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, RULES, Case, assert_trees_close, total, trained

import lora_jax as lora

D, K = 64, 6
ALL = RULES | KINDS


def times(p, x):
    return x @ (p["w"] * p["s"])


def divided(p, x):
    return x @ (p["w"] / p["s"])


def twice(p, x):
    return x @ (p["s"] * (p["s"] * p["w"]).T).T


def cast(dtype, large=1.0):
    def fn(p, x):
        return (x @ (p["w"] * p["s"]).astype(dtype).astype(x.dtype)) * jnp.asarray(large, x.dtype)

    return fn


def convolved(p, x):
    x, w = x.reshape(7, 4, D // 4), (p["w"] * p["s"]).reshape(4, D // 4, K)
    return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def looked_up(p, x):
    return (p["w"] * p["s"])[jnp.arange(5)] * x[0, 0]


# The program, the dtype, the size of W's entries and the scalar. With x of ones, every result is finite in its dtype.
FINITE = {
    "x W overflows fp16": (times, jnp.float16, 2000.0, 1e-3),
    "x W overflows fp16, divided": (divided, jnp.float16, 2000.0, 512.0),
    "x W overflows fp16, twice": (twice, jnp.float16, 2000.0, 0.03),
    "x W overflows fp16, convolved": (convolved, jnp.float16, 2000.0, 1e-3),
    "rows in fp16": (looked_up, jnp.float16, 2000.0, 1e-3),
    "x W underflows fp16": (times, jnp.float16, 1e-5, 1e3),
    "c W is small in fp16": (times, jnp.float16, 1.0, 1e-3),
    "c is negative": (times, jnp.float16, 2000.0, -1e-3),
    "W overflows fp16, cast after c": (cast(jnp.float16), jnp.float32, 1e6, 1e-4),
    "W overflows fp8, cast after c": (cast(jnp.float8_e4m3fn), jnp.float32, 1e4, 1e-3),
    "W underflows fp8, cast after c": (cast(jnp.float8_e4m3fn), jnp.float32, 1e-5, 1e4),
    "bf16, cast after a c that bf16 rounds": (cast(jnp.bfloat16), jnp.float32, 1.0, 1.00390625 + 1 / 512),
    "x W overflows bf16": (times, jnp.bfloat16, 1e38, 1e-3),
    "x W overflows fp32": (times, jnp.float32, 1e38, 1e-30),
    "c W underflows": (times, jnp.float32, 1.0, 1e-30),
}


def mostly_slow(values, often):
    return [pytest.param(value, marks=[] if value in often else pytest.mark.slow) for value in values]


def case_of(name):
    fn, dtype, size, scalar = FINITE[name]
    w = (size * (1 + 0.1 * np.random.default_rng(0).normal(size=(D, K)))).astype(np.float32)
    return fn, {"w": jnp.asarray(w, dtype), "s": jnp.asarray(scalar, dtype)}, jnp.ones((7, D), dtype)


@pytest.mark.parametrize(
    "name", mostly_slow(FINITE, ["x W overflows fp16", "W overflows fp8, cast after c", "c W underflows"])
)
@pytest.mark.sampled(1)
def test_applying_is_merging_wherever_the_model_is_finite(name):
    """With fresh adapters bit by bit what the program computes, and with trained ones what the merged program does."""
    fn, params, x = case_of(name)
    plan = lora.plan(fn, params, x, rules={"w": lora.Lora(rank=1)})
    adapters = lora.init(jax.random.key(0), params, plan)
    apply = lora.lora_apply(fn)
    assert jnp.isfinite(fn(params, x)).all()
    for run in (apply, jax.jit(apply)):
        np.testing.assert_allclose(run(params, adapters, x), fn(params, x), rtol=1e-6)
    size = FINITE[name][2]
    adapters = jax.tree.map(lambda a: a + np.sqrt(size) * 0.1, adapters)
    found, merged = apply(params, adapters, x), fn(lora.merge(params, adapters), x)
    assert jnp.isfinite(merged).all()
    rounding = 0.1 if "fp8" in name else 0.02 if "bf16" in name or x.dtype.itemsize == 2 else 1e-4
    scale = np.abs(np.asarray(merged, np.float32)).max()
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(merged, np.float32), atol=rounding * scale)


@pytest.mark.parametrize("fn", mostly_slow([times, divided, twice], [divided]))
@pytest.mark.parametrize("scalar", mostly_slow([0.25, -0.5, 1e-4], [-0.5]))
@pytest.mark.sampled(1)
def test_gradients_by_the_scalar_and_by_adapters(fn, scalar):
    params = {"w": jax.random.normal(jax.random.key(0), (D, K)), "s": jnp.float32(scalar)}
    x = jax.random.normal(jax.random.key(1), (7, D))
    adapters = trained(lora.init(jax.random.key(2), params, lora.plan(fn, params, x, rules={"w": lora.Lora(2)})), 3)
    apply = lora.lora_apply(fn)

    def of(f):
        def loss(a, s, x):
            return total(jnp.tanh(f(a, {**params, "s": s}, x)))

        at = (adapters, params["s"], x)
        yield jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*at)
        yield jax.jit(jax.grad(jax.grad(lambda s: loss(adapters, s, x))))(params["s"])  # of second order, by the scalar
        yield jax.jit(jax.grad(lambda a: jax.grad(loss, argnums=1)(a, params["s"], x)))(adapters)  # and a mixed one

    found, expected = of(lambda a, p, x: apply(p, a, x)), of(lambda a, p, x: fn(lora.merge(p, a), x))
    for f, e in zip(found, expected, strict=True):
        for one, other in zip(jax.tree.leaves(f), jax.tree.leaves(e), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_a_gate_of_zero_has_a_gradient():
    params = {"w": jax.random.normal(jax.random.key(0), (D, K)), "s": jnp.float32(0)}
    x = jax.random.normal(jax.random.key(1), (7, D))
    adapters = trained(lora.init(jax.random.key(2), params, lora.plan(times, params, x, rules={"w": lora.Lora(2)})), 3)
    apply = lora.lora_apply(times)
    assert not jnp.any(apply(params, adapters, x))
    found, expected = (
        jax.grad(lambda s: total(f({**params, "s": s})))(params["s"])  # noqa: B023
        for f in (lambda p: apply(p, adapters, x), lambda p: times(lora.merge(p, adapters), x))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_divided_by_infinity():
    params = {"w": jnp.ones((D, K)), "s": jnp.float32(jnp.inf)}
    x = jnp.ones((7, D))
    adapters = lora.init(jax.random.key(2), params, lora.plan(divided, params, x, rules={"w": lora.Lora(2)}))
    np.testing.assert_array_equal(lora.lora_apply(divided)(params, adapters, x), 0)


@pytest.mark.parametrize("kind", mostly_slow([kind for kind in ALL if kind != "full"], ["dora"]))
@pytest.mark.sampled(1)
def test_every_kind_in_fp16(kind):
    """W and what is added to it are large, and the scalar makes them small."""
    case = Case("scaled", times, {"w": (D, K), "s": ()}, (7, D), pattern="w", dtype=jnp.float16)
    params, x = case.params(), jnp.full((7, D), 60.0, jnp.float16)
    adapters = case.adapters(ALL[kind])
    params = {"w": 2000 + 100 * params["w"], "s": jnp.float16(1e-3)}
    if kind == "dora":
        adapters = {"w": lora.init(jax.random.key(0), params, case.plan(ALL[kind]))["w"]}
    apply = lora.lora_apply(times)
    assert jnp.isinf(x @ params["w"]).all()
    found, merged = jax.jit(apply)(params, adapters, x), times(lora.merge(params, adapters), x)
    assert_trees_close(found, merged, rtol=5e-3, atol=5e-3 * float(jnp.abs(merged).max()))
    grads = jax.grad(lambda a: total(apply(params, a, x)) * 1e-3)(adapters)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(("dtype", "stays"), [(jnp.bfloat16, True), (jnp.float16, False)])
def test_packed_weights(dtype, stays):
    """A packed weight stays packed, unless its dtype has no room for x @ W."""
    w = jax.random.normal(jax.random.key(0), (D, K)) * 100
    size = 50.0 if dtype == jnp.float16 else 1.0
    params = {"w": lora.bases.Int8(dtype=dtype).pack(w, 0, dtype), "s": jnp.asarray(1e-3, dtype)}
    x = jnp.full((7, D), size, dtype)
    plan = lora.plan(times, params, x, rules={"w": lora.Lora(rank=1)})
    adapters = lora.init(jax.random.key(0), params, plan)
    found = lora.lora_apply(times)(params, adapters, x)
    expected = x.astype(jnp.float32) @ params["w"].dense().astype(jnp.float32) * params["s"].astype(jnp.float32)
    assert jnp.isfinite(found).all()
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.01 * float(jnp.abs(expected).max()))


def test_equal_programs_of_different_zeros_and_of_nan():
    """-0.0 == 0.0, and NaN is not itself; what is kept for one program is not used for another."""

    def filled(fill):
        return lambda p, x: x.at[jnp.array([99])].get(mode="fill", fill_value=fill) + (x @ p["w"])[:1]

    params, x = {"w": jnp.zeros((4, 4))}, jnp.ones((2, 4))
    adapters = {"w": lora.LoraAdapter(jnp.zeros((4, 1)), jnp.zeros((1, 4)), lora.KernelAxes((), (0,), (1,)), -1.0)}
    params = {"w": jnp.full((4, 4), -0.0)}
    for fill in (0.0, -0.0, float("nan")):
        found = jax.jit(lora.lora_apply(filled(fill)))(params, adapters, x)
        np.testing.assert_array_equal(found, np.full((1, 4), fill))
