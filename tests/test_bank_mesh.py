"""A bank on a mesh: the slots of all adapters, and a base that is split, and the answers of one device."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, compilations, normal, total, trained
from jax import P

import lora_jax as lora
from lora_jax.analysis import hlo, hlo_costs

D, F, K, RANK, SLOTS, ROWS = 16, 64, 24, 4, 8, 16
SPECS = {"w1": P("fsdp", "tensor"), "w2": P("tensor", "fsdp")}
NAMES = [f"tenant {i}" for i in range(12)]
AXES = pytest.mark.parametrize("axis", [None, "fsdp"])


def model(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


apply = lora.lora_apply(model)
serve = jax.jit(apply)


@jax.jit
def gradient(bank, params, ids, x):
    return jax.grad(lambda bank: total(apply(params, lora.select(bank, ids), x)))(bank)


@functools.cache
def made():
    """The base, its places, the adapters of each tenant, and a batch."""
    params = {"w1": jnp.asarray(normal((0,), (D, F)) / 4), "w2": jnp.asarray(normal((1,), (F, K)) / 8)}
    plan = lora.plan(model, params, jnp.ones((2, D)), rules={".*": lora.Lora(RANK, alpha=3)})
    one = lora.init(jax.random.key(0), params, plan)
    tenants = {name: jax.tree.map(np.asarray, trained(one, i)) for i, name in enumerate(NAMES)}
    return params, plan, tenants, jnp.asarray(normal((2,), (ROWS, 2, D)))


@functools.cache
def placed():
    """The mesh, and the base and the batch on it."""
    params, *_, x = made()
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda tree, specs: jax.device_put(tree, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs))  # noqa: E731
    return mesh, place(params, SPECS), place(x, P("fsdp"))


def bank_of(**where) -> lora.AdapterBank:
    *_, tenants, _ = made()
    bank = lora.AdapterBank(tenants[NAMES[0]], SLOTS, **where)
    for name, adapters in tenants.items():
        bank.register(name, adapters)
    return bank


def on_mesh(axis: str | None) -> lora.AdapterBank:
    return bank_of(shardings=lora.adapter_shardings(placed()[1], made()[1]), axis=axis)


def requests(seed: int) -> list[str | None]:
    """A batch of seven tenants at most, and the base."""
    draws = np.random.default_rng(seed)
    names = [*draws.permutation(NAMES)[:7].tolist(), None]
    return [names[i] for i in draws.integers(0, 8, ROWS)]


@AXES
def test_it_answers_as_on_one_device_and_compiles_nothing_again(axis):
    params, _, _, x = made()
    _, there, x_there = placed()
    here, bank = bank_of(), on_mesh(axis)
    places = jax.tree.map(lambda leaf: leaf.sharding, bank.adapters)
    for n in range(4):
        with compilations() as seen:
            found = np.asarray(serve(there, bank.select(requests(n)), x_there))
        assert n == 0 or not seen
        assert_trees_close(found, serve(params, here.select(requests(n)), x))
        assert jax.tree.map(lambda leaf: leaf.sharding, bank.adapters) == places
    assert bank.evictions > 0
    ids = bank.ids(requests(4))
    assert_trees_close(
        gradient(bank.adapters, there, ids, x_there), gradient(here.adapters, params, here.ids(requests(4)), x), 1e-4
    )


def sent(compiled) -> Counter:
    """How often each array is sent, by kind, dtype and shape on one device."""
    found = hlo_costs.collectives(hlo.parse(compiled.as_text()))
    return Counter((one.kind, array[:2]) for one in found for array in hlo.arrays(one.results))


@AXES
def test_the_base_is_gathered_as_without_adapters_and_loading_sends_nothing(axis):
    _, there, x = placed()
    bank = on_mesh(axis)
    ids = jax.device_put(bank.ids(requests(0)), x.sharding)
    alone = sent(jax.jit(model).lower(there, x).compile())
    mixed = sent(serve.lower(there, lora.select(bank.adapters, ids), x).compile())
    base = {("all-gather", ("f32", shape)) for shape in ((D, F // 2), (F // 2, K))}  # whole along fsdp, of weights
    assert base == {array for array in alone if array[0] == "all-gather"}
    assert {array: mixed[array] for array in base} == {array: alone[array] for array in base}
    others = {shape for kind, (_, shape) in mixed if kind == "all-gather"} - {shape for _, (_, shape) in base}
    if axis is None:
        assert not others
    else:
        assert all(RANK in shape and shape[0] <= SLOTS for shape in others), "slots of one weight at a time"
    loaded = bank._put.lower(bank.adapters, np.int32(3), bank._read((NAMES[0], 1))).compile()
    assert not sent(loaded)


@AXES
def test_each_device_has_its_part_of_the_slots(axis):
    parts = 4 if axis else 1
    for path, adapter in on_mesh(axis).adapters.items():
        for name, split in (("a", path == "w2"), ("b", path == "w1")):
            array = getattr(adapter, name)
            assert array.addressable_shards[0].data.size == array.size // parts // (2 if split else 1), (path, name)


def test_wrong_places_are_refused_by_name():
    _, plan, tenants, _ = made()
    _, there, _ = placed()
    like, good = tenants[NAMES[0]], lora.adapter_shardings(there, plan)
    for where, says in (
        ({"axis": "fsdp"}, "`shardings`, which are missing"),
        ({"shardings": {"w1": good["w1"]}}, r"of the paths \['w1'\], but the bank has \['w1', 'w2'\]"),
        ({"shardings": good, "axis": "rows"}, "the mesh lacks the axis 'rows'"),
        ({"shardings": good, "axis": "tensor"}, "so its slots cannot be split over 'tensor' too"),
        ({"shardings": jax.tree.map(lambda place: place.spec, good)}, "expected a NamedSharding"),
    ):
        with pytest.raises(lora.LoraError, match=says):
            lora.AdapterBank(like, SLOTS, **where)
    with pytest.raises(lora.LoraError, match=r"axis 0 of size 6 cannot be split evenly over the mesh axes 'fsdp'"):
        lora.AdapterBank(like, 6, shardings=good, axis="fsdp")
