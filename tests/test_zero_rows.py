"""Calls with no rows at all: the last batch of an epoch, an expert that no token goes to, a device without work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, RULES, assert_trees_close, total, trained

import lora_jax as lora

D, K = 8, 6
ALL = {"lora": RULES["lora"]} | KINDS | {"rows": lora.Rows((1,))}


def dense(p, x):
    return x @ p["w"]


def heads(p, x):
    return jnp.einsum("btd,dhk->bthk", x, p["w"])


def experts(p, x):
    return jnp.einsum("etd,edk->etk", x, p["w"])


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def convolution(p, x):
    return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


def grouped_convolution(p, x):
    return jax.lax.conv_general_dilated(
        x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )


def transposed_convolution(p, x):
    return jax.lax.conv_transpose(
        x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel=True
    )


def ragged(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.array([0, 0], jnp.int32))


def lookup(p, x):
    return p["w"][x]


# The program, the shape of W, and the shape of x with all its axes of rows, in which 0 stands for nothing.
PROGRAMS = {
    "dense": (dense, (D, K), (0, D)),
    "no time": (dense, (D, K), (3, 0, D)),
    "heads": (heads, (D, 2, 3), (0, 5, D)),
    "experts": (experts, (2, D, K), (2, 0, D)),
    "scanned": (scanned, (3, D, D), (0, D)),
    "convolution": (convolution, (3, D, K), (0, 5, D)),
    "grouped convolution": (grouped_convolution, (3, D // 2, K), (0, 5, D)),
    "transposed convolution": (transposed_convolution, (3, K, D), (0, 5, D)),
    "ragged": (ragged, (2, D, K), (0, D)),
    "lookup": (lookup, (D, K), (0,)),
    "lookup of a grid": (lookup, (D, K), (3, 0)),
}
often = {("dense", "lokr"), ("convolution", "lora"), ("lookup", "lora")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in often else pytest.mark.slow)
        for name in PROGRAMS
        for kind in ALL
        if kind != "rows" or name in ("dense", "no time", "lookup", "lookup of a grid")
    ],
)
def test_no_rows_are_planned_applied_and_differentiated(name, kind):
    fn, shape, of_x = PROGRAMS[name]
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    x = jnp.zeros(of_x, int if "lookup" in name else jnp.float32)
    some = jnp.zeros(3, int) if "lookup" in name else x  # JAX leaves out a look-up of nothing
    plan = lora.plan(fn, params, some, rules={"w": ALL[kind]})
    adapters = trained(lora.init(jax.random.key(1), params, plan), 2)
    apply = lora.lora_apply(fn)

    def both(f):
        return jax.value_and_grad(lambda a: total(f(a)))(adapters)

    found = both(lambda a: apply(params, a, x))
    assert_trees_close(found, both(lambda a: fn(lora.merge(params, a), x)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))
    out, expected = apply(params, adapters, x), fn(params, x)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    dropped = lora.with_dropout(adapters, jax.random.key(3), 0.5)
    assert apply(params, dropped, x).shape == expected.shape
