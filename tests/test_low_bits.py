"""Weights of few bits as others publish them: read as the numbers that their documents define, one number at a time."""

import json
import math
from random import Random

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_base_files import mutated
from test_recipes_models import facts_of, tensors_of, write

import lora_jax as lora
from lora_jax.interop.low_bits.codes import TABLES
from lora_jax.interop.low_bits.config import METHODS, parse_packing

F8, BF16, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu
W, S = "m.weight", "m.weight_scale"


# The documents, one number at a time ----------------------------------------------------------------------------------


def e2m1(code):
    """OCP Microscaling Formats 1.0, 5.3.3: a sign, two bits of an exponent with bias 1, one bit of a mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def e4m3(code):
    """Micikevicius et al. 2022, table 1: bias 7, no infinities, one NaN of each sign."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if sign else size


def e8m0(code):
    """The same document of OCP, 5.4.1: a power of two with bias 127."""
    return math.nan if code == 255 else 2.0 ** (code - 127)


def nibble(row, j):
    return row[j // 2] >> 4 if j % 2 else row[j // 2] & 15


def field(words, bits, j):
    """The integer at bit j * bits of words of 32 bits."""
    whole = int.from_bytes(np.ascontiguousarray(words).tobytes(), "little")
    return (whole >> j * bits) % 2**bits - 2 ** (bits - 1)


def matrix(rows, columns, number):
    """fp32 [rows, columns] of numbers that are computed in Python's floats, which are of 64 bits."""
    return np.array([[number(i, j) for j in range(columns)] for i in range(rows)], np.float64)


def test_the_tables_are_those_of_the_documents():
    for code in range(256):
        assert TABLES["e2m1"][code].tolist() == [e2m1(code & 15), e2m1(code >> 4)]
        np.testing.assert_array_equal(TABLES["e4m3"][code, 0], np.float32(e4m3(code)))
        assert TABLES["int8"][code, 0] == (code ^ 128) - 128
        for bits in (2, 4, 8):
            words = np.array([code], np.int32)
            assert TABLES[f"packed {bits}"][code].tolist() == [field(words, bits, j) for j in range(8 // bits)]


# One weight in each format --------------------------------------------------------------------------------------------


def random_e4m3(rng, shape):
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(codes % 128 == 127, 1, codes).astype(np.uint8)


def scheme(bits=4, kind="int", strategy="group", symmetric=True, **more):
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False} | more


def compressed(format, *weights):
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": own} for i, own in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


def gpt_oss(rng):
    blocks = rng.integers(0, 256, (2, 3, 2, 16), dtype=np.uint8)
    scales = rng.integers(1, 250, (2, 3, 2), dtype=np.uint8)
    rows = blocks.reshape(6, 32)
    flat = matrix(6, 64, lambda r, i: e2m1(nibble(rows[r], i)) * e8m0(int(scales.reshape(6, 2)[r, i // 32])))
    expected = flat.reshape(2, 3, 64).swapaxes(1, 2)
    return {"m_blocks": blocks, "m_scales": scales}, {"quant_method": "mxfp4"}, {"m": expected}, BF16


def mxfp4(rng, dtype=np.uint8):
    packed = rng.integers(0, 256, (3, 32), dtype=np.uint8)
    scales = rng.integers(1, 250, (3, 2), dtype=np.uint8)
    expected = matrix(3, 64, lambda i, j: e2m1(nibble(packed[i], j)) * e8m0(int(scales[i, j // 32])))
    config = compressed("mxfp4-pack-quantized", scheme(kind="float", group_size=32))
    return {"m.weight_packed": packed, S: scales.view(dtype)}, config, {W: expected}, BF16


def nvfp4(rng):
    packed, scales = rng.integers(0, 256, (3, 16), dtype=np.uint8), random_e4m3(rng, (3, 2)) & 127
    outer = np.array([937.5], np.float32)
    whole = np.float32([[e4m3(int(c)) for c in row] for row in scales]) / outer  # rounded as compressed-tensors does
    expected = matrix(3, 32, lambda i, j: e2m1(nibble(packed[i], j)) * float(whole[i, j // 16]))
    tensors = {"m.weight_packed": packed, S: scales.view(F8), "m.weight_global_scale": outer}
    tensors["m.input_global_scale"] = np.ones(1, np.float32)
    group = scheme(kind="float", strategy="tensor_group", group_size=16)
    return tensors, compressed("nvfp4-pack-quantized", group), {W: expected}, np.float32


def nvfp4_modelopt(rng):
    packed, scales = rng.integers(0, 256, (3, 16), dtype=np.uint8), random_e4m3(rng, (3, 2)) & 127
    outer = np.array(0.00137, np.float32)
    whole = np.float32([[e4m3(int(c)) for c in row] for row in scales]) * outer
    expected = matrix(3, 32, lambda i, j: e2m1(nibble(packed[i], j)) * float(whole[i, j // 16]))
    tensors = {W: packed, S: scales.view(F8), "m.weight_scale_2": outer, "m.input_scale": outer, "m.k_scale": outer}
    return tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {W: expected}, np.float32


def fp8_blocks(rng, dtype=np.float32, shape=(5, 7), size=(2, 3)):
    codes = random_e4m3(rng, shape)
    scales = rng.uniform(0.01, 2, tuple(-(-n // m) for n, m in zip(shape, size, strict=True))).astype(dtype)
    expected = matrix(*shape, lambda i, j: e4m3(int(codes[i, j])) * float(scales[i // size[0], j // size[1]]))
    tensors = {W: codes.view(F8), "m.weight_scale_inv": scales}
    config = {"quant_method": "fp8", "weight_block_size": list(size), "activation_scheme": "dynamic"}
    return tensors, config, {W: expected}, np.float32


def fp8_powers(rng):
    tensors, config, _, _ = fp8_blocks(rng)
    scales = rng.integers(100, 140, (3, 3), dtype=np.uint8)
    codes = tensors[W].view(np.uint8)
    expected = matrix(5, 7, lambda i, j: e4m3(int(codes[i, j])) * e8m0(int(scales[i // 2, j // 3])))
    return tensors | {"m.weight_scale_inv": scales.view(E8M0)}, config, {W: expected}, np.float32


def fp8_whole(rng):
    tensors, config, _, _ = fp8_blocks(rng)
    codes, scale = tensors[W].view(np.uint8), np.array(0.37, np.float32)
    expected = matrix(5, 7, lambda i, j: e4m3(int(codes[i, j])) * float(scale))
    return tensors | {"m.weight_scale_inv": scale}, config | {"weight_block_size": None}, {W: expected}, np.float32


def float_channels(rng):
    codes, scales = random_e4m3(rng, (5, 7)), rng.uniform(0.01, 2, (5, 1)).astype(BF16)
    expected = matrix(5, 7, lambda i, j: e4m3(int(codes[i, j])) * float(scales[i, 0]))
    config = compressed("float-quantized", scheme(8, "float", "channel"))
    return {W: codes.view(F8), S: scales}, config, {W: expected}, np.float32


def integer_channels(rng, asymmetric=False):
    codes, scales = rng.integers(-128, 128, (5, 7), dtype=np.int8), rng.uniform(0.01, 2, (5, 1)).astype(BF16)
    zeros = rng.integers(-128, 128, (5, 1), dtype=np.int8) if asymmetric else np.zeros((5, 1), np.int8)
    expected = matrix(5, 7, lambda i, j: (int(codes[i, j]) - int(zeros[i, 0])) * float(scales[i, 0]))
    config = compressed("int-quantized", scheme(8, "int", "channel", symmetric=not asymmetric))
    return (
        {W: codes, S: scales} | ({"m.weight_zero_point": zeros} if asymmetric else {}),
        config,
        {W: expected},
        np.float32,
    )


def words(rng, shape):
    return rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)


def packed(rng, bits=4, size=8, shape=(5, 24), zeros=None, order=False):
    """Groups of compressed-tensors; `zeros` are packed words, or one number a byte."""
    rows, columns = shape
    groups = 1 if size is None else columns // size
    codes, scales = words(rng, (rows, -(-columns * bits // 32))), rng.uniform(0.01, 2, (rows, groups)).astype(BF16)
    tensors = {"m.weight_packed": codes, S: scales, "m.weight_shape": np.array(shape, np.int64)}
    zero = np.zeros((rows, groups), np.int64)
    if zeros == "packed":
        tensors["m.weight_zero_point"] = words(rng, (-(-rows * bits // 32), groups))
        columns_of = tensors["m.weight_zero_point"].T
        zero = np.array([[field(columns_of[g], bits, i) for g in range(groups)] for i in range(rows)])
    elif zeros == "bytes":
        zero = rng.integers(-8, 8, (rows, groups), dtype=np.int8)
        tensors["m.weight_zero_point"] = zero
    own = np.arange(columns) // (size or columns)
    if order:
        own = rng.permutation(own).astype(np.int32)
        tensors["m.weight_g_idx"] = own
    expected = matrix(*shape, lambda i, j: (field(codes[i], bits, j) - int(zero[i, own[j]])) * float(scales[i, own[j]]))
    strategy = "channel" if size is None else "group"
    group = scheme(bits, "int", strategy, symmetric=zeros is None, group_size=size)
    return tensors, compressed("pack-quantized", group), {W: expected}, np.float32


FORMATS = {
    "gpt-oss": gpt_oss,
    "MXFP4": mxfp4,
    "MXFP4, exponents as such": lambda rng: mxfp4(rng, E8M0),
    "NVFP4": nvfp4,
    "NVFP4, ModelOpt": nvfp4_modelopt,
    "fp8": fp8_blocks,
    "fp8, scales in bf16": lambda rng: fp8_blocks(rng, BF16),
    "fp8, whole blocks": lambda rng: fp8_blocks(rng, shape=(4, 6)),
    "fp8, scales that are powers": fp8_powers,
    "fp8, one scale": fp8_whole,
    "float-quantized": float_channels,
    "int-quantized": integer_channels,
    "int-quantized, asymmetric": lambda rng: integer_channels(rng, True),
    "int4": packed,
    "int4, channels": lambda rng: packed(rng, size=None, shape=(3, 13)),
    "int4, zeros": lambda rng: packed(rng, zeros="packed", shape=(11, 24)),
    "int4, zeros in bytes": lambda rng: packed(rng, zeros="bytes"),
    "int4, in the order of activations": lambda rng: packed(rng, zeros="packed", order=True),
    "int8, packed": lambda rng: packed(rng, bits=8, zeros="packed"),
    "int2": lambda rng: packed(rng, bits=2, zeros="packed", shape=(18, 24)),
}


def published(folder, tensors, packing, **facts):
    folder.mkdir(exist_ok=True, parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(facts | {"quantization_config": packing}))
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_document(name, tmp_path):
    """In fp32 each is the document's formula, rounded once; in bf16 where that is exact."""
    tensors, packing, expected, dtype = FORMATS[name](np.random.default_rng(len(name)))
    other = {"norm.weight": np.ones(3, np.float32), "norm.bias": np.ones(3, BF16)}
    found = lora.bases.open_safetensors(published(tmp_path, tensors | other, packing))
    assert sorted(found) == sorted({**other, **expected})
    for path, w in expected.items():
        assert found[path].shape == w.shape
        assert found[path].dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(found[path].read(), np.float64), w.astype(np.float32).astype(np.float64)
        )
        assert len(np.unique(w)) > 10
    np.testing.assert_array_equal(found["norm.weight"].read(), other["norm.weight"])


def test_scales_of_bf16_are_exact_in_fp32():
    """What a comparison with fp32 counts on: 4 or 8 bits of q times 8 bits of a scale are 16 at most."""
    for code in range(256):
        for scale in (1.0078125, 1.9921875):
            if not math.isnan(e4m3(code)):
                assert float(np.float32(e4m3(code) * scale)) == e4m3(code) * scale


# Whole folders --------------------------------------------------------------------------------------------------------


def packed_model(facts, tensors, format):
    """The linear layers of a model in a format, random but small; and the dense tensors that they are."""
    rng, found, dense = np.random.default_rng(7), {}, {}
    for name, w in tensors.items():
        if not name.endswith("_proj.weight"):
            found[name] = dense[name] = w
            continue
        own, packing, expected, _ = format(rng, w.shape)
        found |= {key.replace("m.", name.removesuffix("weight"), 1): tensor for key, tensor in own.items()}
        dense[name] = expected[W].astype(np.float32)
    return facts | {"quantization_config": packing, "torch_dtype": "bfloat16"}, found, dense


def in_fp8(rng, shape):
    return fp8_blocks(rng, BF16, shape, (8, 8))


def in_int4(rng, shape):
    return packed(rng, size=4, shape=shape, zeros="packed")


@pytest.mark.parametrize(
    ("name", "format"), [("llama", in_fp8), pytest.param("qwen3_moe", in_int4, marks=pytest.mark.slow)]
)
def test_models_are_loaded_as_their_dense_twins(name, format, tmp_path):
    facts = facts_of(name) | ({"attention_bias": False, "mlp_bias": False} if name == "llama" else {})
    facts, packed_tensors, dense = packed_model(facts, tensors_of(facts), format)
    folder = write(tmp_path / "packed", facts, packed_tensors, shards=3)
    del facts["quantization_config"]
    twin = lora.recipes.load(write(tmp_path / "dense", facts, dense))
    wide = lora.recipes.load(folder, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, wide.params, twin.params)
    model = lora.recipes.load(folder)  # linear layers in the config's dtype, the rest as it is in the files
    kernels = {str(leaf.dtype) for path, leaf in jax.tree.leaves_with_path(model.params) if "proj" in str(path)}
    assert kernels == {"bfloat16"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), model.params, twin.params)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:packing changes blocks:lora_jax.LoraWarning")  # of these tiny random weights
def test_a_model_in_few_bits_is_packed_again_while_it_is_loaded(tmp_path):
    """What is packed in 8 bits is what its numbers in bf16 are, packed."""
    facts = facts_of("mistral")
    facts, tensors, _ = packed_model(facts, tensors_of(facts), in_fp8)
    folder = write(tmp_path / "x", facts, tensors)
    model = lora.recipes.load(folder, bits=8)
    expected = lora.bases.quantize(lora.recipes.load(folder).params, lora.recipes.packing(8))
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
    assert jax.tree.structure(model.params) == jax.tree.structure(expected)


def test_a_tree_of_ones_own(tmp_path):
    """Of gpt-oss, whose experts are published [experts, out, in] and are [experts, in, out] in the model."""
    tensors, packing, expected, _ = gpt_oss(np.random.default_rng(0))
    tensors = {key.replace("m_", "layers.0.m_"): tensor for key, tensor in tensors.items()}
    tensors |= {key.replace("0", "1"): tensor for key, tensor in tensors.items()}
    key_map = lora.key_maps.KeyMap(lora.key_maps.experts("m", "layers.{i}.m", "i expert in out", transposed=True))
    params = {"m": jax.ShapeDtypeStruct((2, 2, 64, 3), jnp.bfloat16)}
    stored = lora.bases.from_torch(lora.bases.open_safetensors(published(tmp_path, tensors, packing)), params, key_map)
    base = lora.bases.quantize(stored, {".*": None})
    np.testing.assert_array_equal(np.asarray(base["m"], np.float64), np.stack([expected["m"]] * 2))


# What is refused ------------------------------------------------------------------------------------------------------


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


WRONG = [
    ("gpt-oss", without("m_scales"), "'m_blocks' in .* without 'm_scales'"),
    (
        "gpt-oss",
        lambda t: t | {"m_scales": t["m_scales"][:, :, :1]},
        r"'m_scales' .* U8\[2, 3, 1\], expected \[2, 3, 2\]",
    ),
    ("gpt-oss", lambda t: t | {"m_blocks": t["m_blocks"][..., :8]}, r"expected u8 \[experts, out, in / 32, 16\]"),
    ("gpt-oss", lambda t: t | {"m": np.ones(3, np.float32)}, "'m' twice"),
    (
        "gpt-oss",
        lambda t: t | {"m_scales": np.full((2, 3, 2), 255, np.uint8)},
        "numbers that are not finite in bfloat16",
    ),
    ("MXFP4", without(S), "without 'm.weight_scale'"),
    ("NVFP4", without("m.weight_global_scale"), "without 'm.weight_global_scale'"),
    ("NVFP4", lambda t: t | {"m.weight_global_scale": np.zeros(1, np.float32)}, "not finite in float32"),
    ("NVFP4", lambda t: t | {"m.weight_global_scale": np.ones(2, np.float32)}, r"F32\[2\], expected 1 number"),
    ("NVFP4", lambda t: t | {S: t[S][:, :1].copy()}, r"F8_E4M3\[3, 1\], expected \[3, 2\]"),
    ("NVFP4, ModelOpt", lambda t: t | {"m.pre_quant_scale": np.ones(32, BF16)}, "scales what 'm' is given"),
    ("fp8", without("m.weight_scale_inv"), "without 'm.weight_scale_inv'"),
    (
        "fp8",
        lambda t: t | {"m.weight_scale_inv": np.ones((4, 3), np.float32)},
        r"scales of \[5, 7\] in blocks of 2 x 3",
    ),
    ("fp8", lambda t: t | {W: np.full((5, 7), 127, np.uint8).view(F8)}, "not finite"),
    ("fp8", lambda t: t | {W: np.ones((5, 7, 1), np.uint8).view(F8)}, "expected two axes"),
    ("fp8", lambda t: t | {"x.weight": np.ones((2, 2), np.int32)}, "'x.weight' .* I32.*, without what says how"),
    ("fp8", lambda t: t | {"x.weight": np.ones((2, 2), ml_dtypes.float8_e5m2)}, "'x.weight' .* F8_E5M2"),
    ("float-quantized", lambda t: t | {S: np.ones((5, 2), BF16)}, "in blocks of 1 x all"),
    ("int-quantized, asymmetric", without("m.weight_zero_point"), "lacks 'm.weight_zero_point'"),
    ("int4", without("m.weight_shape"), "without 'm.weight_shape'"),
    ("int4", lambda t: t | {"m.weight_shape": np.array([5, 2**40])}, r"the codes of a weight \[5, 1099511627776\]"),
    ("int4", lambda t: t | {"m.weight_shape": np.array([-5, 24])}, "the codes of a weight"),
    ("int4, zeros", lambda t: t | {"m.weight_zero_point": np.ones((3, 3), np.int32)}, r"expected \[2, 3\]"),
    (
        "int4, in the order of activations",
        lambda t: t | {"m.weight_g_idx": np.full(24, 3, np.int32)},
        "beyond its 3 groups",
    ),
    (
        "int4, in the order of activations",
        lambda t: t | {"m.weight_g_idx": np.zeros(23, np.int32)},
        r"expected I32\[24\]",
    ),
]


@pytest.mark.parametrize(("name", "change", "says"), WRONG)
def test_files_that_are_wrong(name, change, says, tmp_path):
    tensors, packing, _, _ = FORMATS[name](np.random.default_rng(0))
    folder = published(tmp_path, change(tensors), packing)
    with pytest.raises(lora.LoraError, match=says):
        [stored.read() for stored in lora.bases.open_safetensors(folder).values()]


FORMAT = {"quant_method": "compressed-tensors", "config_groups": {}}
REFUSED = [
    ({"quant_method": "gptq", "bits": 4}, "packed by 'gptq', expected one of bitsandbytes, .*before they were packed"),
    ({"quant_method": "awq"}, "packed by 'awq'"),
    ({"bits": 4}, "packed by None"),
    ([4], r"quantization_config is \[4\], expected an object"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\], expected"),
    ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "expected numbers above 0"),
    ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ', expected one of NVFP4"),
    ({"quant_method": "modelopt", "quant_algo": ["NVFP4"]}, "quant_algo is"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size of NVFP4 is 32"),
    (FORMAT | {"format": "marlin-24"}, "format is 'marlin-24', expected one of pack-quantized"),
    (FORMAT | {"config_groups": {"a": {"format": "mxfp6-pack-quantized"}}}, "format is 'mxfp6-pack-quantized'"),
    (FORMAT | {"config_groups": [1]}, r"config_groups is \[1\]"),
    (FORMAT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (FORMAT | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config rotates"),
    (compressed("pack-quantized", scheme(3)), "num_bits is 3, expected 2, 4 or 8"),
    (compressed("pack-quantized", scheme(strategy="token")), "strategy is 'token'"),
    (compressed("pack-quantized", scheme(group_size="all")), r"group_size is \[1, 'all'\]"),
    (compressed("pack-quantized", [1]), r"weights of a group are \[1\]"),
]


@pytest.mark.parametrize(("packing", "says"), REFUSED)
def test_methods_that_are_not_read_are_refused_by_name(packing, says, tmp_path):
    folder = published(tmp_path, {W: np.ones((2, 2), np.float32)}, packing)
    with pytest.raises(lora.LoraError, match=f"config.json: .*{says}"):
        lora.bases.open_safetensors(folder)


def test_where_a_folder_says_how_it_is_packed(tmp_path):
    tensors, packing, expected, _ = nvfp4_modelopt(np.random.default_rng(0))
    folder = published(tmp_path, tensors, None, text_config={"quantization_config": packing})
    for _ in range(2):
        w = lora.bases.open_safetensors(folder)[W].read()
        np.testing.assert_array_equal(w, expected[W].astype(np.float32))
        (folder / "config.json").write_text("{}")
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    (folder / "hf_quant_config.json").unlink()
    assert lora.bases.open_safetensors(folder)[W].dtype == np.uint8  # nothing says that they are packed
    assert parse_packing({"quant_method": "bitsandbytes"}) is None
    assert "mxfp4" in METHODS


def check_mutated(cases, tmp_path):
    """Read with the shape that was said, finite; or refused. Nothing else, whatever a byte says."""
    random, ends = Random(cases), [0, 0]
    made = {name: make(np.random.default_rng(1))[:2] for name, make in FORMATS.items()}
    for i in range(cases):
        tensors, packing = made[random.choice(list(made))]
        text = json.dumps(packing)
        if i % 3:
            tensors = mutated(random, tensors)
        else:
            at = random.randrange(len(text))
            text = text[:at] + random.choice('0123456789"nulltrue[]{},:-') + text[at + random.randrange(2) :]
        folder = published(tmp_path, tensors, None)
        (folder / "config.json").write_text('{"quantization_config": ' + text + "}")
        try:
            for stored in lora.bases.open_safetensors(folder).values():
                w = stored.read()
                assert (w.shape, w.dtype) == (stored.shape, stored.dtype)
            ends[0] += 1
        except lora.LoraError:
            ends[1] += 1
    assert min(ends) > cases / 20


def test_mutated_files(tmp_path):
    check_mutated(300, tmp_path)


@pytest.mark.slow
def test_many_mutated_files(tmp_path, share):
    check_mutated(share(4000), tmp_path)
