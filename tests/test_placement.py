"""Law 5, of training: placement changes speed only."""

import functools

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal, compilations, trained_leaves
from jax import NamedSharding, P
from placements import PLACEMENTS, apply, batch, loss, optimizer, params, plan

import lora_jax as lora

STEPS = 4


def start(p=None, **rest):
    p = params() if p is None else p
    return lora.TrainState.create(lora.init(jax.random.key(1), p, plan()), optimizer(), **rest)


def train(step, state, p, place=lambda rows: rows):
    losses, accuracies = [], []
    for i in range(STEPS):
        state, metrics = step(state, p, *place(batch(i)))
        losses.append(np.ravel(metrics["loss"])[0])
        accuracies.append(np.ravel(metrics["accuracy"])[0])
    return np.array(losses), np.array(accuracies), state.trainable


@functools.cache
def on_one_device(microbatches=1):
    return train(lora.jit_step(loss, optimizer(), microbatches=microbatches), start(), params())


def assert_same(found, expected=None, rounding=1e-6):
    """Losses within 1e-6, and each factor within 1e-6 of its norm."""
    losses, accuracies, adapters = found
    expected_losses, expected_accuracies, expected_adapters = expected or on_one_device()
    np.testing.assert_allclose(losses, expected_losses, rtol=rounding)
    np.testing.assert_allclose(accuracies, expected_accuracies, rtol=rounding)
    for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(expected_adapters), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= rounding * np.linalg.norm(b)


def test_training_moves_everything():
    """So that the comparisons compare something."""
    losses, _, adapters = on_one_device()
    assert len(set(losses.tolist())) == STEPS
    before = lora.init(jax.random.key(1), params(), plan())
    for a, b in zip(trained_leaves(adapters), trained_leaves(before), strict=True):
        assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)


def test_microbatches():
    assert_same(on_one_device(microbatches=4))


def over_mesh(placement):
    """Trained by `jit_step`; and whether the second step compiled nothing and left the state where it was."""
    mesh = placement.mesh()
    p = placement.params(mesh)
    state = start(p)
    assert_trees_equal(state.trainable, start().trainable)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = lora.jit_step(loss, optimizer(), microbatches=2)
    place = functools.partial(lora.shard_batch, sharding=NamedSharding(mesh, placement.batch))
    found = train(step, start(p), p, place)
    with compilations() as seen:
        state, _ = jax.block_until_ready(step(state, p, *place(batch(1))))
    return found, not seen and jax.tree.map(lambda leaf: leaf.sharding, state) == places


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
@pytest.mark.sampled(5)
def test_jit_over_a_mesh(placement):
    found, stays = over_mesh(placement)
    assert_same(found)
    assert stays


@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if p.batch == P("data")], ids=lambda p: p.name)
@pytest.mark.sampled(5)
def test_shard_map(placement):
    mesh = placement.mesh()
    p = placement.params(mesh)
    step = lora.shard_map_step(loss, optimizer(), mesh, placement.batch, microbatches=2)
    place = functools.partial(lora.shard_batch, sharding=NamedSharding(mesh, placement.batch))
    assert_same(train(step, start(p), p, place))


def per_device(rows):
    return jax.tree.map(lambda array: array.reshape(8, -1, *array.shape[1:]), rows)


@pytest.mark.slow
def test_pmap_with_replicated_and_with_one_state():
    """The sums are over the same rows in the same order, and so equal bit for bit."""
    replicate, unreplicate = flax.jax_utils.replicate, flax.jax_utils.unreplicate
    step = lora.pmap_step(loss, optimizer(), microbatches=2)
    losses, accuracies, adapters = train(step, replicate(start()), replicate(params()), per_device)
    assert_same((losses, accuracies, unreplicate(adapters)))
    step = lora.pmap_step(loss, optimizer(), microbatches=2, replicated=False)
    assert_trees_equal(train(step, start(), params(), per_device), (losses, accuracies, unreplicate(adapters)))


def unequal(adapters, params, ids, labels):
    """A mean over the tokens that count, of which some rows have more than others."""
    counts = (labels < 8) | (ids < 4)
    logits = apply(params, adapters, ids)
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    value = (each * counts).sum() / counts.sum()
    return value, {"accuracy": ((logits.argmax(-1) == labels) * counts).sum() / counts.sum()}, counts.sum()


@pytest.mark.parametrize("how", ["microbatches", "mesh", "pmap"])
def test_a_weight_makes_a_mean_over_what_counts_exact(how):
    """Parts of a batch with different numbers of tokens: the mean of their means would be another one."""
    p, place, state = params(), lambda rows: rows, start()
    if how == "microbatches":
        step = lora.jit_step(unequal, optimizer(), microbatches=4)
    elif how == "mesh":
        mesh = PLACEMENTS[3].mesh()
        p = PLACEMENTS[3].params(mesh)
        place, state = functools.partial(lora.shard_batch, sharding=NamedSharding(mesh, P("data"))), start(p)
        step = lora.jit_step(unequal, optimizer(), microbatches=2)
    else:
        step, place = lora.pmap_step(unequal, optimizer(), replicated=False), per_device
    assert_same(train(step, state, p, place), unequal_on_one_device(), rounding=1e-4)  # Adam enlarges rounding


def test_without_the_weight_it_would_not_be():
    step = lora.jit_step(lambda *args: unequal(*args)[:2], optimizer(), microbatches=4)
    assert np.abs(train(step, start(), params())[0] - unequal_on_one_device()[0]).max() > 1e-3


@functools.cache
def unequal_on_one_device():
    return train(lora.jit_step(unequal, optimizer()), start(), params())


def test_explicit_axes():
    """A model that says how its results are sharded, on a mesh whose axes ask for it."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (jax.sharding.AxisType.Explicit,) * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    p = {"up": jax.random.normal(keys[0], (16, 4, 8)) / 4, "down": jax.random.normal(keys[1], (4, 8, 16)) / 6}
    x = np.asarray(jax.random.normal(keys[2], (8, 4, 16)))

    def mlp(place):
        def model(p, x):
            h = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, p["up"]))
            return jnp.einsum("bthk,hkd->btd", h, p["down"], out_sharding=place)

        return model

    def run(fn, p, x):
        made = lora.plan(fn, p, x, rules={".*": lora.Lora(2)})
        apply = lora.lora_apply(fn)
        state = lora.TrainState.create(lora.init(jax.random.key(1), p, made), optimizer())
        step = lora.jit_step(lambda a, p, x: (apply(p, a, x) ** 2).mean(), optimizer())
        for _ in range(2):
            state, metrics = step(state, p, x)
        return metrics["loss"], state.trainable

    expected = run(mlp(None), p, x)
    with jax.set_mesh(mesh):
        specs = {"up": P(None, "tensor"), "down": P("tensor")}
        placed = jax.device_put(p, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        found = run(mlp(P("data")), placed, lora.shard_batch(x, NamedSharding(mesh, P("data"))))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-7)
