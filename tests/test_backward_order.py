"""Inside a remat, an adapter's part of the backward pass waits until the layer was made again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.core._compat import Literal, open_jaxpr
from lora_jax.core.backward_order import awaited

L, T, D, R = 2, 8, 4, 3  # layers, rows, width, rank


def layer(x, w):
    return jnp.tanh(x) @ w, None


def model(params, x):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, params["w"])[0] ** 2)


@pytest.fixture(scope="module")
def given():
    params = {"w": jax.random.normal(jax.random.key(0), (L, D, D))}
    x = jax.random.normal(jax.random.key(1), (T, D))
    rules = {"w": lora.Lora(rank=R)}
    adapters = lora.init(jax.random.key(2), params, lora.plan(model, params, x, rules=rules))
    return params, jax.tree.map(lambda leaf: leaf + 0.1, adapters), x


def remats(jaxpr):
    """Yield the programs of all remats that are left of a derivative."""
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                inner, _ = open_jaxpr(value)
                if eqn.primitive.name in ("checkpoint", "remat2") and eqn.params["differentiated"]:
                    yield inner
                yield from remats(inner)


def is_thin(eqn):
    """Whether it is a product over r that gives an array of x's shape: h B or dh A^T."""
    if eqn.primitive.name != "dot_general" or eqn.outvars[0].aval.shape != (T, D):
        return False
    [axis] = eqn.params["dimension_numbers"][0][0]
    return eqn.invars[0].aval.shape[axis] == R


def made_of(jaxpr, eqn):
    """Return the names of all operations that an equation's operands are computed by."""
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    rest, names = list(eqn.invars), set()
    while rest:
        v = rest.pop()
        if not isinstance(v, Literal) and v in made_by:
            names.add(made_by[v].primitive.name)
            rest += made_by.pop(v).invars
    return names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_with_a_in_the_backward_pass_waits_for_x(given, dtype):
    params, adapters, x = given
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
    gradient = jax.make_jaxpr(jax.grad(lambda a, x: lora.lora_apply(model)(params, a, x), (0, 1)))(adapters, x)
    [body] = remats(open_jaxpr(gradient)[0])
    thin = [eqn for eqn in body.eqns if is_thin(eqn)]
    assert thin
    for eqn in thin:
        assert "tanh" in made_of(body, eqn)


def test_awaited_is_the_identity_in_all_derivatives():
    h, t = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))

    def cube(h):
        return jnp.sum(awaited(h) ** 3)

    np.testing.assert_array_equal(awaited(h), h)
    np.testing.assert_array_equal(jax.grad(cube)(h), 3 * h**2)
    np.testing.assert_array_equal(jax.jvp(cube, (h,), (t,))[1], jnp.sum(3 * h**2))
    np.testing.assert_array_equal(jax.jvp(jax.grad(cube), (h,), (t,))[1], 6 * h)
    np.testing.assert_array_equal(jax.grad(lambda h: jnp.sum(jax.grad(cube)(h)))(h), 6 * h)
    np.testing.assert_array_equal(jax.grad(lambda h: jax.jvp(cube, (h,), (t,))[1])(h), 6 * h)
    np.testing.assert_array_equal(jax.vmap(jax.grad(cube))(h), 3 * h**2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(cube), 1, 1))(h), 3 * h**2)


def test_a_gradient_that_is_not_asked_for_is_not_computed():
    program = jax.make_jaxpr(jax.grad(lambda b: jnp.sum(awaited(jnp.ones((2, 3))) @ b)))(jnp.ones((3, 2)))
    assert "lora_awaits" not in str(program)
