"""Adapters merged into packed weights: packed again in their own format, and what that loses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, eight_devices, trained

import lora_jax as lora
from lora_jax import bases

FORMATS = {"nf4": bases.Nf4(), "nf4_single": bases.Nf4(double=False), "int8": bases.Int8(), "fp8": bases.Fp8()}
PLAIN, STACKED = lora.KernelAxes((), (0,), (1,)), lora.KernelAxes((0,), (1,), (2,))


def adapter(shape, axes=PLAIN, size=0.1, rank=2):
    stack, inputs, outputs = axes.sizes(shape)
    a, b = jax.random.split(jax.random.key(3))
    factors = jax.random.normal(a, (*stack, *inputs, rank)), jax.random.normal(b, (*stack, rank, *outputs))
    return lora.LoraAdapter(*(size * factor for factor in factors), axes, 2.0)


def normal(shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), shape, dtype)


def by_hand(weight, found):
    """What packing loses of the change, in fp64; and the weight that the adapter makes."""
    w, a, b = (np.asarray(array, np.float64) for array in (weight.dense(), found.a, found.b))
    change = found.scale * np.matmul(a, b)
    return w + change, lambda kept: np.linalg.norm(np.asarray(kept, np.float64) - w - change) / np.linalg.norm(change)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("axes", [PLAIN, STACKED], ids=["matrix", "stack"])
def test_a_merged_weight_is_packed_as_it_was(format, axes):
    shape = (3, 64, 20) if axes.stack else (64, 20)
    base = bases.quantize({"w": normal(shape), "other": normal((64, 64))}, {".*": FORMATS[format]})
    adapters = {"w": adapter(shape, axes)}
    merged, losses = bases.merge(base, adapters)
    expected, lost = by_hand(base["w"], adapters["w"])
    again = bases.quantize({"w": jnp.asarray(expected, jnp.float32)}, {"w": FORMATS[format]})["w"]
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    for name, array in again.arrays().items():
        kept = np.asarray(merged["w"].arrays()[name], np.float32)
        np.testing.assert_allclose(kept, np.asarray(array, np.float32), rtol=1e-5, atol=1e-5)
    assert list(losses) == ["w"]
    assert losses["w"] == pytest.approx(lost(merged["w"].dense()), rel=1e-3)
    assert merged["other"] is base["other"]


def test_what_is_dense_stays_dense():
    """Rounded once to its dtype; and every kind of adapter merges as it does into arrays."""
    case = next(c for c in MODELS if c.name == "two_layers")
    base = bases.quantize(case.params(), {"w1": bases.Int8()}) | {"w2": case.params()["w2"].astype(jnp.bfloat16)}
    for rule in (lora.Dora(rank=2), lora.Loha(rank=2)):
        plan = lora.plan(case.fn, base, case.input(), rules={case.pattern: rule})
        adapters = trained(lora.init(jax.random.key(0), base, plan), 1)
        merged, losses = bases.merge(base, adapters)
        whole = lora.merge(base, adapters)
        assert merged["w2"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(merged["w2"], whole["w2"])
        assert 0 < losses["w2"] < 0.1
        step = np.abs(whole["w1"]).max(0, keepdims=True) / 127
        assert (np.abs(merged["w1"].dense() - whole["w1"]) <= step / 2 * 1.001).all()
        assert merged["b"] is base["b"]


def test_an_adapter_that_changes_nothing_leaves_the_weight_as_it_is():
    base = bases.quantize({"w": normal((64, 20))}, {"w": bases.Nf4()})
    fresh = dataclasses.replace(adapter((64, 20)), b=jnp.zeros((2, 20)))
    merged, losses = bases.merge(base, {"w": fresh}, donate=True)
    assert merged["w"] is base["w"]
    assert not merged["w"].codes.is_deleted()
    assert losses == {"w": 0.0}


def test_by_four_bits_more_is_lost_than_a_small_adapter_has_changed():
    base = bases.quantize({"w": normal((64, 64))}, {"w": bases.Nf4()})
    losses = [bases.merge(base, {"w": adapter((64, 64), size=size)})[1]["w"] for size in (0.05, 1.0)]
    assert losses[0] > 1 > losses[1]


def test_values_keep_their_dtype():
    base = bases.quantize({"w": normal((64, 64), jnp.bfloat16)}, {"w": bases.Nf4()})
    merged, losses = bases.merge(base, {"w": adapter((64, 64), size=0.5)})
    assert merged["w"].dtype == jnp.bfloat16
    _, lost = by_hand(base["w"], adapter((64, 64), size=0.5))
    assert losses["w"] == pytest.approx(lost(merged["w"].dense()), rel=1e-3)


def test_a_weight_is_packed_again_from_before_its_deferred_operations():
    w = normal((2, 32, 20))
    packed = bases.quantize({"w": w}, {"w": bases.Int8()})["w"]
    viewed = (
        packed.with_deferred("transpose", (1, 0))
        .with_deferred("reshape", (5, 4, 32))
        .with_deferred("cast", jnp.dtype(jnp.bfloat16))
    )
    change = adapter((2, 5, 4, 32), lora.KernelAxes((0,), (1, 2), (3,)), size=1.0)
    merged, losses = bases.merge({"w": viewed}, {"w": change})
    assert (merged["w"].shape, merged["w"].inner, merged["w"].deferred) == ((2, 5, 4, 32), (32, 20), viewed.deferred)
    whole = lora.merge({"w": viewed}, {"w": change})["w"]
    np.testing.assert_allclose(
        np.asarray(merged["w"].dense(), np.float32), np.asarray(whole, np.float32), atol=0.02 * float(abs(whole).max())
    )
    assert losses["w"] < 0.1


def test_donated_weights_are_gone():
    base = bases.quantize({"w": normal((64, 20)), "v": normal((64, 20))}, {".*": bases.Nf4()})
    base |= {"dense": normal((64, 20)), "host": np.ones((64, 20), np.float32)}
    merged, _ = bases.merge(base, {name: adapter((64, 20)) for name in ("w", "dense", "host")}, donate=True)
    assert all(array.is_deleted() for array in (*base["w"].arrays().values(), base["dense"]))
    assert not any(array.is_deleted() for array in jax.tree.leaves(merged))
    np.testing.assert_array_equal(base["host"], 1)


def test_a_merged_weight_is_where_it_was():
    mesh = eight_devices()
    stacked = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names[0]))
    base = jax.device_put(bases.quantize({"w": normal((8, 64, 20))}, {"w": bases.Nf4()}), stacked)
    change = {"w": adapter((8, 64, 20), STACKED)}
    merged, losses = bases.merge(base, change)
    assert all(array.sharding == stacked for array in merged["w"].arrays().values())
    here, expected = bases.merge(jax.device_put(base, jax.devices()[0]), change)
    np.testing.assert_allclose(merged["w"].dense(), here["w"].dense(), atol=1e-5)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_merged():
    base, change = bases.quantize({"w": normal((64, 20))}, {"w": bases.Nf4()}), {"w": adapter((64, 20))}
    with pytest.raises(lora.LoraError, match="'w' or its adapter is traced"):
        jax.jit(lambda change: bases.merge(base, change)[0])(change)
    with pytest.raises(lora.LoraError, match="adapter for 'v', but the parameters have no such path"):
        bases.merge(base, {"v": change["w"]})
    broken = {"w": dataclasses.replace(change["w"], a=change["w"].a.at[0, 0].set(jnp.inf))}
    with pytest.raises(lora.LoraError, match="'w' holds NaN or infinity once its adapter is merged"):
        bases.merge(base, broken)


FORMATS_AND_NONE = {**FORMATS, "dense": None}


@pytest.mark.parametrize("format", FORMATS_AND_NONE)
@pytest.mark.parametrize("what", ["a", "b", "ratio"])
def test_adapters_that_are_not_finite_are_refused_before_any_work(format, what):
    """Whatever is donated is still there."""
    base = bases.quantize({"v": normal((64, 20)), "w": normal((64, 20))}, {".*": FORMATS_AND_NONE[format]})
    sound = adapter((64, 20))
    for number in (np.nan, np.inf):
        factor = number if what == "ratio" else getattr(sound, what).at[0, 0].set(number)
        broken = dataclasses.replace(sound, **{what: factor})
        with pytest.raises(lora.LoraError, match="'w' holds NaN or infinity once its adapter is merged"):
            bases.merge(base, {"v": sound, "w": broken}, donate=True)
    assert not any(array.is_deleted() for array in jax.tree.leaves(base))


@pytest.mark.parametrize("format", ["dense", "int8", "nf4"])
def test_what_overflows_its_dtype_is_refused(format):
    w = jnp.full((64, 64), 6e4, jnp.float16)
    base = bases.quantize({"v": w + 0, "w": w}, {".*": FORMATS_AND_NONE[format]})
    large = lora.LoraAdapter(jnp.ones((64, 1)), jnp.full((1, 64), 1e4), PLAIN, 1.0)
    small = dataclasses.replace(large, b=large.b / 100)
    with pytest.raises(lora.LoraError, match=r"'w' overflows float16 .* largest \|W'\| is .*e\+04, expected at most"):
        bases.merge(base, {"v": small, "w": large}, donate=True)
    assert not any(array.is_deleted() for array in jax.tree.leaves(base))
    merged, losses = bases.merge(base, {"v": small}, donate=True)
    assert bool(jnp.isfinite(bases.dense(merged)["v"]).all())
    assert np.isfinite(losses["v"])
