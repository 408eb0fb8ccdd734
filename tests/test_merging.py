"""Ways to merge adapters: against slow formulas, entry by entry, and against what HF PEFT wrote."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_truncation import adapter, dense, nearest

import lora_jax as lora
from lora_jax.algebra import knots
from lora_jax.algebra.compose import METHODS
from lora_jax.algebra.sparsify import keyed
from lora_jax.core.paths import path_key

FIXTURE = load_file(Path(__file__).parent / "data" / "peft" / "merges.safetensors")
AXES = lora.KernelAxes((), (0,), (1,))
HEADS = lora.KernelAxes((2,), (1,), (0, 3))  # outputs 0, inputs, experts, outputs 1
WEIGHTS = (0.7, -0.3, 1.2)
KEY = jax.random.key(4)


def parts(shape=(6, 5), axes=AXES, ranks=(2, 3, 2)):
    """Of several ranks and scales."""
    return [
        ({"w": adapter(shape, axes, rank, seed, scale=0.5 + seed)}, WEIGHTS[seed]) for seed, rank in enumerate(ranks)
    ]


# The methods, one entry after another ---------------------------------------------------------------------------------


def pruned(change, density):
    """The largest entries: a sort of all of them."""
    entries = sorted(np.ndindex(change.shape), key=lambda at: -abs(change[at]))
    kept = np.zeros_like(change)
    for at in entries[: int(density * change.size)]:
        kept[at] = change[at]
    return kept


def elected(changes, voters, majority):
    total = np.zeros_like(changes[0])
    for at in np.ndindex(total.shape):
        votes = [voter[at] if majority == "total" else np.sign(voter[at]) for voter in voters]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [change[at] for change, voter in zip(changes, voters, strict=True) if np.sign(voter[at]) == sign]
        total[at] = sum(agree) / len(agree) if agree else 0.0
    return total


def expected(changes, weights, method, density, majority="total", masks=None):
    kept = [
        pruned(change, density) if masks is None else change * masks[i] / density for i, change in enumerate(changes)
    ]
    weighted = [weight * change for weight, change in zip(weights, kept, strict=True)]
    return elected(weighted, weighted, majority) if "ties" in method else sum(weighted)


def masks_of(shape, density, count, number=0):
    """As DARE's: by the key, the path, the number of the matrix and that of the part."""
    keys = [jax.random.fold_in(path_key(KEY, "w"), number)] * count
    return [jax.random.bernoulli(keyed(key, i), density, shape) for i, key in enumerate(keys)]


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", ["magnitude_prune", "dare", "ties", "dare_ties"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_merged_changes(method, density, majority):
    """The full rank gives the merged change itself; a smaller one the nearest to it."""
    given = parts()
    if "ties" not in method and majority == "frequency":
        with pytest.raises(lora.LoraError, match="this method elects no signs; leave majority out"):
            lora.compose(given, method, density=density, majority=majority, rank=2, key=KEY)
        return
    changes = [dense(adapters["w"])[0] for adapters, _ in given]
    masks = masks_of((6, 5), density, 3) if "dare" in method else None
    wanted = expected(changes, WEIGHTS, method, density, majority, masks)
    for rank in (2, 5):
        found = lora.compose(given, method, density=density, majority=majority, rank=rank, key=KEY)["w"]
        assert found.a.shape == (6, rank)
        np.testing.assert_allclose(dense(found)[0], nearest(wanted, rank), atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "knots_ties"])
def test_stacked_matrices_are_merged_one_by_one(method):
    """As those of layers apart."""
    shape = (2, 6, 3, 2)
    given = parts(shape, HEADS)
    together = lora.compose(given, method, density=0.4, rank=3)["w"]
    for i in range(3):
        alone = []
        for adapters, weight in given:
            one = adapters["w"]
            a, b = one.a[i], one.b[i].reshape(one.a.shape[-1], 4)
            alone.append(({"w": lora.LoraAdapter(a, b, AXES, one.ratio)}, weight))
        found = lora.compose(alone, method, density=0.4, rank=3)["w"]
        np.testing.assert_allclose(dense(together)[i], dense(found)[0], atol=1e-5)


def test_knots():
    """TIES of the coefficients in the basis of all changes: by the decomposition of the whole changes, side by side."""
    given = parts()
    changes = [dense(adapters["w"])[0] for adapters, _ in given]
    _, values, basis = np.linalg.svd(np.concatenate(changes), full_matrices=False)
    basis = basis[values > 1e-6]
    coefficients = [change @ basis.T for change in changes]
    wanted = expected(coefficients, WEIGHTS, "ties", 0.5) @ basis
    found = lora.compose(given, "knots_ties", density=0.5)["w"]
    np.testing.assert_allclose(dense(found)[0], wanted, atol=1e-5)
    small = lora.compose(given, "knots_ties", density=0.5, rank=2)["w"]
    np.testing.assert_allclose(dense(small)[0], nearest(wanted, 2), atol=1e-5)
    drawn = lora.compose(given, "knots_dare_ties", density=0.5, key=KEY)["w"]
    masks = masks_of(coefficients[0].shape, 0.5, 3)
    factors = [(float(one.scale) * np.asarray(one.a, np.float64), np.asarray(one.b, np.float64)) for one in
               (adapters["w"] for adapters, _ in given)]  # fmt: skip
    mine, own = knots.in_one_basis(factors)
    wanted = expected(mine, WEIGHTS, "dare_ties", 0.5, masks=masks) @ own
    np.testing.assert_allclose(dense(drawn)[0], wanted, atol=1e-5)


def test_sums_and_negation():
    """Exact, and truncated only if asked; taking a part away again leaves the others."""
    given = parts()
    total = lora.compose(given)["w"]
    assert total.a.shape[-1] == 7
    wanted = sum(weight * dense(adapters["w"])[0] for adapters, weight in given)
    np.testing.assert_allclose(dense(total)[0], wanted, atol=1e-5)
    found = {}
    small = lora.compose(given, energy=0.9, report=found.__setitem__)["w"]
    assert found["w"].rank == small.a.shape[-1] < 5
    np.testing.assert_allclose(dense(small)[0], nearest(wanted, found["w"].rank), atol=1e-5)
    back = lora.compose([({"w": total}, 1.0), (given[0][0], -0.7)], rank=5)["w"]
    np.testing.assert_allclose(dense(back)[0], wanted - 0.7 * dense(given[0][0]["w"])[0], atol=1e-5)


def test_whole_arrays_are_merged_entry_by_entry():
    axes = lora.KernelAxes((), (), (0,))
    deltas = [np.array([3.0, -1.0, 2.0, 0.5]), np.array([-1.0, -2.0, 4.0, 0.1])]
    given = [({"b": lora.FullAdapter(jnp.asarray(delta), axes)}, weight) for delta, weight in
             zip(deltas, (1.0, 0.5), strict=True)]  # fmt: skip
    found = lora.compose(given, "ties", density=0.5, rank=1)["b"]
    np.testing.assert_allclose(found.delta, expected(deltas, (1.0, 0.5), "ties", 0.5))
    low = {"b": adapter((6, 5), AXES, 2)}
    with pytest.raises(lora.LoraError, match="'b' has adapters of several kinds or shapes, which only method='sum'"):
        lora.compose([*given, (low, 1.0)], "ties", density=0.5, rank=1)
    with pytest.raises(lora.LoraError, match="'b' is a FullAdapter, and PEFT merges factors alone"):
        lora.compose(given, "linear", compat="peft")


def test_masks_depend_on_the_path_and_the_part_alone():
    """Other paths, and their order, change nothing; another key does."""
    given = parts()
    more = [({"v": adapters["w"], "w": adapters["w"]}, weight) for adapters, weight in given]
    one, other = (lora.compose(x, "dare", density=0.5, rank=5, key=KEY) for x in (given, more))
    np.testing.assert_array_equal(one["w"].a, other["w"].a)
    assert not np.allclose(dense(other["v"]), dense(other["w"]))
    changed = lora.compose(given, "dare", density=0.5, rank=5, key=jax.random.key(5))
    assert not np.allclose(dense(changed["w"]), dense(one["w"]))


def test_dare_keeps_the_mean():
    """Over many masks the sum of what is kept is the sum of changes."""
    given = parts((40, 30), ranks=(2, 2))
    wanted = sum(weight * dense(adapters["w"])[0] for adapters, weight in given)
    found = dense(lora.compose(given, "dare", density=0.5, rank=30, key=KEY)["w"])[0]
    zero = np.mean([np.isclose(found, 0, atol=1e-4).mean(), 0.25])
    assert 0.2 < zero < 0.3
    assert abs(found.mean() - wanted.mean()) < 4 * wanted.std() / np.sqrt(wanted.size)
    projected = (found * wanted).sum() / (wanted * wanted).sum()
    assert 0.85 < projected < 1.15


# HF PEFT --------------------------------------------------------------------------------------------------------------


def of_peft(name):
    """A and B as PEFT has them: [r, in] and [out, r]."""
    return lora.LoraAdapter(jnp.asarray(FIXTURE[f"{name}.A"].T), jnp.asarray(FIXTURE[f"{name}.B"].T), AXES, 1.0)


@pytest.mark.parametrize(
    ("name", "factors"),
    [("linear", True), ("cat", True), ("svd", False), ("ties", True), ("ties_freq", True), ("ties_svd", False),
     ("magnitude_prune", True), ("magnitude_prune_svd", False)],
)  # fmt: skip
def test_what_peft_wrote(name, factors):
    """Its factors for methods that work on them, the change for those that decompose it."""
    method = name.removesuffix("_freq")
    options = {"density": 0.5} if "ties" in name or "magnitude" in name else {}
    options |= {"majority": "frequency"} if name == "ties_freq" else {}
    given = [({"w": of_peft("a")}, 0.7), ({"w": of_peft("b")}, -0.3)]
    found = lora.compose(given, method, compat="peft", **options)["w"]
    if factors:
        np.testing.assert_allclose(found.a, FIXTURE[f"{name}.A"].T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.b, FIXTURE[f"{name}.B"].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dense(found)[0], (FIXTURE[f"{name}.B"] @ FIXTURE[f"{name}.A"]).T, atol=1e-5)


def test_the_exact_sum_is_that_of_cat_alone():
    """Of what PEFT calls linear the cross terms are no small thing."""
    given = [({"w": of_peft("a")}, 0.7), ({"w": of_peft("b")}, -0.3)]
    exact = dense(lora.combine(given)["w"])
    np.testing.assert_allclose(dense(lora.compose(given, "cat", compat="peft")["w"]), exact, atol=1e-6)
    linear = dense(lora.compose(given, "linear", compat="peft")["w"])
    assert np.linalg.norm(linear - exact) > 0.5 * np.linalg.norm(exact)
    alone = dense(lora.compose(given[:1], "ties", density=0.5, compat="peft")["w"])
    np.testing.assert_allclose(alone, 0.7 * dense(of_peft("a")), atol=1e-6)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("tie", {}, r"compose\(method='tie'\): expected one of sum, magnitude_prune, dare, ties"),
        ("ties_svd", {}, "expected one of sum, .*, which has compat='peft'"),
        ("sum", {"compat": "peft"}, "expected one of linear, .*; leave compat out for this one"),
        ("sum", {"compat": "mergekit"}, r"compose\(compat='mergekit'\): expected 'peft' or None"),
        ("sum", {"density": 0.5}, "this method keeps all entries; leave density out"),
        ("sum", {"rank": 2, "iterations": 3}, "is truncated exactly, by its factors: leave iterations out"),
        ("ties", {"rank": 2}, "keeps a share of the entries of each change: give density=0.5"),
        ("ties", {"rank": 2, "density": 0}, "density=0.: expected a share above 0 and at most 1"),
        ("ties", {"rank": 2, "density": 1.5}, "expected a share above 0 and at most 1"),
        ("ties", {"rank": 2, "density": float("nan")}, "expected a share above 0 and at most 1"),
        ("ties", {"rank": 2, "density": "all"}, "expected a share above 0 and at most 1"),
        ("ties", {"rank": 2, "density": 0.01}, "density=0.01 keeps none of 30 entries: give at least 0.033"),
        ("ties", {"density": 0.5}, r"compose\(method='ties'\)\(rank=None, energy=None\): give one of them"),
        ("ties", {"density": 0.5, "rank": 2, "majority": "most"}, "expected 'total' or 'frequency'"),
        ("dare", {"density": 0.5, "rank": 2}, "draws random numbers: give it key="),
        ("dare", {"density": 0.5, "rank": 2, "key": 3}, "`key` is 3, expected a random key"),
        ("linear", {"compat": "peft", "rank": 2}, "works on factors, as PEFT has it: leave rank"),
        ("linear", {"compat": "peft"}, r"'w' has adapters of the ranks \[2, 3, 2\], and 'linear' adds up factors of"),
    ],
)
def test_options_that_do_not_fit(method, options, says):
    with pytest.raises(lora.LoraError, match=says):
        lora.compose(parts(), method, **options)


def test_parts_that_do_not_fit():
    options = {"density": 0.5, "rank": 2}
    one, other = {"w": adapter((6, 5), AXES, 2)}, {"w": adapter((6, 4), AXES, 2)}
    with pytest.raises(lora.LoraError, match="expected one part at least"):
        lora.compose([], "ties", **options)
    with pytest.raises(lora.LoraError, match=r"compose\(\[.*: `parts` is a dict|adapters, {path: adapter}"):
        lora.compose(one, "ties", **options)
    with pytest.raises(lora.LoraError, match="compose: a weight is nan"):
        lora.compose([(one, float("nan"))], "ties", **options)
    with pytest.raises(lora.LoraError, match="'w' has adapters for different weights"):
        lora.compose([(one, 1.0), (other, 1.0)], "ties", **options)
    dora = lora.Dora(2).init(KEY, jnp.ones((6, 5)), AXES)
    with pytest.raises(lora.LoraError, match="'w' is a DoraAdapter, whose change has no entries to choose from"):
        lora.compose([({"w": dora}, 1.0)], "ties", **options)
    with pytest.raises(lora.LoraError, match="'w' holds infinity or NaN"):
        lora.compose([({"w": dataclasses.replace(one["w"], a=one["w"].a * jnp.nan)}, 1.0)], "ties", **options)
    with pytest.raises(lora.LoraError, match="'w' is traced, and only method='sum' can be"):
        jax.jit(lambda adapters: lora.compose([(adapters, 1.0)], "ties", **options))(one)


def test_methods_are_documented():
    assert all(f'"{name}"' in lora.compose.__doc__ for name in METHODS)


def test_the_figures_of_the_page():
    """In small: sums are exact where they claim to be, and compressed ones as near as a rank can be."""
    from benchmarks import algebra

    c = algebra.Config(size=24, rank=2)
    errors = algebra.sums(c)
    assert max(errors["combine"], errors["PEFT's cat"], algebra.sum_of_lengths(c)) < 1e-6
    assert errors["PEFT's linear"] > 0.1
    for _, left_out, least, distance in algebra.smaller(c):
        np.testing.assert_allclose(left_out, least, atol=1e-6)
        assert distance < 1e-6
    shares = algebra.held(c, (2, 4, 12))
    assert all(found == sorted(found) for found in shares.values())
    assert shares["sum"][-1] > 1 - 1e-9
    assert shares["knots_ties"][-1] > 1 - 1e-9
    assert shares["ties"][-1] < 1 - 1e-3
