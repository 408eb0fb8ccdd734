"""Tied weights, two leaves of a tree that are one array: changed once where nothing differs, and never lost.

What is donated is gone only where no other leaf that is still needed lies in the same memory.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import eight_devices

import lora_jax as lora
from lora_jax import bases
from lora_jax.bases import Stored

INT8, NF4 = bases.Int8(), bases.Nf4()
AXES = lora.KernelAxes((), (0,), (1,))


def adapter(seed, n=64):
    a, b = (np.random.default_rng((seed, i)).normal(size=shape) for i, shape in enumerate([(n, 2), (2, n)]))
    return lora.LoraAdapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), AXES, 0.5)


def weight(n=64):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, n)), jnp.float32)


def view(array):
    """Another array over the same memory, as `jax.device_put` gives where nothing has to move."""
    other = jax.device_put(array, array.sharding)
    assert other is not array
    return other


def alive(tree):
    return not any(isinstance(array, jax.Array) and array.is_deleted() for array in jax.tree.leaves(tree))


ONE, OTHER = adapter(1), adapter(2)
# What is adapted of three names for one array, and whether it is needed by a name without adapter.
ADAPTED = {
    "one of them": {"e": ONE},
    "two alike": {"e": ONE, "h": ONE},
    "two": {"e": ONE, "h": OTHER},
    "all alike": {"e": ONE, "h": ONE, "t": ONE},
    "all": {"e": ONE, "h": OTHER, "t": ONE},
    "one by a copy": {"e": ONE, "h": jax.tree.map(jnp.copy, ONE), "t": OTHER},
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("tie", ["one array", "views"])
def test_merging_tied_arrays(name, tie, donate):
    w, adapters = weight(), ADAPTED[name]
    expected = {path: np.asarray(w) for path in ("e", "h", "t")}
    for path, one in adapters.items():
        expected[path] = expected[path] + 0.5 * np.asarray(one.a) @ np.asarray(one.b)
    params = {"e": w, "h": w, "t": w} if tie == "one array" else {"e": w, "h": view(w), "t": view(w)}
    merged = lora.merge(params, adapters, donate=donate)
    for path, array in merged.items():
        np.testing.assert_allclose(array, expected[path], rtol=1e-5, atol=1e-5)
        assert path in adapters or array is params[path]
    for one, other in itertools.combinations(adapters, 2):
        assert (merged[one] is merged[other]) == (adapters[one] is adapters[other])
    assert alive((merged, adapters))
    if not donate:
        assert alive(params)


@pytest.mark.parametrize("format", [INT8, NF4], ids=["int8", "nf4"])
@pytest.mark.parametrize("name", ADAPTED)
def test_merging_into_tied_packed_weights(name, format):
    packed = bases.quantize({"e": weight()}, {"e": format})["e"]
    # As trees come out of jax.tree.map: other nodes, the same arrays.
    params = {path: jax.tree.map(lambda array: array, packed) for path in ("e", "h", "t")}
    expected, losses = bases.merge(params, ADAPTED[name])
    assert alive(params)
    for one, other in itertools.combinations(ADAPTED[name], 2):
        alike = ADAPTED[name][one] is ADAPTED[name][other]
        assert (expected[one] is expected[other]) == alike
        assert not alike or losses[one] == losses[other]
    merged, found = bases.merge(params, ADAPTED[name], donate=True)
    assert alive(merged)
    assert alive(packed) == (len(ADAPTED[name]) < 3)
    assert found == losses
    for path in params:
        np.testing.assert_array_equal(merged[path].dense(), expected[path].dense())


def test_a_weight_that_stays_is_no_reason_to_delete_it():
    """An adapter that changes nothing gives the weight itself, which another name's adapter does not take away."""
    packed = bases.quantize({"e": weight()}, {"e": INT8})["e"]
    fresh = lora.LoraAdapter(ONE.a, 0 * ONE.b, AXES, 1.0)
    merged, losses = bases.merge({"e": packed, "h": packed}, {"e": fresh, "h": ONE}, donate=True)
    assert losses["e"] == 0 < losses["h"]
    assert merged["e"] is packed
    assert alive(merged)


def test_an_adapter_that_is_the_weight():
    w = weight()
    expected = 2 * np.asarray(w)
    adapters = {"e": lora.FullAdapter(w, lora.KernelAxes((), (), (0, 1)))}
    np.testing.assert_allclose(lora.merge({"e": w}, adapters, donate=True)["e"], expected)
    assert alive(adapters)


RULES = {
    "alike": {"e": INT8, "h": INT8, "t": INT8},
    "in two formats": {"e": INT8, "h": NF4, "t": INT8},
    "one of them": {"e": NF4},
    "one is left": {"e": None, "h": NF4, "t": NF4},
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tie", ["one array", "views"])
def test_packing_tied_arrays(name, tie, donate):
    w, rules = weight(), RULES[name]
    expected = {format: bases.quantize({"w": w}, {"w": format})["w"].dense() for format in (INT8, NF4)}
    params = {"e": w, "h": w, "t": w} if tie == "one array" else {"e": w, "h": view(w), "t": view(w)}
    packed = bases.quantize(params, rules, donate=donate)
    assert alive(packed)
    for path, leaf in packed.items():
        if (format := rules.get(path)) is None:
            assert leaf is params[path]
        else:
            np.testing.assert_array_equal(leaf.dense(), expected[format])
    for one, other in itertools.combinations((path for path in rules if rules[path]), 2):
        assert (packed[one] is packed[other]) == (rules[one] == rules[other])
    if tie == "one array":
        assert w.is_deleted() == (donate and len([path for path in rules if rules[path]]) == 3)


def test_what_is_stored_once_is_read_once():
    reads = []

    def read():
        reads.append(1)
        return np.asarray(weight())

    stored = Stored(jax.ShapeDtypeStruct((64, 64), np.float32), read)
    packed = bases.quantize({"e": stored, "h": stored, "t": stored}, {"e|h": INT8})
    assert packed["e"] is packed["h"]
    assert len(reads) == 2, "once to be packed, and once to stay an array"


def test_tied_weights_stay_tied_on_a_mesh_and_off_it():
    mesh = eight_devices()
    rows = jax.NamedSharding(mesh, jax.P("data"))
    w = weight()
    packed = bases.quantize({"e": w}, {"e": INT8})["e"]
    there = bases.place({"e": packed, "h": packed, "d": w, "t": w}, dict.fromkeys("ehdt", rows))
    assert there["e"] is there["h"]
    assert there["d"] is there["t"]
    assert not any(there["d"] is leaf for leaf in (w, there["e"]))
    dense = bases.dense(there)
    assert dense["e"] is dense["h"]
    apart = bases.place({"e": w, "h": w}, {"e": rows, "h": jax.NamedSharding(mesh, jax.P())})
    assert [leaf.sharding.spec for leaf in apart.values()] == [jax.P("data"), jax.P()]


@pytest.mark.parametrize("spec", [jax.P("data"), jax.P()])
def test_memory_on_a_mesh(spec):
    """A part of one leaf may be another leaf: of an array in eight parts, one device's."""
    sharding = jax.NamedSharding(eight_devices(), spec)
    w = jax.device_put(weight(), sharding)
    expected = np.asarray(w) + 0.5 * np.asarray(ONE.a) @ np.asarray(ONE.b)
    part = w.addressable_shards[3].data
    merged = lora.merge({"e": w, "part": part}, {"e": ONE}, donate=True)
    assert alive((w, merged))
    assert merged["e"].sharding == sharding
    np.testing.assert_allclose(merged["e"], expected, rtol=1e-5, atol=1e-5)
    packed = bases.quantize({"e": w, "part": part}, {"e": INT8}, donate=True)
    assert alive((w, packed))
    del part
    lora.merge({"e": w, "h": w}, {"e": ONE, "h": ONE}, donate=True)
    assert w.is_deleted()
