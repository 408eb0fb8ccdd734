"""What packing changes: reported for each weight, and said aloud where it is more than half of a block."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import eight_devices
from jax import NamedSharding, P
from jax.sharding import AxisType

import lora_jax as lora
from lora_jax import bases
from lora_jax.bases import change, in_parts

FORMATS = {"nf4": bases.Nf4(), "nf4_single": bases.Nf4(double=False), "int8": bases.Int8(), "fp8": bases.Fp8()}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def uneven(rows=512, columns=64):
    """A kernel of which a few outputs are a thousand times smaller than their neighbours."""
    w = normal(rows, columns)
    w[:, 3:5] /= 1000
    return w


def report(params, rules, **rest):
    """The packed tree and what was reported of it, whatever is warned of."""
    changes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.LoraWarning)
        return bases.quantize(params, rules, report=changes.__setitem__, **rest), changes


def by_hand(w, packed, blocks):
    """The relative error of the whole and of the worst block, each block by itself, in float64."""
    before, after = (np.asarray(jnp.asarray(a, jnp.float32), np.float64) for a in (w, packed.dense()))
    worst = 0.0
    for one, other in zip(blocks(before), blocks(after), strict=True):
        error, norm = np.linalg.norm(other - one), np.linalg.norm(one)
        worst = max(worst, 0.0 if error == 0 else error / norm)
    return np.linalg.norm(after - before) / np.linalg.norm(before), worst


def of_64(stack):
    """Blocks of 64 along the first axes of a matrix that hold whole ones, or of all of it, the first axis last."""

    def blocks(w):
        n = next((n for n in range(1, w.ndim - stack) if np.prod(w.shape[stack : stack + n]) % 64 == 0), 1)
        as_torch = np.moveaxis(w, range(stack, stack + n), range(-n, 0))
        matrices = as_torch.reshape(int(np.prod(w.shape[:stack])), -1)
        return [m[i : i + 64] for m in matrices for i in range(0, len(m), 64)]

    return blocks


def of_outputs(stack, inputs):
    def blocks(w):
        s, i = w.shape[:stack], w.shape[stack : stack + inputs]
        columns = w.reshape(int(np.prod(s)), int(np.prod(i)), -1).transpose(0, 2, 1)
        return columns.reshape(-1, int(np.prod(i)))

    return blocks


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(64, 128), (10, 12), (3, 7, 64), (2, 3, 50), (2, 8, 4, 16)])
def test_the_report_is_the_error_of_each_block(format, shape):
    w = normal(*shape) * 3.0 ** np.arange(shape[-1])[::-1] if shape == (10, 12) else normal(*shape)
    w = w.astype(np.float32)
    stack = len(shape) - 2
    blocks = of_64(stack) if "nf4" in format else of_outputs(stack, 1)
    packed, changes = report({"w": w, "b": np.ones(3, np.float32)}, {"w": FORMATS[format]})
    assert list(changes) == ["w"]
    np.testing.assert_allclose(changes["w"], by_hand(w, packed["w"], blocks), rtol=2e-4)
    if shape[0] == 2 and len(shape) == 4 and "nf4" not in format:
        packed, changes = report({"w": w}, {"w": type(FORMATS[format])(stack=1, inputs=2)})
        np.testing.assert_allclose(changes["w"], by_hand(w, packed["w"], of_outputs(1, 2)), rtol=2e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_the_report_does_not_depend_on_the_size_of_numbers(size):
    w = normal(64, 64)
    for format in FORMATS.values():
        one, other = (report({"w": a}, {"w": format})[1]["w"] for a in (w, (w * size).astype(np.float32)))
        np.testing.assert_allclose(other, one, rtol=1e-3)


def test_numbers_that_a_format_has_are_not_changed():
    w = np.zeros((64, 64), np.float32)
    assert report({"w": w}, {"w": bases.Nf4()})[1]["w"] == (0, 0)
    again = report({"w": bases.dense(report({"w": normal(64, 64)}, {"w": bases.Int8()})[0])["w"]}, {"w": bases.Int8()})
    assert max(again[1]["w"]) < 1e-6


def test_small_blocks_beside_large_ones_are_told_of():
    """As bitsandbytes does, `Nf4()` makes them many times too large; exact scales do not."""
    params = {"sound": normal(64, 512), "uneven": uneven(), "too": uneven(256, 64)}
    with pytest.warns(lora.LoraWarning) as caught:
        packed = bases.quantize(params, {".*": bases.Nf4()})
    [warning] = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert "2 weight(s)" in text
    assert "'sound'" not in text
    size = np.linalg.norm(np.asarray(packed["uneven"].dense())[:, 3]) / np.linalg.norm(params["uneven"][:, 3])
    assert size > 2, "the fault that is told of"
    _, worst = by_hand(params["uneven"], packed["uneven"], of_64(0))
    assert f"'uneven': a block by {worst:.2f} of its norm" in text
    assert "lora.bases.Nf4(double=False)" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = {}
        bases.quantize(params, {".*": bases.Nf4(double=False)}, report=exact.__setitem__)
        assert max(change.block for change in exact.values()) < 0.35
        warnings.simplefilter("ignore", lora.LoraWarning)
        bases.quantize(params, {".*": bases.Nf4()})


def test_no_block_of_nf4_with_exact_scales_changes_by_half():
    """The worst that there is: one large number, and 63 in the middle between two codes."""
    worst = 0.0
    for low, high in zip(bases.nf4.CODE[:-1], bases.nf4.CODE[1:], strict=True):
        for share in np.linspace(0.02, 0.98, 25):
            block = np.full((1, 64), low + share * (high - low), np.float32)
            block[0, 0] = 1
            worst = max(worst, report({"w": block}, {"w": bases.Nf4(double=False)})[1]["w"].block)
    assert 0.3 < worst < 0.35


def test_an_output_whose_largest_number_is_alone():
    """8 bits lose what is small beside it."""
    w = normal(400_000, 2) * 0.0015
    w[7] = 1
    with pytest.warns(lora.LoraWarning, match=r"'w': a block by .*; pack it in a format of more bits, or None"):
        bases.quantize({"w": w}, {"w": bases.Int8()})


def test_every_way_in_reports_the_same():
    """Arrays of NumPy and JAX, in files, in bf16, donated, on a mesh; each name of a tied weight."""
    w = uneven()
    [expected] = report({"w": w}, {"w": bases.Nf4()})[1].values()
    stored = bases.Stored(jax.ShapeDtypeStruct(w.shape, np.float32), lambda: w)
    array = jnp.asarray(w)
    for params in ({"w": stored}, {"w": jnp.asarray(w), "v": stored}, {"w": array, "v": array}):
        changes = report(params, {".*": bases.Nf4()}, donate=True)[1]
        assert changes == dict.fromkeys(sorted(params), expected)
    narrow = report({"w": jnp.asarray(w, jnp.bfloat16)}, {"w": bases.Nf4()})[1]["w"]
    np.testing.assert_allclose(narrow, expected, rtol=0.02)
    for kind, spec in ((AxisType.Auto, P("x")), (AxisType.Auto, P(None, "x")), (AxisType.Explicit, P(None, "x"))):
        mesh = jax.make_mesh((8,), ("x",), (kind,))
        with jax.set_mesh(mesh):
            there = jax.device_put(w, NamedSharding(mesh, spec))
            np.testing.assert_allclose(report({"w": there}, {"w": bases.Nf4()})[1]["w"], expected, rtol=1e-5)
    whole = jax.device_put(w, NamedSharding(eight_devices(), P()))
    np.testing.assert_allclose(report({"w": whole}, {"w": bases.Nf4()})[1]["w"], expected, rtol=1e-5)


def test_in_jit_there_is_nothing_to_report():
    rules = {"w": bases.Int8()}
    jax.jit(lambda params: bases.quantize(params, rules))({"w": jnp.ones((4, 4))})
    with pytest.raises(lora.LoraError, match=r"report.* looks at numbers, and 'w' is traced"):
        jax.jit(lambda params: bases.quantize(params, rules, report=print))({"w": jnp.ones((4, 4))})


def test_nothing_is_packed_or_deleted_before_all_is_looked_at():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)).at[1, 1].set(jnp.nan), "c": np.full((4, 4), np.inf)}
    for path in "bc":
        with pytest.raises(lora.LoraError, match=f"'{path}' holds NaN or infinity"):
            bases.quantize(params, {f"a|{path}": bases.Int8()}, donate=True)
    assert not params["a"].is_deleted()


@pytest.mark.parametrize("format", FORMATS)
def test_parts_are_the_whole(format, monkeypatch):
    """Large weights are measured, and packed in 8 bits, part by part; what is computed in fp32 is of a part."""
    w = jnp.asarray(normal(2, 128, 96), jnp.bfloat16)
    packed, changes = report({"w": w}, {"w": FORMATS[format]})
    monkeypatch.setattr(in_parts, "PART", 2**11)
    again, in_12 = report({"w": w}, {"w": FORMATS[format]})
    jax.tree.map(np.testing.assert_array_equal, again, packed)
    np.testing.assert_allclose(in_12["w"], changes["w"], rtol=1e-6)
    shape, axes = change._shape_in_blocks(packed["w"], w)
    axis, parts = in_parts.parts_of(shape, axes)
    assert parts == 12

    def temporary(size):
        program = change._of_blocks.lower(w, w, packed["w"], 0, size, axis).compile()
        return program.memory_analysis().temp_size_in_bytes

    in_fp32 = 4 * w.size
    assert temporary(shape[axis] // parts) < 3 * in_fp32 / parts < in_fp32 < temporary(shape[axis])
