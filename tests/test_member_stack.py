"""Stacks of members: several sets of adapters as one tree, whose ranks are padded with zeros that stay zero."""

import dataclasses
import operator

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KINDS, MODELS, RULES, assert_trees_close, assert_trees_equal, equations, formed, total, trained

import lora_jax as lora
from lora_jax import KernelAxes

STACKED = {
    "lora": [RULES["lora"], lora.Lora(rank=4, alpha=3), lora.RsLora(rank=3, alpha=5)],
    "lora_fa": [lora.LoraFa(rank=r, alpha=r + 1) for r in (2, 4, 3)],
    "dora": [lora.Dora(rank=r, alpha=r + 1) for r in (2, 4, 3)],
    "adalora": [lora.AdaLora(rank=r, alpha=r + 1) for r in (2, 4, 3)],
}
CASES = {case.name: case for case in MODELS}
NAMES = ["two_layers", "attention_kernels", "scan_over_remat", "experts", "embedding", "convolution", "tied"]
many = pytest.mark.parametrize("kind", STACKED)


def members_of(name, kind):
    """Three sets of adapters of ranks 2, 4 and 3, trained."""
    case = CASES[name]
    plans = [case.plan(rule) for rule in STACKED[kind]]
    return [trained(lora.init(jax.random.key(i), case.params(), plan), i) for i, plan in enumerate(plans)]


def dots_with(jaxpr, shape):
    """The products that have an operand of this shape."""
    products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name in ("dot_general", "conv_general_dilated")]
    return sum(any(v.aval.shape == shape for v in eqn.invars) for eqn in products)


@many
@pytest.mark.parametrize("name", ["two_layers", "scan_over_remat", "experts", "convolution"])
def test_unstacking_gives_each_back_bit_by_bit(name, kind):
    members = members_of(name, kind)
    stacked = lora.stack(members)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked)} == {3}
    assert all(adapter.a.shape[-1] == 4 for adapter in stacked.values())
    for found, member in zip(lora.unstack(stacked), members, strict=True):
        assert_trees_equal(found, member)
    wider = lora.stack(members, rank=6)
    assert all(adapter.a.shape[-1] == 6 for adapter in wider.values())
    for found, member in zip(lora.unstack(wider), members, strict=True):
        assert_trees_equal(found, member)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (kind, i) in (("lora", 0), ("dora", 2)) else pytest.mark.slow)
        for i, name in enumerate(NAMES)
        for kind in STACKED
        if (name, kind) not in (("embedding", "adalora"), ("embedding", "dora"))
    ],
)
@pytest.mark.sampled(5)
def test_vmap_over_a_stack_is_each_member_by_itself(name, kind):
    """Values and gradients, with one product by each weight of the base, and no weight for each member."""
    case, members = CASES[name], members_of(name, kind)
    params, x, apply = case.params(), case.input(), lora.lora_apply(case.fn)
    each = jax.value_and_grad(lambda a, x: total(apply(params, a, x)), argnums=(0, 1))
    alone = jax.jit(each)
    found = jax.jit(jax.vmap(each, in_axes=(0, None)))(lora.stack(members), x)
    for i, member in enumerate(members):
        value, (gradient, of_x) = alone(member, x)
        np.testing.assert_allclose(found[0][i], value, rtol=2e-5)
        np.testing.assert_allclose(found[1][1][i], of_x, rtol=2e-4, atol=2e-4)
        own = jax.tree.map(lambda array, i=i: array[i], found[1][0])
        for path, adapter in gradient.items():
            for field, array in adapter.arrays().items():
                if field != "ratio":
                    padded = getattr(own[path], field)
                    at = tuple(slice(0, size) for size in array.shape)
                    np.testing.assert_allclose(padded[at], array, rtol=2e-4, atol=2e-4)
                    np.testing.assert_allclose(np.sum(padded**2), np.sum(array**2), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["two_layers", "attention_kernels", "scan_over_remat", "experts"])
@many
def test_one_product_with_the_base_and_no_weight_of_a_member(name, kind):
    case, members = CASES[name], members_of(name, kind)
    params, x, apply = case.params(), case.input(), lora.lora_apply(case.fn)
    xs, stacked = jnp.stack([x, 2 * x, 3 * x]), lora.stack(members, rank=5)  # a rank that no weight has

    def gradient(params, adapters, x):
        return jax.grad(lambda a, x: total(apply(params, a, x)), argnums=(0, 1))(adapters, x)

    alone = jax.make_jaxpr(gradient)(params, members[1], x)
    together = jax.make_jaxpr(jax.vmap(gradient, in_axes=(None, 0, 0)))(params, stacked, xs)
    for path in members[0]:
        shape = params[path].shape
        assert not formed(together, (3, *shape))
        assert dots_with(together, shape) == dots_with(alone, shape)


# What pads stays zero -------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "lion": optax.lion(1e-3, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "lora_plus": lora.lora_plus(optax.adamw, 1e-3),
    "riemannian": optax.chain(lora.riemannian(), optax.sgd(1e-3)),
}


def loss_of(case):
    apply = lora.lora_apply(case.fn)
    return lambda adapters, params, x: jnp.mean((apply(params, adapters, x) - 1) ** 2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if (kind, name) in FAST else pytest.mark.slow)
        for FAST in [(("dora", "adamw"), ("adalora", "adamw"))]
        for kind in STACKED
        for name in OPTIMIZERS
        if not (name == "riemannian" and kind in ("adalora", "dora"))
    ],
)
@pytest.mark.sampled(5)
def test_pads_stay_zero_and_each_member_trains_as_it_does_alone(kind, name):
    """Exactly zero, under weight decay too; and no mask keeps an optimizer from the scale and the rank."""
    case, members = CASES["two_layers"], members_of("two_layers", kind)
    params, x, optimizer = case.params(), case.input(), OPTIMIZERS[name]
    loss = loss_of(case)

    def train(adapters):
        def step(carry, _):
            adapters, state = carry
            updates, state = optimizer.update(jax.grad(loss)(adapters, params, x), state, adapters)
            return (optax.apply_updates(adapters, updates), state), None

        return jax.lax.scan(step, (adapters, optimizer.init(adapters)), None, length=5)[0][0]

    stacked = jax.jit(jax.vmap(train))(lora.stack(members))
    for path, adapter in stacked.items():
        assert not np.any(adapter.a[0, ..., 2:]), path
        assert not np.any(adapter.b[0, 2:]), path
        assert np.any(adapter.a[1, ..., 2:])
    for member, one in zip(lora.unstack(stacked), members, strict=True):
        alone = jax.jit(train)(one)
        if name != "adafactor":  # which scales by the mean of squares of an array, its zeros among them
            assert_trees_close(member, alone, rtol=1e-5, atol=1e-5)
        assert jax.tree.map(jnp.shape, member) == jax.tree.map(jnp.shape, alone)


def test_orthogonality_counts_no_pads():
    members = members_of("two_layers", "adalora")
    each = jax.jit(jax.value_and_grad(lora.orthogonality))
    found = jax.jit(jax.vmap(each))(lora.stack(members))
    for i, member in enumerate(members):
        value, gradient = each(member)
        np.testing.assert_allclose(found[0][i], value, rtol=1e-5)
        own = jax.tree.map(lambda array, i=i: array[i], found[1])
        np.testing.assert_allclose(own["w1"].a[..., : gradient["w1"].a.shape[-1]], gradient["w1"].a, atol=1e-6)


# Where a stack goes ---------------------------------------------------------------------------------------------------


def test_a_stack_goes_through_transformations_and_files(tmp_path):
    members = members_of("scan_over_remat", "lora")
    stacked = lora.stack(members)
    lora.checkpoint.save(tmp_path / "stack", stacked)
    ways = {
        "jit": jax.jit(lambda tree: tree)(stacked),
        "vmap": jax.vmap(lambda tree: tree)(stacked),
        "a stack under jit": jax.jit(lora.stack)(members),
        "in turn": jax.tree.map(lambda a: a[jnp.array([2, 0, 1])][jnp.array([1, 2, 0])], stacked),
        "a file": lora.checkpoint.load(tmp_path / "stack")[0],
        "flax": flax.serialization.from_bytes(stacked, flax.serialization.to_bytes(stacked)),
        "grad": jax.tree.map(operator.sub, stacked, jax.tree.map(jnp.zeros_like, stacked)),
    }
    for way, found in ways.items():
        for one, member in zip(lora.unstack(found), members, strict=True):
            assert_trees_equal(one, jax.tree.map(jnp.asarray, member))
        assert way


def test_stacks_of_members_of_stacks():
    """A member that was taken out by its index still knows its rank."""
    members = members_of("two_layers", "lora")
    first, _, last = (jax.tree.map(lambda a, i=i: a[i], lora.stack(members)) for i in range(3))
    found = lora.unstack(lora.stack([last, first, members[1]]))
    for one, member in zip(found, (members[2], members[0], members[1]), strict=True):
        assert_trees_equal(one, jax.tree.map(jnp.asarray, member))
    assert_trees_equal(lora.unstack(lora.stack([first]))[0], jax.tree.map(jnp.asarray, members[0]))


def test_stacks_made_by_hand():
    case = CASES["two_layers"]
    plan, keys = case.plan(RULES["lora"]), jax.random.split(jax.random.key(0), 3)
    found = lora.unstack(jax.vmap(lambda key: lora.init(key, case.params(), plan))(keys))
    for one, key in zip(found, keys, strict=True):
        assert_trees_close(one, jax.tree.map(jnp.asarray, lora.init(key, case.params(), plan)))


def test_one_program_for_any_ranks():
    """Ranks are data: other members of the same padded rank run without another trace."""
    case, (two, four, three) = CASES["two_layers"], members_of("two_layers", "lora")
    traces, params, x = [], case.params(), case.input()

    @jax.jit
    def run(stacked):
        traces.append(1)
        return jax.vmap(lora.lora_apply(case.fn), in_axes=(None, 0, None))(params, stacked, x)

    for members in ([two, four], [four, three], [three, two], [two, two]):
        found = run(lora.stack(members, rank=4))
        for y, member in zip(found, members, strict=True):
            np.testing.assert_allclose(y, case.fn(lora.merge(params, member), x), rtol=2e-5, atol=2e-5)
    assert len(traces) == 1


# What is no stack -----------------------------------------------------------------------------------------------------

AXES = KernelAxes((), (0,), (1,))


def one(rank=2, shape=(6, 5), axes=AXES, path="w", rule=lora.Lora, **rest):
    w = jnp.ones(shape)
    return {path: rule(rank, **rest).init(jax.random.key(rank), w, axes)}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([], "there is nothing to stack, expected the adapters of one member at least"),
        (one(), r"`members` is adapters, \{path: adapter\}, expected a list of adapters"),
        ([one(), 3], r"stack: member 1: `adapters` is 3, expected a dict"),
        ([one(), one(path="v")], r"member 1 has no adapter for 1 path\(s\) of member 0:\n  w"),
        ([one(), one() | one(path="v")], r"member 1 has adapters for 1 path\(s\) that member 0 lacks:\n  v"),
        ([one(), one(rule=lora.LoraFa)], "'w' of member 1 is a LoraFaAdapter, and member 0 has a LoraAdapter"),
        ([one(), one(shape=(6, 4))], r"member 1 is for a weight \[6, 4\] .* and member 0 for \[6, 5\]"),
        ([one(shape=(5, 5)), one(shape=(5, 5), axes=AXES.transpose())], "with inputs 1, outputs 0, and member 0"),
        ([one(), one(dtype=jnp.bfloat16)], "member 1 has the dtypes .*bfloat16.*: cast it"),
        ([one(rule=lora.Loha)], r"'w' is a LohaAdapter, .*: \{path: adapter.to_lora\(\)"),
        ([{"w": lora.Ia3().init(jax.random.key(0), jnp.ones((6, 5)), AXES)}], "'w' is an? Ia3Adapter, .*jax.tree.map"),
        ([lora.with_dropout(one(), jax.random.key(0))], "'w' is a DropoutAdapter, .*: take the adapters as they were"),
        ([lora.stack([one(), one()])], r"'w' of member 0 is a stack of 2 itself: lora.stack\(\[\*lora.unstack\(one"),
        ([{"w": dataclasses.replace(one()["w"], b=jnp.ones((3, 5)))}], "'w' of member 0 is not of one piece"),
    ],
)
def test_what_is_not_stacked(members, says):
    with pytest.raises(lora.LoraError, match=says):
        lora.stack(members)


def test_ranks_above_the_padding_and_what_is_no_stack():
    with pytest.raises(lora.LoraError, match=r"stack\(rank=3\): 'w' has rank 4 in member 1: give rank=4 or more"):
        lora.stack([one(), one(4)], rank=3)
    with pytest.raises(lora.LoraError, match="the rank is a whole number of at least 1"):
        lora.stack([one()], rank=0)
    with pytest.raises(lora.LoraError, match=r"'w' is no stack of adapters: it has a float32\[6, 2\]"):
        lora.unstack(one())
    with pytest.raises(lora.LoraError, match=r"different numbers of members: \{'w': 2, 'v': 1\}"):
        lora.unstack(lora.stack([one(), one(4)]) | lora.stack([one(path="v")]))
    with pytest.raises(lora.LoraError, match="'w': ranks are not known where adapters are traced"):
        jax.jit(lora.unstack)(lora.stack([one(), one(4)]))
    with pytest.raises(lora.LoraError, match=r"Several sets of adapters at once go through jax.vmap"):
        lora.lora_apply(lambda p, x: x @ p["w"])({"w": jnp.ones((6, 5))}, lora.stack([one()]), jnp.ones((3, 6)))


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in (*STACKED, "rslora")])
def test_all_other_kinds_are_refused_by_name(kind):
    case = CASES["two_layers"]
    adapters = case.adapters(KINDS[kind])
    with pytest.raises(lora.LoraError, match=type(adapters["w1"]).__name__):
        lora.stack([adapters, adapters])
