"""`lora.inspect` and `lora.diff`: numbers against those of the changes formed in full."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KINDS, MODELS

import lora_jax as lora

CASE = next(case for case in MODELS if case.name == "two_layers")
AXES = lora.KernelAxes((), (0,), (1,))


def noisy(tree, seed=0):
    """The same tree with normal numbers."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    """The norm is that of W' - W where W does not matter, and is not told where it does."""
    adapters = noisy(CASE.adapters(KINDS[kind]))
    zeros = jax.tree.map(jnp.zeros_like, CASE.params())
    found = lora.inspect(adapters)
    assert list(found) == sorted(adapters)
    for path, adapter in adapters.items():
        row = found[path]
        assert row.kind in lora.core.kinds.KINDS
        assert row.finite
        assert row.parameters == sum(array.size for name, array in adapter.arrays().items() if name != "ratio")
        if adapter.to_lora() is None and not isinstance(adapter, lora.FullAdapter):
            assert (row.norm, row.effective_rank, row.rank, row.scale) == (None, None, None, None)
            continue
        change = np.asarray(lora.merge(zeros, {path: adapter})[path], np.float64)
        np.testing.assert_allclose(row.norm, np.linalg.norm(change), rtol=1e-5)
        if row.rank is not None:
            assert sorted(row.shape) == sorted(change.shape)
            values = np.linalg.svd(change, compute_uv=False)
            shares = values[values > values[0] * 1e-6] / values.sum()
            np.testing.assert_allclose(row.effective_rank, np.exp(-(shares * np.log(shares)).sum()), rtol=1e-3)
    assert found.parameters == sum(row.parameters for row in found.values())
    assert repr(found) == str(found)
    assert len(str(found).splitlines()) == 2 + len(found) + 1


def test_trees_that_hold_adapters(tmp_path):
    adapters = noisy(CASE.adapters(lora.Lora(2)))
    expected = lora.inspect(adapters)
    state = lora.TrainState.create({"adapters": adapters, "head": jnp.ones(3)}, optax.adam(1e-3))
    assert [f"adapters/{path}" for path in expected] == list(lora.inspect(state))
    lora.checkpoint.save(tmp_path / "a", adapters, {"head": jnp.ones(3)})
    assert lora.inspect(lora.checkpoint.load(tmp_path / "a")) == expected
    assert lora.inspect(lora.with_dropout(adapters, jax.random.key(0))) == expected
    assert list(lora.inspect({"a": [adapters["w1"]], "b": jnp.ones(2)})) == ["a/0"]


def test_inspect_says_what_it_takes():
    adapters = CASE.adapters(lora.Lora(2))
    for wrong in (CASE.params(), {}, "runs/adapters", None):
        with pytest.raises(lora.LoraError, match=r"inspect takes adapters, found none in a .*lora.checkpoint.load"):
            lora.inspect(wrong)
    with pytest.raises(lora.LoraError, match=r"'w1' holds a \w*Tracer in the place of numbers: call inspect outside"):
        jax.jit(lora.inspect)(adapters)
    with pytest.raises(lora.LoraError, match=r"'w1' holds a ShapeDtypeStruct"):
        lora.inspect({path: target.abstract() for path, target in CASE.plan(lora.Lora(2)).items()})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_rank_of_a_merged_change_is_found_in_spite_of_rounding(dtype, stack):
    """In 16 bits rounding gives a merged weight's change the full rank; what is above it has that of the adapter."""
    rng = np.random.default_rng(0)
    axes = lora.KernelAxes((0,), (1,), (2,)) if stack else AXES
    a, b = rng.normal(size=(*stack, 48, 3)), rng.normal(size=(*stack, 3, 64))
    adapter = lora.LoraAdapter(*(jnp.asarray(x, jnp.float32) for x in (a, b)), axes, 0.5)
    base = {"w": jnp.asarray(rng.normal(size=(*stack, 48, 64)), dtype), "frozen": jnp.ones((4, 4), dtype)}
    tuned = lora.merge(base, {"w": adapter})
    found = lora.diff(base, tuned)
    assert (list(found), found.unchanged, found.mismatches) == (["w"], 1, {})
    change = np.asarray(tuned["w"], np.float64) - np.asarray(base["w"], np.float64)
    row = found["w"]
    assert (row.rank, row.shape) == (3, (*stack, 48, 64))
    np.testing.assert_allclose(row.norm, np.linalg.norm(change), rtol=1e-12)
    np.testing.assert_allclose(row.relative, row.norm / np.linalg.norm(np.asarray(base["w"], np.float64)), rtol=1e-12)
    assert row.largest == np.abs(change).max()
    values = np.linalg.svd(change.reshape(-1, 48, 64), compute_uv=False)
    shares = values / values.sum(-1, keepdims=True)
    np.testing.assert_allclose(row.effective_rank, np.exp(-(shares * np.log(shares)).sum(-1)).mean(), rtol=1e-6)
    assert lora.diff(base, tuned, ranks=False)["w"].rank is None
    assert [line.split()[0] for line in str(found).splitlines()] == ["weight", "------", "w", "1"]


def test_a_full_change_has_a_full_rank():
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)}
    tuned = {"w": base["w"] + 0.01 * jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)}
    assert lora.diff(base, tuned)["w"].rank == 8


def test_what_does_not_fit_is_said():
    base = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones(2), "n": jnp.array([1, jnp.nan]), "i": jnp.arange(3)}
    tuned = {
        "a": jnp.ones((3, 2)),
        "b": jnp.full(3, 2, jnp.bfloat16),
        "d": jnp.ones(2),
        "n": jnp.array([2, jnp.nan]),
        "i": jnp.arange(3).at[0].set(5),
    }
    found = lora.diff(base, tuned)
    assert found.mismatches == {
        "a": "shape [2, 3] in base and [3, 2] in tuned",
        "b": "float32 in base and bfloat16 in tuned",
        "c": "only in base",
        "d": "only in tuned",
    }
    assert list(found) == ["b", "i", "n"]
    assert (found["b"].largest, found["b"].rank, found["i"].largest) == (1.0, None, 5.0)
    assert np.isnan(found["n"].norm)
    assert found["n"].rank is None
    assert "'a': shape [2, 3] in base and [3, 2] in tuned." in str(found).splitlines()
    assert lora.diff({"z": jnp.zeros(2)}, {"z": jnp.ones(2)})["z"].relative == np.inf
    same = lora.diff(base, base)
    assert (len(same), same.unchanged, str(same)) == (0, 5, "0 weights changed, 5 did not.")


def test_packed_weights_and_keys_are_compared_too():
    base = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32), "key": jax.random.key(0)}
    packed = lora.bases.quantize(base, {"w": lora.bases.Int8(), "key": None})
    found = lora.diff(base, packed | {"key": jax.random.key(1)})
    assert list(found) == ["key", "w"]
    assert 0 < found["w"].relative < 0.02


def test_diff_says_what_it_takes():
    with pytest.raises(lora.LoraError, match=r"'w' is a str: call it outside of jax.jit on parameters"):
        lora.diff({"w": "x"}, {"w": jnp.ones(2)})
    with pytest.raises(lora.LoraError, match=r"'w' is a \w*Tracer"):
        jax.jit(lambda p: lora.diff(p, p))({"w": jnp.ones(2)})
