"""Wrappers around adapters: dropout, copies for each shard of the batch, and `vmap` over sets of adapters.

Each changes how a product is computed and nothing about its value: over every kind of adapter, every program of the
table, and every way in which a batch may be split.
"""

import abc
import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODELS, Case, assert_trees_close, total, trained
from jax import NamedSharding, P

import lora_jax as lora
from lora_jax.core.operand import Operand, Wrapper, check_delegation
from lora_jax.sharding.gradient_copies import add_up, make_copies

KINDS = {"lora": helpers.RULES["lora"], **helpers.KINDS}
for name in ("rslora", "lokr_whole"):  # nothing that a wrapper would meet in another way
    KINDS.pop(name)
OF_ONE_SIZE = ("gathered_experts", "embedding", "tied_embedding", "one_hot")  # programs for a batch of 5 only
# Every spec over mesh axes of sizes 1, 2, 4 and, together, 8: of the rows, of the sequence, and of both.
SPLITS = [
    P("one"),
    P("two"),
    P(("two", "four"), None),
    P(None, "two"),
    P(None, ("two", "four")),
    P("two", "four"),
    P("one", ("two", "four")),
]


def mesh():
    return jax.make_mesh((1, 2, 4), ("one", "two", "four"), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def eight_rows(case: Case) -> Case:
    """The program on a batch that eight devices can split."""
    return case if case.name in OF_ONE_SIZE else dataclasses.replace(case, x=(8, *case.x[1:]))


def adapters_for(case: Case, kind: str):
    """What a kind cannot follow is formed: everything has a value to be compared with."""
    params, x = case.params(), case.input()
    plan = lora.plan(case.fn, params, x, rules={case.pattern: KINDS[kind]}, materialize=True)
    return trained(lora.init(jax.random.key(0), params, plan), 2)


def wrapped(adapters, spec):
    """The adapters in every wrapper. A rate of 1e-9 drops nothing and divides by 1."""

    def dropout(adapters):
        return lora.with_dropout(adapters, jax.random.key(7), 1e-9)

    copies = make_copies(adapters, NamedSharding(mesh(), spec))
    return {"none": adapters, "dropout": dropout(adapters), "copies": copies, "both": dropout(copies)}


FP32 = [c for c in MODELS if c.dtype == jnp.float32 and c.name != "cast"]
FEW = ("two_layers", "tied", "padded_and_flipped", "scan_over_remat", "condition")
pairs = [
    pytest.param(c, k, SPLITS[(i + j) % len(SPLITS)], marks=[] if c.name in FEW else pytest.mark.slow)
    for i, c in enumerate(FP32)
    for j, k in enumerate(KINDS)
]


def name_of(value):
    return getattr(value, "name", value) if not isinstance(value, P) else str(value).removeprefix("PartitionSpec")


@pytest.mark.parametrize(("case", "kind", "spec"), pairs, ids=name_of)
@pytest.mark.sampled(5)
def test_applying_wrapped_adapters_is_merging(case, kind, spec):
    case = eight_rows(case)
    params, x, adapters = case.params(), case.input(), adapters_for(case, kind)
    apply = lora.lora_apply(case.fn, materialize=True)

    def run(adapters, x):
        return {name: apply(params, one, x) for name, one in wrapped(adapters, spec).items()}

    def merged(adapters):
        return case.fn(lora.merge(params, adapters), x)

    found, expected = jax.jit(run)(adapters, x), jax.jit(merged)(adapters)
    for name, out in found.items():
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-4, err_msg=name), out, expected
        )


# JAX itself has no vmap of ragged_dot over some of its operands.
vmapped = [
    pytest.param(c, k, marks=[] if c.name in FEW else pytest.mark.slow)
    for i, c in enumerate(FP32)
    for j, k in enumerate(KINDS)
    if c.name != "ragged" and (i + j) % 3 == 0
]


@pytest.mark.parametrize(("case", "kind"), vmapped, ids=name_of)
@pytest.mark.sampled(5)
def test_vmap_over_sets_of_adapters(case, kind):
    params, x, one = case.params(), case.input(), adapters_for(case, kind)
    two = jax.tree.map(lambda a: a * 1.25 if jnp.issubdtype(a.dtype, jnp.floating) else a, one)
    apply = lora.lora_apply(case.fn, materialize=True)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), one, two)

    def dropped(params, adapters, x):
        return apply(params, lora.with_dropout(adapters, jax.random.key(7), 1e-9), x)

    @jax.jit
    def run(stacked):
        return [jax.vmap(f, in_axes=(None, 0, None))(params, stacked, x) for f in (apply, dropped)]

    expected = jax.jit(lambda: [case.fn(lora.merge(params, a), x) for a in (one, two)])()
    expected = jax.tree.map(lambda *a: jnp.stack(a), *expected)
    for found in run(stacked):
        assert_trees_close(found, expected, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("spec", SPLITS, ids=name_of)
@pytest.mark.parametrize("name", ["scan_over_remat", "attention_kernels", "tied"])
@pytest.mark.sampled(6)
def test_gradients_of_copies_add_up(name, spec):
    """The gradient of the adapters, from that of their copies: with dropout around them, and without."""
    case = eight_rows(next(c for c in MODELS if c.name == name))
    params, x = case.params(), case.input()
    apply, batch = lora.lora_apply(case.fn, materialize=True), NamedSharding(mesh(), spec)
    kinds = [kind for kind in KINDS if name == "scan_over_remat" or kind in ("lora", "dora", "lokr")]
    adapters = {kind: adapters_for(case, kind) for kind in kinds}

    def of_copies(adapters):
        def loss(copies, wrap):
            return total(apply(params, wrap(copies), x))

        copies = make_copies(adapters, batch)
        plain = jax.grad(lambda c: loss(c, lambda c: c))(copies)
        dropped = jax.grad(lambda c: loss(c, lambda c: lora.with_dropout(c, jax.random.key(7), 1e-9)))(copies)
        return add_up(plain, batch), add_up(dropped, batch)

    @jax.jit
    def both(every):
        return {
            kind: (of_copies(a), jax.grad(lambda a: total(case.fn(lora.merge(params, a), x)))(a))
            for kind, a in every.items()
        }

    for (plain, dropped), expected in both(adapters).values():
        assert_trees_close(plain, expected, rtol=1e-4, atol=1e-4)
        assert_trees_close(dropped, expected, rtol=1e-4, atol=1e-4)


# Law 5: every spec over meshes of 1, 2 and 8 devices ------------------------------------------------------------------

PLACEMENTS = [
    ((n, m), spec)
    for n, m in ((1, 1), (1, 2), (2, 1), (1, 8), (8, 1), (2, 4))
    for spec in (P("data"), P("data", None), P(None, "seq"), P("data", "seq"), P(("data", "seq")))
]
steps = [
    pytest.param(shape, spec, kind, marks=[] if (i + 5 * j) % 19 == 0 else pytest.mark.slow)
    for i, (shape, spec) in enumerate(PLACEMENTS)
    for j, kind in enumerate(KINDS)
    if kind == "lora" or (i + j) % 3 == 0
]


def stacked_layers(params, x):
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    return x @ params["head"]


PARAMS = {
    "layers": jax.random.normal(jax.random.key(0), (2, 12, 12)) / 3,
    "head": jax.random.normal(jax.random.key(1), (12, 10)) / 3,
}


@pytest.mark.parametrize(("shape", "spec", "kind"), steps, ids=name_of)
def test_a_step_does_not_depend_on_placement(shape, spec, kind):
    """More than one row on each device; the gradient of `jit_step` is the one of a single device."""
    x = jax.random.normal(jax.random.key(2), (16, 16, 12))
    plan = lora.plan(stacked_layers, PARAMS, x, rules={".*": KINDS[kind]})
    adapters = trained(lora.init(jax.random.key(3), PARAMS, plan), 4)
    apply, optimizer = lora.lora_apply(stacked_layers), lora.freeze_base(optax.sgd(0.1))

    def loss(adapters, params, x):
        return jnp.mean(apply(params, adapters, x) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))(adapters, PARAMS, x)
    devices = jax.devices()[: shape[0] * shape[1]]
    here = jax.make_mesh(shape, ("data", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)
    whole = NamedSharding(here, P())
    state = lora.TrainState.create(jax.device_put(jax.tree.map(jnp.copy, adapters), whole), optimizer)
    step = lora.jit_step(loss, optimizer)
    state, metrics = step(state, jax.device_put(PARAMS, whole), jax.device_put(x, NamedSharding(here, spec)))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    mask = lora.trainable_mask(adapters)
    expected = jax.tree.map(lambda a, g, moves: a - 0.1 * g if moves else a, adapters, grads, mask)
    assert_trees_close(state.trainable, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("program", ["lookup", "head", "both"])
def test_rows_on_a_mesh(program):
    """Trained rows of a table, looked up and multiplied by, where the batch is split."""
    here = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    ids = jnp.arange(16).reshape(16, 1) % 7
    run = {
        "lookup": lambda p, ids: p["table"][ids],
        "head": lambda p, ids: jax.nn.one_hot(ids, 4) @ p["table"].T,
        "both": lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T,
    }[program]
    whole = NamedSharding(here, P())
    params = jax.device_put({"table": jax.random.normal(jax.random.key(0), (16, 4))}, whole)
    plan = lora.plan(run, params, ids, rules={"table": lora.Rows((1, 3))})
    adapters = trained(lora.init(jax.random.key(1), params, plan), 2)
    apply, optimizer = lora.lora_apply(run), lora.freeze_base(optax.sgd(0.1))

    def loss(adapters, params, ids):
        return jnp.mean(apply(params, adapters, ids) ** 2)

    grads = jax.jit(jax.grad(loss))(adapters, params, ids)
    expected = jax.tree.map(lambda a, g: a - 0.1 * g, adapters, grads)
    state = lora.TrainState.create(jax.device_put(adapters, whole), optimizer)
    state, _ = lora.jit_step(loss, optimizer)(state, params, jax.device_put(ids, NamedSharding(here, P("data"))))
    assert_trees_close(state.trainable, expected, rtol=1e-5, atol=1e-6)


# What a wrapper must not forget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["none", "dropout", "copies", "both"])
@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_a_scale_of_outputs_is_refused_where_it_cannot_follow(kind, wrap):
    """x @ W and y @ W^T scale different axes, and ones that a weight is padded with are no outputs of its."""
    x = jnp.ones((8, 6))
    params = {"w": jax.random.normal(jax.random.key(0), (6, 6))}
    plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": KINDS[kind]})
    adapters = trained(lora.init(jax.random.key(1), params, plan), 2)
    one = wrapped(adapters, P(("two", "four")))[wrap]

    def both_ways(p, x):
        return (x @ p["w"]) @ p["w"].T

    def padded(p, x):
        return x @ jnp.pad(p["w"], ((0, 0), (0, 2)), constant_values=1.0)

    for fn in (both_ways, padded):
        with pytest.raises(lora.LoraError, match="cannot stay factored"):
            lora.lora_apply(fn)(params, one, x)
        found = jax.jit(lambda one, fn=fn: lora.lora_apply(fn, materialize=True)(params, one, x))(one)
        np.testing.assert_allclose(found, fn(lora.merge(params, adapters), x), rtol=1e-4, atol=1e-4)


def test_a_wrapper_that_forgets_a_method_does_not_import():
    class Longer(Operand):
        @abc.abstractmethod
        def added_later(self):
            """Something that only the operand inside knows."""

    with pytest.raises(TypeError, match=r"Wrapper has to hand Longer\.added_later on"):
        check_delegation(Wrapper, of=Longer, own=())


# What a loss sees are its adapters, and not their copies -------------------------------------------------------------


def scaled_down(adapters):
    return jax.tree.map(lambda array: array / jnp.linalg.norm(array), adapters)


LOSSES = {
    "penalty": lambda apply, a, p, x: apply(p, a, x).mean() + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(a)),
    "norm": lambda apply, a, p, x: jnp.mean(apply(p, a, x) ** 2) + optax.tree.norm(a),
    "size": lambda apply, a, p, x: jnp.mean(apply(p, a, x) ** 2) / sum(leaf.size for leaf in jax.tree.leaves(a)),
    "field": lambda apply, a, p, x: jnp.mean(apply(p, a, x) ** 2) + jnp.sum(a["head"].b ** 2),
    "orthogonality": lambda apply, a, p, x: jnp.mean(apply(p, a, x) ** 2) + lora.orthogonality(a),
    "normed": lambda apply, a, p, x: jnp.mean(apply(p, scaled_down(a), x) ** 2),
    "merged": lambda apply, a, p, x: jnp.mean(stacked_layers(lora.merge(p, a), x) ** 2),
    "jitted": lambda apply, a, p, x: jnp.mean(jax.jit(apply)(p, a, x) ** 2),
    "ensemble": lambda apply, a, p, x: jnp.mean(
        jax.vmap(apply, in_axes=(None, 0, None))(p, jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), a), x)[0] ** 2
    ),
}


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.sampled(5)
def test_a_loss_sees_its_adapters_and_not_their_copies(name, microbatches):
    rule = lora.AdaLora(rank=2) if name == "orthogonality" else lora.Lora(rank=2)
    x = jax.random.normal(jax.random.key(2), (16, 16, 12))
    plan = lora.plan(stacked_layers, PARAMS, x, rules={".*": rule})
    adapters = trained(lora.init(jax.random.key(3), PARAMS, plan), 4)
    apply, optimizer = lora.lora_apply(stacked_layers), optax.sgd(0.01)

    def loss(adapters, params, x):
        return LOSSES[name](apply, adapters, params, x)

    state = lora.TrainState.create(jax.tree.map(jnp.copy, adapters), optimizer)
    expected, there = lora.jit_step(loss, optimizer, microbatches=microbatches)(state, PARAMS, x)
    here = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(here, P())
    state = lora.TrainState.create(jax.device_put(adapters, whole), optimizer)
    step = lora.jit_step(loss, optimizer, microbatches=microbatches)
    found, metrics = step(state, jax.device_put(PARAMS, whole), jax.device_put(x, NamedSharding(here, P("data"))))
    np.testing.assert_allclose(metrics["loss"], there["loss"], rtol=1e-5)
    assert_trees_close(found.trainable, expected.trainable, rtol=1e-4, atol=1e-5)
