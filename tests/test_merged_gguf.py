"""Merged models as GGUF files, read back by the package `gguf`; llama.cpp and its converter are compared elsewhere."""

import json
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import run
from test_recipes_models import tensors_of, write

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.interop.gguf.merged import merge_gguf
from lora_jax.interop.gguf.merged_keys import _CUTS, _LLAMA_3

gguf = pytest.importorskip("gguf")
if not hasattr(gguf, "GGUFWriter"):
    pytest.skip("another module is called gguf", allow_module_level=True)

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
    "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
}
KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}


def tokenizer(tokens=30, cut="llama-bpe", **more):
    """tokenizer.json of bytes and one merge, with two added tokens."""
    steps = next(steps for steps, name in _CUTS.items() if name == cut)
    made = {"Split": {"pattern": {"Regex": steps[0][1]}, "behavior": "Isolated"}, "Digits": {"individual_digits": True}}
    cuts = [
        {"type": kind, **made[kind]}
        if kind != "ByteLevel"
        else {"type": kind, "add_prefix_space": False, "use_regex": own}
        for kind, own in steps
    ]
    vocab = {chr(97 + i): i for i in range(tokens - 1)} | {"ab": tokens - 1}
    return {
        "added_tokens": [
            {"id": tokens, "content": "<|end|>", "special": True},
            {"id": tokens + 1, "content": "<tool>", "special": False},
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
    } | more


def folder(path, kind="llama", tokens=None, **facts):
    facts = SIZES | {"model_type": kind, "eos_token_id": 30} | facts
    write(path, facts, tensors_of(facts))
    (path / "tokenizer.json").write_text(json.dumps(tokens or tokenizer()))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ messages }}"}))
    return path


def adapters_of(path, rank=2):
    """Random adapters of all linear layers of the first layer, and what merging them makes of the tensors."""
    rng, adapters = np.random.default_rng(0), {}
    for name, w in load_file(path / "model.safetensors").items():
        if name.startswith("model.layers.0.") and name.endswith("_proj.weight"):
            a, b = rng.normal(size=(w.shape[1], rank)), rng.normal(size=(rank, w.shape[0]))
            axes = lora.KernelAxes((), (0,), (1,))
            adapters[name.removesuffix(".weight")] = lora.LoraAdapter(*map(jnp.float32, (a, b)), axes, 0.1)
    entries = [key_maps.linear(module, module) for module in adapters]
    return adapters, key_maps.KeyMap(*entries)


def read(file):
    """Return the keys, the tensors and their types."""
    found = gguf.GGUFReader(file)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in found.tensors}
    return (
        {name: field.contents() for name, field in found.fields.items()},
        tensors,
        {t.name: t.tensor_type.name for t in found.tensors},
    )


def in_pairs(w, heads):
    """Rows of each head: the first of one half, the first of the other, and so on."""
    half = len(w) // heads // 2
    return w[[head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_merged_model_in_one_file(kind, dtype, tmp_path):
    source = folder(tmp_path / "in", kind)
    adapters, key_map = adapters_of(source)
    found = merge_gguf(source, adapters, tmp_path / "model.gguf", key_map, dtype=dtype)
    lora.merge_checkpoint(source, adapters, tmp_path / "merged", key_map)
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    keys, tensors, types = read(tmp_path / "model.gguf")
    assert len(tensors) == len(expected)
    close = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3, "q8_0": 0.02}[dtype]
    for name, to in NAMES.items():
        w = expected[name]
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            w = in_pairs(w, 4 if "q_proj" in name else 2)
        np.testing.assert_allclose(tensors[to], w, atol=close * np.abs(w).max())
        own = "F32" if w.ndim == 1 else "F16" if dtype == "q8_0" and w.shape[1] % 32 else KINDS[dtype]
        assert types[to] == own
    assert list(found) == [f"{module}.weight" for module in adapters]
    assert all(0.9 < survival.kept < 1.1 and survival.loss < 0.2 for survival in found.values())
    arch = keys["general.architecture"]
    assert arch == kind
    sizes = ("block_count", "context_length", "embedding_length", "feed_forward_length")
    assert [keys[f"{arch}.{n}"] for n in sizes] == [2, 64, 32, 48]
    assert [keys[f"{arch}.attention.{n}"] for n in ("head_count", "head_count_kv", "key_length")] == [4, 2, 8]
    assert keys[f"{arch}.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert keys[f"{arch}.rope.freq_base"] == 10_000
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[:2] + tokens[29:33] == ["a", "b", "ab", "<|end|>", "<tool>", "[PAD32]"]
    assert [kinds[i] for i in (0, 30, 31, 39)] == [1, 3, 4, 5]
    assert keys["tokenizer.ggml.merges"] == ["a b"]
    assert keys["tokenizer.ggml.eos_token_id"] == 30
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "merged", "model.gguf"]


def test_positions(tmp_path):
    """Llama 3's factors are a tensor; others are keys."""
    theta = {"rope_theta": 500_000.0}
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    for rope, say in [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, **theta}, ("linear", 4.0, None)),
        ({"rope_parameters": yarn | theta}, ("yarn", 2.0, 32)),
        ({"rope_parameters": LLAMA_3 | theta}, (None, None, None)),
    ]:
        source = folder(tmp_path / str(say[0]), **rope)
        merge_gguf(source, *given(source, tmp_path / f"{say[0]}.gguf"), dtype="f16")
        keys, tensors, _ = read(tmp_path / f"{say[0]}.gguf")
        scaling = [keys.get(f"llama.rope.scaling.{n}") for n in ("type", "factor", "original_context_length")]
        assert tuple(scaling) == say
        assert keys["llama.rope.freq_base"] == 500_000
    waves = [2 * np.pi * 500_000 ** (i / 8) for i in range(0, 8, 2)]
    expected = []
    for wave in waves:  # the formula of Llama 3.1's rope_utils, in transformers
        smooth = (32 / wave - 1) / 3
        expected.append(1 if wave < 8 else 8 if wave > 32 else 1 / ((1 - smooth) / 8 + smooth))
    np.testing.assert_allclose(tensors["rope_freqs.weight"], expected, rtol=1e-6)


def given(source, file):
    adapters, key_map = adapters_of(source)
    return adapters, file, key_map


WRONG = [
    (
        {"kind": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 4},
        {},
        "model_type is 'gemma2', expected one of llama",
    ),
    ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu'"),
    ({"kind": "mistral", "sliding_window": 8}, {}, "sliding_window is 8"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rope_type is 'dynamic'"),
    ({"kind": "qwen3", "rope_scaling": LLAMA_3}, {}, "'llama3', which qwen3 of GGUF does not have"),
    ({}, {"dtype": "q4_k"}, "dtype='q4_k'.*expected one of f32, f16, bf16, q8_0"),
    ({"tokens": tokenizer(pre_tokenizer={"type": "Whitespace"})}, {}, "is none of llama-bpe, qwen2, .*cut='tekken'"),
    ({"tokens": tokenizer(tokens=60)}, {}, "the model 40 entries"),
    ({"tokens": tokenizer(model={"type": "Unigram", "vocab": []})}, {}, "'Unigram', expected BPE"),
    ({"tokens": tokenizer(model={"type": "BPE", "byte_fallback": True, "vocab": {"a": 0}})}, {}, "SentencePiece"),
    ({"tokens": tokenizer(added_tokens=[{"id": 1}])}, {}, "added_tokens hold"),
]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("facts", "more", "says"), WRONG)
def test_what_is_refused_leaves_nothing(facts, more, says, tmp_path):
    made = {key: value for key, value in facts.items() if key not in ("hidden_act", "rope_scaling")}
    source = folder(tmp_path / "in", **made)
    config = json.loads((source / "config.json").read_text()) | {k: v for k, v in facts.items() if k not in made}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(lora.LoraError, match=f"(?s){says}"):
        merge_gguf(source, *given(source, tmp_path / "model.gguf"), **more)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_that_is_there_stays(tmp_path):
    source = folder(tmp_path / "in")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(lora.LoraError, match="is there already"):
        merge_gguf(source, *given(source, tmp_path / "model.gguf"))
    assert (tmp_path / "model.gguf").read_text() == "mine"
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(lora.LoraError, match=r"up_proj\.weight' would hold numbers beyond those of F16"):
        merge_gguf(source, *given(source, tmp_path / "other.gguf"), dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "model.gguf"]


def check_mutated(cases, tmp_path):
    """A file, or a `LoraError` and nothing; whatever the config and the tokenizer say."""
    random, ends = Random(cases), [0, 0]
    source = folder(tmp_path / "in", **{"rope_scaling": LLAMA_3})
    adapters, key_map = adapters_of(source)
    texts = {name: (source / name).read_text() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    for _ in range(cases):
        name = random.choice(list(texts))
        at = random.randrange(len(texts[name]))
        new = random.choice(['"', "0", "9", "null", "-", "[", "]", "{", "}", ",", ":", "x", "true", '"a"', "1e9"])
        (source / name).write_text(texts[name][:at] + new + texts[name][at + random.randrange(3) :])
        try:
            merge_gguf(source, adapters, tmp_path / "out.gguf", key_map, dtype="f16")
            (tmp_path / "out.gguf").unlink()
            ends[0] += 1
        except lora.LoraError:
            ends[1] += 1
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
        (source / name).write_text(texts[name])
    assert min(ends) > cases / 20


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_mutated_configs(tmp_path):
    check_mutated(60, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_many_mutated_configs(tmp_path, share):
    check_mutated(share(2000), tmp_path)


def test_the_command(capsys, tmp_path):
    source = folder(tmp_path / "in")
    adapters, key_map = adapters_of(source)
    lora.save_peft(tmp_path / "peft", adapters, key_map)
    code, out, _ = run(capsys, "merge", source, tmp_path / "peft", tmp_path / "m.gguf", "--to", "gguf:q8_0", "--json")
    assert code == 0
    assert len(json.loads(out)) == len(adapters)
    assert read(tmp_path / "m.gguf")[0]["general.file_type"] == 7


def test_the_tables():
    assert "(?i:'s|'t" in _LLAMA_3
    assert jax.tree.leaves(list(_CUTS.values())) == ["llama-bpe", "qwen2", "smollm", "gpt-2"]
