import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODELS, RULES, assert_trees_close, assert_trees_equal, compilations, total, trained_leaves

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
    assert sorted(metrics) == ["grad_norm", "loss", "skipped"]


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
    assert held == {leaf.shape for leaf in trained_leaves(tree["adapters"])}
    grads = jax.grad(lambda t: total(lora.lora_apply(CASE.fn)(t["params"], t["adapters"], CASE.input())))(tree)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads["params"]))
    updates, _ = optimizer.update(grads, state, tree)
    moved = optax.apply_updates(tree, updates)
    for a, b in zip(jax.tree.leaves(moved["params"]), jax.tree.leaves(tree["params"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(jnp.any(u != 0) for u in trained_leaves(updates["adapters"]))


def test_a_mask_of_ones_own():
    tree = {"adapters": CASE.adapters(RULES["lora"]), "head": jnp.ones(3)}
    mask = {"adapters": lora.trainable_mask(tree["adapters"]), "head": True}
    optimizer = lora.freeze_base(optax.sgd(1.0), mask)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), optimizer.init(tree), tree)
    assert jnp.all(updates["head"] == -1)


def test_a_head_beside_adapters_is_trained():
    """Under `freeze_base`, as by the optimizer itself; the step gives out both."""
    optimizer, apply = lora.freeze_base(optax.sgd(0.1)), lora.lora_apply(CASE.fn)
    tree = {"lora": CASE.adapters(RULES["lora"]), "head": jnp.ones(CASE.input().shape[-1])}

    def loss(trainable, params, x):
        return jnp.mean((apply(params, trainable["lora"], x) * trainable["head"][None, None]) ** 2)

    expected = jax.tree.map(lambda t, g: t - 0.1 * g, tree, jax.grad(loss)(tree, CASE.params(), CASE.input()))
    state = lora.TrainState.create(jax.tree.map(jnp.copy, tree), optimizer)
    state, _ = lora.jit_step(loss, optimizer)(state, CASE.params(), CASE.input())
    assert_trees_close(state.trainable, expected, rtol=1e-5, atol=1e-6)
    assert jnp.all(state.trainable["head"] != 1)


UNUSED = {
    "nothing": lambda apply, t, p, x: jnp.mean(x**2),
    "the base alone": lambda apply, t, p, x: jnp.mean(CASE.fn(p, x) ** 2),
    "the head alone": lambda apply, t, p, x: jnp.mean(CASE.fn(p, x) ** 2) * t["head"].sum(),
    "stopped": lambda apply, t, p, x: jnp.mean(apply(p, jax.lax.stop_gradient(t["lora"]), x) ** 2) + t["head"].sum(),
    "in a metric": lambda apply, t, p, x: (jnp.mean(x**2), {"y": apply(p, t["lora"], x).sum()}),
}
USED = {
    "applied": lambda apply, t, p, x: jnp.mean(apply(p, t["lora"], x) ** 2),
    "merged": lambda apply, t, p, x: jnp.mean(CASE.fn(lora.merge(p, t["lora"]), x) ** 2),
    "held down": lambda apply, t, p, x: optax.tree.norm(t["lora"]["w1"]),
    "rematerialized": lambda apply, t, p, x: jnp.mean(jax.checkpoint(apply)(p, t["lora"], x) ** 2),
    "in a branch": lambda apply, t, p, x: jax.lax.cond(
        x.sum() > 0, lambda: apply(p, t["lora"], x).sum(), lambda: 0 * x.sum()
    ),
}


HOW = ["eager", "jit", "microbatches", "mesh", "shard_map", "pmap"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(
            name, how, marks=[] if how == "mesh" or name in ("the base alone", "applied") else pytest.mark.slow
        )
        for name in UNUSED | USED
        for how in HOW
    ],
)
def test_a_loss_that_does_not_use_the_adapters(name, how):
    """Found while it is traced, and for what it does: fresh adapters, whose A has a gradient of zero, are used."""
    apply, optimizer = lora.lora_apply(CASE.fn), optax.sgd(0.1)
    plan = CASE.plan(RULES["lora"])
    tree = {"lora": lora.init(jax.random.key(0), CASE.params(), plan), "head": jnp.ones(3)}
    x = jnp.ones((8, *CASE.input().shape[1:]))
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    whole, rows = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))

    def loss(trainable, params, x):
        return (UNUSED | USED)[name](apply, trainable, params, x)

    def run():
        state, params = lora.TrainState.create(tree, optimizer), CASE.params()
        if how == "eager":
            return lora.value_and_grad(loss)(tree, params, x)
        if how == "mesh":
            step = functools.partial(lora.value_and_grad, loss, batch_sharding=rows)
            return jax.eval_shape(step(), tree, params, jax.device_put(x, rows))
        steps = {
            "jit": lambda: lora.jit_step(loss, optimizer),
            "microbatches": lambda: lora.jit_step(loss, optimizer, microbatches=2),
            "shard_map": lambda: lora.shard_map_step(loss, optimizer, mesh, jax.P("data")),
            "pmap": lambda: lora.pmap_step(loss, optimizer, replicated=False),
        }
        state = jax.device_put(state, whole) if how == "shard_map" else state
        return jax.eval_shape(steps[how](), state, params, x[:, None] if how == "pmap" else x)

    if name in USED:
        run()
    else:
        with pytest.raises(lora.LoraError, match="the loss does not use what is trained, so that no gradient reaches"):
            run()


def test_what_is_watched_costs_nothing():
    """The compiled gradient is the one of `jax.grad`."""
    loss, _, adapters = setup(optax.sgd(0.1))
    args = adapters, CASE.params(), CASE.input()
    ours = jax.jit(lora.value_and_grad(lambda *a: loss(*a)[0])).lower(*args).compile()
    plain = jax.jit(jax.value_and_grad(lambda *a: loss(*a)[0])).lower(*args).compile()
    assert ours.cost_analysis()["flops"] <= plain.cost_analysis()["flops"] + 8 * sum(
        map(jnp.size, jax.tree.leaves(adapters))
    )
    assert ours.memory_analysis().temp_size_in_bytes <= plain.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("trainable", [{}, {"lora": {}}, None])
def test_nothing_to_train(trainable):
    with pytest.raises(lora.LoraError, match="there is nothing to train"):
        lora.value_and_grad(lambda t, p, x: x.sum())(trainable, {}, jnp.ones(3))


@pytest.mark.parametrize(
    ("created", "stepped", "says"),
    [
        (optax.sgd(0.1), optax.adam(0.1), "expected ScaleByAdamState"),
        (optax.adam(0.1), optax.sgd(0.1), "is made of ScaleByAdamState"),
        (optax.adam(0.1), lora.freeze_base(optax.adam(0.1)), "made of ScaleByAdamState.*expected PartitionState"),
        (optax.adam(0.1), optax.chain(optax.clip(1.0), optax.adam(0.1)), "not one of this optimizer"),
    ],
    ids=["sgd, then adam", "adam, then sgd", "not frozen", "not clipped"],
)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_another_optimizer_in_the_step_than_in_the_state(created, stepped, says, jit):
    loss, state, _ = setup(created)
    step = lora.jit_step(loss, stepped) if jit else functools.partial(lora.train_step, loss, stepped)
    with pytest.raises(lora.LoraError, match=f"{says}.*TrainState.create"):
        step(state, CASE.params(), CASE.input())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_an_optimizer_whose_start_looks_at_numbers():
    """What its state is cannot be known from shapes: it is taken as it is."""

    def init(params):
        return {"large": jnp.ones(())} if float(optax.tree.norm(params)) > 0 else {}

    optimizer = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    loss, state, _ = setup(optimizer)
    state, _ = lora.jit_step(loss, optimizer)(state, CASE.params(), CASE.input())
    assert state.opt_state == {"large": 1}


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


def test_value_and_grad_is_jax_value_and_grad():
    """Of the whole batch, whatever it is cut into: for loops of one's own."""
    loss, state, _ = setup(optax.sgd(0.1))
    x = jnp.concatenate([CASE.input(), 2 * CASE.input()[:3]])  # eight rows
    expected = jax.value_and_grad(lambda a: loss(a, CASE.params(), x)[0])(state.trainable)
    for microbatches in (1, 2, 8):
        (value, metrics), grads = lora.value_and_grad(loss, microbatches=microbatches)(
            state.trainable, CASE.params(), x
        )
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        np.testing.assert_allclose(metrics["twice"], 2 * value, rtol=1e-6)
        assert_trees_close(grads, expected[1], rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_counted_and_changes_nothing():
    loss, state, _ = setup(optimizer := lora.freeze_base(optax.adamw(1e-2)))
    step = jax.jit(lambda *args: lora.train_step(loss, optimizer, *args))
    good, metrics = step(state, CASE.params(), CASE.input())
    assert metrics["skipped"] == good.skipped == 0
    after, metrics = step(good, CASE.params(), CASE.input().at[0, 0, 0].set(jnp.nan))
    assert np.isnan(metrics["loss"])
    assert metrics["skipped"] == after.skipped == 1
    assert after.step == 2
    assert_trees_equal((after.trainable, after.opt_state), (good.trainable, good.opt_state))
    again, metrics = step(after, CASE.params(), CASE.input())
    assert metrics["skipped"] == 1
    assert all(jnp.any(a != b) for a, b in zip(*map(trained_leaves, (again.trainable, after.trainable)), strict=True))


def test_the_loss_scale_lets_small_gradients_through_fp16_and_finds_its_size():
    """Gradients of 1e-8 vanish in fp16; scaled by 2^15 they do not."""
    case = next(case for case in MODELS if case.name == "fp16")
    rate = 2.0**20
    apply, optimizer = lora.lora_apply(case.fn), optax.sgd(rate)
    adapters, params, x = case.adapters(RULES["lora"]), case.params(), case.input()

    def loss(adapters, params, x, size):
        return jnp.mean((apply(params, adapters, x) * size).astype(jnp.float32)) * 1e-3

    def gradient(loss_scale, size=1e-2):
        state = lora.TrainState.create(adapters, optimizer, loss_scale=loss_scale)
        size = jnp.float16(size)
        after, metrics = lora.train_step(loss, optimizer, state, params, x, size)
        return jax.tree.map(lambda a, b: (a - b) / rate, adapters, after.trainable), after, metrics

    plain, _, _ = gradient(None)
    scaled, after, metrics = gradient(lora.LossScale.create(2.0**15))
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), (params, x))
    exact = jax.grad(lambda a: loss(a, *wide, 1e-2))(adapters)
    assert_trees_close(scaled, exact, rtol=0.05, atol=1e-9)
    norms = [float(optax.tree.norm(tree)) for tree in (plain, scaled, exact)]
    assert norms[0] < 0.5 * norms[2]
    assert abs(norms[1] - norms[2]) < 0.05 * norms[2]
    assert (metrics["loss_scale"], after.loss_scale.value, after.skipped) == (2.0**15, 2.0**15, 0)
    _, after, _ = gradient(lora.LossScale.create(2.0**40))
    assert (after.loss_scale.value, after.skipped) == (2.0**39, 1)
    _, after, _ = gradient(lora.LossScale.create(2.0**10, interval=1))
    assert after.loss_scale.value == 2.0**11


def test_the_loss_scale_stays_where_it_can_come_back_from():
    scale = lora.LossScale.create(interval=1)
    for _ in range(200):
        scale = scale.update(jnp.array(True))
    assert scale.value == 2.0**24
    for start, after in [(2.0**126, 2.0**121), (2.0**24, 2.0**19), (2.0**3, 1.0)]:
        scale = lora.LossScale.create(start, interval=1).update(jnp.array(True))
        assert scale.value == (start if start >= 2.0**24 else 2 * start)
        scale = lora.LossScale.create(start, interval=1)
        for _ in range(5):
            scale = scale.update(jnp.array(False))
        assert scale.value == after
    for value in (0.0, -1.0, float("inf"), float("nan"), True, "1"):
        with pytest.raises(lora.LoraError, match=r"LossScale\.create\(value=.*a number above 0"):
            lora.LossScale.create(value)
    for interval in (0, 1.5, True):
        with pytest.raises(lora.LoraError, match=r"LossScale\.create\(interval=.*a whole number"):
            lora.LossScale.create(interval=interval)


def test_each_step_and_each_microbatch_has_a_random_key_of_its_own():
    def loss(trainable, params, x, key):
        return (trainable["w"] * x).sum(), {"draw": jax.random.uniform(key), "bits": x.sum()}

    optimizer = optax.sgd(1.0)
    draws = []
    for microbatches in (1, 2):
        state = lora.TrainState.create({"w": jnp.ones(())}, optimizer, key=jax.random.key(5))
        step = lora.jit_step(loss, optimizer, microbatches=microbatches)
        for _ in range(2):
            state, metrics = step(state, {}, jnp.ones(4))
            draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 4
    again = lora.TrainState.create({"w": jnp.ones(())}, optimizer, key=jax.random.key(5))
    assert lora.jit_step(loss, optimizer)(again, {}, jnp.ones(4))[1]["draw"] == draws[0]


@pytest.mark.parametrize(
    ("loss", "kwargs", "says"),
    [
        (lambda t, p, x: x, {}, r"returns a scalar.* found \(4,\)"),
        (lambda t, p, x: (x.sum(), x), {}, "returns a scalar"),
        (lambda t, p, x: (x.sum(), {}, x.sum(), {}), {}, "returns a scalar"),
        (lambda t, p, x: (x.sum(), {"loss": x.sum()}), {}, "reports a metric 'loss', which is the step's own"),
        (lambda t, p, x: x.sum(), {"microbatches": 3}, r"a batch of shape \[4\] cannot be cut into 3 microbatches"),
        (lambda t, p, x: x.sum(), {"microbatches": 0}, "microbatches is 0, expected a whole number"),
    ],
)
def test_a_loss_or_batch_that_does_not_fit(loss, kwargs, says):
    optimizer = optax.sgd(1.0)
    state = lora.TrainState.create({"w": jnp.ones(())}, optimizer)
    with pytest.raises(lora.LoraError, match=says):
        lora.train_step(loss, optimizer, state, {}, jnp.ones(4), **kwargs)


def test_a_shard_map_over_axes_that_are_not_there():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    for spec, says in [(jax.P("model"), "'model', an axis that the mesh lacks"), (jax.P(), "split over no axis")]:
        with pytest.raises(lora.LoraError, match=says):
            lora.shard_map_step(lambda t, p, x: x.sum(), optax.sgd(1.0), mesh, spec)
