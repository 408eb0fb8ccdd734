"""Arguments of a step that are no batch: marked, they are whole in each part; not marked, they are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, trained
from jax import NamedSharding, P

import lora_jax as lora
from lora_jax.sharding.batches import combined_sharding

PARAMS = {"w": jax.random.normal(jax.random.key(0), (6, 10))}
ROWS = jax.random.normal(jax.random.key(1), (16, 6))
LABELS = jnp.arange(16) % 10
WEIGHTS = jnp.arange(1.0, 11.0)  # of the classes
OPTIMIZER = optax.sgd(0.1)


def model(params, x):
    return x @ params["w"]


APPLY = lora.lora_apply(model)


def loss(adapters, params, x, labels, weights):
    """Class weights that are cut would be taken out of bounds, and clipped, in silence."""
    losses = optax.softmax_cross_entropy_with_integer_labels(APPLY(params, adapters, x), labels)
    return jnp.mean(weights["of classes"][labels] * losses), {"sum": weights["of classes"].sum()}


def start():
    plan = lora.plan(model, PARAMS, ROWS, rules={"w": lora.Lora(rank=2)})
    return lora.TrainState.create(trained(lora.init(jax.random.key(2), PARAMS, plan), 3), OPTIMIZER)


def mesh():
    return jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))


def batch(weights=WEIGHTS):
    return ROWS, LABELS, {"of classes": weights}


def marked():
    return batch(lora.Unbatched(WEIGHTS))


def expected():
    return lora.train_step(loss, OPTIMIZER, start(), PARAMS, *batch())


def on_mesh(tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh(), P(*spec)))


def by_mesh(microbatches):
    rows, labels, weights = marked()
    step = lora.jit_step(loss, OPTIMIZER, microbatches=microbatches)
    split = NamedSharding(mesh(), P("data"))
    rows, labels = lora.shard_batch(jax.device_get((rows, labels)), split)
    return step(on_mesh(start()), on_mesh(PARAMS), rows, labels, on_mesh(weights))


def by_shard_map(microbatches):
    step = lora.shard_map_step(loss, OPTIMIZER, mesh(), P("data"), microbatches=microbatches)
    return step(on_mesh(start()), on_mesh(PARAMS), *marked())


def by_pmap(microbatches):
    step = lora.pmap_step(loss, OPTIMIZER, microbatches=microbatches, replicated=False)
    rows, labels, weights = marked()
    return step(start(), PARAMS, rows.reshape(8, 2, 6), labels.reshape(8, 2), weights)


WAYS = {
    "eager": lambda n: lora.train_step(loss, OPTIMIZER, start(), PARAMS, *marked(), microbatches=n),
    "jit": lambda n: lora.jit_step(loss, OPTIMIZER, microbatches=n)(start(), PARAMS, *marked()),
    "mesh": by_mesh,
    "shard_map": by_shard_map,
    "pmap": by_pmap,
}


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_marked_is_whole_everywhere(way, microbatches):
    (state, metrics), (there, numbers) = WAYS[way](microbatches), expected()
    assert_trees_close(jax.device_get(state.trainable), jax.device_get(there.trainable), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], numbers["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["sum"], WEIGHTS.sum(), rtol=1e-6)


def test_a_whole_argument_may_be_marked():
    """A tree of arrays of any sizes, scalars and keys among them."""

    def seen(trainable, params, x, others):
        return trainable["t"] * x.sum(), {
            "sizes": jnp.stack([jnp.float32(jnp.size(a)) for a in jax.tree.leaves(others)])
        }

    others = {"a": jnp.ones((3, 2)), "b": 2.0, "c": jnp.ones(4), "key": jax.random.key(0)}
    (_, metrics), grads = lora.value_and_grad(seen, microbatches=4)(
        {"t": jnp.ones(())}, {}, jnp.ones(8), lora.Unbatched(others)
    )
    assert metrics["sizes"].tolist() == [6, 1, 4, 1]
    assert grads["t"] == 2  # of a mean over four parts with a sum of two


@pytest.mark.parametrize("call", ["value_and_grad", "jit", "shard_map", "shard_map in parts"])
def test_arrays_with_different_numbers_of_rows_are_refused_by_name(call):
    run = {
        "value_and_grad": lambda: lora.value_and_grad(loss, microbatches=2)(start().trainable, PARAMS, *batch()),
        "jit": lambda: lora.jit_step(loss, OPTIMIZER, microbatches=2)(start(), PARAMS, *batch()),
        "shard_map": lambda: lora.shard_map_step(loss, OPTIMIZER, mesh(), P("data"))(start(), PARAMS, *batch()),
        "shard_map in parts": lambda: lora.shard_map_step(loss, OPTIMIZER, mesh(), P("data"), microbatches=2)(
            start(), PARAMS, *batch(jnp.ones(24))
        ),
    }[call]
    says = r"batch\[0\] of shape \[16, 6\], batch\[2\]\['of classes'\] of shape \[(10|24)\].*lora.Unbatched\("
    who = "the mesh, over 'data'," if "shard_map" in call else "microbatches=2"
    with pytest.raises(lora.LoraError, match=f"{who} cuts the arrays of a batch.*{says}"):
        run()


def test_one_part_cuts_nothing():
    """Nothing is refused, and nothing has to be marked."""
    state, _ = lora.jit_step(loss, OPTIMIZER)(start(), PARAMS, *batch())
    assert_trees_close(state.trainable, expected()[0].trainable, rtol=1e-5, atol=1e-6)


def test_a_batch_on_a_mesh_with_what_is_no_batch():
    """It is on every device, and says nothing of how the batch is split."""
    place = NamedSharding(mesh(), P("data"))
    rows, weights = lora.shard_batch(
        (np.ones((16, 3)), lora.Unbatched({"w": np.arange(10.0), "n": np.float32(3)})), place
    )
    assert rows.sharding.spec == P("data")
    assert weights.value["w"].sharding.is_fully_replicated
    np.testing.assert_array_equal(weights.value["w"], np.arange(10.0))
    assert weights.value["n"] == 3
    assert combined_sharding((lora.Unbatched(on_mesh(jnp.ones((8, 8)), None, "data")), rows)) == place
    assert combined_sharding(lora.Unbatched(rows)) is None
