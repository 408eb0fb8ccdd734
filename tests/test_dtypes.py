"""What each dtype does: of the base, of the activations, of the adapters; and what is no float passes through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import D, K, assert_trees_close, equations, trained

import lora_jax as lora
from lora_jax import Lora, LoraError


def linear(params, x):
    return x @ params["w"]


def adapted(fn, params, x, **rule):
    plan = lora.plan(fn, params, x, rules={"w": Lora(2, alpha=3, **rule)})
    return trained(lora.init(jax.random.key(0), params, plan), key=1)


@pytest.mark.parametrize("activations", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "float16"])
def test_the_output_has_the_functions_dtype_and_adapters_stay_fp32(base, activations):
    params = {"w": jax.random.normal(jax.random.key(0), (D, K), base)}
    x = jax.random.normal(jax.random.key(1), (3, D), activations)
    adapters = adapted(linear, params, x)
    apply = lora.lora_apply(linear)
    out = apply(params, adapters, x)
    assert out.dtype == linear(params, x).dtype
    grads = jax.grad(lambda a: apply(params, a, x).astype(jnp.float32).sum())(adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (params, x))
    exact = linear(lora.merge(wide[0], adapters), wide[1])
    rounding = max(float(jnp.finfo(dtype).eps) for dtype in (base, activations, out.dtype))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=8 * rounding, atol=16 * rounding)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_thin_products_accumulate_in_fp32_and_no_activation_is_upcast(dtype):
    """The dots take narrow operands and give fp32: tokens are never copied in a wider dtype to be multiplied."""
    params, x = {"w": jnp.ones((D, K), dtype)}, jnp.ones((3, D), dtype)
    adapters = adapted(linear, params, x)
    program = jax.make_jaxpr(lora.lora_apply(linear))(params, adapters, x)
    dots = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    base, *thin = dots
    assert base.params["preferred_element_type"] == dtype
    assert len(thin) == 2
    for dot in thin:
        assert {v.aval.dtype for v in dot.invars} == {jnp.dtype(dtype)}
        assert dot.outvars[0].aval.dtype == jnp.float32


def test_what_is_no_float_passes_through():
    params = {
        "w": jnp.ones((D, K)),
        "phase": jnp.ones((K, K), jnp.complex64) * 1j,
        "ids": jnp.arange(3),
        "key": jax.random.key(3),
        "mask": jnp.array([True, False, True]),
    }

    def fn(p, x):
        noise = jax.random.normal(p["key"], (3, 1))
        return ((x @ p["w"]) @ p["phase"])[p["ids"]] + jnp.where(p["mask"][:, None], noise, 0.0)

    x = jnp.ones((3, D))
    adapters = adapted(fn, params, x)
    assert list(adapters) == ["w"]
    found = jax.jit(lora.lora_apply(fn))(params, adapters, x)
    assert found.dtype == jnp.complex64
    np.testing.assert_allclose(found, fn(lora.merge(params, adapters), x), rtol=1e-5)
    with pytest.raises(LoraError, match=r"'phase': complex64\[10, 10\] is not of a floating dtype"):
        lora.plan(fn, params, x, rules={"phase": Lora(2)})


def test_x64():
    """In float64 a law that holds holds to 1e-13; fp32 adapters keep a float64 function in float64."""
    with jax.enable_x64(True):
        params = {"w": jax.random.normal(jax.random.key(0), (D, K), jnp.float64)}
        x = jax.random.normal(jax.random.key(1), (3, D), jnp.float64)
        for dtype in (jnp.float64, jnp.float32):
            adapters = adapted(linear, params, x, dtype=dtype)
            found = jax.jit(lora.lora_apply(linear))(params, adapters, x)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, linear(lora.merge(params, adapters), x), rtol=1e-13, atol=1e-13)


def test_default_matmul_precision_is_respected():
    params, x = {"w": jnp.ones((D, K))}, jnp.ones((3, D))
    adapters, apply = adapted(linear, params, x), lora.lora_apply(linear)

    def precisions():
        program = jax.make_jaxpr(lambda *args: apply(*args))(params, adapters, x)
        return [e.params["precision"] for e in equations(program) if e.primitive.name == "dot_general"]

    assert precisions() == [None] * 3
    with jax.default_matmul_precision("highest"):
        assert precisions() == [(jax.lax.Precision.HIGHEST,) * 2] * 3
    assert precisions() == [None] * 3


def test_adapters_of_another_dtype():
    params, x = {"w": jnp.ones((D, K))}, jnp.ones((3, D))
    adapters = jax.tree.map(lambda a: a.astype(jnp.int32), adapted(linear, params, x))
    for call in (lora.lora_apply(linear), lambda p, a, x: lora.merge(p, a)):
        with pytest.raises(LoraError, match="the adapter for 'w' holds int32 arrays, expected floats"):
            call(params, adapters, x)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), adapted(linear, params, x))
    assert_trees_close(lora.lora_apply(linear)(params, narrow, x), linear(lora.merge(params, narrow), x), rtol=1e-4)
