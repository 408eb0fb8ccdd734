"""One adapted product, forward, on a TPU v5e: x [2048, 4096] @ W [4096, 14336] and its adapter of rank 16."""

import cached
import jax
import jax.numpy as jnp
import programs
import pytest
from products import products

import lora_jax as lora

pytest.importorskip("libtpu", reason="libtpu is not installed: make test-compiled")

SHAPES = {"w": jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16)}
ROWS = jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)


def product(params, x):
    return x @ params["w"]


@pytest.fixture(scope="module")
def found():
    """Reports with an adapter and without."""
    mesh = lora.topology_mesh("v5e:2x2", data=4)
    params, x = lora.abstract(SHAPES, mesh), lora.abstract(ROWS, mesh)
    plan = lora.plan(product, params, x, rules={"w": lora.Lora(rank=16)})
    adapters = lora.abstract_state(params, plan, programs.OPTIMIZER).trainable
    adapted = cached.report(lora.lora_apply(product), params, adapters, x, topology="v5e:2x2")
    return adapted, cached.report(product, params, x, topology="v5e:2x2")


@pytest.mark.xfail(strict=True, reason="measured 1.34, bound 1.06: x @ W is written out and read again")
def test_an_adapted_product_takes_few_more_cycles(found):
    """In a step these passes are hidden beside others, or done by what follows: there it is 1.014."""
    adapted, plain = map(programs.cycles, found)
    assert adapted <= 1.06 * plain


def dtypes(report):
    """Of x, of the weight and of the result of each product."""
    return sorted(tuple(array.dtype for array in each) for each in products(report))


def test_factors_in_fp32_are_narrow_in_products_which_are_accumulated_in_fp32(found):
    adapted, plain = map(dtypes, found)
    assert plain == [("bf16", "bf16", "bf16")]
    assert adapted == [*plain, *[("bf16", "bf16", "f32")] * 2]


def test_an_adapted_product_keeps_one_array_beside_its_result(found):
    adapted, _ = found
    assert programs.temporary(adapted) <= 1.02 * 2048 * 14336 * 2
