"""Ragged products under `vmap`: the axis of members goes into the rows, and no member has a base of its own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations, total, trained

import lora_jax as lora
from lora_jax.core import ragged
from lora_jax.core.ragged import ragged_product

N, T, E, D, K = 3, 10, 4, 6, 5
X, W = jax.random.normal(jax.random.key(0), (N, T, D)), jax.random.normal(jax.random.key(1), (N, E, D, K))
SIZES = jnp.array([[2, 3, 0, 5], [1, 1, 1, 1], [10, 0, 0, 0]], jnp.int32)  # of the second, six rows are in no group


def by_rows(x, w, sizes):
    """One row after the other, in float64."""
    y = np.zeros((T, K))
    for row, group in enumerate(np.repeat(np.arange(E), sizes)):
        y[row] = np.asarray(x[row], np.float64) @ np.asarray(w[group], np.float64)
    return y


ways = [axes for axes in itertools.product((0, None), repeat=3) if axes != (None,) * 3]


@pytest.mark.parametrize("axes", ways, ids=str)
def test_whatever_has_the_axis(axes):
    """Values and both gradients, against one row after the other and JAX's own product."""
    args = [array if axis == 0 else array[0] for array, axis in zip((X, W, SIZES), axes, strict=True)]
    both = jax.value_and_grad(lambda x, w, sizes, f: jnp.sum(jnp.sin(f(x, w, sizes))), (0, 1))
    values = jax.jit(jax.vmap(ragged_product, axes))(*args)
    found = jax.jit(jax.vmap(lambda *a: both(*a, ragged_product), axes))(*args)
    alone = jax.jit(lambda *a: both(*a, jax.lax.ragged_dot))
    for i in range(N):
        own = [array if axis is None else array[i] for array, axis in zip(args, axes, strict=True)]
        np.testing.assert_allclose(values[i], by_rows(*own), rtol=1e-4, atol=1e-5)
        value, gradients = alone(*own)
        np.testing.assert_allclose(found[0][i], value, rtol=1e-4)
        for one, expected in zip(found[1], gradients, strict=True):
            np.testing.assert_allclose(one[i], expected, rtol=1e-4, atol=1e-5)


def test_members_as_further_groups():
    """What TPUs do, with rows of no group among them."""
    how = {"precision": None, "wide": None}
    y = jax.jit(lambda: ragged._product_of_groups(X, W, SIZES, contract=1, **how))()
    grams = jax.jit(lambda: ragged._gram_of_groups(X, jnp.sin(y), SIZES, **how))()
    for i in range(N):
        np.testing.assert_allclose(y[i], by_rows(X[i], W[i], SIZES[i]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        grams, jax.jit(lambda: ragged._gram(X, jnp.sin(y), SIZES, **how))(), rtol=1e-4, atol=1e-4
    )
    for i in range(N):
        start, own = 0, np.asarray(grams[i])
        for group, size in enumerate(np.asarray(SIZES[i])):
            rows = slice(start, start + size)
            np.testing.assert_allclose(own[group], X[i, rows].T @ np.sin(y[i, rows]), rtol=1e-3, atol=1e-4)
            start += size


def test_vmap_of_vmap():
    twice = jax.jit(jax.vmap(jax.vmap(ragged_product, (0, None, 0)), (0, None, None)))
    both = jax.jit(jax.vmap(jax.vmap(ragged_product, (0, 0, 0)), (None, 0, None)))
    found, others = twice(jnp.stack([X, 2 * X]), W[0], SIZES), both(X, jnp.stack([W, -W]), SIZES)
    for i in range(N):
        np.testing.assert_allclose(found[1, i], 2 * by_rows(X[i], W[0], SIZES[i]), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(others[1, i], -by_rows(X[i], W[i], SIZES[i]), rtol=1e-4, atol=1e-5)


def test_second_derivatives():
    """JAX has none of its own here: against products of each group."""
    x, w, sizes = X[0], W[0], SIZES[0]
    groups = np.repeat(np.arange(E), sizes)
    one = lambda w: jnp.sum(jnp.sin(ragged_product(x, w, sizes)))  # noqa: E731
    by_group = lambda w: jnp.sum(jnp.sin(jnp.einsum("td,tdk->tk", x, w[groups])))  # noqa: E731
    found, expected = (jax.jit(jax.grad(lambda w, f=f: jnp.sum(jax.grad(f)(w) ** 3)))(w) for f in (one, by_group))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def mixture(p, x):
    """Experts chosen by each member's own hidden state; the second ones are frozen."""
    x = x @ p["in"]
    logits = x @ p["router"]
    chosen = jnp.argmax(logits, -1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.sum(jax.nn.one_hot(chosen, E, dtype=jnp.int32), 0, dtype=jnp.int32)
    h = jnp.tanh(jax.lax.ragged_dot(x[order], p["up"], sizes))
    return jnp.zeros_like(x).at[order].set(jax.lax.ragged_dot(h, p["down"], sizes))


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_a_mixture_of_experts_for_all_members_at_once(scanned):
    """Routing differs by member. Base experts take part in one product each, of all members' rows."""
    shapes = {"in": (D, D), "router": (D, E), "up": (E, D, K), "down": (E, K, D)}
    params = {n: jax.random.normal(jax.random.key(i), s) / 2 for i, (n, s) in enumerate(shapes.items())}
    if scanned:
        params = jax.tree.map(lambda a: jnp.stack([a, -a]), params)
    fn = (lambda p, x: jax.lax.scan(lambda x, w: (mixture(w, x), None), x, p)[0]) if scanned else mixture
    rules = [{"in|router|up": lora.Lora(rank, alpha=4)} for rank in (1, 3, 2)]
    plans = [lora.plan(fn, params, X[0], rules=rule) for rule in rules]
    members = [trained(lora.init(jax.random.key(i), params, plan), i) for i, plan in enumerate(plans)]
    apply = lora.lora_apply(fn)
    gradient = lambda p, a, x: jax.value_and_grad(lambda a: total(apply(p, a, x)))(a)  # noqa: E731
    together = jax.vmap(gradient, in_axes=(None, 0, 0))
    found, alone = jax.jit(together)(params, lora.stack(members), X), jax.jit(gradient)
    for i, member in enumerate(members):
        value, own = alone(params, member, X[i])
        np.testing.assert_allclose(found[0][i], value, rtol=1e-4)
        rank = own["up"].a.shape[-1]
        np.testing.assert_allclose(found[1]["up"].a[i, ..., :rank], own["up"].a, rtol=1e-3, atol=1e-4)
    products = [
        [e for e in equations(jax.make_jaxpr(f)(params, *args)) if e.primitive.name == "lora_ragged_product"]
        for f, args in ((gradient, (members[0], X[0])), (together, (lora.stack(members), X)))
    ]
    of_base = [[e for e in eqns if e.invars[1].aval.shape in ((E, D, K), (E, K, D))] for eqns in products]
    assert len(of_base[0]) == len(of_base[1]) >= 3
    assert {e.invars[0].aval.shape[0] for e in of_base[1]} == {N * T}
