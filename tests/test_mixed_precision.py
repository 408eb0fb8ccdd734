"""fp32 adapters over a narrow base: their gradients are accumulated and kept in fp32, and summed over devices in it."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, RULES, Case, assert_trees_close, eight_devices, equations, total, trained, trained_leaves

import lora_jax as lora
from benchmarks.collectives import collectives

# What is trained beside a program's own operations has the gradient that these give it: `Full` is not among the kinds.
NARROW = {kind: rule for kind, rule in (RULES | KINDS).items() if kind != "full"}
HALF = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


def linear(p, x):
    return x @ p["w"]


def dense(p, x):
    return jnp.tanh(x @ p["w"])


def heads(p, x):
    return jnp.tanh(jnp.einsum("td,dhk->thk", x, p["w"]))


def experts(p, x):
    return jnp.einsum("ted,edk->tek", jnp.stack([x, x**2], 1), p["w"])


def layers(p, x):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0]


def convolution(p, x):
    return jax.lax.conv_general_dilated(
        x.reshape(2, -1, 8), p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


def transposed_convolution(p, x):
    return jax.lax.conv_transpose(
        x.reshape(2, -1, 8), p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel=True
    )


def ragged(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.array([30, 34], jnp.int32))


def lookup(p, x):
    return p["w"][jnp.arange(40) % 16] * x[:40]


PROGRAMS = {
    "dense": (dense, (8, 6)),
    "heads": (heads, (8, 2, 3)),
    "experts": (experts, (2, 8, 6)),
    "layers": (layers, (3, 8, 8)),
    "convolution": (convolution, (3, 8, 6)),
    "transposed convolution": (transposed_convolution, (3, 6, 8)),
    "ragged": (ragged, (2, 8, 6)),
    "lookup": (lookup, (16, 8)),
}
CASES = {
    name: {d: Case(name, fn, {"w": w}, (64, 8), dtype=d) for d in HALF.values()} for name, (fn, w) in PROGRAMS.items()
}
often = [("dense", "lora"), ("convolution", "lora")]


def mostly_slow(cases, often):
    return [pytest.param(*case, marks=[] if case in often else pytest.mark.slow) for case in cases]


programs = mostly_slow(
    [*((name, "lora") for name in PROGRAMS), *(("dense", kind) for kind in NARROW if kind != "lora")], often
)
on_a_mesh = mostly_slow(
    [(kind, how) for kind in ("lora", "dora", "lokr", "ia3") for how in ("jit", "value_and_grad")], [("lora", "jit")]
)


def gradients(case, rule):
    """The loss's gradient over the narrow base; and the exact one, of the same numbers in fp64."""
    params, x, adapters = case.params(), case.input(), case.adapters(rule)
    apply = lora.lora_apply(case.fn)
    found = jax.grad(lambda a: total(apply(params, a, x)))(adapters)  # a compiler may leave roundings out
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (params, adapters, x))
        exact = jax.grad(lambda a: total(case.fn(lora.merge(wide[0], a), wide[2])))(wide[1])
    return found, exact


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "kind"), programs)
def test_gradients_are_not_rounded_to_the_dtype_of_the_base(name, kind, dtype):
    found, exact = gradients(CASES[name][HALF[dtype]], NARROW[kind])
    for g, e, trains in zip(*map(jax.tree.leaves, (found, exact, lora.trainable_mask(found))), strict=True):
        assert g.dtype == jnp.float32
        if trains:
            assert jnp.mean(g == g.astype(dtype).astype(jnp.float32)) < 0.5, "numbers of fp32, and not of the base"
            np.testing.assert_allclose(g, e, atol=0.1 * np.abs(e).max())


def test_rows_over_a_narrow_table():
    case = CASES["lookup"][jnp.bfloat16]
    [gradient] = jax.tree.leaves(gradients(case, lora.Rows((3, 5)))[0])
    assert gradient.dtype == jnp.float32
    assert jnp.any(gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_sum_over_many_tokens_is_exact_in_fp32():
    """4,096 equal contributions and one that bf16 loses beside their sum."""
    params = {"w": jnp.zeros((2, 2), jnp.bfloat16)}
    x = jnp.ones((4097, 2), jnp.bfloat16).at[-1].set(3)
    adapters = lora.init(
        jax.random.key(0), params, lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(1)})
    )
    adapters = jax.tree.map(jnp.ones_like, adapters)
    grads = jax.grad(lambda a: lora.lora_apply(lambda p, x: x @ p["w"])(params, a, x).astype(jnp.float32).sum())(
        adapters
    )
    np.testing.assert_array_equal(grads["w"].a, np.full((2, 1), 2 * 4099.0))
    np.testing.assert_array_equal(grads["w"].b, np.full((1, 2), 2 * 4099.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "convolution", "ragged"])
def test_every_kind_of_derivative(name):
    """Forward mode, both modes of second order, of the adapters and of x, `vmap` and remat."""
    case = CASES[name][jnp.bfloat16]
    params, x, adapters = case.params(), case.input(), case.adapters(RULES["lora"])
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (params, x))
    apply = lora.lora_apply(case.fn)
    along = jax.tree.map(jnp.cos, adapters)

    def narrow(a, x):
        return total(jax.checkpoint(apply)(params, a, x.astype(jnp.bfloat16)))

    def exact(a, x):
        return total(case.fn(lora.merge(wide[0], a), x))

    def of(loss):
        def tangent(a):
            return jax.jvp(lambda a: loss(a, wide[1]), (a,), (along,))[1]

        yield "forward", jax.jit(tangent)(adapters)
        yield "of x", jax.jit(jax.grad(loss, argnums=1))(adapters, wide[1])
        yield "reverse over forward", jax.jit(jax.grad(tangent))(adapters)
        gradient = jax.grad(lambda a: loss(a, wide[1]))
        yield "forward over reverse", jax.jit(lambda a: jax.jvp(gradient, (a,), (along,))[1])(adapters)
        if name != "ragged":  # of which JAX has no vmap
            stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), adapters)
            yield "vmap", jax.jit(jax.vmap(gradient))(stacked)

    for (what, found), (_, expected) in zip(of(narrow), of(exact), strict=True):
        for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(f, np.float32), e, atol=0.1 * np.abs(e).max(), err_msg=what)


def test_activations_are_not_copied_in_fp32():
    """Forward and backward, the only products with a wide operand are the two that the gradients of the factors are."""
    case = CASES["dense"][jnp.bfloat16]
    params, x, adapters = case.params(), case.input(), case.adapters(RULES["lora"])
    apply = lora.lora_apply(case.fn)
    forward = jax.make_jaxpr(apply)(params, adapters, x)
    assert {v.aval.dtype for e in dots(forward) for v in e.invars} == {jnp.dtype("bfloat16")}
    both = jax.make_jaxpr(jax.grad(lambda a: total(apply(params, a, x))))(adapters)
    assert len(dots(both)) == 3 + 3, "x W, x A, h B; and the gradients of h, of A and of B"
    wide = {v.aval.shape for e in dots(both) for v in e.invars if v.aval.dtype == jnp.float32}
    assert (64, 8) not in wide
    assert "convert_element_type" not in {
        e.primitive.name for e in equations(both) if e.outvars[0].aval.shape == x.shape
    }


def dots(jaxpr):
    return [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]


def test_a_policy_of_remat_sees_the_thin_products():
    case = CASES["dense"][jnp.bfloat16]
    params, x, adapters = case.params(), case.input(), case.adapters(RULES["lora"])
    apply = lora.lora_apply(case.fn)

    def count(policy):
        loss = jax.checkpoint(lambda a: total(apply(params, a, x)), policy=policy)
        return len(dots(jax.make_jaxpr(jax.grad(loss))(adapters)))

    assert count(jax.checkpoint_policies.dots_saveable) == 3 + 3
    assert count(jax.checkpoint_policies.nothing_saveable) == 3 + 3 + 3


def test_adapters_of_adapters():
    """The factors of fp32 adapters over a bf16 base are weights like any other, as they are over one in fp32."""
    params, x = {"w": jnp.ones((8, 6), jnp.bfloat16)}, jnp.ones((3, 8), jnp.bfloat16)

    inner = trained(lora.init(jax.random.key(0), params, lora.plan(linear, params, x, rules={"w": lora.Lora(4)})), 1)

    def adapted(everything, x):
        return lora.lora_apply(linear)(everything["base"], everything["adapters"], x)

    everything = {"base": params, "adapters": inner}
    plan = lora.plan(adapted, everything, x, rules={"adapters/w/[ab]": lora.Lora(2)})
    assert list(plan) == ["adapters/w/a", "adapters/w/b"]
    outer = trained(lora.init(jax.random.key(2), everything, plan), key=3)
    found = jax.jit(lora.lora_apply(adapted))(everything, outer, x)
    assert_trees_close(found, adapted(lora.merge(everything, outer), x), rtol=0.05, atol=0.05)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 8):
            x = jnp.tanh(nn.Dense(width, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, use_bias=False)(x))
        return x


@functools.cache
def small_model():
    model, x = Small(), jax.random.normal(jax.random.key(0), (64, 8), jnp.bfloat16)
    return model.apply, model.init(jax.random.key(1), x), x


@pytest.mark.parametrize(("kind", "how"), on_a_mesh)
def test_sums_over_devices_run_in_fp32(kind, how):
    """No gradient crosses devices in 16 bits, as the compiled program says; and the sum is that of one device."""
    fn, params, x = small_model()
    apply, mesh = lora.lora_apply(fn), eight_devices()
    plan = lora.plan(fn, params, x, rules={".*kernel": NARROW[kind]})
    adapters = trained(lora.init(jax.random.key(2), params, plan), 3)

    def loss(adapters, params, x):
        return jnp.mean(apply(params, adapters, x).astype(jnp.float32) ** 2)

    rows, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    places = (whole, whole, rows)
    if how == "jit":
        gradient = jax.jit(jax.grad(loss), in_shardings=places, out_shardings=whole)
    else:
        of = lora.value_and_grad(loss, batch_sharding=rows)
        gradient = jax.jit(lambda *args: of(*args)[1], in_shardings=places, out_shardings=whole)
    compiled = gradient.lower(adapters, params, x).compile()
    sums = [c for c in collectives(compiled.as_text()) if c.kind in ("all-reduce", "reduce-scatter")]
    sent = [(math.prod(shape), c.nbytes / sum(map(math.prod, c.shapes))) for c in sums for shape in c.shapes]
    assert sum(size for size, _ in sent) >= sum(leaf.size for leaf in trained_leaves(adapters))
    assert {width for _, width in sent} == {4}, "bytes of each number"
    here = jax.jit(jax.grad(loss))(adapters, params, x)
    there = compiled(*map(jax.device_put, (adapters, params, x), places))
    rounding = 2e-6 if how == "jit" else 0.02  # copies are fused in another way, and activations rounded elsewhere
    for a, b in zip(*map(jax.tree.leaves, (there, here)), strict=True):
        np.testing.assert_allclose(a, b, atol=rounding * np.abs(b).max())
