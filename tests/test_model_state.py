"""What a model carries from step to step: batch statistics, counts and keys, in each kind of step and on disk."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from helpers import assert_trees_equal, compilations, eight_devices

import lora_jax as lora

SGD = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)  # rows of a batch


def new_state():
    return {
        "mean": jnp.arange(3.0),
        "half": jnp.ones((), jnp.bfloat16),
        "count": jnp.zeros((), jnp.uint32),
        "seen": jnp.zeros((), jnp.bool_),
        "key": jax.random.key(3),
    }


def loss(trainable, params, x, *, model_state):
    """The mean follows that of the rows, half of the way each time."""
    after = {
        "mean": (model_state["mean"] + x.mean(0)) / 2,
        "half": model_state["half"] / 2,
        "count": model_state["count"] + 1,
        "seen": model_state["seen"] | True,
        "key": jax.random.split(model_state["key"])[0],
    }
    return (jnp.mean(trainable["gain"] * x.sum(1) ** 2), {"before": model_state["mean"].sum()}), after


def expected(devices, microbatches, steps=1):
    """The state by plain loops: over steps, over the rows of each device, over its microbatches in turn."""
    mean, n = np.arange(3.0), steps * microbatches
    for _ in range(steps):
        means = []
        for rows in np.split(X, devices):
            own = mean
            for i in range(microbatches):
                own = (own + rows[i::microbatches].mean(0)) / 2
            means.append(own)
        mean = np.mean(means, axis=0)
    key = jax.random.key(3)
    for _ in range(n):
        key = jax.random.split(key)[0]
    return {"mean": mean, "half": 0.5**n, "count": n, "seen": n > 0, "key": jax.random.key_data(key)}


def assert_state(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(new_state())
    assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(new_state())]
    for name, value in wanted.items():
        array = jax.random.key_data(found[name]) if name == "key" else found[name].astype(jnp.float32)
        np.testing.assert_allclose(array, value, rtol=1e-5, atol=1e-6, err_msg=name)


def create(trainable=None, optimizer=SGD, **kwargs):
    return lora.TrainState.create(trainable or {"gain": jnp.ones(())}, optimizer, **kwargs)


def taken(how, microbatches, steps=2):
    """The state of the model after some steps."""
    mesh, state, x = eight_devices(), create(model_state=new_state()), X
    if how == "eager":

        def step(*args):
            return lora.train_step(loss, SGD, *args, microbatches=microbatches)

    elif how == "shard_map":
        step = lora.shard_map_step(loss, SGD, mesh, jax.P("data"), microbatches=microbatches)
        state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    elif how == "pmap":
        step = lora.pmap_step(loss, SGD, microbatches=microbatches, replicated=False)
        x = X.reshape(8, 4, 3)
    else:
        step = lora.jit_step(loss, SGD, microbatches=microbatches)
    if how == "mesh":
        state = create({"gain": whole(mesh, jnp.ones(()))}, model_state=new_state())
        x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("data")))
    for _ in range(steps):
        state, metrics = step(state, {}, x)
    assert metrics["skipped"] == 0
    return state.model_state


@pytest.mark.parametrize(
    ("how", "microbatches"),
    [
        pytest.param(how, n, marks=[] if (how, n) in (("jit", 2), ("shard_map", 2)) else pytest.mark.slow)
        for how in ("eager", "jit", "mesh", "shard_map", "pmap")
        for n in (1, 2)
    ],
)
def test_each_kind_of_step_carries_it(how, microbatches):
    """From one microbatch to the next; over devices, floats are averaged, and the rest is the same on all."""
    devices = 8 if how in ("shard_map", "pmap") else 1
    assert_state(taken(how, microbatches), expected(devices, microbatches, steps=2))


def test_what_differs_between_devices():
    """Floats are averaged, each device counting the same; counts and keys are those of the first."""

    def uneven(trainable, params, x, *, model_state):
        rank = x[0, 0].astype(jnp.uint32)
        after = {"mean": model_state["mean"] + x[0, 0], "n": rank, "key": jax.random.key(rank), "on": rank > 2}
        return (jnp.mean(trainable["gain"] * x), {}, x[0, 0] + 1), after

    mesh = eight_devices()
    start = {"mean": jnp.zeros(()), "n": jnp.uint32(0), "key": jax.random.key(0), "on": jnp.array(False)}
    state = jax.device_put(create(model_state=start), jax.NamedSharding(mesh, jax.P()))
    state, _ = lora.shard_map_step(uneven, SGD, mesh, jax.P("data"))(state, {}, jnp.arange(5.0, 13)[:, None])
    found = state.model_state
    assert (float(found["mean"]), int(found["n"]), bool(found["on"])) == (8.5, 5, True)
    assert jnp.all(jax.random.key_data(found["key"]) == jax.random.key_data(jax.random.key(5)))


def test_the_second_step_compiles_nothing_and_the_memory_is_reused():
    step = lora.jit_step(loss, SGD, microbatches=2)
    first = create(model_state=new_state() | {"count": np.uint32(0), "seen": False})
    second, _ = jax.block_until_ready(step(first, {}, X))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.model_state))
    with compilations() as seen:
        jax.block_until_ready(step(second, {}, X))
    assert not seen


def test_a_step_that_is_skipped_leaves_it_alone():
    state = create(model_state=new_state())
    after, metrics = lora.jit_step(loss, SGD)(state, {}, jnp.full((4, 3), jnp.nan))
    assert metrics["skipped"] == 1
    assert_state(after.model_state, expected(1, 1, steps=0))


def test_the_gradient_by_itself():
    """Of the loss with the state as it was given: nothing is differentiated with respect to it."""
    state, tree = new_state(), {"gain": jnp.ones(())}
    ((value, metrics), grads), after = lora.value_and_grad(loss, microbatches=2)(tree, {}, X, model_state=state)
    np.testing.assert_allclose(value, np.mean(X.sum(1) ** 2), rtol=1e-5)
    np.testing.assert_allclose(grads["gain"], value, rtol=1e-6)
    second = (np.arange(3.0) + X[0::2].mean(0)) / 2  # the state that the second part got
    np.testing.assert_allclose(metrics["before"], (3 + second.sum()) / 2, rtol=1e-5)
    assert_state(after, expected(1, 2))
    found = lora.value_and_grad(lambda t, p, x, model_state: (t["gain"] * x.sum(), {}))(tree, {}, X, model_state={})
    assert found[1] == {}, "a state without arrays is one"


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


def flax_model(library):
    if library == "nnx":
        return lora.from_nnx(Nnx(nnx.Rngs(0)))
    variables = Linen().init(jax.random.key(0), X)
    return lora.from_linen(Linen(), freeze(variables) if library == "frozen dicts" else variables)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("linen", "frozen dicts")]


@pytest.mark.parametrize("library", ["nnx", *SLOW])
def test_batch_statistics_over_microbatches_are_those_of_the_parts_in_turn(library):
    """As in the Flax examples; the counts of dropout go on with each part."""
    fn, params, start = flax_model(library)
    plan = lora.plan(fn, params, start, X, rules={".*kernel": lora.Lora(rank=1)})
    adapters, apply = lora.init(jax.random.key(0), params, plan), lora.lora_apply(fn)

    def of_flax(adapters, params, x, *, model_state):
        y, model_state = apply(params, adapters, model_state, x)
        return jnp.mean((y - 1) ** 2), model_state

    wanted = start
    for rows in (X[0::2], X[1::2]):
        _, wanted = fn(params, wanted, rows)  # a fresh adapter changes nothing
    state = lora.TrainState.create(adapters, SGD, model_state=start)
    state, _ = lora.jit_step(of_flax, SGD, microbatches=2)(state, params, X)
    assert jax.tree.structure(state.model_state) == jax.tree.structure(start)
    found, wanted = (
        [jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in jax.tree.leaves(tree)]
        for tree in (state.model_state, wanted)
    )
    assert len(found) == (4 if library == "nnx" else 2)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# What is refused -----------------------------------------------------------------------------------------------------

FORM = r"`return loss, model_state`, or `return \(loss, \{name: array\}\), model_state`"
MEAN = {"mean": jnp.ones(3)}
WRONG = {
    "no state": (lambda t, p, x, model_state: t["gain"] * 1, f"{FORM}.*; found float32"),
    "three": (lambda t, p, x, model_state: (t["gain"] * 1, {}, model_state), f"{FORM}.*; found a tuple of 3"),
    "metrics alone": (
        lambda t, p, x, model_state: (t["gain"] * 1, {"a": x.sum()}),
        rf"(?s)model_state\['mean'\]: float32\[3\] in the state, nothing returned\n.*\['a'\]: nothing in the.*{FORM}",
    ),
    "dtype": (
        lambda t, p, x, model_state: (t["gain"] * 1, {"mean": model_state["mean"].astype(jnp.bfloat16)}),
        r"model_state\['mean'\]: float32\[3\] in the state, bfloat16\[3\] returned",
    ),
    "shape": (
        lambda t, p, x, model_state: (t["gain"] * 1, {"mean": jnp.ones(4)}),
        r"float32\[3\] in the state, float32\[4\] returned",
    ),
    "no array": (
        lambda t, p, x, model_state: (t["gain"] * 1, {"mean": "x"}),
        r"float32\[3\] in the state, str\('x'\) returned",
    ),
    "the loss": (lambda t, p, x, model_state: (x, model_state), r"the loss returns a scalar.* found \(\d,\)"),
    "no keyword": (lambda t, p, x: (t["gain"] * 1, MEAN), "has a `model_state`, and the loss does not take it.*leave"),
}


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", WRONG)
def test_a_loss_that_does_not_fit(case, microbatches):
    wrong, says = WRONG[case]
    with pytest.raises(lora.LoraError, match=says):
        lora.train_step(wrong, SGD, create(model_state=MEAN), {}, jnp.ones(4), microbatches=microbatches)


@pytest.mark.parametrize("name", ["key", "model_state"])
def test_a_loss_that_takes_what_is_not_there(name):
    losses = {
        "key": lambda t, p, x, *, key: t["gain"] * 1,
        "model_state": lambda t, p, x, *, model_state: (t["gain"] * 1, model_state),
    }
    with pytest.raises(lora.LoraError, match=rf"the loss takes a keyword `{name}`.*create\(.*{name}=\.\.\.\)"):
        lora.train_step(losses[name], SGD, create(), {}, X)


def test_a_state_among_batch_and_metrics():
    """It works with one part, and with several the error says what to do."""
    state = new_state()

    def other(trainable, params, x, model_state):
        value, after = loss(trainable, params, x, model_state=model_state)
        return value[0], {"state": after}

    assert lora.train_step(other, SGD, create(), {}, X, state)[1]["state"]["count"] == 1
    with pytest.raises(lora.LoraError, match=rf"the metric 'state' holds a random key.*model_state=state\).*{FORM}"):
        lora.train_step(other, SGD, create(), {}, X, lora.Unbatched(state), microbatches=2)

    def product(trainable, params, x, weights):
        return (trainable["gain"] * x @ weights).sum()

    with pytest.raises(TypeError) as caught:  # as many weights as rows
        lora.train_step(product, SGD, create(), {}, jnp.ones((4, 4)), jnp.ones(4), microbatches=2)
    assert "parts of the batch, of shapes [[2, 4], [2]]. Mark what is no batch" in str(caught.value.__notes__)


# What a state is made of is left as it is -----------------------------------------------------------------------------


def whole(mesh, array):
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P()))


@pytest.mark.parametrize(
    "where", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("one device", "mesh")), "partly on a mesh"]
)
def test_what_a_state_is_made_of_stays(where):
    mesh = eight_devices()
    given = {"gain": jnp.ones(()), "split": jnp.ones((8, 2))}, jax.random.key(0), lora.LossScale.create(), new_state()
    if where != "one device":
        split = jax.device_put(given[0]["split"], jax.NamedSharding(mesh, jax.P("data")))
        given = ({"gain": given[0]["gain"], "split": split}, *given[1:])
    if where == "mesh":
        given = jax.tree.map(lambda a: a if a is split else whole(mesh, a), given)

    def of_all(trainable, params, x, *, key, model_state):
        (value, _), after = loss(trainable, params, x, model_state=model_state)
        return value + (trainable["split"] ** 2).sum() + 0 * jax.random.uniform(key), after

    before = jax.tree.map(lambda a: a.copy(), given)
    state = lora.TrainState.create(given[0], SGD, *given[1:])
    assert state.trainable["split"].sharding == given[0]["split"].sharding
    assert [a.committed for a in jax.tree.leaves(state.trainable)] == [where != "one device"] * 2
    after, _ = lora.jit_step(of_all, SGD)(state, {}, X)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "the state's own memory is reused"
    assert after.trainable["split"].sharding == given[0]["split"].sharding
    for a, b in zip(*map(jax.tree.leaves, (given, before)), strict=True):
        assert jnp.all(a == b)


def test_arrays_that_are_there_twice():
    """One array in two places, and one that the optimizer holds too: each has memory of its own in the state."""
    array = jnp.ones(3)
    holding = optax.GradientTransformation(lambda params: {"start": params}, lambda g, state, params=None: (g, state))
    state = lora.TrainState.create({"a": array, "b": array}, holding, model_state={"a": array})

    def both(t, p, x, model_state):
        return (t["a"] * t["b"] * x).sum(), model_state

    state, _ = lora.jit_step(both, holding)(state, {}, X[0])
    np.testing.assert_array_equal(array, 1)
    np.testing.assert_array_equal(state.opt_state["start"]["b"], 1)


def test_a_state_that_is_made_while_tracing():
    def make(tree):
        return create(tree, model_state=new_state(), optimizer=optax.adam(0.1))

    tree = {"gain": jnp.ones(())}
    shapes = jax.eval_shape(make, tree)
    assert jax.tree.structure(jax.jit(make)(tree)) == jax.tree.structure(make(tree)) == jax.tree.structure(shapes)
    abstract = create({"gain": jax.ShapeDtypeStruct((), jnp.float32)})
    assert abstract.trainable["gain"].shape == ()


# On disk --------------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_it(tmp_path):
    """Bit by bit, keys too, and on another mesh."""
    step, mesh = lora.jit_step(loss, SGD), eight_devices()
    state, _ = step(create(model_state=new_state()), {}, X)
    with lora.Checkpoints(tmp_path, {}, {}, every=1) as checkpoints:
        checkpoints.save(state)
    for place in (lambda a: a, lambda a: whole(mesh, a)):
        given = jax.tree.map(place, create({"gain": jnp.zeros(())}, model_state=new_state()))
        with lora.Checkpoints(tmp_path, {}, {}, every=1) as checkpoints:
            found, _ = checkpoints.restore(given)
        assert [a.sharding for a in jax.tree.leaves(found)] == [a.sharding for a in jax.tree.leaves(given)]
        keys = [jax.random.key_data(it.model_state["key"]) for it in (found, state)]
        np.testing.assert_array_equal(*keys)
        without = [{name: a for name, a in it.model_state.items() if name != "key"} for it in (found, state)]
        assert_trees_equal(*without)


def test_checkpoints_from_before_there_was_one(tmp_path):
    """They go on as they were; into a state with one they go if that is asked for, which then begins anew."""
    with lora.Checkpoints(tmp_path, {}, {}, every=1) as checkpoints:
        checkpoints.save(create({"gain": jnp.full((), 7.0)}), force=True)
    with lora.Checkpoints(tmp_path, {}, {}, every=1) as checkpoints:
        assert checkpoints.restore(create())[0].trainable["gain"] == 7
        state = create(model_state=new_state())
        with pytest.raises(lora.LoraError, match=r"(?s)model_state/count: uint32\[\] now, not saved.*the model state"):
            checkpoints.restore(state)
        found, _ = checkpoints.restore(state, allow_other_rules=True)
        assert found.trainable["gain"] == 7
        assert_state(found.model_state, expected(1, 1, steps=0))
