"""Trained rows of a table: nothing of the table's size is formed where it is looked up, or is the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, equations, formed, normal, total, trained

import lora_jax as lora

VOCABULARY, D, BATCH, TIME = 41, 12, 2, 5
INDICES = (3, 40, 17)
IDS = np.arange(BATCH * TIME).reshape(BATCH, TIME) * 17 % VOCABULARY  # some of the trained ones among them


def looked_up(p, x):
    return jnp.tanh(p["w"][IDS] + x)


def tied(p, x):
    return jnp.tanh(p["w"][IDS] + x) @ p["w"].T


def head(p, x):
    return jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x, p["w"]))


def vmapped_head(p, x):
    return jax.vmap(lambda x: p["w"] @ x.T)(x)


def one_row(p, x):
    return jnp.tanh(p["w"][jnp.argmax(x[0, 0])][None, None] + x) + p["w"][3][None, None]


def out_of_bounds(p, x):
    return p["w"].at[IDS + 30].get(mode="fill", fill_value=0.5) + p["w"].at[IDS + 30].get(mode="clip") * x


def part_of_the_table(p, x):
    return p["w"][2:20][IDS % 18] + x @ p["w"][10:].T[:, :D]


def in_a_scan(p, x):
    return jax.lax.scan(lambda x, ids: (jnp.tanh(x @ p["w"].T @ p["w"] + p["w"][ids][:, None]), None), x, IDS.T)[0]


def one_hot(p, x):
    return jax.nn.one_hot(IDS, VOCABULARY, dtype=x.dtype) @ p["w"] + x


def joined(p, x):
    return x @ jnp.concatenate([p["w"], p["w"][5:8]]).T


USES = [looked_up, tied, head, vmapped_head, one_row, out_of_bounds, part_of_the_table, in_a_scan, one_hot, joined]
THIN = [looked_up, tied, head, vmapped_head, one_row, out_of_bounds]


def transposed(fn):
    """The same for a table [d, vocabulary]."""

    def on_columns(p, x):
        return fn({"w": p["w"].T}, x)

    on_columns.__name__ = f"{fn.__name__} of columns"
    return on_columns


def case_of(fn, axis, dtype=jnp.float32):
    w = jnp.asarray(normal((0,), (VOCABULARY, D)), dtype)
    params, x = {"w": w if axis == 0 else w.T}, jnp.asarray(normal((1,), (BATCH, TIME, D)), dtype)
    plan = lora.plan(fn, params, x, rules={"w": lora.Rows(INDICES, axis=axis)})
    return params, trained(lora.init(jax.random.key(0), params, plan), 2), x


both_ways = pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.slow)])


@pytest.mark.parametrize("fn", USES, ids=lambda fn: fn.__name__)
@both_ways
@pytest.mark.sampled(5)
def test_applying_is_merging(fn, axis):
    fn = transposed(fn) if axis else fn
    params, adapters, x = case_of(fn, axis)
    apply = lora.lora_apply(fn)

    def both(a, p, x):
        factored = jax.value_and_grad(lambda a: total(apply(p, a, x)))(a)
        return factored, jax.value_and_grad(lambda a: total(fn(lora.merge(p, a), x)))(a)

    found, expected = jax.jit(both)(adapters, params, x)
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_bf16_head():
    params, adapters, x = case_of(tied, 0, jnp.bfloat16)
    found = lora.lora_apply(tied)(params, adapters, x)
    assert_trees_close(found, tied(lora.merge(params, adapters), x), rtol=3e-2, atol=0.2)


@pytest.mark.parametrize("fn", THIN, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("axis", [0, 1])
def test_nothing_of_the_tables_size_is_formed(fn, axis):
    """Nor anything that has an entry for each pair of a row of the table and a trained row."""
    fn = transposed(fn) if axis else fn
    params, adapters, x = case_of(fn, axis)
    apply = lora.lora_apply(fn)
    program = jax.make_jaxpr(jax.value_and_grad(lambda a, p, x: total(apply(p, a, x))))(adapters, params, x)
    assert formed(program, (VOCABULARY, D)) == []
    assert formed(program, (VOCABULARY, len(INDICES))) == []
    moved = [
        e for e in equations(program) if e.primitive.name == "transpose" and e.outvars[0].aval.size == VOCABULARY * D
    ]
    base = [e for e in equations(jax.make_jaxpr(fn)(params, x)) if e.primitive.name == "transpose"]
    assert len(moved) <= len(base), "the table is turned no more often than the program turns it"


def test_stacked_copies_of_a_table():
    """As gradient copies have them: the rows of each member are its own."""
    params, adapters, x = case_of(tied, 0)
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), adapters)
    apply = lora.lora_apply(tied)
    found = jax.vmap(apply, (None, 0, None))(params, many, x)
    for i in range(2):
        one = jax.tree.map(lambda a: a[i], many)  # noqa: B023
        assert_trees_close(found[i], tied(lora.merge(params, one), x), rtol=1e-4, atol=1e-4)
