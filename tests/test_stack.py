"""Rules that name the stacked axes of a weight: experts and members that a program multiplies by as by one matrix.

The programs are such that no batched product shows the stack. Law 1 and law 3 hold for adapters with factors for each
matrix of it; what cannot be computed from the program's own product is refused.
"""

import dataclasses
import re
import warnings
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    KINDS,
    RULES,
    TRANSFORMS,
    Case,
    assert_trees_close,
    assert_trees_equal,
    equations,
    formed,
    merge_by_hand,
    total,
    trained,
    trained_leaves,
)
from jax import NamedSharding, P

import lora_jax as lora
from lora_jax import KernelAxes
from lora_jax.key_maps import KeyMap, experts
from lora_jax.sharding.gradient_copies import make_copies

EVERY = {"lora": RULES["lora"], **KINDS}
EVERY.pop("full")  # has the axes of its array, whatever it is
SCALES_OUTPUTS = ("dora", "ia3")
B, T, D, K, E, F = 8, 4, 12, 10, 3, 2
PROGRAMS = []


def program(shapes, stack, sums=False, x=(B, T, D)):
    """Add a program; `sums` says that it contracts over the stack."""

    def add(fn):
        PROGRAMS.append((Case(fn.__name__, fn, shapes, x), stack, sums))
        return fn

    return add


@program({"w": (E, D, K)}, 0)
def every_expert_sees_x(p, x):
    return jnp.tanh(jnp.einsum("btd,edk->btek", x, p["w"]))


@program({"w": (E, D, K)}, -3, sums=True)
def experts_are_summed(p, x):
    each = jnp.stack([x * (i + 1) for i in range(E)], 2)
    return jnp.einsum("bted,edk->btk", each, p["w"])


@program({"w1": (E, D, K), "w2": (E, K, D)}, 0, sums=True)
def mixture_of_experts(p, x):
    gates = jax.nn.softmax(x[..., :E])
    h = jax.nn.silu(jnp.einsum("btd,edk->btek", x, p["w1"]))
    return jnp.einsum("btek,ekd,bte->btd", h, p["w2"], gates)


@program({"w": (D, E, K)}, (1,))
def experts_in_the_middle_and_on_the_left(p, x):
    return jnp.einsum("dek,btd->ketb", p["w"], x)


@program({"w": (D, F, K, E)}, (3,), sums=True)
def experts_last(p, x):
    each = jnp.stack([x * (i + 1) for i in range(E)], 1)
    return jnp.einsum("dfke,betd->bftk", p["w"], each)


@program({"w": (E, D, F, K)}, (0, 2), sums=True)
def summed_along_one_and_shared_along_another(p, x):
    each = jnp.stack([x * (i + 1) for i in range(E)], 2)
    return jnp.einsum("bted,edfk->bftk", each, p["w"])


@program({"w": (2, E, D, D)}, 1)
def scanned_layers_of_experts(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(jnp.einsum("btd,edk->btek", x, w).sum(2)), None), x, p["w"])[0]


@program({"w": (F, D, E, K)}, 2)
def stacked_beside_a_batched_product(p, x):
    each = jnp.stack([x * (i + 1) for i in range(F)])
    return jnp.einsum("fbtd,fdek->btfke", each, p["w"])


@program({"w": (E, D, K)}, 0, sums=True)
def tied_experts(p, x):
    return jnp.einsum("btek,edk->btd", jnp.tanh(jnp.einsum("btd,edk->btek", x, p["w"])), p["w"])


@program({"w1": (E, D, K), "w2": (E, K, 7)}, 0)
def members_by_vmap(p, x):
    return jax.vmap(lambda w1, w2, x: jnp.tanh(x @ w1) @ w2, (0, 0, None))(p["w1"], p["w2"], x)


@program({"w": (E, D, 1, K)}, (0, 2))
def a_stack_of_size_one(p, x):
    return jnp.einsum("btd,eduk->buetk", x, p["w"])


@program({"w": (E, D, K)}, 0, sums=True)
def gradient_of_experts_inside(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(jnp.einsum("btd,edk->btek", x, p["w"]))))(x)


FEW = ("mixture_of_experts", "summed_along_one_and_shared_along_another", "members_by_vmap")


def marked(*values, fast):
    return pytest.param(*values, marks=[] if fast else pytest.mark.slow)


def name_of(value):
    return getattr(value, "name", value if isinstance(value, str | P) else "")


cases = pytest.mark.parametrize(
    ("case", "stack", "sums"), [marked(*one, fast=one[0].name in FEW) for one in PROGRAMS], ids=name_of
)


def adapters_of(case, stack, rule=RULES["lora"]):
    rule = dataclasses.replace(rule, stack=stack)
    plan = lora.plan(case.fn, case.params(), case.input(), rules={case.pattern: rule})
    return trained(lora.init(jax.random.key(0), case.params(), plan), 1)


def both_ways(case, adapters):
    """Values and gradients with respect to adapters and x: with factors, and merged."""
    params, apply = case.params(), lora.lora_apply(case.fn)

    @jax.jit
    def run(adapters, x):
        factored = jax.value_and_grad(lambda a, x: total(apply(params, a, x)), argnums=(0, 1))(adapters, x)
        merged = jax.value_and_grad(lambda a, x: total(case.fn(lora.merge(params, a), x)), argnums=(0, 1))(adapters, x)
        return factored, merged

    return run(adapters, case.input())


@cases
@pytest.mark.sampled(1)
def test_applying_is_merging_and_stays_factored(case, stack, sums):
    adapters = adapters_of(case, stack)
    stacks = {i % len(shape) for shape in case.shapes.values() for i in np.atleast_1d(stack).tolist()}
    assert all(stacks <= set(adapter.axes.stack) for adapter in adapters.values())
    assert_trees_close(*both_ways(case, adapters), rtol=1e-4, atol=1e-4)
    params, x, apply = case.params(), case.input(), lora.lora_apply(case.fn)
    for path, merged in lora.merge(params, adapters).items():
        np.testing.assert_allclose(merged, merge_by_hand(params[path], adapters[path]), rtol=1e-5, atol=1e-5)
    traced = jax.make_jaxpr(jax.value_and_grad(lambda a, p: total(apply(p, a, x))))(adapters, params)
    base = jax.make_jaxpr(jax.value_and_grad(lambda x, p: total(case.fn(p, x))))(x, params)
    for path in adapters:
        assert Counter(formed(traced, params[path].shape)) <= Counter(formed(base, params[path].shape))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "stack", "sums", "transform"),
    [
        (*one, transform)
        for i, one in enumerate(PROGRAMS)
        for j, transform in enumerate(TRANSFORMS)
        if transform != "grad" and (i + j) % 2  # by turns
    ],
    ids=name_of,
)
def test_applying_is_merging_under_every_transform(case, stack, sums, transform):
    adapters, run, apply = adapters_of(case, stack), TRANSFORMS[transform], lora.lora_apply(case.fn)
    found = run(apply, case.params(), adapters, case.input())
    expected = run(lambda p, a, x: case.fn(lora.merge(p, a), x), case.params(), adapters, case.input())
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "stack", "sums", "kind"),
    [
        marked(*one, kind, fast=one[0].name == FEW[0] and kind in ("lokr", "dora", "vera"))
        for i, one in enumerate(PROGRAMS)
        for j, kind in enumerate(EVERY)
        if kind != "lora" and (one[0].name == FEW[0] or (i + j) % 2)
    ],
    ids=name_of,
)
@pytest.mark.sampled(5)
def test_every_kind_is_right_or_refused(case, stack, sums, kind):
    """What scales outputs cannot do so for each matrix once the program has summed over them."""
    if kind in SCALES_OUTPUTS and sums:
        with pytest.raises(lora.LoraError, match=r"uses it with .* but its adapter was made for stack"):
            adapters_of(case, stack, EVERY[kind])
        return
    assert_trees_close(*both_ways(case, adapters_of(case, stack, EVERY[kind])), rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize(
    ("case", "stack", "sums", "spec"),
    [
        marked(*one, spec, fast=one[0].name in FEW[:2] and spec == P("two", "four"))
        for i, one in enumerate(PROGRAMS)
        for j, spec in enumerate((P("two", "four"), P(("two", "four")), P("one"), P(None, "four")))
        if one[0].name in FEW or (i + j) % 2
    ],
    ids=name_of,
)
@pytest.mark.sampled(5)
def test_wrappers_change_nothing(case, stack, sums, spec):
    """Dropout that drops nothing, and copies for each part of the batch."""
    mesh = jax.make_mesh((1, 2, 4), ("one", "two", "four"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    params, x, apply = case.params(), case.input(), lora.lora_apply(case.fn)

    @jax.jit
    def run(adapters):
        copies = make_copies(adapters, NamedSharding(mesh, spec))
        return [
            apply(params, lora.with_dropout(one, jax.random.key(7), rate), x)
            for one in (adapters, copies)
            for rate in (0, 1e-9)
        ]

    adapters = adapters_of(case, stack)
    for found in run(adapters):
        assert_trees_close(found, case.fn(lora.merge(params, adapters), x), rtol=1e-4, atol=1e-4)


def test_dropout_drops_x_before_each_a():
    """Half of what the adapters see is gone, and what is left is doubled: by x = 1 and A of ones, all is 2 or 0."""
    fn = lambda p, x: jnp.einsum("ted,edk->tk", x, p["w"])  # noqa: E731
    axes = KernelAxes((0,), (1,), (2,))
    adapters = {"w": lora.LoraAdapter(jnp.ones((E, D, 1)), jnp.ones((E, 1, K)), axes, 1.0)}
    dropped = lora.with_dropout(adapters, jax.random.key(0), 0.5)
    y = np.asarray(lora.lora_apply(fn)({"w": jnp.zeros((E, D, K))}, dropped, jnp.ones((50, E, D))))[:, 0]
    assert set(np.unique(y % 2)) == {0}
    assert abs(y.mean() - E * D) < 3
    assert len(np.unique(y)) > 5


@cases
@pytest.mark.sampled(1)
def test_flops_are_those_of_the_program(case, stack, sums):
    """What the plan counts is what the traced program has beyond the base."""
    plan = lora.plan(case.fn, case.params(), case.input(), rules={case.pattern: lora.Lora(rank=2, stack=stack)})
    adapters, apply = lora.init(jax.random.key(0), case.params(), plan), lora.lora_apply(case.fn)
    with_adapters = jax.make_jaxpr(apply)(case.params(), adapters, case.input())
    counted = dot_flops(with_adapters) - dot_flops(jax.make_jaxpr(case.fn)(case.params(), case.input()))
    times = 2 if case.fn is scanned_layers_of_experts else 1  # that a loop runs the products of its body
    assert sum(target.flops() for target in plan.values()) == times * counted


def dot_flops(jaxpr):
    flops = 0
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            flops += 2 * eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in contracted]))
    return flops


# What is trained: each matrix by itself -------------------------------------------------------------------------------


class Member(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(16)(x)))


def test_members_of_an_ensemble_train_apart():
    """By vmap over stacked weights with one input: the gradient of a member's output is that of its own factors."""
    members = nn.vmap(
        Member, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=4
    )()
    x = jax.random.normal(jax.random.key(0), (5, 8))
    fn, params, state = lora.from_linen(members, members.init(jax.random.key(1), x))
    with pytest.warns(lora.LoraWarning, match=r"'Dense_1/kernel' \[4, 8, 16\].*'Dense_0/kernel' is a stack") as caught:
        lora.plan(fn, params, state, x, rules={".*kernel": lora.Lora(rank=2)})
    assert len(caught) == 1
    assert "the rule Lora(rank=2, stack=0); if not, Lora(rank=2, stack=())" in str(caught[0].message)
    assert caught[0].filename == __file__
    plan = lora.plan(fn, params, state, x, rules={".*kernel": lora.Lora(rank=2, stack=0)})  # warns of nothing
    assert [str(target.axes) for target in plan.values()] == ["stack 0, inputs 1, outputs 2"] * 2
    adapters, apply = trained(lora.init(jax.random.key(2), params, plan), 1), lora.lora_apply(fn)
    of_first = jax.grad(lambda a: jnp.sum(apply(params, a, state, x)[0][0] ** 2))(adapters)
    for gradient in trained_leaves(of_first):
        assert jnp.any(gradient[0] != 0)
        assert not jnp.any(gradient[1:])
    shared = lora.plan(fn, params, state, x, rules={".*kernel": lora.Lora(rank=2, stack=())})  # nor of what is meant
    assert str(shared["Dense_1/kernel"].axes) == "inputs 1, outputs 0 2"


def test_attention_with_its_heads_first_warns_of_nothing():
    params = {"q": jnp.ones((3, 8, 4)), "o": jnp.ones((3, 4, 8)), "layers": jnp.ones((2, 8, 8))}

    def attention(p, x):
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"])[0]
        return jnp.einsum("tnh,nhd->td", jnp.einsum("td,ndh->tnh", x, p["q"]), p["o"])

    found = lora.plan(attention, params, jnp.ones((5, 8)), rules={".*": lora.Lora(rank=2)})
    assert str(found).splitlines()[-3:] == [
        "'o' [3, 4, 8]: axes 0 and 1 share one B.",
        "'q' [3, 8, 4]: axes 0 and 2 share one A.",
        "Where each index along an axis is a matrix of its own (experts, members), name that axis: stack=0.",
    ]
    assert "parameters beside" in found.table(advice=False).splitlines()[-1]


def test_what_one_use_shows_to_be_stacked_is_stacked():
    """A part that is sliced out, and all of it at once."""

    def fused(p, x):
        return x @ p["w"][0] + jnp.einsum("td,cdk->tck", x, p["w"])[:, 1]

    params, x = {"w": jnp.ones((3, 8, 4))}, jax.random.normal(jax.random.key(0), (5, 8))
    plan = lora.plan(fused, params, x, rules={"w": lora.Lora(rank=2)})
    assert plan["w"].axes == KernelAxes((0,), (1,), (2,))
    adapters = trained(lora.init(jax.random.key(0), params, plan), 1)
    assert_trees_close(
        lora.lora_apply(fused)(params, adapters, x), fused(lora.merge(params, adapters), x), rtol=1e-5, atol=1e-5
    )


@jax.custom_vjp
def grouped(x, w):
    return jnp.einsum("etd,edk->etk", x, w)


grouped.defvjp(lambda x, w: (grouped(x, w), (x, w)), lambda r, g: (g @ r[1].mT, r[0].mT @ g))


def test_a_grouped_product_behind_a_derivative_of_its_own():
    """It is formed, and nothing shows how it is used: the plan says what is shared, and the rule what is not."""
    params, x = {"w": jnp.ones((3, 8, 4))}, jax.random.normal(jax.random.key(0), (3, 5, 8))
    fn = lambda p, x: grouped(x, p["w"])  # noqa: E731
    plans = [
        lora.plan(fn, params, x, rules={"w": lora.Lora(rank=2, stack=stack)}, materialize=True) for stack in (None, 0)
    ]
    assert "'w' [3, 8, 4]: axes 0 and 1 share one B." in str(plans[0])
    assert "share" not in str(plans[1])
    adapters = trained(lora.init(jax.random.key(0), params, plans[1]), 1)
    apply = lora.lora_apply(fn, materialize=True)
    gradient = jax.grad(lambda a: jnp.sum(apply(params, a, x)[1] ** 2))(adapters)["w"]
    assert all(jnp.any(array[1] != 0) and not jnp.any(array[jnp.array([0, 2])]) for array in (gradient.a, gradient.b))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (lora.Lora(2, stack=3), r"names the axis 3, and the weight has the axes 0 to 2"),
        (lora.Lora(2, stack=(0, -4)), r"names the axis -4"),
        (lora.Lora(2, stack=1), r"Lora\(rank=2, stack=1\) leaves no inputs to the matrices of the stack"),
        (lora.Ia3(stack=(0, 2)), r"Ia3\(stack=\(0, 2\)\) leaves no outputs"),
        (lora.Lora(9, stack=0), r"with stack 0, inputs 1, outputs 2: rank 9 is above min\(8, 4\)"),
    ],
)
def test_stacks_that_do_not_fit(rule, says):
    with pytest.raises(lora.LoraError, match=says):
        lora.plan(
            lambda p, x: jnp.einsum("td,edk->tek", x, p["w"]), {"w": jnp.ones((3, 8, 4))}, jnp.ones((5, 8)),
            rules={"w": rule},
        )  # fmt: skip


@pytest.mark.parametrize("stack", ["0", 1.5, True, (0, 0), ("e",), {0}])
@pytest.mark.parametrize("kind", [lora.Lora, lora.Vera, lora.Dora, lora.Lokr])
def test_what_no_stack_is(kind, stack):
    with pytest.raises(lora.LoraError, match=rf"{kind.__name__}\(stack=.*an axis of the weight, such as 0"):
        kind(rank=2, stack=stack)


def test_a_convolution_has_no_stack():
    x, w = jnp.ones((2, 6, 6, 4)), jnp.ones((3, 3, 4, 5))
    conv = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    with pytest.raises(lora.LoraError, match=r"uses it with inputs 0 1 2, outputs 3, but its adapter was made for st"):
        lora.plan(conv, {"w": w}, x, rules={"w": lora.Lora(rank=2, stack=0)})


# Experts in files -----------------------------------------------------------------------------------------------------

KEY_MAP = KeyMap(experts("up", "model.mlp.experts.up_proj"), experts("down", "model.mlp.experts.down_proj"))
EXPERTS = {
    name: jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate({"up": (4, 8, 6), "down": (4, 6, 8), "router": (8, 4)}.items())
}


def all_experts(p, x):
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("tef,efd,te->td", h, p["down"], jax.nn.softmax(x @ p["router"]))


def dispatched(p, x):
    h = jax.nn.silu(jnp.einsum("etd,edf->etf", jnp.broadcast_to(x, (4, *x.shape)), p["up"]))
    return jnp.einsum("etf,efd->etd", h, p["down"]).sum(0)


@pytest.mark.parametrize("fn", [all_experts, dispatched])
def test_experts_are_exported_one_by_one(fn, tmp_path):
    """However the program multiplies by them; read again, the files give the same adapters and the same outputs."""
    x = jax.random.normal(jax.random.key(3), (10, 8))
    plan = lora.plan(fn, EXPERTS, x, rules={"up|down": lora.Lora(rank=2, alpha=3, stack=0)})
    adapters = trained(lora.init(jax.random.key(0), EXPERTS, plan), 1)
    change = np.asarray(lora.merge(EXPERTS, adapters)["down"] - EXPERTS["down"])
    assert [np.linalg.matrix_rank(change[e], rtol=1e-3) for e in range(4)] == [2] * 4
    lora.save_peft(tmp_path / "adapter", adapters, KEY_MAP)
    found, _ = lora.load_peft(tmp_path / "adapter", plan, KEY_MAP)
    assert {path: adapter.axes for path, adapter in found.items()} == {path: a.axes for path, a in adapters.items()}
    assert_trees_close(lora.merge(EXPERTS, found), lora.merge(EXPERTS, adapters), rtol=1e-6, atol=1e-6)
    assert_trees_close(
        lora.lora_apply(fn)(EXPERTS, found, x), fn(lora.merge(EXPERTS, adapters), x), rtol=1e-4, atol=1e-4
    )
    lora.checkpoint.save(tmp_path / "own", adapters)
    assert_trees_equal(lora.checkpoint.load(tmp_path / "own")[0], adapters)


def test_experts_with_a_shared_factor_are_told_of_the_stack(tmp_path):
    x = jnp.ones((10, 8))
    shared = lora.plan(all_experts, EXPERTS, x, rules={"up|down": lora.Lora(rank=2)})
    with pytest.raises(lora.LoraError, match=r"'down' has stack 0.* by the key map.*has inputs 0 1, .*stack=0\)"):
        lora.save_peft(tmp_path / "adapter", lora.init(jax.random.key(0), EXPERTS, shared), KEY_MAP)
    apart = lora.plan(all_experts, EXPERTS, x, rules={"up|down": lora.Lora(rank=2, stack=0)})
    lora.save_peft(tmp_path / "adapter", lora.init(jax.random.key(0), EXPERTS, apart), KEY_MAP)
    with pytest.raises(lora.LoraError, match=r"by the plan.*stack=0\)"):
        lora.load_peft(tmp_path / "adapter", shared, KEY_MAP)


def test_adapters_made_by_hand(tmp_path):
    """With axes of one's own, and no plan."""
    axes, x = KernelAxes(stack=(0,), inputs=(1,), outputs=(2,)), jax.random.normal(jax.random.key(3), (10, 8))
    adapters = {n: lora.Lora(rank=2).factors(jax.random.key(1), EXPERTS[n].shape, axes) for n in ("up", "down")}
    adapters = trained(adapters, 1)
    found = lora.lora_apply(all_experts)(EXPERTS, adapters, x)
    assert_trees_close(found, all_experts(lora.merge(EXPERTS, adapters), x), rtol=1e-4, atol=1e-4)


def test_rules_that_name_a_stack():
    assert lora.Lora(2, stack=0) == lora.Lora(2, stack=(0,)) != lora.Lora(2)
    assert str(lora.Vera(2, stack=[0, 1])) == "Vera(rank=2, seed=0, stack=(0, 1))"
    assert str(lora.Dora(2, stack=-1)) == "Dora(rank=2, stack=-1)"
    assert hash(lora.Lokr(2, stack=[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert re.search("stack", str(lora.Ia3(stack=0)))


def test_training_moves_the_experts_that_are_used():
    """Adam on a loss of expert 1 alone, by a program that multiplies by all of them at once."""
    x = jax.random.normal(jax.random.key(3), (10, 8))
    plan = lora.plan(all_experts, EXPERTS, x, rules={"up|down": lora.Lora(rank=2, stack=0)})
    adapters, optimizer = lora.init(jax.random.key(0), EXPERTS, plan), lora.freeze_base(optax.adam(1e-2))
    apply = lora.lora_apply(lambda p, x: jnp.einsum("td,edf->tef", x, p["up"])[:, 1])
    before = jax.tree.map(np.array, adapters)
    step = lora.jit_step(lambda a, p, x: jnp.mean(apply(p, a, x) ** 2), optimizer)
    state = lora.TrainState.create(adapters, optimizer)
    for _ in range(2):
        state, _ = step(state, EXPERTS, x)
    moved = jax.tree.map(lambda a, b: np.asarray(a) != b, state.trainable, before)
    for factor in (moved["up"].a, moved["up"].b):
        assert factor.any(axis=(1, 2)).tolist() == [False, True, False, False]
