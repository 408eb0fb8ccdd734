"""LoRA in GGUF: what is written, what is read back, and what is refused. tests/interop_gguf runs llama.cpp itself."""

import gc
import json
import struct
import tracemalloc
from pathlib import Path
from random import Random

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import LoraError
from lora_jax.interop.gguf import file as gguf_file
from lora_jax.interop.gguf.adapters import load_gguf, read_gguf, save_gguf, write_gguf
from lora_jax.interop.gguf.factors import in_halves, side_by_side
from lora_jax.interop.gguf.names import ARCHITECTURES, MODEL_TYPES, slot_of, source_of
from lora_jax.interop.module_adapters import Lazy, ModuleAdapters, of_all_experts, outlined
from lora_jax.interop.peft.formats.format import Module
from lora_jax.interop.peft.formats.registry import FORMATS, LORA
from lora_jax.interop.peft_modules import read_peft
from lora_jax.key_maps import LLAMA, KeyMap, array, embedding, experts, linear

D, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY, EXPERTS, RANK = 12, 4, 2, 6, 10, 7, 3, 2
SHAPES = {  # [out, in] of each module's weight, by the end of its name
    "q_proj": (HEADS * SIZE, D),
    "k_proj": (KV_HEADS * SIZE, D),
    "v_proj": (KV_HEADS * SIZE, D),
    "o_proj": (D, HEADS * SIZE),
    "gate_proj": (INNER, D),
    "up_proj": (INNER, D),
    "down_proj": (D, INNER),
    "w1": (INNER, D),
    "w3": (INNER, D),
    "w2": (D, INNER),
    "gate": (EXPERTS, D),
    "lm_head": (VOCABULARY, D),
    "embed_tokens": (D, VOCABULARY),  # its factors are those of the table turned
    "wte": (D, VOCABULARY),
    "qkv_proj": ((HEADS + 2 * KV_HEADS) * SIZE, D),
    "gate_up_proj": (2 * INNER, D),
    "c_attn": (3 * D, D),
    "c_fc": (INNER, D),
}
BASES = {
    name: {
        "model_type": kind,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
        "num_experts": EXPERTS,
    }
    for kind, name in MODEL_TYPES.items()
}


def shape_of(name):
    return (D, INNER) if name.endswith("mlp.c_proj") else (D, D) if name.endswith("c_proj") else None


def module(name, seed=0, rank=RANK, scale=0.5, dtype=np.float32):
    """Random factors of a module; of all experts in one parameter with their ranks together."""
    rng = np.random.default_rng([seed, *name.encode()])
    out, inputs = shape_of(name) or SHAPES[name.rpartition(".")[2]]
    each = EXPERTS if name.rpartition(".")[0].endswith(".mlp.experts") else 1
    a, b = rng.normal(size=(each * rank, inputs)), rng.normal(size=(out, rank * each))
    return Module({"a": a.astype(dtype), "b": b.astype(dtype)}, scale)


def adapters_of(modules, architecture="llama"):
    """Adapters by their modules."""
    kinds, together = {}, {}
    plain = "conv1d" if ARCHITECTURES[architecture].transposed else "linear"
    for name in modules:
        kinds[name] = "embedding" if name.endswith(("embed_tokens", "wte")) else plain
        if name == "lm_head":
            kinds[name] = "linear"
        if name.rpartition(".")[0].endswith(".mlp.experts"):
            kinds[name], together[name] = "experts", EXPERTS
    return ModuleAdapters(LORA, modules, outlined(modules), kinds, together)


def names_of(architecture, style="together"):
    """All modules of two layers that an architecture can have adapters of."""
    found = [name.format(i=i) for name in ARCHITECTURES[architecture].modules for i in range(2)]
    if ARCHITECTURES[architecture].experts:
        found = [name for name in found if ".mlp." not in name]
        for tensor in ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            name = source_of(ARCHITECTURES[architecture], f"blk.0.{tensor}", style).module
            found += [name.replace("{e}", str(e)) for e in range(EXPERTS)]
    return list(dict.fromkeys(found))


def written(path, modules, architecture="llama", **kwargs):
    write_gguf(path, adapters_of(modules, architecture), **{"base": BASES[architecture]} | kwargs)
    return path


def arrays_in(path):
    """What the `gguf` package reads of a file, by the names of tensors."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def same(found, modules, exact=True):
    assert sorted(found.modules) == sorted(modules)
    for name, (arrays, scale) in modules.items():
        own = found.modules[name]
        np.testing.assert_array_equal(own.arrays["a"], arrays["a"])
        check = np.testing.assert_array_equal if exact else np.testing.assert_allclose
        check(own.arrays["b"] * np.float32(own.scale), arrays["b"] * np.float32(scale))
        for field, array_ in own.arrays.items():
            outline = found.outlines[name].arrays[field]
            assert (outline.shape, outline.dtype) == (array_.shape, array_.dtype)


# The container --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", gguf_file.TYPES)
def test_tensors_of_the_gguf_package_are_read(tmp_path, kind):
    writer = gguf.GGUFWriter(tmp_path / "file", "llama")
    writer.add_string("a.string", "x")
    writer.add_array("a.list", ["one", "two"])
    writer.add_array("another.list", [1, 2, 3])
    writer.add_float32("a.number", 0.5)
    writer.add_string("long", "x" * 5000)
    values = np.random.default_rng(0).normal(size=(3, 2, 32)).astype(np.float32)
    own = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(values, own)
    writer.add_tensor("first", np.ones(3, np.float32))
    writer.add_tensor("x", stored, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_file.header(tmp_path / "file")
    assert header.facts["a.string"] == "x"
    assert header.facts["a.number"] == 0.5
    assert header.facts["a.list"] is header.facts["another.list"] is header.facts["long"] is None
    place = gguf_file.places(tmp_path / "file", header)["x"]
    found = gguf_file.read(tmp_path / "file", place)
    assert (place.type, found.shape, found.dtype) == (kind, values.shape, place.dtype)
    np.testing.assert_array_equal(found.astype(np.float32), gguf.quants.dequantize(stored, own))


def test_blocks_are_what_their_documents_say(tmp_path):
    """By hand: scale and least, then bytes with the first 16 codes in their low halves, the others in the high ones."""
    q4_1 = struct.pack("<2e", 0.5, -3.0) + bytes((15 - j) * 16 + j for j in range(16))
    q8_0 = struct.pack("<e", 0.25) + struct.pack("<32b", *range(-128, -96))
    head = header_with(2, body=tensor(b"four", (32, 1), kind=3) + tensor(b"eight", (32, 1), kind=8, start=32))
    (tmp_path / "file").write_bytes(head + bytes(-len(head) % 32) + q4_1 + bytes(12) + q8_0)
    places = gguf_file.places(tmp_path / "file", gguf_file.header(tmp_path / "file"))
    four, eight = (gguf_file.read(tmp_path / "file", places[name]) for name in ("four", "eight"))
    assert four.dtype == eight.dtype == np.float32
    assert four.tolist() == [[0.5 * j - 3 for j in range(16)] + [0.5 * (15 - j) - 3 for j in range(16)]]
    assert eight.tolist() == [[n / 4 for n in range(-128, -96)]]


def test_lists_and_long_text_are_kept_where_they_are_asked_for(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "file", "llama")
    facts = {"texts": ["é", "", "x" * 2000], "numbers": [1, -2, 3], "halves": [0.5, -1.5], "flags": [True, False]}
    for key, value in facts.items():
        writer.add_array(key, value)
    writer.add_string("long", "y" * 5000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kept = gguf_file.header(tmp_path / "file", lists=True)
    assert {key: kept.facts[key] for key in facts} == facts
    assert kept.facts["long"] == "y" * 5000
    skipped = gguf_file.header(tmp_path / "file")
    assert [skipped.facts[key] for key in (*facts, "long")] == [None] * 5
    assert (kept.data, list(kept.facts)) == (skipped.data, list(skipped.facts))


def test_lists_of_numbers_have_a_bound_where_they_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "ENTRIES", 3)
    (tmp_path / "file").write_bytes(header_with(0, 1, text(b"k") + struct.pack("<IIQ4b", 9, 1, 4, *range(4))))
    assert gguf_file.header(tmp_path / "file").facts == {"k": None}
    with pytest.raises(LoraError, match="lists of 4 entries"):
        gguf_file.header(tmp_path / "file", lists=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_the_gguf_package_reads_what_is_written(tmp_path, dtype):
    name = "model.layers.1.self_attn.v_proj"
    own = module(name, scale=1.0)
    written(tmp_path / "file", {name: own}, dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "file")
    facts = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert facts == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    found = arrays_in(tmp_path / "file")
    for field, array_ in own.arrays.items():
        expected = array_.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(found[f"blk.1.attn_v.weight.lora_{field}"], expected)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    name = "model.layers.1.self_attn.v_proj"
    path = written(tmp_path / "file", {name: module(name)})
    before = path.read_bytes()

    def fail(name):
        raise RuntimeError("the disk is gone")

    found = adapters_of({name: module(name)})
    with pytest.raises(RuntimeError):
        write_gguf(path, found._replace(modules=Lazy([name], fail)), base=BASES["llama"])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(architecture):
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, 2)
    known = {gguf.TENSOR_NAMES[t].format(bid=0) for t in gguf.MODEL_TENSORS[number]} | {"output"}
    own = ARCHITECTURES[architecture]
    for name in names_of(architecture, "apart"):
        stacked = name.replace(".experts.0.", ".experts.").replace(".experts.1.", ".experts.")
        stacked = stacked.replace(".experts.2.", ".experts.").removeprefix("transformer.")
        (tensor,) = slot_of(own, name).tensors
        found = table.get_name(stacked) or table.get_name(stacked.replace("lm_head", "output"))
        assert tensor == (found or {"lm_head": "output"}.get(name))
        assert tensor.replace("blk.1.", "blk.0.") in known
    assert all(tensor.format(i=0) in known for tensor in own.tensors)


@pytest.mark.parametrize("style", ["together", "apart", "mixtral"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_module_is_found_again_by_its_tensor(architecture, style):
    own = ARCHITECTURES[architecture]
    for name in names_of(architecture, style):
        slot = slot_of(own, name)
        for tensor in slot.tensors:
            source = source_of(own, tensor, style)
            assert source.module.replace("{e}", str(slot.expert)) == name
            assert source.tensors == slot.tensors


def test_a_language_model_inside_another_one():
    own = ARCHITECTURES["gemma3"]
    for inside in ("model.language_model.", "language_model.model."):
        assert slot_of(own, f"{inside}layers.3.mlp.up_proj").tensors == ("blk.3.ffn_up",)
    assert slot_of(own, "language_model.lm_head").tensors == ("output",)


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["together", "apart", "mixtral"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_and_back(tmp_path, architecture, style):
    modules = {name: module(name, scale=2.0 ** (i % 4 - 2)) for i, name in enumerate(names_of(architecture, style))}
    path = written(tmp_path / "file", modules, architecture)
    same(read_gguf(path, base=BASES[architecture], experts=style), modules)
    modules = {name: own._replace(scale=0.3) for name, own in modules.items()}
    same(read_gguf(written(path, modules, architecture), base=BASES[architecture], experts=style), modules, exact=False)


def test_rows_of_q_and_k_are_in_the_order_of_pairs(tmp_path):
    """As the converter of a model moves the rows of its weights, so are those of their changes."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
    modules = {name: module(name) for name in names}
    found = arrays_in(written(tmp_path / "file", modules))
    for name, heads in zip(names, (HEADS, KV_HEADS, None), strict=True):
        change = 0.5 * modules[name].arrays["b"] @ modules[name].arrays["a"]
        expected = change
        if heads is not None:  # row by row
            half = SIZE // 2
            expected = [
                change[h * SIZE + i + half * part] for h in range(heads) for i in range(half) for part in (0, 1)
            ]
        tensor = f"blk.0.attn_{name[-6]}.weight"
        np.testing.assert_allclose(
            found[f"{tensor}.lora_b"] @ found[f"{tensor}.lora_a"], expected, rtol=1e-5, atol=1e-6
        )
    rows = np.arange(24)[:, None]
    assert side_by_side(rows, 2, "q")[:6, 0].tolist() == [0, 6, 1, 7, 2, 8]
    np.testing.assert_array_equal(in_halves(side_by_side(rows, 2, "q"), 2, "q"), rows)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
def test_other_architectures_keep_their_rows(tmp_path, architecture):
    name = next(name for name in names_of(architecture) if name.endswith((".q_proj", ".qkv_proj", ".c_attn")))
    found = arrays_in(written(tmp_path / "file", {name: module(name, scale=1.0)}, architecture))
    tensor = slot_of(ARCHITECTURES[architecture], name).tensors[0]
    np.testing.assert_array_equal(found[f"{tensor}.weight.lora_b"], module(name).arrays["b"])


def test_alpha_of_other_writers(tmp_path):
    """llama.cpp multiplies with alpha / r, with the rank of each pair."""
    arrays = {}
    for name, rank in (("blk.0.ffn_up", 2), ("blk.1.ffn_up", 4)):
        arrays |= {f"{name}.weight.lora_a": np.ones((rank, D)), f"{name}.weight.lora_b": np.ones((INNER, rank))}
    for alpha, expected in ((8.0, [4.0, 2.0]), (0.0, [1.0, 1.0]), (None, [1.0, 1.0])):
        foreign(tmp_path / "file", arrays, {} if alpha is None else {"adapter.lora.alpha": alpha})
        found = read_gguf(tmp_path / "file")
        assert [own.scale for own in found.modules.values()] == expected
        assert [own.scale for own in found.outlines.values()] == expected


def foreign(path, arrays, more=(), without=(), architecture="llama"):
    """A file as another program writes it."""
    facts = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"} | dict(more)
    facts = {key: value for key, value in facts.items() if key not in without}
    arrays = {name: np.asarray(own, np.float32) for name, own in arrays.items()}
    forms = {name: ("F32", own.shape) for name, own in arrays.items()}
    gguf_file.write(path, facts, forms, arrays.items())
    return path


def test_a_file_of_llama_cpps_converter(tmp_path):
    """`convert_lora_to_gguf.py` made the file of the folder of PEFT beside it, and what is written of that is equal."""
    data = Path(__file__).parent / "data" / "gguf"
    base = BASES["llama"]  # 4 heads, 2 of keys and values
    expected = read_peft(data / "llama_peft")
    found = read_gguf(data / "llama.gguf", base=base)
    assert {own.scale for own in found.outlines.values()} == {3.0 / 2}
    assert found.modules.keys() == expected.modules.keys()
    for name, (arrays, scale) in expected.modules.items():
        assert found.modules[name].scale == scale
        for field in "ab":
            np.testing.assert_array_equal(found.modules[name].arrays[field], arrays[field])
    write_gguf(tmp_path / "file", expected, base=base)
    own, theirs = arrays_in(tmp_path / "file"), arrays_in(data / "llama.gguf")
    assert own.keys() == theirs.keys()
    for name, array_ in own.items():
        np.testing.assert_array_equal(array_, theirs[name] * (1.5 if name.endswith("b") else 1))


def test_experts_together_are_those_apart(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    together = module(name)
    each = {
        f"model.layers.0.mlp.experts.{e}.{part}_proj": Module(
            {
                "a": together.arrays["a"][e * RANK : (e + 1) * RANK],
                "b": together.arrays["b"][rows, e::EXPERTS],
            },
            together.scale,
        )
        for e in range(EXPERTS)
        for part, rows in (("gate", slice(None, INNER)), ("up", slice(INNER, None)))
    }
    path = written(tmp_path / "together", {name: together}, "qwen3moe")
    other = written(tmp_path / "apart", each, "qwen3moe")
    assert arrays_in(path).keys() == arrays_in(other).keys()
    for tensor, array_ in arrays_in(path).items():
        np.testing.assert_array_equal(array_, arrays_in(other)[tensor])
    same(read_gguf(path, experts="apart"), each)
    same(read_gguf(other, experts="together"), {name: together})


def test_gate_and_up_with_other_factors_become_one_parameter_of_both_ranks(tmp_path):
    names = [f"model.layers.0.mlp.experts.{e}.{part}_proj" for e in range(EXPERTS) for part in ("gate", "up")]
    for kept in (names, [name for name in names if "up" in name]):
        modules = {name: module(name, rank=1 + ("up" in name), scale=0.3) for name in kept}
        path = written(tmp_path / "file", modules, "qwen3moe")
        found = read_gguf(path)
        arrays, scale = found.modules["model.layers.0.mlp.experts.gate_up_proj"]
        rank = len(arrays["a"]) // EXPERTS
        assert (rank, scale) == (3 if kept is names else 2, 1.0)
        for e in range(EXPERTS):
            change = arrays["b"].reshape(2 * INNER, rank, EXPERTS)[:, :, e] @ arrays["a"][e * rank : (e + 1) * rank]
            for part, rows in (("gate", change[:INNER]), ("up", change[INNER:])):
                own = modules.get(f"model.layers.0.mlp.experts.{e}.{part}_proj")
                expected = np.zeros((INNER, D)) if own is None else 0.3 * own.arrays["b"] @ own.arrays["a"]
                np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-6)


def test_experts_that_lack_and_ranks_that_differ(tmp_path):
    names = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in (0, 2)]
    modules = {name: module(name, rank=rank) for name, rank in zip(names, (1, 3), strict=True)}
    found = arrays_in(written(tmp_path / "file", modules, "qwen3moe"))
    a, b = (found[f"blk.0.ffn_up_exps.weight.lora_{field}"] for field in "ab")
    assert (a.shape, b.shape) == ((EXPERTS, 3, D), (EXPERTS, INNER, 3))
    assert not a[1].any()
    assert not b[1].any()
    for e, own in zip((0, 2), modules.values(), strict=True):
        np.testing.assert_allclose(b[e] @ a[e], 0.5 * own.arrays["b"] @ own.arrays["a"], rtol=1e-5, atol=1e-6)


def test_one_module_at_a_time(tmp_path):
    """Each module is asked for once, in order, and a reader opens none before it is asked."""
    names = names_of("qwen3moe", "apart")
    modules = {name: module(name) for name in names}
    asked = []

    def make(name):
        asked.append(name)
        return modules[name]

    found = adapters_of(modules)._replace(modules=Lazy(names, make))
    write_gguf(tmp_path / "file", found, base=BASES["qwen3moe"])
    assert sorted(asked) == sorted(names)
    lazy = read_gguf(tmp_path / "file", experts="apart")
    (tmp_path / "file").unlink()
    with pytest.raises(LoraError, match="cannot be read"):
        lazy.modules[names[0]]


def test_a_conversion_holds_few_tensors(tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(16)]
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(16, 4096)).astype(np.float32), rng.normal(size=(4096, 16)).astype(np.float32)
    whole = adapters_of({name: Module({"a": a, "b": b}, 0.3) for name in names})
    write_gguf(tmp_path / "one", whole, base=BASES["qwen3"])
    gc.collect()
    tracemalloc.start()
    write_gguf(tmp_path / "two", read_gguf(tmp_path / "one"), base=BASES["qwen3"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert peak < 4.5 * a.nbytes  # a, b, b with its scale, and what is about to be written


# Parameters -----------------------------------------------------------------------------------------------------------

MOE = KeyMap(
    embedding("model/embed_tokens/embedding", "model.embed_tokens"),
    linear("layers/q/kernel", "model.layers.{i}.self_attn.q_proj", "i in out out"),
    experts("layers/gate_up", "model.layers.{i}.mlp.experts.gate_up_proj", "i expert in out"),
    array("layers/norm", "model.layers.{i}.input_layernorm.weight", "i out"),
    linear("lm_head/kernel", "lm_head"),
)
PARAMS = {
    "model": {"embed_tokens": {"embedding": jnp.zeros((VOCABULARY, D))}},
    "layers": {
        "q": {"kernel": jnp.zeros((2, D, HEADS, SIZE))},
        "gate_up": jnp.zeros((2, EXPERTS, D, 2 * INNER)),
        "norm": jnp.zeros((2, D)),
    },
    "lm_head": {"kernel": jnp.zeros((D, VOCABULARY))},
}


def adapters_of_params(paths):
    matches = MOE.match({path: shape for path, shape in shapes().items() if path in paths})
    found = {}
    for i, (path, match) in enumerate(matches.items()):
        axes = match.axes
        stack, inputs, outputs = ([match.shape[n] for n in group] for group in (axes.stack, axes.inputs, axes.outputs))
        keys = jax.random.split(jax.random.key(i))
        a = jax.random.normal(keys[0], (*stack, *inputs, RANK))
        b = jax.random.normal(keys[1], (*stack, RANK, *outputs))
        found[path] = lora.LoraAdapter(a, b, axes, 0.25)
    return found


def shapes():
    return {
        "model/embed_tokens/embedding": (VOCABULARY, D),
        "layers/q/kernel": (2, D, HEADS, SIZE),
        "layers/gate_up": (2, EXPERTS, D, 2 * INNER),
        "lm_head/kernel": (D, VOCABULARY),
    }


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_parameters_there_and_back(tmp_path, model_type):
    base = BASES["llama"] | {"model_type": model_type}
    adapters = adapters_of_params(shapes())
    save_gguf(tmp_path / "file", adapters, MOE, base=base)
    back = load_gguf(tmp_path / "file", PARAMS, MOE, base=base)
    assert sorted(back) == sorted(adapters)
    for path, adapter in adapters.items():
        np.testing.assert_array_equal(back[path].a, adapter.a)
        np.testing.assert_array_equal(back[path].b, adapter.b * 0.25)
        assert (back[path].scale, back[path].axes) == (1.0, adapter.axes)
    plan = lora.plan(
        lambda p, x: x @ p["lm_head"]["kernel"],
        PARAMS,
        jnp.zeros((1, D)),
        rules={"lm_head/kernel": lora.Lora(rank=RANK)},
    )
    save_gguf(tmp_path / "head", {"lm_head/kernel": adapters["lm_head/kernel"]}, MOE, base=base)
    assert [*load_gguf(tmp_path / "head", plan, MOE, base=base)] == ["lm_head/kernel"]


def test_experts_that_are_modules_of_their_own(tmp_path):
    """Stacked in one parameter, of which one expert has no adapter: its zeros come back."""
    key_map = KeyMap(linear("layers/up/kernel", "model.layers.{i}.mlp.experts.{e}.up_proj", "i e in out"))
    a, b = (jax.random.normal(jax.random.key(n), (2, EXPERTS, *shape)) for n, shape in enumerate(((D, 2), (2, INNER))))
    a, b = (array_.at[1, 0].set(0) for array_ in (a, b))
    adapter = lora.LoraAdapter(a, b, lora.KernelAxes((0, 1), (2,), (3,)), 1.0)
    save_gguf(tmp_path / "file", {"layers/up/kernel": adapter}, key_map, base=BASES["qwen3moe"])
    assert len(arrays_in(tmp_path / "file")) == 4
    params = {"layers": {"up": {"kernel": jnp.zeros((2, EXPERTS, D, INNER))}}}
    back = load_gguf(tmp_path / "file", params, key_map)["layers/up/kernel"]
    np.testing.assert_array_equal(back.a, a)
    np.testing.assert_array_equal(back.b, b)


def test_a_text_model_inside_another_one(tmp_path):
    """Gemma 3 with images: what is written are the tensors of the text model, whatever its names begin with."""
    base = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_attention_heads": HEADS}}
    path = "model/layers/0/mlp/up_proj/kernel"
    adapter = lora.LoraAdapter(jnp.ones((D, RANK)), jnp.ones((RANK, INNER)), lora.KernelAxes((), (0,), (1,)), 1.0)
    inside = LLAMA.renamed("model.", "model.language_model.")
    save_gguf(tmp_path / "file", {path: adapter}, inside, base=base)
    assert sorted(arrays_in(tmp_path / "file")) == [f"blk.0.ffn_up.weight.lora_{x}" for x in "ab"]
    params = {"model": {"layers": {"0": {"mlp": {"up_proj": {"kernel": jnp.zeros((D, INNER))}}}}}}
    for key_map in (inside, LLAMA):
        np.testing.assert_array_equal(load_gguf(tmp_path / "file", params, key_map)[path].a, adapter.a)


def test_the_base_may_be_a_folder_a_config_or_a_gguf(tmp_path):
    config = BASES["llama"] | {"model_type": "mistral", "hidden_size": D}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.k_proj"
    own = {name: module(name)}
    model = model_file(tmp_path / "model.gguf", {"blk.0.attn_k.weight": SHAPES["k_proj"]})
    expected = written(tmp_path / "file", own).read_bytes()
    for base in (tmp_path / "model", str(tmp_path / "model" / "config.json"), model):
        assert written(tmp_path / "file", own, base=base).read_bytes() == expected
        same(read_gguf(tmp_path / "file", base=base), own)
    base = model_file(tmp_path / "other.gguf", {"blk.0.attn_k.weight": (12, 13)})
    with pytest.raises(LoraError, match=r"blk\.0\.attn_k\.weight \[12, 12\].*is \[12, 13\] there"):
        written(tmp_path / "file", own, base=base)
    with pytest.raises(LoraError, match="that is not there"):
        written(tmp_path / "file", own, base=model_file(tmp_path / "other.gguf", {"blk.1.attn_k.weight": (12, 12)}))


def model_file(path, tensors, **more):
    """A model's GGUF of architecture llama, with zeros."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(more.get("heads", HEADS))
    writer.add_head_count_kv(more.get("kv_heads", KV_HEADS))
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_table_that_is_the_head(tmp_path):
    """llama.cpp adapts neither end of it, unless the model's GGUF has both: then both are written."""
    table = "model.embed_tokens"
    own = {table: module(table)}
    both = model_file(tmp_path / "m.gguf", {"token_embd.weight": (VOCABULARY, D), "output.weight": (VOCABULARY, D)})
    one = model_file(tmp_path / "one.gguf", {"token_embd.weight": (VOCABULARY, D)})
    for base in (BASES["llama"] | {"tie_word_embeddings": True}, {"model_type": "gemma3"}, one):
        for name in (table, "lm_head"):
            with pytest.raises(LoraError, match="adapts neither"):
                written(tmp_path / "file", {name: module(name)}, base=base)
    with pytest.raises(LoraError, match="say tied=True"):
        written(tmp_path / "file", own, base=both)
    alone = arrays_in(written(tmp_path / "file", own, base=both, tied=False))
    assert sorted(alone) == ["token_embd.weight.lora_a", "token_embd.weight.lora_b"]
    found = arrays_in(written(tmp_path / "file", own, base=both, tied=True))
    a, b = own[table].arrays["a"], own[table].arrays["b"]
    change = 0.5 * (b @ a).T  # [tokens, d]
    lookups = found["token_embd.weight.lora_a"] @ found["token_embd.weight.lora_b"].T
    head = found["output.weight.lora_b"] @ found["output.weight.lora_a"]
    np.testing.assert_allclose(lookups, change, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head, change, rtol=1e-5, atol=1e-6)
    # And back, into a model in which both are one parameter.
    params = {"model": {"embed_tokens": {"embedding": jnp.zeros((VOCABULARY, D))}}}
    same(read_gguf(tmp_path / "file"), {**own, "lm_head": Module({"a": b.T, "b": a.T}, 0.5)}, exact=False)
    adapter = lora.LoraAdapter(jnp.asarray(a.T), jnp.asarray(b.T), lora.KernelAxes((), (0,), (1,)), 1.0)
    adapters = {"model/embed_tokens/embedding": adapter}
    save_gguf(tmp_path / "file", adapters, LLAMA, base=both, tied=True)
    back = load_gguf(tmp_path / "file", params, LLAMA)
    np.testing.assert_array_equal(back["model/embed_tokens/embedding"].a, adapter.a)


# Refusals -------------------------------------------------------------------------------------------------------------

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def _not_written(**cases):
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(
    ("modules", "kwargs", "says"),
    _not_written(
        norm=({"model.norm": Q}, {}, "has no place in a GGUF.*the nearest are"),
        positions=({"transformer.wpe": "transformer.wte"}, {"base": BASES["gpt2"]}, "has no place"),
        family=({Q: Q}, {"base": {"model_type": "mamba"}}, "model_type 'mamba'.*llama"),
        no_family=({Q: Q}, {"base": {}}, "model_type None"),
        no_base=({Q: Q}, {"base": 3}, "`base` is"),
        no_folder=({Q: Q}, {"base": "nowhere"}, "there is no nowhere"),
        no_heads=({Q: Q}, {"base": {"model_type": "llama"}}, "does not say how many heads"),
        heads=({Q: Q}, {"base": {"model_type": "llama", "num_attention_heads": 5}}, "not 5 heads"),
        odd_heads=({Q: Q}, {"base": {"model_type": "llama", "num_attention_heads": "4"}}, "expected a whole number"),
        tie=({Q: Q}, {"base": {"model_type": "llama", "tie_word_embeddings": "no"}}, "expected true or false"),
        dtype=({UP: UP}, {"dtype": jnp.float8_e4m3fn}, "llama.cpp does not read: say dtype"),
        head=({"lm_head": "lm_head"}, {"base": {"model_type": "gemma"}}, "adapts neither"),
        experts=(
            {"model.layers.0.mlp.experts.0.up_proj": UP},
            {"base": {"model_type": "qwen3_moe"}},
            "does not say how many experts",
        ),
        expert=({"model.layers.0.mlp.experts.3.up_proj": UP}, {"base": BASES["qwen3moe"]}, "an expert of a layer"),
        router=(
            {f"model.layers.0.{name}.gate": "model.layers.0.mlp.gate" for name in ("mlp", "block_sparse_moe")},
            {},
            "are both blk.0.ffn_gate_inp",
        ),
        twice=(
            {
                "model.layers.0.mlp.experts.0.up_proj": UP,
                "model.layers.0.mlp.experts.gate_up_proj": "model.layers.0.mlp.experts.gate_up_proj",
            },
            {},
            "given twice",
        ),
        down_twice=(
            {
                "model.layers.0.mlp.experts.down_proj": "model.layers.0.mlp.experts.down_proj",
                "model.layers.0.mlp.experts.0.down_proj": "model.layers.0.mlp.down_proj",
            },
            {},
            "are both blk.0.ffn_down_exps",
        ),
        long=({f"model.layers.{'1' * 50}.mlp.up_proj": UP}, {}, "longer than the 63 bytes"),
    ),
)
def test_what_is_not_written(tmp_path, modules, kwargs, says):
    with pytest.raises(LoraError, match=says):
        written(tmp_path / "file", {name: module(own) for name, own in modules.items()}, **kwargs)
    assert not [*tmp_path.iterdir()]


def test_further_things_that_are_not_written(tmp_path):
    own = adapters_of({UP: module(UP)})
    with pytest.raises(LoraError, match="DORA has no place in GGUF"):
        write_gguf(tmp_path / "file", own._replace(format=FORMATS["DORA"]), base=BASES["llama"])
    with pytest.raises(LoraError, match="of the kind 'conv'"):
        write_gguf(tmp_path / "file", own._replace(kinds={UP: "conv"}), base=BASES["llama"])
    ranks = Module({"a": np.ones((2, D), np.float32), "b": np.ones((INNER, 3), np.float32)}, 1.0)
    with pytest.raises(LoraError, match="of no common rank"):
        written(tmp_path / "file", {UP: ranks})
    large = Module({"a": np.ones((1, D), np.float32), "b": np.full((INNER, 1), 60000, np.float32)}, 2.0)
    with pytest.raises(LoraError, match="beyond float16"):
        written(tmp_path / "file", {UP: large}, dtype=jnp.float16)
    with pytest.raises(LoraError, match="float64"):
        written(tmp_path / "file", {UP: module(UP, dtype=np.float64)})
    with pytest.raises(LoraError, match="there are no adapters"):
        save_gguf(tmp_path / "file", {}, MOE, base=BASES["llama"])
    with pytest.raises(LoraError, match="floating"):
        save_gguf(tmp_path / "file", {}, MOE, base=BASES["llama"], dtype=jnp.int8)
    assert not [*tmp_path.iterdir()]


PAIR = {"blk.0.ffn_up.weight.lora_a": np.ones((2, 4)), "blk.0.ffn_up.weight.lora_b": np.ones((6, 2))}


@pytest.mark.parametrize(
    ("arrays", "more", "says"),
    [
        (PAIR, {"general.type": "model"}, "general.type is 'model', expected 'adapter'"),
        (PAIR, {"adapter.type": "control_vector"}, "adapter.type is 'control_vector'"),
        (PAIR, {"general.architecture": "mamba"}, "architecture 'mamba'; this version knows llama"),
        (PAIR, {"general.architecture": "qwen2"}, "for the architecture 'qwen2', and .* is 'llama'"),
        (PAIR, {"adapter.lora.alpha": float("nan")}, "expected a finite number"),
        (PAIR, {"adapter.lora.alpha": "8"}, "expected a finite number"),
        (PAIR, {"adapter.lora.alpha": 1e-45}, "no scale for rank 2"),
        (PAIR, {"adapter.alora.invocation_tokens": "x"}, "activated LoRA"),
        ({}, {}, "holds no tensors"),
        (PAIR | {"blk.0.attn_norm.weight": np.ones(4)}, {}, "attn_norm.weight.*llama.cpp reads norms"),
        (PAIR | {"blk.0.attn_norm.weight.lora_a": np.ones((1, 4))}, {}, "and not its partner"),
        (
            {f"blk.0.attn_norm.weight.lora_{x}": np.ones((2, 2)) for x in "ab"},
            {},
            "does not know in the architecture 'llama'",
        ),
        ({name: np.ones((2, 4)) for name in PAIR}, {}, "of no common rank"),
        ({name: np.ones((2, 2, 2)) for name in PAIR}, {}, "factors of 3 axes"),
        ({name: np.ones(2) for name in PAIR}, {}, "of no common rank"),
        ({f"blk.0.ffn_up_exps.weight.lora_{x}": np.ones((2, 2)) for x in "ab"}, {}, "factors of 2 axes"),
        (
            {
                f"blk.0.ffn_{p}_exps.weight.lora_{x}": np.ones((n, 2, 2))
                for p, n in (("up", 2), ("gate", 3))
                for x in "ab"
            },
            {},
            "experts of different numbers",
        ),
    ],
)
def test_what_is_not_read(tmp_path, arrays, more, says):
    foreign(tmp_path / "file", arrays, more)
    with pytest.raises(LoraError, match=says):
        read_gguf(tmp_path / "file", base=BASES["llama"])


def test_further_things_that_are_not_read(tmp_path):
    path = written(tmp_path / "file", {Q: module(Q)})
    with pytest.raises(LoraError, match=r"say base=.*num_attention_heads"):
        read_gguf(path)
    with pytest.raises(LoraError, match="not 5 heads"):
        read_gguf(path, base={"model_type": "llama", "num_attention_heads": 5})
    with pytest.raises(LoraError, match="of type 'adapter', expected a model"):
        read_gguf(path, base=path)
    with pytest.raises(LoraError, match="expected one of 'together'"):
        read_gguf(path, base=BASES["llama"], experts="all")
    with pytest.raises(LoraError, match="gives to none of the parameters"):
        load_gguf(path, {"lm_head": PARAMS["lm_head"]}, MOE, base=BASES["llama"])
    with pytest.raises(LoraError, match="cannot be read"):
        load_gguf(tmp_path / "nothing", PARAMS, MOE)


# Files that are not trusted -------------------------------------------------------------------------------------------


def header_with(tensors=1, facts=0, body=b""):
    return gguf_file.MAGIC + struct.pack("<IQQ", 3, tensors, facts) + body


def text(data):
    return struct.pack("<Q", len(data)) + data


def tensor(name=b"x", axes=(2, 2), kind=0, start=0):
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, start)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is no GGUF"),
        (b"GGML", "is no GGUF"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1), "of version 1"),
        (header_with()[:-2], "only 6 are left"),
        (header_with(tensors=2**60), "tensors, expected at most"),
        (header_with(facts=2**60), "facts, expected at most"),
        (header_with(body=struct.pack("<Q", 2**63)), "bytes, expected 1 to"),
        (header_with(body=text(b"")), "bytes, expected 1 to"),
        (header_with(body=text(b"\xff\xfe") + bytes(40)), "is no UTF-8"),
        (header_with(body=struct.pack("<Q", 100)), "are left"),
        (header_with(body=text(b"x") + struct.pack("<I", 5)), "has 5 axes"),
        (header_with(body=text(b"x") + struct.pack("<I", 0)), "has 0 axes"),
        (header_with(2, body=tensor() * 2 + bytes(64)), "twice"),
        (header_with(body=tensor(axes=(2**62, 2**62))), "expected to begin at"),
        (header_with(body=tensor(axes=(2, 0)) + bytes(64)), "is empty"),
        (header_with(body=tensor(start=32) + bytes(128)), "expected to begin at"),
        (header_with(body=tensor(kind=2) + bytes(128)), "GGUF's type 2"),
        (header_with(body=tensor(kind=8) + bytes(128)), "no multiple of 32"),
        (header_with(2, body=tensor() + tensor(b"y") + bytes(128)), "expected to begin at 32"),
        (header_with(0, 1, text(b"k") + struct.pack("<I", 77)), "type 77, which is none"),
        (header_with(0, 2, (text(b"k") + struct.pack("<IB", 0, 1)) * 2), "'k' twice"),
        (header_with(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**61)), "are left"),
        (header_with(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 2**62)), "are left"),
        (header_with(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99)), "a list of type 9"),
        (header_with(0, 1, text(b"k") + struct.pack("<IQ", 8, 2**40)), "are left"),
        (header_with(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 3)), "power of two"),
        (header_with(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)), "power of two"),
        (header_with(0, 1, text(b"general.alignment") + struct.pack("<I?", 7, 1)), "power of two"),
    ],
)
def test_files_that_lie(tmp_path, data, says, lists):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(LoraError, match=says):
        gguf_file.places(tmp_path / "file", gguf_file.header(tmp_path / "file", lists=lists))


def test_lists_of_text_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "ENTRIES", 3)
    body = text(b"k") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") * 2
    (tmp_path / "file").write_bytes(header_with(0, 2, body + body.replace(b"k", b"l", 1)))
    with pytest.raises(LoraError, match="lists of 4 entries"):
        gguf_file.header(tmp_path / "file")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    files = []
    for style in ("together", "apart"):
        names = [name for name in names_of("llama", style) if ".1." not in name or "experts" in name]
        files.append(written(folder / style, {name: module(name) for name in names}).read_bytes())
    foreign(folder / "foreign", PAIR, {"adapter.lora.alpha": 8.0, "general.name": "x"})
    return [*files, (folder / "foreign").read_bytes()]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_mutated_files(tmp_path, originals, share, seed):
    """A reader returns adapters or says what is wrong, and takes no more memory than the file and some."""
    rng, path = Random(seed), tmp_path / "file"
    tracemalloc.start()
    for _ in range(300 if seed == 0 else share(20_000)):
        original = rng.choice(originals)
        data = bytearray(original)
        begin = min(len(data), 3000)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(begin)
            kind = rng.randrange(5)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(data)]))
            elif kind == 2:
                del data[at : at + rng.randrange(1, 20)]
            elif kind == 3:
                data[at:at] = data[: rng.randrange(1, 40)]
            else:
                del data[rng.randrange(24, len(data)) :]
            begin = min(len(data), 3000)
            if begin < 64:
                break
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            found = read_gguf(path, base=BASES["llama"], experts=rng.choice(["together", "apart"]))
            for name in found.modules:
                outline = found.outlines[name].arrays
                assert {k: v.shape for k, v in found.modules[name].arrays.items()} == {
                    k: v.shape for k, v in outline.items()
                }
        except LoraError:
            pass
        assert tracemalloc.get_traced_memory()[1] - before < 2**21
    tracemalloc.stop()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_of_all_experts_is_what_the_modules_have():
    """The helper of these tests, `module`, has experts as PEFT has them."""
    own = module("model.layers.0.mlp.experts.down_proj").arrays
    a, b = own["a"].reshape(EXPERTS, RANK, -1), own["b"].reshape(D, RANK, EXPERTS).transpose(2, 0, 1)
    again = of_all_experts({"a": a, "b": b})
    np.testing.assert_array_equal(again["b"], own["b"])
