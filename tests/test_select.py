"""Mixed batches: each example with its own adapter of a bank is what it is by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    KINDS,
    MODELS,
    RULES,
    Case,
    assert_trees_close,
    assert_trees_equal,
    compilations,
    eight_devices,
    equations,
    normal,
    total,
    trained,
)

import lora_jax as lora
from lora_jax.core import blocks
from lora_jax.core import slots as ways
from lora_jax.core.products import Matmul
from lora_jax.transform import per_example

SLOTS = 3
IDS = (2, -1, 0, 2, 1)


def bank_of(case: Case, rule) -> dict[str, lora.Adapter]:
    """Three adapters, which differ in every number that is trained."""
    adapters = case.adapters(rule)
    marks = lora.trainable_mask(adapters)
    return jax.tree.map(
        lambda leaf, is_trained: jnp.stack([leaf * (1 - 0.4 * i * is_trained) for i in range(SLOTS)]), adapters, marks
    )


def slot_of(bank, i: int):
    return jax.tree.map(lambda leaf: leaf[i], bank)


def one_by_one(fn, params, bank, ids, x):
    """The definition: a batch of each example with its own adapters, or none, and their results side by side."""
    apply = lora.lora_apply(fn)
    parts = [
        fn(params, x[i : i + 1]) if slot < 0 else apply(params, slot_of(bank, slot), x[i : i + 1])
        for i, slot in enumerate(ids)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def check(fn, params, bank, x, ids=IDS, tolerance=1e-5) -> None:
    """Values and the gradient of the bank, of a mixed batch and of its examples one by one."""
    apply = lora.lora_apply(fn)

    @jax.jit
    def mixed(bank, ids, x):
        run = lambda bank: apply(params, lora.select(bank, ids), x)  # noqa: E731
        return run(bank), jax.grad(lambda bank: total(run(bank)))(bank)

    @jax.jit
    def apart(bank, x):
        run = lambda bank: one_by_one(fn, params, bank, ids, x)  # noqa: E731
        return run(bank), jax.grad(lambda bank: total(run(bank)))(bank)

    (found, gradient), (expected, its_gradient) = mixed(bank, jnp.array(ids), x), apart(bank, x)
    assert_trees_close(found, expected, tolerance, tolerance)
    assert_trees_close(gradient, its_gradient, 10 * tolerance, 10 * tolerance)


# Programs whose x has another first axis than examples, or that return something else than a result for each.
OTHERS = [
    "weight_on_the_left",
    "weight_on_the_left_of_batched",
    "axes_in_any_order",
    "experts_in_the_middle",
    "vmap_over_experts",
    "scan_over_layers",
    "scan_over_layers_of_experts",
    "frozen_beside",
    "scaled_by_what_it_computes",
    "sliced_inputs",
    "chosen_layer",
    "gathered_experts",
    "embedding",
    "tied_embedding",
    "one_row",
    "one_hot",
    "table_for_each_head",
    "ragged",
    "while_loop",
    "condition",
]
OF_EXAMPLES = [case for case in MODELS if len(case.x) == 3 and case.x[0] == len(IDS) and case.name not in OTHERS]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", OF_EXAMPLES, ids=lambda case: case.name)
def test_a_mixed_batch_is_its_examples_one_by_one(case):
    half = case.dtype != jnp.float32 or "16" in case.name
    check(case.fn, case.params(), bank_of(case, RULES["lora"]), case.input(), tolerance=3e-2 if half else 1e-5)


def scanned(params, x):
    return jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, params["w"])[0]


def looked_up(params, x):
    return jnp.tanh(params["w"][x]) @ params["w"].T


def convolved(params, x):
    return jax.lax.conv_general_dilated(x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def of_experts(params, x):
    return jnp.einsum("btd,edf->betf", x, params["w"])


PROGRAMS = {
    "scanned": (scanned, (2, 6, 6), normal((1,), (5, 4, 6)), None),
    "looked_up": (looked_up, (7, 6), np.arange(20).reshape(5, 4) % 7, None),
    "convolved": (convolved, (3, 6, 4), normal((1,), (5, 8, 6)), None),
    "of_experts": (of_experts, (3, 6, 4), normal((1,), (5, 4, 6)), 0),
}


def bank_for(name: str, rule):
    fn, shape, x, _ = PROGRAMS[name]
    params, x = {"w": jnp.asarray(normal((0,), shape) / 3)}, jnp.asarray(x)
    adapters = lora.init(jax.random.key(1), params, lora.plan(fn, params, x, rules={"w": rule}))
    return fn, params, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(trained(adapters, i) for i in range(SLOTS)))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", PROGRAMS)
def test_scans_tables_convolutions_and_experts_can_be_mixed(name):
    fn, params, x, bank = bank_for(name, lora.Lora(2, alpha=3, stack=PROGRAMS[name][3]))
    check(fn, params, bank, x)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_can_be_mixed(kind):
    case = next(case for case in MODELS if case.name == "two_layers")
    check(case.fn, case.params(), bank_of(case, KINDS[kind]), case.input(), tolerance=3e-5)


def linear(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


@functools.cache
def linear_bank(slots: int = 4, rank: int = 4):
    params = {"w1": jnp.asarray(normal((0,), (6, 8)) / 2), "w2": jnp.asarray(normal((1,), (8, 5)) / 2)}
    plan = lora.plan(linear, params, jnp.ones((2, 6)), rules={".*": lora.Lora(rank, alpha=3)})
    one = lora.init(jax.random.key(0), params, plan)
    return params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(trained(one, i) for i in range(slots)))


@pytest.fixture(params=["gathered", "loop", "blocks", "arranged"])
def way(request, monkeypatch):
    """Each way in which products of examples are computed, as it is with one device."""
    jax.clear_caches()  # of products in another way
    monkeypatch.setattr(ways, "way_of", lambda *_: "blocks" if request.param == "arranged" else request.param)
    monkeypatch.setattr(Matmul, "flat", lambda self: True)
    monkeypatch.setattr(ways, "is_on_one_device", lambda *_: True)
    monkeypatch.setattr(per_example, "is_on_one_device", lambda *_: request.param == "arranged")
    yield request.param
    jax.clear_caches()


MANY = tuple(int(i) for i in np.random.default_rng(0).integers(-1, 4, 40))


def test_all_ways_are_exact(way):
    params, bank = linear_bank()
    check(linear, params, bank, jnp.asarray(normal((2,), (40, 2, 6))), MANY)


def derivatives(fn):
    """Along a direction: of a loss of fn(bank, x), and of its gradient."""
    at = linear_bank()[1], jnp.asarray(normal((2,), (40, 2, 6)))
    along = jax.tree.map(lambda leaf: jnp.asarray(normal(leaf.shape, leaf.shape)), at)
    loss = lambda at: total(fn(*at))  # noqa: E731
    run = jax.jit(lambda at, along: (jax.jvp(loss, (at,), (along,)), jax.jvp(jax.grad(loss), (at,), (along,))))
    return run(at, along)


@functools.cache
def derivatives_of_merged():
    params, _ = linear_bank()

    def one(bank, slot, x):
        merged = lora.merge(params, slot_of(bank, slot))
        return linear(jax.tree.map(lambda own, w: jnp.where(slot >= 0, own, w), merged, params), x)

    return derivatives(lambda bank, x: jax.vmap(one, in_axes=(None, 0, 0))(bank, jnp.array(MANY), x))


def test_all_ways_have_derivatives_along_a_direction_and_of_the_gradient(way):
    params, _ = linear_bank()
    mixed = lambda bank, x: lora.lora_apply(linear)(params, lora.select(bank, jnp.array(MANY)), x)  # noqa: E731
    assert_trees_close(derivatives(mixed), derivatives_of_merged(), 1e-4, 1e-4)


def test_in_all_ways_nan_stays_with_its_slot(way):
    """A slot that diverged, and an example that did: nothing of other slots changes, gradients included."""
    params, bank = linear_bank()
    apply, x, ids = lora.lora_apply(linear), jnp.asarray(normal((2,), (40, 2, 6))), np.array(MANY)
    at = int(np.flatnonzero(ids == 2)[3])

    @jax.jit
    def run(bank, x):
        def rows(bank, x):
            y = apply(params, lora.select(bank, jnp.asarray(ids)), x)
            return jnp.sum(y**2), y

        (_, y), gradients = jax.value_and_grad(rows, (0, 1), has_aux=True)(bank, x)
        return y, gradients

    poisoned = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), bank)
    y, (of_bank, of_x) = run(poisoned, x.at[at].set(jnp.nan))
    expected, (bank_expected, x_expected) = run(bank, x)
    others = ~np.isin(ids, (0,)) & (np.arange(40) != at)
    np.testing.assert_array_equal(y[others], expected[others])
    np.testing.assert_array_equal(of_x[others], x_expected[others])
    assert np.isnan(y[ids == 0]).all()
    assert np.isnan(y[at]).all()
    for slot in (1, 3):
        assert_trees_equal(slot_of(of_bank, slot), slot_of(bank_expected, slot))


@pytest.mark.parametrize("way", ["blocks", "arranged"], indirect=True)
def test_no_row_of_blocks_is_added_to_another(way):
    """Forward and backward, rows are gathered; what is added up are the gradients of a slot's blocks."""
    params, bank = linear_bank()
    apply, x, ids = lora.lora_apply(linear), jnp.ones((40, 2, 6)), jnp.arange(40) % 5 - 1
    step = jax.grad(lambda bank, x: total(apply(params, lora.select(bank, ids), x)), (0, 1))
    found = [
        e.outvars[0].aval.shape for e in equations(jax.make_jaxpr(step)(bank, x)) if "scatter-add" in str(e.primitive)
    ]
    assert sorted(found) == sorted(leaf.shape for one in bank.values() for leaf in (jnp.swapaxes(one.a, 1, 2), one.b))


@pytest.mark.parametrize("way", ["blocks", "arranged"], indirect=True)
def test_blocks_keep_x_and_no_factor_for_the_derivative(way):
    params, bank = linear_bank()
    apply, x, ids = lora.lora_apply(linear), jnp.ones((40, 2, 6)), jnp.array(MANY)
    kept = jax.eval_shape(lambda bank, x: jax.vjp(lambda b: apply(params, lora.select(b, ids), x), bank)[1], bank, x)
    size = ways.block_size(40, 4)
    shapes = [leaf.shape for leaf in jax.tree.leaves(kept)]
    assert not [shape for shape in shapes if len(shape) == 3 and shape[0] == 40 // size]
    assert sum(np.prod(shape) == 40 * 2 * 6 for shape in shapes) <= 1  # x, as the gradient of the first A reads it


@pytest.mark.parametrize("keep", ["inputs", "thin"])
def test_no_way_but_gathering_copies_factors_for_examples(way, keep):
    params, bank = linear_bank()
    apply, x, ids = lora.lora_apply(linear, keep=keep), jnp.ones((40, 2, 6)), jnp.array(MANY)
    step = jax.grad(lambda bank, x: total(apply(params, lora.select(bank, ids), x)), (0, 1))
    program = jax.jit(step).lower(bank, x).as_text() if way == "loop" else str(jax.make_jaxpr(step)(bank, x))
    assert (("[40,8,4]" in program) or ("tensor<40x8x4" in program)) == (way in ("gathered", "loop"))


def test_products_of_one_x_are_taken_together(way):
    """One thin product of x for q, k and v, where their slots are known to be the same."""
    params = {name: jnp.asarray(normal((i,), (6, 8))) for i, name in enumerate("qkv")}

    def model(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        return q * k + v

    x = jnp.asarray(normal((3,), (40, 2, 6)))
    plan = lora.plan(model, params, x, rules={".*": lora.Lora(4)})
    bank = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(trained(lora.init(jax.random.key(i), params, plan), i) for i in range(4))
    )
    check(model, params, bank, x, MANY)

    def run(bank, x):
        return lora.lora_apply(model)(params, lora.select(bank, jnp.array(MANY)), x)

    def of_three_selections(bank, x):
        chosen = {path: lora.select(bank, jnp.array(MANY))[path] for path in bank}
        return lora.lora_apply(model)(params, chosen, x)

    joined, by_itself = (
        sum(
            e.primitive.name == "dot_general" and e.outvars[0].aval.shape[-1] == 12
            for e in equations(jax.make_jaxpr(fn)(bank, x))
        )
        for fn in (run, of_three_selections)
    )
    assert joined > 0
    assert by_itself == 0
    assert_trees_close(run(bank, x), of_three_selections(bank, x))


@pytest.mark.parametrize("way", ["arranged"], indirect=True)
def test_in_order_no_row_of_x_is_moved_in_a_product(way):
    """Rows move when they come in and go out, and of what is left over in products."""
    params, bank = linear_bank()
    apply, x, ids = lora.lora_apply(linear), jnp.ones((40, 2, 6)), jnp.array(MANY)
    program = jax.make_jaxpr(lambda bank, x: apply(params, lora.select(bank, ids), x))(bank, x)
    found = [e.outvars[0].aval for e in equations(program) if str(e.primitive) == "lora_moved"]
    size = ways.block_size(40, 4)
    left = [(4 * size, n) for n in (6, 4, 8, 4)] + [(40, n) for n in (4, 8, 4, 5)]  # there and back
    assert sorted((aval.shape[0], aval.shape[-1]) for aval in found) == sorted([(40, 6), (40, 5), *left])


def test_blocks_are_of_one_slot_in_any_mix():
    for ids in ([0] * 64, [3] * 60 + [-1] * 4, list(range(4)) * 16, [-1] * 64, [0] + [1] * 63, [2, 0, 7] * 21):
        size = blocks.block_size(len(ids), 4)
        found = jax.tree.map(np.asarray, blocks.order(jnp.array(ids), 4, size))
        assert size == {64: 8, 63: 4}[len(ids)]
        assert len(found.source) % size == 0
        assert found.source[found.place].tolist() == list(range(len(ids)))
        assert sorted(found.source)[: len(ids)] == list(range(len(ids)))
        there = np.append(ids, -1)[found.source]
        for slot in range(4):
            at = np.flatnonzero(there == slot)
            whole = at[: len(at) // size * size]
            assert (there[whole // size * size + np.arange(len(whole)) % size] == slot).all()
            assert (whole.reshape(-1, size)[:, 0] % size == 0).all()
            assert not np.diff(found.source[at]).clip(max=0).any()  # examples of a slot keep their order


@pytest.mark.parametrize(
    ("shape", "slots", "dtype", "is_arranged"),
    [
        ((40, 2, 6), 4, "float32", True),
        ((40, 2), 4, "int32", True),
        ((41, 2, 6), 4, "float32", False),  # no whole blocks
        ((40, 3, 6), 4, "float32", False),  # more rows than half the rank
        ((40, 3), 4, "int32", False),
        ((12, 2, 6), 4, "float32", False),  # few of each slot
    ],
)
def test_examples_are_brought_into_order_where_that_pays(shape, slots, dtype, is_arranged, monkeypatch):
    monkeypatch.setattr(per_example, "is_on_one_device", lambda *_: True)
    _, bank = linear_bank(slots)
    chosen = list(lora.select(bank, jnp.zeros(shape[0], int)).values())
    assert (per_example._order(chosen, [jnp.zeros(shape, dtype)]) is not None) == is_arranged
    assert per_example._order(chosen, [jnp.zeros(shape, dtype), jnp.zeros((shape[0], 9, 6))]) is None  # a cache


@pytest.mark.parametrize("way", ["arranged"], indirect=True)
def test_examples_in_order_have_their_own_masks_axes_and_results(way, monkeypatch):
    params, bank = linear_bank()
    x, numbers = jnp.asarray(normal((2,), (2, 40, 6))), jnp.arange(40)
    keys = jax.random.split(jax.random.key(1), 40)

    def model(params, x, numbers, keys):
        return linear(params, x), numbers * 10, jax.vmap(jax.random.normal)(keys), jnp.float32(3)

    chosen = lora.select(bank, jnp.array(MANY), in_axes=(1, 0, 0), out_axes=(-2, 0, 0, None))
    adapters = lora.with_dropout(chosen, jax.random.key(3), 0.5)
    found = lora.lora_apply(model)(params, adapters, x, numbers, keys)
    monkeypatch.setattr(per_example, "is_on_one_device", lambda *_: False)
    assert_trees_close(found, lora.lora_apply(model)(params, adapters, x, numbers, keys))
    assert_trees_equal(found[1:3], model(params, x, numbers, keys)[1:3])


def test_any_mix_is_one_program_and_unused_slots_have_no_gradient():
    params, bank = linear_bank()
    apply, x = lora.lora_apply(linear), jnp.asarray(normal((2,), (3, 2, 6)))
    step = jax.jit(jax.grad(lambda bank, ids, x: total(apply(params, lora.select(bank, ids), x))))
    step(bank, jnp.array([0, 1, 2]), x)
    with compilations() as seen:
        gradient = step(bank, jnp.array([3, -1, 3]), x)
    assert not seen
    for leaf in jax.tree.leaves(gradient):
        assert not np.any(np.asarray(leaf[:3]))
    assert np.all(np.any(np.asarray(gradient["w2"].b[3]), axis=0))


def test_a_slot_of_nan_is_nobody_elses():
    params, bank = linear_bank()
    poisoned = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), bank)
    apply, x = lora.lora_apply(linear), jnp.asarray(normal((2,), (3, 2, 6)))

    ids = jnp.array([-1, 2, 3])
    loss = jax.jit(jax.value_and_grad(lambda x, bank, ids: total(apply(params, lora.select(bank, ids), x))))
    assert_trees_equal(loss(x, poisoned, ids), loss(x, bank, ids))


def test_ids_beyond_the_bank_are_the_base_where_they_are_traced():
    params, bank = linear_bank()
    apply, x = lora.lora_apply(linear), jnp.asarray(normal((2,), (3, 2, 6)))
    found = jax.jit(lambda ids, x: apply(params, lora.select(bank, ids), x))(jnp.array([4, -7, 1]), x)
    assert_trees_close(found, one_by_one(linear, params, bank, (-1, -1, 1), x))


def matmul_flops(fn, *args) -> int:
    """The FLOPs of all products of a program as it is compiled for one device, loops by their lengths."""
    found = 0
    for eqn in equations(jax.make_jaxpr(fn)(*args)):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            found += 2 * eqn.outvars[0].aval.size * int(np.prod([lhs[i] for i in contract]))
    return found


def test_gathered_factors_take_the_flops_of_one_adapter():
    params, bank = linear_bank()
    apply, x, ids = lora.lora_apply(linear), jnp.ones((3, 16, 6)), jnp.array([0, 1, -1])
    mixed = lambda bank: apply(params, lora.select(bank, ids), x)  # noqa: E731
    for one, many in (
        (lambda a: apply(params, a, x), mixed),
        (
            jax.grad(lambda a: jnp.sum(apply(params, a, x) ** 2)),
            jax.grad(lambda bank: jnp.sum(mixed(bank) ** 2)),
        ),
    ):
        assert matmul_flops(many, bank) == matmul_flops(one, slot_of(bank, 0))
    base = [e for e in equations(jax.make_jaxpr(mixed)(bank)) if e.primitive.name == "dot_general"]
    assert sum({v.aval.shape for v in e.invars} >= {(6, 8)} for e in base) == 1  # W takes part in one product


def test_on_a_mesh_each_device_has_its_examples():
    params, bank = linear_bank()
    mesh = eight_devices()
    place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("data")))
    apply, ids = lora.lora_apply(linear), tuple(i % 5 - 1 for i in range(16))
    x = jnp.asarray(normal((2,), (16, 2, 6)))
    run = jax.jit(lambda bank, ids, x: apply(params, lora.select(bank, ids), x))
    compiled = run.lower(bank, place(jnp.array(ids)), place(x)).compile()
    assert_trees_close(compiled(bank, place(jnp.array(ids)), place(x)), one_by_one(linear, params, bank, ids, x))
    assert not any(
        word in compiled.as_text() for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    )


def test_caches_and_shared_arguments_say_where_their_examples_are():
    params, bank = linear_bank()

    def step(params, x, cache, shift):
        y = linear(params, x + shift)
        return y, jnp.concatenate([cache[1:], y[None]]), jnp.mean(y)[None], jnp.sum(shift)

    x, cache, shift = jnp.asarray(normal((2,), (3, 6))), jnp.zeros((2, 3, 5)), jnp.ones(6)
    with jax.numpy_rank_promotion("allow"):
        chosen = lora.select(bank, np.array([1, -1, 0]), in_axes=(0, 1, None), out_axes=(0, 1, 0, None))
        y, new, means, same = lora.lora_apply(step)(params, chosen, x, cache, shift)
        expected = one_by_one(lambda p, x: linear(p, x + shift), params, bank, (1, -1, 0), x)
    assert_trees_close(y, expected)
    assert new.shape == cache.shape
    assert_trees_close(new[1], expected)
    assert_trees_close(means, jnp.mean(expected, axis=1))
    assert same.shape == ()


def test_dropout_has_a_mask_for_each_example():
    params, bank = linear_bank()
    apply, x = lora.lora_apply(linear), jnp.ones((4, 2, 6))
    chosen = lora.with_dropout(lora.select(bank, jnp.array([1, 1, 1, -1])), jax.random.key(3), 0.5)
    y = np.asarray(apply(params, chosen, x))
    assert not np.allclose(y[0], y[1])
    assert not np.allclose(y[1], y[2])
    np.testing.assert_allclose(y[3], np.asarray(linear(params, x[3])), rtol=1e-5, atol=1e-6)


def test_one_slot_for_all_and_a_vmap_of_ones_own():
    params, bank = linear_bank()
    apply, x = lora.lora_apply(linear), jnp.asarray(normal((2,), (3, 2, 6)))
    assert_trees_close(apply(params, lora.select(bank, 2), x), apply(params, slot_of(bank, 2), x))
    ids = jnp.array([1, -1, 3])
    own = jax.grad(lambda b: total(jax.vmap(lambda i, x: apply(params, lora.select(b, i), x))(ids, x)))(bank)
    assert_trees_close(own, jax.grad(lambda b: total(apply(params, lora.select(b, ids), x)))(bank))


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([0, 4], r"ids\[1\] is 4, expected one of the slots 0 to 3"),
        (np.array([-2]), r"ids\[0\] is -2"),
        ([0.5], "whole numbers"),
        ([[0]], "ids are"),
        ([], "ids"),
    ],
)
def test_ids_that_are_known_are_checked(ids, says):
    with pytest.raises(lora.LoraError, match=says):
        lora.select(linear_bank()[1], ids)


def test_wrong_banks_and_batches_are_refused_by_name():
    params, bank = linear_bank()
    apply = lora.lora_apply(linear)
    with pytest.raises(lora.LoraError, match="the bank is empty"):
        lora.select({}, [0])
    with pytest.raises(lora.LoraError, match="'w1' is no stack of adapters"):
        lora.select(slot_of(bank, 0), [0])
    with pytest.raises(lora.LoraError, match="different numbers of slots"):
        lora.select({"w1": bank["w1"], "w2": jax.tree.map(lambda leaf: leaf[:2], bank["w2"])}, [0])
    with pytest.raises(lora.LoraError, match=r"argument 0 .*has the shape \[2, 6\], expected 3 examples along axis 0"):
        apply(params, lora.select(bank, [0, 1, 2]), jnp.ones((2, 6)))
    with pytest.raises(lora.LoraError, match="no axis 0 of that one example"):
        lora.lora_apply(lambda p, x: jnp.mean(linear(p, x)))(params, lora.select(bank, [0, 1]), jnp.ones((2, 6)))
    with pytest.raises(lora.LoraError, match="several calls of"):
        apply(params, lora.select({"w1": bank["w1"]}, [0, 1]) | lora.select({"w2": bank["w2"]}, [0]), jnp.ones((2, 6)))


# Optimizers for each slot ---------------------------------------------------------------------------------------------


def test_each_slot_has_its_own_steps():
    """Trained in mixed batches, each slot is what it is when trained alone on its own rows."""
    params, bank = linear_bank()
    apply = lora.lora_apply(linear)
    alone = lora.freeze_base(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(lambda n: 0.05 / (1 + n))))
    optimizer = lora.per_slot(alone)
    batches = [(0, 2, 2), (2, -1, 2), (1, 0, 0)]
    x, y = jnp.asarray(normal((4,), (3, 3, 2, 6))), jnp.asarray(normal((5,), (3, 3, 2, 5)))

    @jax.jit
    def step(bank, state, ids, x, y):
        def loss(bank):
            return jnp.sum((apply(params, lora.select(bank, ids), x) - y) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(bank), state, bank)
        return optax.apply_updates(bank, updates), state

    @jax.jit
    def step_alone(adapters, state, x, y):
        gradient = jax.grad(lambda adapters: jnp.sum((apply(params, adapters, x) - y) ** 2))(adapters)
        updates, state = alone.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state

    trained_bank, state = bank, optimizer.init(bank)
    for ids, x_, y_ in zip(batches, x, y, strict=True):
        trained_bank, state = step(trained_bank, state, jnp.array(ids), x_, y_)
    for slot in range(4):
        adapters = slot_of(bank, slot)
        its_state = alone.init(adapters)
        for ids, x_, y_ in zip(batches, x, y, strict=True):
            rows = np.array([i for i, n in enumerate(ids) if n == slot], int)
            if len(rows):
                adapters, its_state = step_alone(adapters, its_state, x_[rows], y_[rows])
        assert_trees_close(slot_of(trained_bank, slot), adapters, 1e-4, 1e-5)
        assert_trees_close(slot_of(state, slot), its_state, 1e-4, 1e-5)
    assert_trees_equal(slot_of(trained_bank, 3), slot_of(bank, 3))


# Banks ----------------------------------------------------------------------------------------------------------------


def some(i: int, rank: int = 4, alpha: float = 3) -> dict[str, lora.Adapter]:
    params = linear_bank()[0]
    plan = lora.plan(linear, params, jnp.ones((2, 6)), rules={".*": lora.RsLora(rank, alpha=alpha)})
    return trained(lora.init(jax.random.key(i), params, plan), i)


def check_requests(bank, run, adapters, requests, x) -> None:
    params = linear_bank()[0]
    found = run(bank.select(requests), x)
    apply = lora.lora_apply(linear)
    for i, request in enumerate(requests):
        row = x[i : i + 1]
        expected = linear(params, row) if request is None else apply(params, adapters[request], row)
        np.testing.assert_allclose(np.asarray(found[i : i + 1]), np.asarray(expected), rtol=1e-5, atol=1e-5)


def test_a_bank_loads_evicts_and_replaces():
    params, _ = linear_bank()
    apply = lora.lora_apply(linear)
    run, x = jax.jit(lambda chosen, x: apply(params, chosen, x)), jnp.asarray(normal((2,), (3, 2, 6)))
    adapters = {"a": some(0), "b": some(1, rank=2), "c": some(2, alpha=-1), "d": {"w2": some(3)["w2"]}}
    bank = lora.AdapterBank(some(9), slots=2)
    for name, one in adapters.items():
        bank.register(name, (lambda one=one: one) if name == "b" else one)
    check_requests(bank, run, adapters, ["a", None, "b"], x)
    assert bank.resident() == [("a", 1), ("b", 1)]
    with compilations() as seen:
        chosen = bank.select(["c", "a", "c"])
        jax.block_until_ready(run(chosen, x))
    assert not seen
    assert bank.resident() == [("a", 1), ("c", 1)]
    assert (bank.loads, bank.evictions) == (3, 1)
    check_requests(bank, run, adapters, ["d", "d", "b"], x)
    adapters["d"] = some(7)
    bank.register("d", adapters["d"], version=1)  # replaced in its slot
    check_requests(bank, run, adapters, ["d", None, "b"], x)


def test_versions_stay_beside_one_another():
    params, _ = linear_bank()
    apply = lora.lora_apply(linear)
    run, x = jax.jit(lambda chosen, x: apply(params, chosen, x)), jnp.asarray(normal((2,), (3, 2, 6)))
    bank = lora.AdapterBank(some(9), slots=3)
    adapters = {("policy", n): some(n) for n in (10, 11, 12)}
    for name, n in adapters:
        assert bank.register(name, adapters[name, n], version=n) == n
    adapters["policy"] = adapters["policy", 12]
    check_requests(bank, run, adapters, ["policy", ("policy", 11), ("policy", 12)], x)
    with pytest.raises(lora.LoraError, match=r"no version 10 of 'policy'; there are \[11, 12\]"):
        bank.ids([("policy", 10)])
    bank.unregister("policy")
    assert bank.names() == {}
    assert bank.resident() == []


def test_wrong_adapters_and_requests_are_refused_by_name():
    bank = lora.AdapterBank(some(9), slots=1)
    bank.register("a", some(0))
    bank.register("b", some(1))
    for adapters, says in (
        (some(0, rank=5), "of rank 5, above the 4 of the bank"),
        ({"w3": some(0)["w1"]}, "'w3', which the bank has not"),
        ({"w1": some(0)["w2"]}, "has the shape"),
        ({"w1": lora.Ia3().init(jax.random.key(0), jnp.ones((6, 8)), some(0)["w1"].axes)}, "is a Ia3Adapter"),
    ):
        with pytest.raises(lora.LoraError, match=says):
            bank.register("wrong", adapters)
    with pytest.raises(lora.LoraError, match="no adapter 'aa'; the nearest are"):
        bank.ids(["aa"])
    with pytest.raises(lora.LoraError, match="asks for 2 adapters at once, but the bank has 1 slots"):
        bank.ids(["a", "b"])
    with pytest.raises(lora.LoraError, match="`like` is empty"):
        lora.AdapterBank({}, 1)
    assert bank.resident() == []
    assert list(bank.names()) == ["a", "b"]


@pytest.mark.slow
def test_a_thousand_adapters_in_64_slots(share):
    """10,000 requests, a share of them in CI: no compilation after the first batch, and every answer is right."""
    params, _ = linear_bank()
    apply = lora.lora_apply(linear)
    leaves, tree = jax.tree.flatten(some(0))
    many = [
        np.asarray(leaf) + 0.3 * normal((i,), (1000, *leaf.shape)).astype(np.float32) for i, leaf in enumerate(leaves)
    ]
    one_of = lambda i: jax.tree.unflatten(tree, [leaf[i] for leaf in many])  # noqa: E731
    bank = lora.AdapterBank(some(0), slots=64)
    for i in range(1000):
        bank.register(f"tenant {i}", functools.partial(one_of, i))
    run = jax.jit(lambda chosen, x: apply(params, chosen, x))
    expected = jax.jit(jax.vmap(lambda adapters, x: apply(params, adapters, x[None])[0]))
    draws = np.random.default_rng(0)
    held = None
    for n in range(share(160)):
        which = np.minimum(draws.geometric(0.004, 64) - 1, 999)
        x = jnp.asarray(draws.normal(size=(64, 6)), jnp.float32)
        with compilations() as seen:
            found = run(bank.select([f"tenant {i}" for i in which]), x)
            found = np.asarray(found)
        assert n == 0 or not seen
        np.testing.assert_allclose(
            found, expected(jax.tree.unflatten(tree, [leaf[which] for leaf in many]), x), rtol=1e-5, atol=1e-5
        )
        on_device = sum(leaf.nbytes for leaf in jax.tree.leaves(bank.adapters))
        assert held is None or on_device == held
        held = on_device
    assert len(bank.resident()) == 64
    assert bank.loads - bank.evictions == 64
