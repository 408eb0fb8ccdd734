"""Rows brought into another order: values, derivatives and `vmap`, and no scatter in any of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations, normal

from lora_jax.core.moved import moved

N, T, P = 3, 5, 7
PLACES = np.array([[6, 0, 3, 7, 2], [7, 7, 7, 7, 7], [4, 5, 0, 1, 2]], np.int32)  # 7 is no place
X, CT = jnp.asarray(normal((0,), (N, T, 2))), jnp.asarray(normal((1,), (N, P, 2)))


def sources(places):
    """The row in each place, by the definition."""
    found = np.full(P, T, np.int32)
    for row, place in enumerate(places):
        if place < P:
            found[place] = row
    return found


SOURCES = np.stack([sources(places) for places in PLACES])


def by_rows(x, places):
    """Each row put where it goes, one after the other."""
    y = np.zeros((P, *x.shape[1:]), np.float32)
    for row, place in zip(np.asarray(x), places, strict=True):
        if place < P:
            y[place] = row
    return y


def back(ct, places):
    """The derivative: each row gets what was at its place."""
    return np.stack([ct[place] if place < P else np.zeros_like(ct[0]) for place in places])


WAYS = [axes for axes in itertools.product((0, None), repeat=2) if axes != (None, None)]


@pytest.mark.parametrize(("of_x", "of_order"), WAYS)
def test_values_and_derivatives_whatever_has_the_axis_of_members(of_x, of_order):
    args = [array if axis == 0 else array[0] for array, axis in ((X, of_x), (SOURCES, of_order), (PLACES, of_order))]

    def both(x, source, place, ct):
        run = lambda x: moved(x, source, place)  # noqa: E731
        y, pull = jax.vjp(run, x)
        return y, pull(ct)[0], jax.jvp(run, (x,), (2 * x,))[1]

    mapped = jax.jit(jax.vmap(both, (of_x, of_order, of_order, 0)))
    found = mapped(*args, CT)
    for i in range(N):
        x, places = X[i if of_x == 0 else 0], PLACES[i if of_order == 0 else 0]
        np.testing.assert_array_equal(found[0][i], by_rows(x, places))
        np.testing.assert_array_equal(found[1][i], back(np.asarray(CT[i]), places))
        np.testing.assert_array_equal(found[2][i], by_rows(2 * x, places))
    names = {eqn.primitive.name for eqn in equations(jax.make_jaxpr(mapped)(*args, CT))}
    assert not any("scatter" in name for name in names)
    assert "lora_moved" in names


def test_what_is_nowhere_has_no_derivative():
    run = jax.jit(jax.grad(lambda x: jnp.sum(jnp.where(x > 0, 1, 0) + 0 * moved(x, SOURCES[1], PLACES[1])[:1])))
    np.testing.assert_array_equal(run(X[0]), np.zeros((T, 2)))
