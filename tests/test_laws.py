"""The laws of the library, each over the whole of its tables."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    MODELS,
    RULES,
    TRANSFORMS,
    Case,
    assert_trees_close,
    assert_trees_equal,
    eight_devices,
    formed,
    merge_by_hand,
    total,
    trained_leaves,
)

import lora_jax as lora

RULE = RULES["lora"]
cases = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
# Where the two sides round to a narrow dtype, they do so at different places.
narrow = {"cast": 3e-2, "bf16": 3e-2, "fp16": 4e-3, "bf16_activations grad of the input": 3e-2}
narrow |= {"concatenated": 1e-4, "gradient_inside": 1e-4}  # products of products of large numbers


def tolerance(case: Case, transform: str = "") -> dict[str, float]:
    rounding = narrow.get(case.name) or narrow.get(f"{case.name} {transform}")
    return {"rtol": rounding, "atol": 10 * rounding} if rounding else {"rtol": 2e-5, "atol": 2e-5}


# JAX itself has no forward mode through a custom_vjp, no reverse mode through a loop of unknown length, and no vmap of
# ragged_dot.
reverse = [t for t in TRANSFORMS if "grad" in t or t in ("remat", "mesh")]
impossible = {("custom_vjp_between", "jvp"), *(("while_loop", t) for t in reverse)}
impossible |= {("ragged", "vmap over adapters"), ("ragged", "vmap over inputs")}
# The inner loop takes each model by its gradient, and a few models by everything; CI takes the others by half of all
# else, one model by some and the next by the rest.
everywhere = ("two_layers", "attention_kernels", "scan_over_remat", "condition", "tied_embedding", "convolution")
product = [
    pytest.param(c, t, marks=[] if t in ("grad", "jvp") or c.name in everywhere else pytest.mark.slow)
    for i, c in enumerate(MODELS)
    for j, t in enumerate(TRANSFORMS)
    if (c.name, t) not in impossible and ((i + j) % 2 or t in ("grad", "jvp") or c.name in everywhere)
]
differentiable = pytest.mark.parametrize("case", [c for c in MODELS if c.name != "while_loop"], ids=lambda c: c.name)


@pytest.mark.parametrize(("case", "transform"), product, ids=lambda v: getattr(v, "name", v))
@pytest.mark.sampled(5)
def test_applying_is_merging(case, transform):
    run, apply = TRANSFORMS[transform], lora.lora_apply(case.fn)

    def both(p, a, x):
        return run(apply, p, a, x), run(lambda p, a, x: case.fn(lora.merge(p, a), x), p, a, x)

    if transform != "eager":
        both = jax.jit(both)  # one compilation
    factored, merged = both(case.params(), case.adapters(RULE), case.input())
    assert_trees_close(factored, merged, **tolerance(case, transform))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [name for name in RULES if RULES[name] is not RULE])
@cases
def test_applying_is_merging_for_every_other_rule(case, rule):
    params, x, adapters = case.params(), case.input(), case.adapters(RULES[rule])
    factored = jax.jit(lora.lora_apply(case.fn))(params, adapters, x)
    merged = jax.jit(lambda p, a, x: case.fn(lora.merge(p, a), x))(params, adapters, x)
    assert_trees_close(factored, merged, **tolerance(case))


@pytest.mark.parametrize("rule", RULES)
@cases
@pytest.mark.sampled(6)
def test_merging_is_the_formula(case, rule):
    params, adapters = case.params(), case.adapters(RULES[rule])
    merged = lora.merge(params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for name, w in params.items():
        assert (merged[name].shape, merged[name].dtype) == (w.shape, w.dtype)
        if name in adapters:
            rounding = {jnp.bfloat16.dtype: 8e-3, jnp.float16.dtype: 1e-3}.get(w.dtype, 1e-6)
            expected = merge_by_hand(w, adapters[name])
            np.testing.assert_allclose(np.asarray(merged[name], np.float64), expected, rtol=rounding, atol=rounding)
        else:
            assert merged[name] is w


# Compiled as a whole, and fused in another way; or c (x @ W) in the place of x @ (c W).
rounded = ("tensor_parallel", "scaled", "scaled_by_what_it_computes")


@pytest.mark.parametrize("rule", ["lora"])
@cases
@pytest.mark.sampled(5)
def test_starting_is_identity(case, rule):
    params, x = case.params(), case.input()
    adapters = lora.init(jax.random.key(0), params, case.plan(RULES[rule]))
    assert_trees_equal(lora.merge(params, adapters), params)
    found, expected = lora.lora_apply(case.fn)(params, adapters, x), case.fn(params, x)
    if case.name in rounded:
        assert_trees_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert_trees_equal(found, expected)


@differentiable
@pytest.mark.sampled(5)
def test_factored_stays_factored(case):
    """Forward and gradient compute no value of W's size, or of one of its matrices', beyond the program's own."""
    params, x, adapters = case.params(), case.input(), case.adapters(RULE)
    apply = lora.lora_apply(case.fn)
    program = jax.make_jaxpr(jax.value_and_grad(lambda a, p: total(apply(p, a, x))))(adapters, params)
    base = jax.make_jaxpr(jax.value_and_grad(lambda x, p: total(case.fn(p, x))))(x, params)
    naive = jax.make_jaxpr(jax.value_and_grad(lambda a, p: total(case.fn(lora.merge(p, a), x))))(adapters, params)
    for name, adapter in adapters.items():
        shape = params[name].shape
        one_matrix = tuple(n for axis, n in enumerate(shape) if axis not in adapter.axes.stack)
        assert Counter(formed(program, shape)) <= Counter(formed(base, shape)), name
        assert Counter(formed(program, one_matrix)) <= Counter(formed(base, one_matrix)), name
        assert len(formed(naive, shape)) > len(formed(base, shape)), "the check sees what it is meant to see"


@differentiable
@pytest.mark.sampled(5)
def test_frozen_stays_frozen(case):
    params, x, adapters = case.params(), case.input(), case.adapters(RULE)
    before = jax.tree.map(np.array, params)
    apply = lora.lora_apply(case.fn)
    optimizer = lora.freeze_base(optax.adam(1e-2))

    def loss(adapters, params, x):
        return total(apply(params, adapters, x)) ** 2, {}

    state = lora.TrainState.create(jax.tree.map(jnp.copy, adapters), optimizer)  # the step donates it
    step = lora.jit_step(loss, optimizer)
    grads = jax.jit(jax.grad(lambda a: loss(a, params, x)[0]))(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    assert all(np.any(np.asarray(g) != 0) for g in trained_leaves(grads))
    out = jax.eval_shape(step, state, params, x)
    allowed = {leaf.shape for leaf in jax.tree.leaves(adapters)} | {()}
    assert {leaf.shape for leaf in jax.tree.leaves(out)} <= allowed, "the step gives out nothing of the base"

    start = jax.tree.map(np.array, adapters)
    for _ in range(2):
        state, metrics = step(state, params, x)
    assert np.isfinite(metrics["loss"])
    assert_trees_equal(params, before)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), state.trainable, start)
    assert moved == lora.trainable_mask(adapters)


@cases
@pytest.mark.sampled(5)
def test_placement_changes_speed_only(case):
    """The same adapters from the same key, also when made under jit on a mesh."""
    params, plan = case.params(), case.plan(RULE)
    mesh = eight_devices()
    here = lora.init(jax.random.key(3), params, plan)
    everywhere = jax.NamedSharding(mesh, jax.P())
    there = jax.jit(lambda key: lora.init(key, params, plan), out_shardings=everywhere)(jax.random.key(3))
    assert_trees_equal(here, there)
