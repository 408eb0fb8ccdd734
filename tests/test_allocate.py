"""Ranks by importance: no others within the bounds have a higher sum of scores, and rules take them as they are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.initialization.rank_allocation import allocate_ranks, gradient_scores, input_scores

SIZES = {"a": 4, "b": 2, "c": 3, "d": 1}


def brute_force(scores, budget, least, most):
    """The highest sum of scores that any ranks have."""
    best = -1.0
    for ranks in itertools.product(*(range(least, min(len(own), most or len(own)) + 1) for own in scores.values())):
        if sum(ranks) == budget:
            best = max(best, sum(sum(sorted(own)[-r:]) for own, r in zip(scores.values(), ranks, strict=True)))
    return best


@pytest.mark.parametrize(("least", "most"), [(1, None), (1, 2), (1, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_ranks_are_better(seed, least, most):
    draw = np.random.default_rng(seed)
    kinds = (
        [draw.uniform(0, 1, n) for n in SIZES.values()],
        [draw.integers(0, 3, n) for n in SIZES.values()],
    )  # and ties
    for own in kinds:
        scores = dict(zip(SIZES, own, strict=True))
        most_of = {path: min(n, most or n) for path, n in SIZES.items()}
        for budget in range(least * len(SIZES), sum(most_of.values()) + 1):
            ranks = allocate_ranks(scores, budget, least=least, most=most)
            assert list(ranks) == list(SIZES)
            assert sum(ranks.values()) == budget
            assert all(least <= ranks[path] <= most_of[path] for path in SIZES)
            found = sum(sum(sorted(scores[path])[-rank:]) for path, rank in ranks.items())
            np.testing.assert_allclose(found, brute_force(scores, budget, least, most), rtol=1e-12)


def test_every_rank_is_at_least_the_least():
    scores = {"a": [9, 8, 7, 6], "b": [1, 1, 1], "c": [2, 2]}
    assert allocate_ranks(scores, 8, least=2) == {"a": 4, "b": 2, "c": 2}
    assert allocate_ranks(scores, 8, least=2, most=3) == {"a": 3, "b": 3, "c": 2}


def test_ties_go_by_the_order_of_paths_whatever_that_of_the_dict_is():
    scores = {"b": np.ones(3), "c": np.ones(3), "a": np.ones(3)}
    turned = dict(reversed(scores.items()))
    for budget, expected in [(4, (2, 1, 1)), (5, (2, 2, 1)), (6, (2, 2, 2)), (7, (3, 2, 2))]:
        ranks = allocate_ranks(scores, budget)
        assert tuple(ranks[path] for path in "abc") == expected
        assert allocate_ranks(turned, budget) == ranks


def test_a_higher_budget_takes_no_rank_away():
    draw = np.random.default_rng(0)
    scores = {path: draw.uniform(0, 1, n) for path, n in SIZES.items()}
    every = [allocate_ranks(scores, budget) for budget in range(4, 11)]
    for less, more in itertools.pairwise(every):
        assert all(less[path] <= more[path] for path in SIZES)


# A model with a stack of layers, and weights with several outputs or used the other way round.
LAYERS, D, HEADS, HEAD = 3, 6, 2, 5
SHAPES = {"heads": (D, HEADS, HEAD), "out": (4, D), "w": (LAYERS, D, D)}


def model(p, x):
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    x = x * jnp.einsum("td,dhk->thk", x, p["heads"]).sum((1, 2))[:, None]
    return jnp.einsum("td,kd->tk", x, p["out"])


def case():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {name: jax.random.normal(k, s) / 3 for k, (name, s) in zip(keys, SHAPES.items(), strict=True)}
    x = jax.random.normal(jax.random.key(1), (7, D))
    return params, x, lora.plan(model, params, x, rules={".*": lora.Lora(rank=1)})


def test_scores_of_gradients_are_squared_singular_values():
    params, x, plan = case()
    grads = jax.grad(lambda p: jnp.sum(jnp.square(model(p, x))))(params)
    scores = gradient_scores(plan, grads)
    matrices = {"heads": (1, D, HEADS * HEAD), "out": (1, 4, D), "w": (LAYERS, D, D)}
    for path, shape in matrices.items():
        g = np.asarray(grads[path], np.float64).reshape(shape)
        np.testing.assert_allclose(scores[path], np.mean(np.linalg.svd(g)[1] ** 2, axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(scores[path].sum(), np.sum(g**2) / shape[0], rtol=1e-5)


def test_scores_of_gradients_need_not_fit_fp32():
    params, _, plan = case()
    tiny = gradient_scores(plan, jax.tree.map(lambda w: 1e-30 * w, params))
    one = gradient_scores(plan, params)
    for path in SHAPES:
        np.testing.assert_allclose(tiny[path], 1e-60 * one[path], rtol=1e-3)


def test_scores_of_inputs_are_shares_of_the_variance():
    _, _, plan = case()
    x = {"heads": np.ones((9, D)), "out": np.eye(5, D), "w": np.zeros((LAYERS, 1, D))}
    x["w"][0, 0, 0] = 2.0
    scores = input_scores(plan, x)
    np.testing.assert_allclose(scores["heads"], [1, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(scores["out"], np.full(4, 1 / 5), rtol=1e-6)  # of min(d, k) = 4 components
    np.testing.assert_allclose(scores["w"], [1 / 3, 0, 0, 0, 0, 0], atol=1e-6)  # two layers have no inputs
    draw = np.random.default_rng(0).normal(size=(20, D)) * 0.7 ** np.arange(D)
    values = np.linalg.svd(draw)[1] ** 2
    np.testing.assert_allclose(input_scores(plan, x | {"heads": draw})["heads"], values / values.sum(), rtol=1e-5)


def test_ranks_are_those_of_eva():
    """Where nothing bounds EVA's ranks but the shapes."""
    params, _, _ = case()
    plan = lora.plan(model, params, jnp.ones((7, D)), rules={".*": lora.Lora(rank=3)})
    draw = np.random.default_rng(0)
    stacks = {"heads": (), "out": (), "w": (LAYERS,)}
    x = {path: draw.normal(size=(*s, 20, D)) * draw.uniform(0, 1, D) ** 3 for path, s in stacks.items()}
    started = lora.starts.eva(lora.init(jax.random.key(0), params, plan), x, rho=10.0)
    ranks = allocate_ranks(input_scores(plan, x), 9)
    assert ranks == {path: adapter.a.shape[-1] for path, adapter in started.items()}
    assert len(set(ranks.values())) > 1


def test_a_rule_takes_the_ranks():
    """A weight of stacked layers has one rank for all of them."""
    params, x, plan = case()
    scores = {"heads": [5, 4, 3, 1], "out": [2, 1, 0, 0], "w": [7, 6, 1]}
    ranks = allocate_ranks(scores, budget=3 * len(plan), most=4)
    assert ranks == {"heads": 4, "out": 2, "w": 3}
    plan = lora.plan(model, params, x, rules={".*": lora.Lora(rank=ranks, alpha=8)})
    adapters = lora.init(jax.random.key(0), params, plan)
    assert adapters["w"].a.shape == (LAYERS, D, 3)
    assert adapters["w"].b.shape == (LAYERS, 3, D)
    assert {path: a.scale for path, a in adapters.items()} == {path: 8 / ranks[path] for path in ranks}
    with pytest.raises(lora.LoraError, match=r"no rank was allocated to 'heads'; the nearest that have one: .*'w'"):
        lora.plan(model, params, x, rules={".*": lora.Lora(rank=allocate_ranks({"w": [1], "out": [1]}, 2))})


def test_what_is_trained_whole_has_no_scores():
    params, x = {"w": jnp.eye(4, 3), "b": jnp.zeros(3)}, jnp.ones((2, 4))
    rules = {"w": lora.Lora(rank=1), "b": lora.Full()}
    plan = lora.plan(lambda p, x: x @ p["w"] + p["b"][None], params, x, rules=rules)
    assert list(gradient_scores(plan, params)) == ["w"]
    assert list(input_scores(plan, {"w": x})) == ["w"]


@pytest.mark.parametrize("needs", [1, 2, 4])
def test_a_weight_whose_gradient_has_a_higher_rank_gets_a_higher_rank(needs):
    """The targets ask one weight for a change of rank `needs`, and the others for one of rank 1."""
    d, names = 8, ("one", "two", "three")
    draw = np.random.default_rng(0)
    params = {name: jnp.zeros((d, d)) for name in names}

    def change(rank):
        q, r = (np.linalg.qr(draw.normal(size=(d, d)))[0] for _ in range(2))
        return q[:, :rank] @ r[:rank]

    wanted = {name: change(needs if name == "two" else 1) for name in names}
    batches = [jnp.asarray(draw.normal(size=(64, d)), jnp.float32) for _ in range(4)]

    def fn(p, x):
        return jnp.stack([x @ p[name] for name in names])

    def loss(p, x):
        return jnp.mean(jnp.square(fn(p, x) - fn({name: jnp.asarray(w, x.dtype) for name, w in wanted.items()}, x)))

    grads = jax.tree.map(lambda *g: sum(g) / len(g), *(jax.grad(loss)(params, x) for x in batches))
    plan = lora.plan(fn, params, batches[0], rules={".*": lora.Lora(rank=1)})
    ranks = allocate_ranks(gradient_scores(plan, grads), budget=2 + needs)
    assert ranks == {"one": 1, "two": needs, "three": 1}


GOOD = {"a": [3, 2], "b": [1]}


def of_plan(score, found):
    _, _, plan = case()
    return score(plan, found)


WRONG = {
    "below one a weight": (
        lambda: allocate_ranks(GOOD, 1),
        r"budget=1.*2 weight\(s\) .* need 2 in all, and can have 3",
    ),
    "below the least": (lambda: allocate_ranks({"a": [1, 1], "b": [1, 1]}, 3, least=2), "need 4 in all"),
    "above the shapes": (lambda: allocate_ranks(GOOD, 4), "and can have 3: give a budget from 2 to 3"),
    "above most": (lambda: allocate_ranks(GOOD, 3, most=1), "and can have 2: give a budget from 2 to 2"),
    "half a rank": (lambda: allocate_ranks(GOOD, 2.5), "budget=2.5.*expected a whole number of at least 1"),
    "no least": (lambda: allocate_ranks(GOOD, 2, least=0), "least=0.*expected a whole number of at least 1"),
    "no most": (lambda: allocate_ranks(GOOD, 2, most=0), "most=0.*expected a whole number of at least 1"),
    "least above a shape": (
        lambda: allocate_ranks(GOOD, 4, least=2),
        "'b' can have a rank of at most 1: lower `least`",
    ),
    "least above most": (
        lambda: allocate_ranks(GOOD, 4, least=2, most=1),
        "least=2, most=1.*'a' can have a rank of at",
    ),
    "NaN": (
        lambda: allocate_ranks({"a": [1, np.nan]}, 1),
        r"scores\['a'\] are float64\[2\], expected one finite number",
    ),
    "infinite": (lambda: allocate_ranks({"a": [1, np.inf]}, 1), "expected one finite number of at least 0 for each"),
    "negative": (lambda: allocate_ranks({"a": [1, -1]}, 1), "expected one finite number of at least 0 for each"),
    "matrices": (lambda: allocate_ranks({"a": np.ones((2, 2))}, 1), r"scores\['a'\] are float64\[2, 2\], expected one"),
    "none for a weight": (lambda: allocate_ranks({"a": []}, 1), "'a' can have a rank of at most 0"),
    "none": (lambda: allocate_ranks({}, 1), r"scores \{path: \[n\]\} as lora.gradient_scores makes them, found \{\}"),
    "no plan": (lambda: gradient_scores({}, {}), "gradient_scores takes a plan, found a dict: make it with lora.plan"),
    "no gradient": (lambda: of_plan(gradient_scores, {"v": np.ones(2)}), "gradients has nothing for 'heads', .*'v'"),
    "another shape": (
        lambda: of_plan(gradient_scores, {name: np.ones((2, 2)) for name in SHAPES}),
        r"gradients\['heads'\] has shape \[2, 2\], expected \[6, 2, 5\]",
    ),
    "NaN in a gradient": (
        lambda: of_plan(gradient_scores, {name: np.full(s, np.nan) for name, s in SHAPES.items()}),
        r"gradients\['heads'\] holds a NaN",
    ),
    "no inputs": (lambda: of_plan(input_scores, {}), "inputs has nothing for 'heads'"),
    "inputs of a stack": (
        lambda: of_plan(input_scores, {name: np.ones((9, D)) for name in SHAPES}),
        r"inputs\['w'\] has shape \[9, 6\], expected \[3, n, 6\]",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls(wrong):
    call, message = WRONG[wrong]
    with pytest.raises(lora.LoraError, match=message):
        call()
