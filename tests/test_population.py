"""Populations: N members in one step go where each would go alone, over one copy of the base."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, assert_trees_equal, compilations

import lora_jax as lora

D, K, T = 6, 5, 8
RATES = {"learning_rate": [1e-2, 3e-2, 1e-1, 2e-2], "weight_decay": [0.0, 0.1, 0.2, 0.0]}
RULES = [lora.Lora(2, alpha=4), lora.RsLora(3, alpha=2), lora.Lora(1), lora.Lora(4)]


def model(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


PARAMS = {
    "up": jax.random.normal(jax.random.key(0), (D, K)),
    "down": jax.random.normal(jax.random.key(1), (K, 4)),
}
X, Y = jax.random.normal(jax.random.key(2), (T, D)), jax.random.normal(jax.random.key(3), (T, 4))
APPLY = lora.lora_apply(model)


def member(rule, seed=0):
    plan = lora.plan(model, PARAMS, X, rules={".*": rule})
    return {"adapters": lora.init(jax.random.key(seed), PARAMS, plan), "head": jnp.eye(4)}


def outputs(trained, params, x):
    return APPLY(params, trained["adapters"], x) @ trained["head"]


def loss(trained, params, x, y):
    return jnp.mean((outputs(trained, params, x) - y) ** 2)


def with_key(trained, params, x, y, *, key, smooth):
    """A loss that takes a key and a hyperparameter."""
    noise = smooth * jax.random.normal(key, x.shape)
    return loss(trained, params, x + noise, y)


MEMBERS = [member(rule, i) for i, rule in enumerate(RULES)]
STEP = lora.population_step(loss, optax.adamw)


def population():
    return lora.Population.create(MEMBERS, optax.adamw, RATES, rank=4)


def alone(i, steps, loss=loss, key=None, batch=(X, Y)):
    optimizer = optax.adamw(RATES["learning_rate"][i], weight_decay=RATES["weight_decay"][i])
    state, step = lora.TrainState.create(MEMBERS[i], optimizer, key=key), lora.jit_step(loss, optimizer)
    for _ in range(steps):
        state, metrics = step(state, PARAMS, *batch)
    return state, metrics


def run(population, steps, step=STEP, batch=(X, Y)):
    for _ in range(steps):
        population, metrics = step(population, PARAMS, *batch)
    return population, metrics


def test_each_member_goes_where_it_goes_alone():
    found, metrics = run(population(), 4)
    for i in range(4):
        state, expected = alone(i, 4)
        assert_trees_close(found.member(i), state.trainable, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(metrics["loss"][i], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"][i], expected["grad_norm"], rtol=1e-4)
    assert found.member(2)["adapters"]["up"].a.shape == (D, 1)
    padded = found.trainable["adapters"]["up"]
    assert padded.a.shape == (4, D, 4)
    assert not np.any(padded.a[2, :, 1:])
    assert not np.any(padded.b[2, 1:])


@pytest.mark.slow
def test_keys_hyperparameters_of_the_loss_and_data_of_each():
    keys, xs = jax.random.split(jax.random.key(7), 4), jnp.stack([X, 2 * X, 3 * X, 4 * X])
    smooth = [0.0, 0.1, 0.2, 0.3]

    # No Adam here: that divides by |g|, so an entry whose parts cancel shows their rounding: 7e-5 after 3 steps.
    def clipped(learning_rate, weight_decay):
        steps = optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate)
        return optax.chain(optax.clip_by_global_norm(1.0), *steps)

    start = lora.Population.create(MEMBERS, clipped, RATES | {"smooth": smooth}, key=keys)
    step = lora.population_step(with_key, clipped, microbatches=2)
    found, _ = run(start, 3, step, (lora.PerMember(xs), Y))
    for i in range(4):
        optimizer = clipped(RATES["learning_rate"][i], RATES["weight_decay"][i])
        own = lambda *args, key, i=i: with_key(*args, key=key, smooth=smooth[i])  # noqa: E731
        state, single = lora.TrainState.create(MEMBERS[i], optimizer, key=keys[i]), lora.jit_step(
            own, optimizer, microbatches=2
        )  # fmt: skip
        for _ in range(3):
            state, _ = single(state, PARAMS, xs[i], Y)
        assert_trees_close(found.member(i), state.trainable, rtol=1e-5, atol=1e-5)


def test_stopped_replaced_and_reordered_without_another_compilation():
    """Everything that chooses members is data, also the rank and the hyperparameters of a new one."""

    def life(population):
        population, metrics = STEP(population, PARAMS, X, Y)
        population = population.stop(metrics["loss"] > 1e6).keep_best(metrics["loss"], 2)
        population, _ = STEP(population, PARAMS, X, Y)
        population = population.take([1, 1, 0, 3])
        numbers = {"learning_rate": 0.01, "weight_decay": 0.01}
        population = population.replace(2, member(lora.Lora(3), 9), optax.adamw, numbers)
        return population, STEP(population, PARAMS, X, Y)[0]

    life(population())
    before = jax.tree.map(jnp.copy, member(lora.Lora(1), 9))
    again = lambda: population().replace(2, before, optax.adamw, {"learning_rate": 0.5, "weight_decay": 0.0})  # noqa: E731
    other = again().stop(jnp.array([True, False, False, False]))
    with compilations() as seen:
        STEP(other, PARAMS, X, Y)
    assert not seen


def test_members_that_are_stopped_stay_as_they_are():
    first, metrics = run(population(), 1)
    kept = first.keep_best(jnp.array([3.0, 1.0, jnp.nan, 2.0]), 2)
    assert kept.active.tolist() == [False, True, False, True]
    assert first.keep_best(jnp.array([3.0, 1.0, jnp.nan, 2.0]), 2, largest=True).active.tolist() == [
        True, False, False, True,
    ]  # fmt: skip
    assert kept.keep_best(jnp.zeros(4), 1).active.tolist() == [False, True, False, False]
    before = jax.tree.map(jnp.copy, first)
    found, _ = run(kept, 2)
    assert found.steps.tolist() == [1, 3, 1, 3]
    assert_trees_equal(found.member(0), before.member(0))
    assert_trees_close(found.member(1), alone(1, 3)[0].trainable, rtol=1e-5, atol=1e-5)
    assert int(found.step) == 3
    assert "no" in found.table(metrics)


def test_a_member_in_the_place_of_another_begins_anew():
    found, _ = run(population(), 2)
    numbers = {name: RATES[name][0] for name in RATES}
    found = found.take([3, 2, 1, 0]).replace(1, MEMBERS[0], optax.adamw, numbers)
    assert found.steps.tolist() == [2, 0, 2, 2]
    found, _ = run(found, 2)
    assert_trees_close(found.member(1), alone(0, 2)[0].trainable, rtol=1e-5, atol=1e-5)
    assert_trees_close(found.member(0), alone(3, 4)[0].trainable, rtol=1e-5, atol=1e-5)
    fewer, _ = run(found.take([1, 0]), 1)
    assert len(fewer) == 2
    assert_trees_close(fewer.member(0), alone(0, 3)[0].trainable, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("on_mesh", [False, True])
def test_batches_of_parts(on_mesh):
    """Trees of arrays, some of them for each member, and what is no batch."""

    def weighted(trained, params, batch, weights):
        return jnp.mean((outputs(trained, params, batch["x"]) * batch["scale"] - batch["y"]) ** 2 * weights[None])

    scales, weights = jnp.array([1.0, 2.0, 0.5, 1.5]), lora.Unbatched(jnp.arange(4.0))
    batch = {"x": X, "y": lora.PerMember(jnp.stack([Y] * 4)), "scale": lora.PerMember(scales)}
    where = {}
    if on_mesh:
        mesh = jax.make_mesh((2, 4), ("members", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        where = {"mesh": mesh, "members": "members", "data": "data"}
    step = lora.population_step(weighted, optax.adamw, **where)
    found, _ = step(population(), PARAMS, batch, weights)
    for i in range(4):
        optimizer = optax.adamw(RATES["learning_rate"][i], weight_decay=RATES["weight_decay"][i])
        state = lora.TrainState.create(MEMBERS[i], optimizer)
        own = {"x": X, "y": Y, "scale": scales[i]}
        state, _ = lora.jit_step(weighted, optimizer)(state, PARAMS, own, weights)
        assert_trees_close(found.member(i), state.trainable, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_one_member_s_own():
    xs = jnp.stack([X, X * jnp.nan, X, X])
    found, metrics = run(population(), 1, batch=(lora.PerMember(xs), Y))
    assert metrics["skipped"].tolist() == [0, 1, 0, 0]
    assert_trees_equal(found.member(1), jax.tree.map(jnp.asarray, MEMBERS[1]))
    assert np.isfinite(found.trainable["head"]).all()


def test_checkpoints_save_and_restore_it(tmp_path):
    plan = lora.plan(model, PARAMS, X, rules={".*": RULES[3]})
    half, _ = run(population(), 2)
    with lora.Checkpoints(tmp_path / "run", PARAMS, plan, every=1) as checkpoints:
        checkpoints.save(half.stop(jnp.array([False, False, False, True])), {"loss": jnp.ones(4)})
    expected, _ = run(half.stop(jnp.array([False, False, False, True])), 1)
    with lora.Checkpoints(tmp_path / "run", PARAMS, plan, every=1) as checkpoints:
        found, _ = checkpoints.restore(population())
    assert_trees_equal(run(found, 1)[0], expected)
    adapters, others = lora.checkpoint.load(tmp_path / "run")
    assert lora.unstack(adapters)[2]["up"].a.shape == (D, 1)
    assert others["head"].shape == (4, 4, 4)


@pytest.mark.slow
def test_over_a_mesh_of_members_and_data():
    mesh = jax.make_mesh((4, 2), ("members", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    step = lora.population_step(loss, optax.adamw, mesh=mesh, members="members", data="data")
    here, metrics = run(population(), 3)
    there, found = run(population().placed(mesh, "members"), 3, step, (X, Y))
    assert_trees_close(there, here, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
    assert there.trainable["head"].sharding.spec == jax.P("members")
    text = step.lower(there, PARAMS, X, Y).compile().as_text()
    groups = re.findall(r"all-reduce(?:-start)?\(.*replica_groups=(\S+),", text)
    assert groups
    assert all("4,2" in group or group.startswith("{{0,1}") for group in groups)  # the data of one member, and no other
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)


# What is refused ------------------------------------------------------------------------------------------------------


def create(members=MEMBERS, optimizer=optax.adamw, numbers=RATES, **rest):
    return lora.Population.create(members, optimizer, numbers, **rest)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: create([]), "there are no members"),
        (lambda: create(MEMBERS[0]), "`members` is a dict .*expected a list of what each member trains"),
        (lambda: create([MEMBERS[0], {"adapters": MEMBERS[0]["adapters"]}]), "member 1 is another tree .*'head'"),
        (lambda: create(optimizer=[optax.adam(1e-3)] * 4), "`optimizer` is a list of 4, expected one for all members"),
        (
            lambda: create(numbers={"learning_rate": [0.1]}),
            r"hyperparameters\['learning_rate'\] is \[0.1\], expected 4",
        ),
        (lambda: create(numbers={"learning_rate": [0.1, 0.2, float("nan"), 1]}), "expected 4 finite numbers"),
        (lambda: create(optimizer=lambda learning_rate: 3), "`optimizer` is 3, expected an optax transformation"),
        (lambda: create(key=3), r"a random key, such as jax.random.key\(3\)"),
        (lambda: create(rank=2), r"has rank 4 in member 3: give rank=4"),
        (lambda: population().take([4]), "4 is no member, expected 0 to 3"),
        (lambda: population().stop([0, 1]), r"expected bool\[4\]"),
        (lambda: population().keep_best([0.0], 1), r"expected float32\[4\] and a whole number"),
        (
            lambda: create(MEMBERS[:1], numbers={}, optimizer=optax.adam(1e-3)).replace(
                0, member(lora.Lora(4)), optax.adam(1e-3)
            ),
            r"'adapters/.*' has rank 4, and the population is padded to 2: make it with .*rank=4",
        ),
        (lambda: population().replace(0, MEMBERS[0], optax.adamw, {}), r"found the hyperparameters \[\], expected"),
        (
            lambda: population().replace(0, MEMBERS[0], optax.sgd, dict.fromkeys(RATES, 0.1)),
            "another tree than the oth",
        ),
        (lambda: STEP(lora.TrainState.create(MEMBERS[0], optax.adam(1e-3)), PARAMS, X, Y), "`population` is a TrainS"),
        (lambda: STEP(population(), PARAMS, lora.PerMember(X), Y), r"PerMember\(...\) is \[8, 6\], expected a leading"),
        (lambda: lora.population_step(loss, optax.adam, members="members"), "axes of a `mesh`, which is missing"),
        (lambda: lora.population_step(3, optax.adam), "`loss` is 3, expected a function"),
    ],
)
def test_what_is_refused(call, says):
    with pytest.raises(lora.LoraError, match=says):
        call()


def test_a_population_that_a_step_has_taken():
    start = population()
    STEP(start, PARAMS, X, Y)
    with pytest.raises(lora.LoraError, match="has been deleted: a step took its memory"):
        STEP(start, PARAMS, X, Y)
    assert dataclasses.is_dataclass(start)
