"""Products in any orientation: random einsums of a kernel and an activation, against merging by hand."""

import string

import jax
import jax.numpy as jnp
import numpy as np
from helpers import merge_by_hand, trained
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora


@st.composite
def products(draw):
    """An einsum, the shapes of its two operands, and which of the kernel's axes are stacked, inputs and outputs."""
    letters = iter(string.ascii_lowercase)
    sizes = {}

    def axes(least, most):
        chosen = [next(letters) for _ in range(draw(st.integers(least, most)))]
        sizes.update({letter: draw(st.integers(1, 3)) for letter in chosen})
        return chosen

    stack, inputs, outputs, rows = axes(0, 2), axes(1, 2), axes(1, 2), axes(0, 2)
    kernel = draw(st.permutations(stack + inputs + outputs))
    x = draw(st.permutations(stack + inputs + rows))
    y = draw(st.permutations(stack + rows + outputs))
    operands = [kernel, x] if draw(st.booleans()) else [x, kernel]
    spec = ",".join("".join(operand) for operand in operands) + "->" + "".join(y)
    groups = tuple(tuple(sorted(kernel.index(letter) for letter in group)) for group in (stack, inputs, outputs))
    return spec, operands[0] is kernel, [sizes[a] for a in kernel], [sizes[a] for a in x], lora.KernelAxes(*groups)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(products())
def test_products_in_any_orientation(product):
    spec, on_left, kernel_shape, x_shape, axes = product

    def fn(params, x):
        return jnp.einsum(spec, *((params["w"], x) if on_left else (x, params["w"])), precision="highest")

    params = {"w": jax.random.normal(jax.random.key(0), kernel_shape)}
    x = jax.random.normal(jax.random.key(1), x_shape)
    plan = lora.plan(fn, params, x, rules={"w": lora.Lora(rank=1, alpha=2)})
    assert plan["w"].axes == axes
    adapters = trained(lora.init(jax.random.key(2), params, plan), key=3)
    merged = {"w": jnp.asarray(merge_by_hand(params["w"], adapters["w"]), jnp.float32)}
    found = jax.jit(lora.lora_apply(fn))(params, adapters, x)
    np.testing.assert_allclose(found, jax.jit(fn)(merged, x), rtol=1e-4, atol=1e-4)
