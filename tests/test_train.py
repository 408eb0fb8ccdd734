import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODELS, RULES, compilations, total

import lora_jax as lora

CASE = next(case for case in MODELS if case.name == "two_layers")


def setup(optimizer):
    apply = lora.lora_apply(CASE.fn)

    def loss(adapters, params, x):
        value = (apply(params, adapters, x) ** 2).mean()
        return value, {"twice": 2 * value}

    adapters = CASE.adapters(RULES["lora"])
    return loss, lora.TrainState.create(adapters, optimizer), adapters


def test_a_step_is_the_formula():
    """Stochastic gradient descent by hand, on merged weights."""
    loss, state, adapters = setup(optimizer := optax.sgd(0.1))
    params, x = CASE.params(), CASE.input()
    grads = jax.grad(lambda a: (CASE.fn(lora.merge(params, a), x) ** 2).mean())(adapters)
    expected = jax.tree.map(lambda a, g: a - 0.1 * g, adapters, grads)
    state, metrics = lora.train_step(loss, optimizer, state, params, x)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert state.step == 1
    np.testing.assert_allclose(metrics["twice"], 2 * metrics["loss"], rtol=1e-6)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_the_second_step_compiles_nothing_and_the_base_is_never_donated():
    loss, state, _ = setup(optimizer := lora.freeze_base(optax.adamw(1e-2)))
    step = lora.jit_step(loss, optimizer)
    params, x = CASE.params(), CASE.input()
    first, _ = jax.block_until_ready(step(state, params, x))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "the state's buffers are donated"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    with compilations() as seen:
        jax.block_until_ready(step(first, params, x))
    assert not seen


def test_a_loss_may_be_a_number_alone():
    loss, state, _ = setup(optimizer := optax.sgd(0.1))
    _, metrics = lora.train_step(lambda *args: loss(*args)[0], optimizer, state, CASE.params(), CASE.input())
    assert sorted(metrics) == ["grad_norm", "loss"]


def test_compilations_are_seen():
    with compilations() as seen:
        jax.jit(lambda x: x * 2.5 + 7)(jnp.ones(31))
    assert seen


def test_only_marked_leaves_move_and_only_they_have_state():
    """The whole model in one tree: the mask lets nothing but adapters move, though all has gradients."""
    tree = {"params": CASE.params(), "adapters": CASE.adapters(RULES["lora"])}
    optimizer = lora.freeze_base(optax.adamw(1e-2, weight_decay=0.1))
    state = optimizer.init(tree)
    held = {leaf.shape for leaf in jax.tree.leaves(state)} - {()}
    assert held == {leaf.shape for leaf in jax.tree.leaves(tree["adapters"])}
    grads = jax.grad(lambda t: total(lora.lora_apply(CASE.fn)(t["params"], t["adapters"], CASE.input())))(tree)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads["params"]))
    updates, _ = optimizer.update(grads, state, tree)
    moved = optax.apply_updates(tree, updates)
    for a, b in zip(jax.tree.leaves(moved["params"]), jax.tree.leaves(tree["params"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(updates["adapters"]))


def test_a_mask_of_ones_own():
    tree = {"adapters": CASE.adapters(RULES["lora"]), "head": jnp.ones(3)}
    mask = {"adapters": lora.trainable_mask(tree["adapters"]), "head": True}
    optimizer = lora.freeze_base(optax.sgd(1.0), mask)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), optimizer.init(tree), tree)
    assert jnp.all(updates["head"] == -1)


@pytest.mark.parametrize("d", [1024])
def test_flops_of_the_gradient(d):
    """At most 2/3 + r(1/d + 1/k) + 0.002 of full fine-tuning's: the formula of a square linear, counted by XLA."""
    tokens, r = 2048, 16
    x, w = jax.ShapeDtypeStruct((tokens, d), jnp.float32), jax.ShapeDtypeStruct((d, d), jnp.float32)
    params = {"w": w}

    def linear(params, x):
        return x @ params["w"]

    plan = lora.plan(linear, params, x, rules={"w": lora.Lora(rank=r)})
    adapters = jax.eval_shape(lambda key: lora.init(key, params, plan), jax.random.key(0))
    apply = lora.lora_apply(linear)

    def flops(grad, *args):
        return jax.jit(grad).lower(*args).compile().cost_analysis()["flops"]

    # With respect to x too: inside a model, the layers below need it.
    adapted = flops(jax.grad(lambda a, x, p: (apply(p, a, x) ** 2).sum(), argnums=(0, 1)), adapters, x, params)
    full = flops(jax.grad(lambda p, x: (linear(p, x) ** 2).sum(), argnums=(0, 1)), params, x)
    assert 2 / 3 < adapted / full <= 2 / 3 + r * (1 / d + 1 / d) + 0.002


def test_it_learns():
    """Adapters on a frozen random network find a target that differs from it by a low-rank change."""
    key = jax.random.key(0)
    params = {
        "w1": jax.random.normal(key, (16, 32)) / 4,
        "w2": jax.random.normal(jax.random.fold_in(key, 1), (32, 4)) / 6,
    }

    def model(params, x):
        return jnp.tanh(x @ params["w1"]) @ params["w2"]

    x = jax.random.normal(jax.random.fold_in(key, 2), (256, 16))
    plan = lora.plan(model, params, x, rules={"w.": lora.Lora(rank=4)})
    hidden = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(key, a.shape), lora.init(key, params, plan))
    target = model(lora.merge(params, hidden), x)
    apply = lora.lora_apply(model)
    optimizer = lora.freeze_base(optax.adam(3e-2))
    step = lora.jit_step(lambda a, p, x, y: (((apply(p, a, x) - y) ** 2).mean(), {}), optimizer)
    state = lora.TrainState.create(lora.init(jax.random.key(5), params, plan), optimizer)
    losses = []
    for _ in range(300):
        state, metrics = step(state, params, x, target)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.05
    assert losses[-1] < 1e-3 * losses[0]
