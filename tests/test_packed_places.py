"""Packed weights over a mesh: the same numbers, no more bytes on a device than its part, and gathered packed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close
from jax import NamedSharding, P
from jax.sharding import AxisType
from placements import PLACEMENTS, batch, loss, optimizer, params, plan

import lora_jax as lora
from benchmarks.collectives import INNER, LAYERS, MICROBATCHES, PLACES, WIDTH, Setup
from lora_jax import bases
from lora_jax.core.deferred import apply_deferred, dtype_after, spec_after, spec_before, undo_deferred

EIGHT = {"layers/router": None, "layers/o": bases.Int8(stack=1, inputs=2), "layers/experts": bases.Int8(stack=2)}
EIGHT |= {"layers/.*": bases.Int8(stack=1, inputs=1)}


def shardings(mesh, specs):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def train(p, place=lambda rows: rows, steps=2):
    state = lora.TrainState.create(lora.init(jax.random.key(1), p, plan()), optimizer())
    step, losses = lora.jit_step(loss, optimizer(), microbatches=2), []
    for i in range(steps):
        state, metrics = step(state, p, *place(batch(i)))
        losses.append(float(metrics["loss"]))
    return losses, state.trainable


@functools.cache
def on_one_device():
    return train(bases.quantize(params(), EIGHT))


SEVERAL_AXES = [pytest.param(p, id=p.name, marks=() if len(p.axes) > 1 else pytest.mark.slow) for p in PLACEMENTS[1:]]


@pytest.mark.parametrize("placement", SEVERAL_AXES)
@pytest.mark.slow
def test_training_over_a_mesh(placement):
    """Law 5 over a packed base, placed after it was packed."""
    mesh = placement.mesh()
    base = bases.place(bases.quantize(params(), EIGHT), shardings(mesh, placement.specs()))
    for name, spec in placement.specs()["layers"].items():
        if name != "router":
            w = base["layers"][name]
            assert w.sharding.is_equivalent_to(NamedSharding(mesh, spec), w.ndim), name
            assert w.q.sharding.is_equivalent_to(NamedSharding(mesh, spec), w.ndim), name
    place = functools.partial(lora.shard_batch, sharding=NamedSharding(mesh, placement.batch))
    losses, adapters = train(base, place)
    np.testing.assert_allclose(losses, on_one_device()[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(on_one_device()[1]), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-6 * np.linalg.norm(b)


@functools.cache
def setup(name):
    made = Setup(PLACES[name])
    places = jax.tree.map(lambda w: w.sharding, made.params)
    made.params = bases.place(bases.quantize(made.params, {".*": bases.Nf4(stack=1)}), places)
    return made


@pytest.mark.parametrize("name", ["fsdp 8", "data 2, fsdp 2, tensor 2"])
@pytest.mark.sampled(5)
def test_fsdp_gathers_packed_bytes(name):
    """Codes and scales of each weight, for each of its two uses, and nothing of a dense one."""
    gathers = [c for c in setup(name).lora(MICROBATCHES) if c.kind == "all-gather"]
    tensor, numbers, uses = PLACES[name].axes.get("tensor", 1), WIDTH * INNER, 2 * LAYERS * MICROBATCHES
    codes, scales = 2 * uses * numbers // 2 // tensor, uses * numbers // 64 // tensor
    # XLA:CPU has no collectives of 4 bits and sends each code as a byte; XLA:TPU sends uint4 as it is.
    assert sum(c.times * c.nbytes for c in gathers) == 2 * codes + scales, "scales of `up` are whole, of 64 inputs each"
    assert codes + 2 * scales < 0.13 * 2 * uses * numbers * 4 // tensor, "of the bytes of fp32"


@pytest.mark.parametrize("name", ["tensor 8", "data 2, tensor 4", "data 8"])
@pytest.mark.sampled(5)
def test_packed_bases_add_no_communication(name):
    dense, packed = Setup(PLACES[name]).lora(MICROBATCHES), setup(name).lora(MICROBATCHES)
    assert sorted((c.kind, c.shapes, c.times) for c in packed) == sorted((c.kind, c.shapes, c.times) for c in dense)


@pytest.mark.parametrize("format", [bases.Nf4(stack=1), bases.Nf4(stack=1, double=False), bases.Int8(stack=1)])
@pytest.mark.parametrize(
    "spec", [P(), P("x"), P(None, "x"), P(None, None, "y"), P(None, "x", "y"), P(None, ("x", "y"))]
)
@pytest.mark.sampled(5)
def test_each_device_has_its_part(format, spec):
    mesh = jax.make_mesh((2, 4), ("x", "y"), (AxisType.Auto,) * 2)
    w = jax.device_put(jax.random.normal(jax.random.key(0), (2, 64, 512)), NamedSharding(mesh, spec))
    whole = bases.quantize({"w": np.asarray(w)}, {"w": format})["w"]
    for split in (
        bases.quantize({"w": w}, {"w": format})["w"],
        bases.place({"w": whole}, {"w": w.sharding})["w"],
    ):
        assert split.sharding.is_equivalent_to(w.sharding, 3)
        assert_trees_close(split.arrays(), whole.arrays(), rtol=0, atol=0)
        parts = w.size // w.addressable_shards[0].data.size
        first = split.arrays()[split.parts[0]]
        assert first.size // first.addressable_shards[0].data.size == parts
        np.testing.assert_array_equal(jax.jit(lambda w: w.dense())(split), whole.dense())


def test_what_cannot_be_split_is_whole():
    """Scales where the mesh cuts through blocks, and all of a matrix that had to be padded."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), (AxisType.Auto,) * 2)

    def placed(shape, spec):
        w = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        packed = bases.quantize({"w": w}, {"w": bases.Nf4(stack=0)})["w"]
        return packed.sharding.spec, packed.codes.sharding.spec, packed.scales.sharding.spec

    assert placed((64, 64), P("x", "y")) == (P("x", "y"), P("x", "y"), P(None, "y"))
    assert placed((256, 64), P("y", "x")) == (P("y", "x"), P("y", "x"), P("y", "x"))
    assert placed((24, 24), P(None, "x")) == (P(None, "x"), P("x", None), P(None, None))
    assert placed((24, 256), P("x", "y")) == (P(None, "y"), P("y", None), P("y", None))
    assert placed((12, 8), P(None, "x")) == (P(None, None), P(None, None), P(None, None))
    assert placed((16, 16, 64), P("x", "y", None)) == (P("x", None, None), P("x", None), P("x", None))
    assert placed((16, 16, 64), P(None, "x", "y")) == (P(None, None, "y"), P(None, "y"), P(None, "y"))
    assert placed((64, 4, 16), P("x", "y")) == (P("x", "y", None), P("x", "y"), P(None, "y"))


@pytest.mark.parametrize(
    ("deferred", "spec", "after"),
    [
        ((("transpose", (1, 0)),), ("x", "y"), ("y", "x")),
        ((("reshape", (64, 4, 32)),), ("x", "y"), ("x", "y", None)),
        ((("transpose", (1, 0)), ("reshape", (4, 32, 64))), ("x", "y"), ("y", None, "x")),
        ((("reshape", (64 * 128,)),), ("x", None), ("x",)),
        ((("cast", jnp.bfloat16), ("reshape", (64, 1, 128))), ("x", "y"), ("x", None, "y")),
        ((("reshape", (64, 2, 64)),), ("x", "y"), ("x", None, None)),
    ],
)
def test_specs_before_and_after_deferred_operations(deferred, spec, after):
    sizes = {None: 1, "x": 2, "y": 4}
    assert spec_after(spec, (64, 128), deferred, sizes.__getitem__) == after
    back = spec_before(after, (64, 128), deferred, sizes.__getitem__)
    assert back == (spec if after.count(None) + 2 == len(after) or "y" not in spec else ("x", None))
    w = jax.random.normal(jax.random.key(0), (3, 64, 128))
    np.testing.assert_array_equal(
        undo_deferred(apply_deferred(w, 1, deferred[-2:]), 1, (64, 128), deferred).astype(w.dtype),
        w.astype(dtype_after(w.dtype, deferred)).astype(w.dtype),
    )


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({"v": P()}, "is not in both trees"),
        ({"w": None}, "expected a NamedSharding"),
        ({"w": P("x", None, None)}, "at most 2 entries"),
        ({"w": P(None, "x")}, "cannot be split evenly.* or leave it whole"),
    ],
)
def test_places_that_cannot_be(places, says):
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=jax.devices()[:4])
    base = bases.quantize({"w": jnp.ones((64, 6))}, {"w": bases.Nf4()})
    found = {
        path: jax.sharding.SingleDeviceSharding(jax.devices()[0]) if spec is None else NamedSharding(mesh, spec)
        for path, spec in places.items()
    }
    with pytest.raises(lora.LoraError, match=says):
        bases.place(base, found)


@pytest.mark.parametrize("packed", ["before", "there"])
@pytest.mark.parametrize("format", [bases.Nf4(stack=0), bases.Int8(stack=0, inputs=1)])
@pytest.mark.sampled(5)
def test_explicit_axes(format, packed):
    """A model that says how its results are sharded, on a mesh whose axes ask for it; one of them is Auto."""
    kinds = (AxisType.Explicit, AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "fsdp"), kinds)
    shapes, keys = {"up": (16, 4, 64), "mid": (4, 64, 256), "down": (256, 128)}, jax.random.split(jax.random.key(0), 4)
    specs = {"up": P(None, "tensor"), "mid": P("tensor"), "down": P("fsdp", "tensor")}
    dense = {name: jax.random.normal(key, shape) / 16 for key, (name, shape) in zip(keys, shapes.items(), strict=False)}
    base, x = bases.quantize(dense, {".*": format}), np.asarray(jax.random.normal(keys[3], (8, 16)))

    def run(whole, base, x):
        def model(p, x):
            h = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, p["up"]))
            return jnp.einsum("bhk,hkd->bd", h, p["mid"], out_sharding=whole) @ p["down"]

        made = lora.plan(model, base, x, rules={".*": lora.Lora(2)})
        adapters = lora.init(jax.random.key(1), base, made)
        loss = lora.value_and_grad(lambda a, p, x: (lora.lora_apply(model)(p, a, x) ** 2).mean())
        return jax.jit(loss)(adapters, base, x)

    expected = run(None, base, x)
    with jax.set_mesh(mesh):
        if packed == "before":
            placed = bases.place(base, shardings(mesh, specs))
        else:
            placed = bases.quantize(jax.device_put(dense, shardings(mesh, specs)), {".*": format})
        assert placed["down"].sharding.spec == P("fsdp", "tensor")
        found = run(P("data"), placed, lora.shard_batch(x, NamedSharding(mesh, P("data"))))
    assert_trees_close(jax.device_get(found), jax.device_get(expected), rtol=1e-5, atol=1e-6)


def test_blocks_that_explicit_axes_cut():
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:4])
    w = jax.random.normal(jax.random.key(0), (64, 32))
    whole = bases.quantize({"w": w}, {"w": bases.Nf4()})["w"]
    with jax.set_mesh(mesh):
        split = bases.quantize({"w": jax.device_put(w, NamedSharding(mesh, P("x")))}, {"w": bases.Nf4()})["w"]
        assert (split.codes.sharding.spec, split.scales.sharding.spec) == (P("x", None), P(None, None))
        np.testing.assert_array_equal(jax.jit(lambda w: w.dense())(split), whole.dense())


def test_a_mesh_of_one_device_is_none():
    mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=jax.devices()[:1])
    base = bases.quantize({"b": jnp.ones((64, 64)), "a": jnp.ones(3)}, {"b": bases.Nf4()})
    there = {"a": NamedSharding(mesh, P()), "b": NamedSharding(mesh, P("x"))}
    assert bases.place(base, there)["b"].compute_sharding is None
