"""Sums of every kind that has them: exact beside the sum of dense changes, in fp64 and one matrix at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapters.output_scaled import along_outputs

AXES = lora.KernelAxes((), (0,), (1,))
STACKED = lora.KernelAxes((1,), (2,), (0,))  # outputs, experts, inputs
SHAPES = {AXES: (6, 4), STACKED: (4, 2, 6)}
RULES = {
    "lora": lora.Lora(2, alpha=3),
    "rslora": lora.RsLora(3, alpha=2),
    "lora_fa": lora.LoraFa(2),
    "adalora": lora.AdaLora(2),
    "loha": lora.Loha(2),
    "lokr": lora.Lokr(1),
    "vera": lora.Vera(2),
    "dora": lora.Dora(2, alpha=5),
    "ia3": lora.Ia3(),
}


def weight(axes=AXES):
    return jax.random.normal(jax.random.key(3), SHAPES[axes])


def made(name, seed, axes=AXES):
    """An adapter that changes something: all that is trained is random."""
    adapter = RULES[name].among([(6, 4)]).init(jax.random.key(seed), weight(axes), axes)
    rng = np.random.default_rng(seed)
    arrays = {
        field: jnp.asarray(rng.normal(size=array.shape) + (field in ("m", "gain")), array.dtype)
        for field, array in adapter.arrays().items()
        if field not in adapter.frozen
    }
    return dataclasses.replace(adapter, **arrays)


def change(adapter, axes=AXES):
    """W' - W in fp64, by the formula of the kind: of DoRA and (IA)^3 by themselves, of others by A and B."""
    w = np.asarray(weight(axes), np.float64)
    n = len(axes.stack)
    order = [*axes.stack, *axes.inputs, *axes.outputs]
    canonical = w.transpose(order)
    if isinstance(adapter, lora.Ia3Adapter):
        return (canonical * (np.asarray(adapter.gain, np.float64) - 1)[..., None, :]).transpose(np.argsort(order))
    factors = adapter if isinstance(adapter, lora.DoraAdapter) else adapter.to_lora()
    a, b = (np.asarray(array, np.float64) for array in (factors.a, factors.b))
    ab = float(factors.scale) * a @ b
    assert a.ndim == n + 2
    if isinstance(adapter, lora.DoraAdapter):
        v = canonical + ab
        gain = np.asarray(adapter.m, np.float64) / np.linalg.norm(v, axis=n)
        ab = gain[..., None, :] * v - canonical
    return ab.transpose(np.argsort(order))


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


LINEAR = ("lora", "rslora", "lora_fa", "adalora", "loha", "lokr", "vera")


@pytest.mark.parametrize(
    ("names", "needs_base"),
    [
        pytest.param(LINEAR, False, marks=pytest.mark.slow),
        (("rslora", "lora"), False),
        (("ia3", "ia3"), False),
        (("dora", "dora"), True),
        (("lora", "dora", "ia3", "rslora"), True),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("axes", [AXES, STACKED], ids=["plain", "stacked"])
def test_sums_of_kinds(names, needs_base, axes):
    """Of several ranks and scales, with weights of both signs, below 1e-6 of the sum."""
    terms = [(made(name, i, axes), (-0.7) ** i * 1.3) for i, name in enumerate(names)]
    parts = [({"w": adapter}, factor) for adapter, factor in terms]
    expected = sum(factor * change(adapter, axes) for adapter, factor in terms)
    total = lora.combine(parts, params={"w": weight(axes)} if needs_base else None)["w"]
    assert total.kernel_shape() == SHAPES[axes]
    assert relative(change(total, axes), expected) < 1e-6
    if needs_base:
        with pytest.raises(lora.LoraError, match=r"'w': the change of Dora.* combine\(parts, params=params\)"):
            lora.combine(parts)


def test_the_sum_of_lengths_is_what_is_applied():
    """In a program too; and of one term with the weight 1 it is the adapter itself."""
    one, other = {"w": made("dora", 1)}, {"w": made("dora", 2)}
    params, x = {"w": weight()}, jnp.ones((2, 6))
    apply = lora.lora_apply(lambda p, x: x @ p["w"])
    total = lora.combine([(one, 0.5), (other, -2.0)], params=params)
    expected = np.asarray(x, np.float64) @ (
        np.asarray(weight(), np.float64) + 0.5 * change(one["w"]) - 2 * change(other["w"])
    )
    np.testing.assert_allclose(apply(params, total, x), expected, rtol=1e-4, atol=1e-4)
    alone = lora.combine([(one, 1.0)], params=params)
    assert relative(change(alone["w"]), change(one["w"])) < 1e-6


def test_an_output_that_is_taken_away_is_refused():
    """And so are numbers that fp32 cannot hold."""
    with pytest.raises(lora.LoraError, match="'w' has a sum that float32 cannot hold"):
        lora.combine([({"w": made("dora", 1)}, 1.0), ({"w": made("lora", 1)}, 3e38)], params={"w": weight()})
    gone = dataclasses.replace(made("ia3", 1), gain=jnp.zeros(4))
    with pytest.raises(lora.LoraError, match="'w': with these weights nothing is left of an output of W"):
        lora.combine([({"w": gone}, 1.0), ({"w": made("lora", 0)}, 1.0)], params={"w": weight()})


# Parts ----------------------------------------------------------------------------------------------------------------


def test_sums_of_whole_arrays():
    """Of biases, and of a weight that another part changes by factors, or by lengths."""
    bias = lora.FullAdapter(jnp.arange(4.0), lora.KernelAxes((), (), (0,)))
    full = lora.FullAdapter(jnp.ones((6, 4)), lora.KernelAxes((), (), (0, 1)))
    low, dora = made("rslora", 1), made("dora", 2)
    total = lora.combine([({"w": low, "bias": bias}, 2.0), ({"w": full, "bias": bias}, -0.5)])
    np.testing.assert_allclose(total["bias"].delta, 1.5 * np.arange(4))
    assert relative(np.asarray(total["w"].delta), 2 * change(low) - 0.5) < 1e-6
    total = lora.combine([({"w": full}, 2.0), ({"w": dora}, -0.5)], params={"w": weight()})
    assert relative(np.asarray(total["w"].delta), 2 - 0.5 * change(dora)) < 1e-6
    with pytest.raises(lora.LoraError, match=r"'w': the change of a DoraAdapter depends on W\. Give the param"):
        lora.combine([({"w": full}, 2.0), ({"w": dora}, -0.5)])
    with pytest.raises(lora.LoraError, match=r"'w' has adapters for different weights, of shapes \[6, 4\] and \[4\]"):
        lora.combine([({"w": full}, 1.0), ({"w": bias}, 1.0)])


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_of_rows(axis):
    """Rows that both parts have, and rows that one has; W is only needed where the weights do not add up to 1."""
    w = weight()

    def rows(seed, *indices):
        values = jax.random.normal(jax.random.key(seed), (len(indices), w.shape[1 - axis]))
        return lora.RowsAdapter(values, AXES, indices, w.shape[axis], axis)

    one, other = rows(1, 3, 0), rows(2, 1, 3)
    total = lora.combine([({"w": one}, 0.5), ({"w": other}, -2.0)], params={"w": w})["w"]
    assert total.indices == (0, 1, 3)
    wide = np.moveaxis(np.asarray(w, np.float64), axis, 0)
    expected = np.zeros_like(wide)
    for adapter, factor in ((one, 0.5), (other, -2.0)):
        for i, value in zip(adapter.indices, adapter.values, strict=True):
            expected[i] += factor * (np.asarray(value, np.float64) - wide[i])
    assert relative(np.moveaxis(np.asarray(total.merge(w)), axis, 0) - wide, expected) < 1e-6
    between = lora.combine([({"w": rows(1, 3)}, 0.25), ({"w": rows(2, 3)}, 0.75)])["w"]
    np.testing.assert_allclose(between.values, 0.25 * rows(1, 3).values + 0.75 * rows(2, 3).values, rtol=1e-6)
    with pytest.raises(lora.LoraError, match="'w': Rows replace rows, and the weights of row 0 do not add up to 1"):
        lora.combine([({"w": one}, 0.5), ({"w": other}, -2.0)])
    with pytest.raises(lora.LoraError, match="'w' is a RowsAdapter beside another kind; sums"):
        lora.combine([({"w": one}, 0.5), ({"w": made("lora", 1)}, 0.5)])
    with pytest.raises(lora.LoraError, match=r"'w' has rows of different tables: \d along axis"):
        lora.combine([({"w": one}, 1.0), ({"w": dataclasses.replace(other, size=9)}, 1.0)])


# Weights that are learned ---------------------------------------------------------------------------------------------


def test_gradients_reach_the_weights():
    """Those of a linear function of the change are its values at the parts; one program serves all weights."""
    params = {"w": weight(), "bias": jnp.ones(4)}
    bias = lora.FullAdapter(jnp.arange(4.0), lora.KernelAxes((), (), (0,)))
    parts = [{"w": made("lora", 1), "bias": bias}, {"w": made("dora", 2)}]
    c = jax.random.normal(jax.random.key(5), (6, 4))

    @jax.jit
    @jax.grad
    def gradient(weights):
        total = lora.combine([(part, weights[i]) for i, part in enumerate(parts)], params=params)
        merged = lora.merge(params, total)
        return (c * merged["w"]).sum() + merged["bias"].sum()

    expected = [(c * change(part["w"])).sum() for part in parts]
    expected[0] += 6.0
    for weights in ([0.3, -1.5], [1.0, 0.1]):
        np.testing.assert_allclose(gradient(jnp.asarray(weights)), expected, rtol=1e-4)
    assert gradient._cache_size() == 1


def test_gradients_reach_the_weight_of_one_part():
    """Which is its scale alone, and a scale has no gradient of its own."""
    part = {"w": made("rslora", 1)}

    def size(factor):
        return lora.merge({"w": jnp.zeros((6, 4))}, lora.combine([(part, factor)]))["w"].sum()

    np.testing.assert_allclose(jax.grad(size)(0.5), change(part["w"]).sum(), rtol=1e-5)


@pytest.mark.parametrize("wrong", [jnp.ones(2), np.ones(2), jnp.ones((), jnp.int32)])
def test_weights_that_are_no_numbers(wrong):
    part = {"w": made("lora", 1)}
    with pytest.raises(lora.LoraError, match=r"combine: a weight is .*, expected a scalar of floats, such as"):
        jax.jit(lambda factor: lora.combine([(part, factor)]))(wrong)
    if wrong.ndim:
        with pytest.raises(lora.LoraError, match=r"combine: a weight is .*expected a finite number"):
            lora.combine([(part, wrong)])


def test_stacks_of_adapters():
    """Members are added up one by one, each with a weight of its own."""
    members = [{"w": made("lora", seed)} for seed in (1, 2)]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *members)
    with pytest.raises(lora.LoraError, match="'w' is a stack of 2 adapters: add them up one by one"):
        lora.combine([(stack, 0.5)])
    shared = {"w": made("rslora", 3)}
    weights = jnp.asarray([0.5, -1.0])
    found = jax.vmap(lambda a, factor: lora.combine([(a, factor), (shared, 2.0)]))(stack, weights)
    for i, member in enumerate(members):
        mine = jax.tree.map(lambda array, i=i: array[i], found)["w"]
        expected = float(weights[i]) * change(member["w"]) + 2 * change(shared["w"])
        assert relative(change(mine), expected) < 1e-6


def test_what_wraps_an_adapter_is_no_part_of_its_change():
    parts = [({"w": made(name, 1)}, 0.5) for name in ("lora", "dora")]
    key = jax.random.key(0)
    under = [(lora.with_dropout(adapters, key, rate=0.5), factor) for adapters, factor in parts]
    params = {"w": weight()}
    found, expected = lora.combine(under, params=params), lora.combine(parts, params=params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_adapters_of_other_parameters():
    with pytest.raises(lora.LoraError, match="there is an adapter for 'w', but the parameters have no such path"):
        lora.combine([({"w": made("lora", 1)}, 1.0)], params={"v": weight()})
    three = lora.Ia3().init(jax.random.key(0), jnp.ones((6, 3)), AXES)
    with pytest.raises(lora.LoraError, match=r"'w' has adapters for different weights: \[6, 4\].* and \[6, 3\]"):
        lora.combine([({"w": made("ia3", 1)}, 1.0), ({"w": three}, 1.0)])


def test_along_outputs_is_what_the_formula_here_says():
    """So that the oracle above is right about which axis a gain is for."""
    gain = jnp.arange(4.0)
    np.testing.assert_array_equal(along_outputs(gain, AXES)[0], gain)


def test_a_packed_base():
    """Is unpacked where a change depends on it."""
    w = jax.random.normal(jax.random.key(0), (64, 4))
    packed = lora.bases.quantize({"w": w}, {"w": lora.bases.Nf4()})
    dora = lora.Dora(2).init(jax.random.key(1), w, AXES)
    found, expected = (
        lora.combine([({"w": dora}, 0.5)], params=params)["w"] for params in (packed, {"w": packed["w"].dense()})
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
