"""Trees with packed weights among arrays, and what is asked of packed weights that they cannot do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import MODELS, assert_trees_close, total, trained

import lora_jax as lora
from lora_jax import bases

FORMATS = {"nf4": bases.Nf4(), "nf4_single": bases.Nf4(double=False), "int8": bases.Int8(), "fp8": bases.Fp8()}


def linear(params, x):
    return x @ params["w"] + params["b"][None]


def packed_linear(format=FORMATS["nf4"]):
    w = jax.random.normal(jax.random.key(0), (64, 8))
    base, x = bases.quantize({"w": w, "b": jnp.ones(8)}, {"w": format}), jnp.ones((3, 64))
    plan = lora.plan(linear, base, x, rules={"w": lora.Lora(rank=2)})
    return base, trained(lora.init(jax.random.key(1), base, plan), 2), x


@pytest.mark.parametrize("adapted", ["w1", "w2", "w1|w2"])
@pytest.mark.parametrize("packed", ["w1", "w2", "w1|w2"])
def test_dense_and_packed_weights_stand_side_by_side(packed, adapted):
    """Adapted and not, whichever of them is packed."""
    case = next(c for c in MODELS if c.name == "two_layers")
    base, x = bases.quantize(case.params(), {packed: bases.Int8()}), case.input()
    adapters = trained(
        lora.init(jax.random.key(0), base, lora.plan(case.fn, base, x, rules={adapted: lora.Lora(rank=2)})), 1
    )
    apply = lora.lora_apply(case.fn)
    both = jax.jit(lambda base: jax.value_and_grad(lambda adapters: total(apply(base, adapters, x)))(adapters))
    assert_trees_close(both(base), both(bases.dense(base)), rtol=1e-5, atol=1e-5)
    merged = lora.merge(base, adapters)
    assert_trees_close(bases.dense(merged), lora.merge(bases.dense(base), adapters), rtol=1e-6, atol=1e-6)
    left = [path for path in packed.split("|") if path not in adapters]
    assert all(merged[path] is base[path] for path in left)


def test_a_packed_weight_among_the_other_arguments_is_what_the_function_makes_of_it():
    base, adapters, x = packed_linear()

    def fn(params, x, other):
        return linear(params, x) + x @ other.dense()

    found = lora.lora_apply(fn)(base, adapters, x, base["w"])
    expected = lora.lora_apply(linear)(base, adapters, x) + x @ base["w"].dense()
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


WAYS = {
    "grad": lambda f: jax.grad(lambda p: f(p).sum(), allow_int=True),
    "vjp": lambda f: lambda p: jax.vjp(f, p),
    "jit": lambda f: jax.grad(jax.jit(lambda p: f(p).sum()), allow_int=True),
    "remat": lambda f: jax.grad(jax.checkpoint(lambda p: f(p).sum()), allow_int=True),
    "scan": lambda f: jax.grad(
        lambda p: jax.lax.scan(lambda c, _: (c + f(p).sum(), None), 0.0, length=2)[0], allow_int=True
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_packed_base_has_no_derivative(way):
    base, adapters, x = packed_linear()
    apply = lora.lora_apply(linear)
    with pytest.raises(lora.LoraError, match="'w' is packed, and something differentiates with respect to it"):
        WAYS[way](lambda base: apply(base, adapters, x))(base)
    with pytest.raises(lora.LoraError, match="'w' is packed, and something differentiates with respect to it"):
        WAYS[way](lambda base: apply(base, {}, x))(base)


@pytest.mark.parametrize("format", FORMATS)
def test_no_format_has_one(format):
    """Floats of 8 bits look as if they had; of integers JAX itself says no."""
    base, adapters, x = packed_linear(FORMATS[format])
    kind, says = (lora.LoraError, "'w' is packed") if format == "fp8" else (TypeError, "grad requires real")
    with pytest.raises(kind, match=says):
        jax.grad(lambda base: lora.lora_apply(linear)(base, adapters, x).sum())(base)


def test_what_stands_beside_it_has_one():
    """The adapters, x, and arrays of the same tree, in every way of differentiating."""
    base, adapters, x = packed_linear()
    apply = lora.lora_apply(linear)

    def loss(bias, adapters, x, w):
        return jnp.square(apply({"w": w, "b": bias}, adapters, x)).sum()

    by = functools.partial(jax.grad, argnums=(0, 1, 2))
    expected = by(loss)(base["b"], adapters, x, base["w"].dense())
    scanned = lambda *args: jax.lax.scan(lambda c, _: (c + loss(*args) / 2, None), 0.0, length=2)[0]  # noqa: E731
    for fn in (loss, jax.jit(loss), jax.checkpoint(loss), scanned):
        assert_trees_close(by(fn)(base["b"], adapters, x, base["w"]), expected, rtol=1e-4, atol=1e-4)
    _, forward = jax.jvp(lambda bias: loss(bias, adapters, x, base["w"]), (base["b"],), (jnp.ones(8),))
    assert_trees_close(forward, expected[0].sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "part", "array"),
    [
        ("nf4", "scales", jnp.zeros((3, 8), jnp.uint8)),
        ("nf4", "codes", jnp.zeros((64, 4), jnp.float32)),
        ("int8", "scales", jnp.ones(7)),
        ("int8", "q", jnp.zeros((32, 2, 8), jnp.int8)),
    ],
)
def test_packed_arrays_that_do_not_fit_each_other(format, part, array):
    base, _, x = packed_linear(FORMATS[format])
    broken = base | {"w": dataclasses.replace(base["w"], **{part: array})}
    for call in (
        lambda: lora.plan(linear, broken, x, rules={"w": lora.Lora(rank=2)}),
        lambda: lora.lora_apply(linear)(broken, {}, x),
    ):
        with pytest.raises(lora.LoraError, match=rf"'w' is a .* do not fit each other, .*{part}.*Pack it again"):
            call()
