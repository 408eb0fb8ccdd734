"""Mixed batches: each example with its own adapter of a bank is what it is by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, MODELS, RULES, Case, add, assert_trees_close, total

import lora_jax as lora
from lora_jax.core import slots as slots_module

SLOTS = 3
IDS = (2, -1, 0, 2, 1)


def bank_of(case: Case, rule) -> dict[str, lora.Adapter]:
    """Three adapters, which differ in every number."""
    adapters = case.adapters(rule)
    return jax.tree.map(lambda leaf: jnp.stack([leaf * (1 - 0.4 * i) for i in range(SLOTS)]), adapters)


def slot_of(bank, i: int):
    return jax.tree.map(lambda leaf: leaf[i], bank)


def one_by_one(case: Case, params, bank, ids, x):
    """The definition: a batch of each example with its own adapters, or none, and their results side by side."""
    apply = lora.lora_apply(case.fn)
    parts = [
        case.fn(params, x[i : i + 1]) if slot < 0 else apply(params, slot_of(bank, slot), x[i : i + 1])
        for i, slot in enumerate(ids)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def is_of_examples(case: Case) -> bool:
    """Whether the frozen program itself treats a batch as its examples one by one, and returns one result for each."""
    x, params = case.input(), case.params()
    shapes = [(1, *x.shape[1:]), x.shape]
    try:
        of_one, of_all = (
            jax.tree.leaves(jax.eval_shape(case.fn, params, jax.ShapeDtypeStruct(s, x.dtype))) for s in shapes
        )
    except (TypeError, ValueError):
        return False
    alike = [(one.shape[:1], one.shape[1:]) == ((1,), whole.shape[1:]) for one, whole in zip(of_one, of_all, strict=True)]
    if not all(alike) or len(x) != len(IDS):
        return False
    parts = [case.fn(params, x[i : i + 1]) for i in range(len(x))]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    close = jax.tree.map(
        lambda a, b: a.shape == b.shape and bool(jnp.allclose(a, b, rtol=1e-4, atol=1e-4)), together, case.fn(params, x)
    )
    return all(jax.tree.leaves(close))


cases = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
FEW = [case for case in MODELS if case.name in ("two_layers", "scan_over_remat", "embedding", "experts")]


def check(case: Case, rule, tolerance: float) -> None:
    params, bank, x = case.params(), bank_of(case, rule), case.input()
    apply = lora.lora_apply(case.fn)

    def mixed(bank, ids):
        return apply(params, lora.select(bank, ids), x)

    found = jax.jit(lambda bank, ids: (mixed(bank, ids), jax.grad(lambda b: total(mixed(b, ids)), allow_int=True)(bank)))(
        bank, jnp.array(IDS)
    )
    expected = one_by_one(case, params, bank, IDS, x)
    gradient = jax.jit(jax.grad(lambda b: total(one_by_one(case, params, b, IDS, x)), allow_int=True))(bank)
    assert_trees_close(found[0], expected, tolerance, tolerance)
    assert_trees_close(found[1], gradient, 10 * tolerance, 10 * tolerance)


@pytest.mark.sampled(8)
@cases
def test_a_mixed_batch_is_its_examples_one_by_one(case):
    if not is_of_examples(case):
        pytest.skip("the program itself mixes the examples of a batch")
    half = case.dtype != jnp.float32 or "16" in case.name
    check(case, RULES["lora"], 3e-2 if half else 1e-5)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_can_be_mixed(kind, case):
    if case.name == "embedding" and kind == "ia3":
        pytest.skip("no product, no gain")
    check(case, KINDS[kind], 3e-5)
