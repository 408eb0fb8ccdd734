"""Adapters as GGUF in the real llama.cpp: its logits are those of the model in JAX with the same adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_cpp_models import LlamaCpp, write_model
from test_recipes_models import tensors_of, write

import lora_jax as lora
from lora_jax.interop.gguf.adapters import load_gguf, save_gguf
from lora_jax.key_maps import KeyMap, linear

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
GEMMA = {"sliding_window": 64, "query_pre_attn_scalar": 8}
MODELS = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": 4},  # as hidden_size has it: llama.cpp knows no other size
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS},
    "gemma2": {
        "model_type": "gemma2",
        **GEMMA,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0},
}
OF_PHI3 = {"model_type": "llama", "head_dim": 4}
IDS = np.arange(12) * 7 % 40
# Of logits of about 5. llama.cpp has GELU, which is Gemma's, from a table in fp16.
CLOSE = {name: 1e-2 if name.startswith("gemma") else 1e-4 for name in MODELS}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`(folder, facts, tensors, model in JAX)` by name."""
    made = {}

    def model(name):
        if name not in made:
            facts = SIZES | (OF_PHI3 if name == "phi3" else MODELS[name])
            tensors = tensors_of(facts)
            folder = write(tmp_path_factory.mktemp("models") / name, facts, tensors)
            made[name] = folder, facts, tensors, lora.recipes.load(folder)
        return made[name]

    return model


@pytest.fixture
def llama_cpp(tmp_path):
    """Load models of GGUF, and let them go after the test."""
    loaded = []

    def load(facts, tensors, **kwargs):
        path = write_model(tmp_path / f"{len(loaded)}.gguf", facts, tensors, **kwargs)
        loaded.append(LlamaCpp(path))
        return loaded[-1], path

    yield load
    for model in loaded:
        model.close()


def adapters_of(model, seed=0, ends=True):
    """LoRA of all linear layers, with ranks and scales that differ, one of them as rank-stabilised LoRA has it."""
    rules = {
        r"model/layers/self_attn/[qk]_proj/kernel": lora.Lora(3, alpha=3.0),
        r"model/layers/self_attn/[vo]_proj/kernel": lora.RsLora(4, alpha=0.7),
        r"model/layers/mlp/gate/kernel": lora.Lora(1, alpha=0.5),
        r"model/layers/mlp/(experts/)?\w+_proj/kernel": lora.Lora(2, alpha=1.0),
    }
    if ends:
        rules |= {"lm_head/kernel": lora.Lora(5, alpha=4.0), "model/embed_tokens/embedding": lora.Lora(2, alpha=3.0)}
    rules = {pattern: rule for pattern, rule in rules.items() if model.config.experts or "/gate/" not in pattern}
    plan = lora.plan(model.logits, model.params, jnp.asarray(IDS)[None], rules=rules)
    key = jax.random.key(seed)
    found = {}
    for i, (path, adapter) in enumerate(lora.init(key, model.params, plan).items()):
        a, b = jax.random.split(jax.random.fold_in(key, i))
        a, b = (0.5 * jax.random.normal(k, x.shape) for k, x in ((a, adapter.a), (b, adapter.b)))
        found[path] = dataclasses.replace(adapter, a=a, b=b)
    return found


def logits(model, *weighted):
    """Logits in JAX, with the sum of adapters."""
    adapters = lora.combine(weighted) if len(weighted) > 1 or weighted[0][1] != 1 else weighted[0][0]
    return np.asarray(lora.lora_apply(model.logits)(model.params, adapters, jnp.asarray(IDS)[None]))[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_in_jax(tmp_path, models, llama_cpp, name):
    folder, facts, tensors, model = models(name)
    theirs, _ = llama_cpp(facts, tensors)
    plain = np.asarray(model.logits(model.params, jnp.asarray(IDS)[None]))[0]
    before = theirs.logits(IDS)
    np.testing.assert_allclose(before, plain, atol=CLOSE[name])
    one, other = (adapters_of(model, seed, ends=not model.config.tied) for seed in (0, 1))
    save_gguf(tmp_path / "one.gguf", one, model.key_map, base=folder)
    save_gguf(tmp_path / "other.gguf", other, model.key_map, base=folder)
    handles = [theirs.adapter(tmp_path / f"{file}.gguf") for file in ("one", "other")]
    assert all(handles)
    ours = logits(model, (one, 1.0))
    assert np.abs(ours - plain).max() > 0.5
    np.testing.assert_allclose(theirs.logits(IDS, (handles[0], 1.0)), ours, atol=CLOSE[name])
    both = theirs.logits(IDS, (handles[1], -0.5), (handles[0], 0.5))
    np.testing.assert_allclose(both, logits(model, (one, 0.5), (other, -0.5)), atol=CLOSE[name])
    np.testing.assert_array_equal(theirs.logits(IDS), before)
    back = load_gguf(tmp_path / "one.gguf", model.params, model.key_map, base=folder)
    np.testing.assert_allclose(logits(model, (back, 1.0)), ours, atol=1e-5)


@pytest.mark.parametrize(("dtype", "close"), [(jnp.float16, 1e-2), (jnp.bfloat16, 1e-1)])
def test_factors_in_half_precision(tmp_path, models, llama_cpp, dtype, close):
    folder, facts, tensors, model = models("llama")
    theirs, _ = llama_cpp(facts, tensors)
    adapters = adapters_of(model)
    save_gguf(tmp_path / "file", adapters, model.key_map, base=folder, dtype=dtype)
    ours = logits(model, (adapters, 1.0))
    np.testing.assert_allclose(theirs.logits(IDS, (theirs.adapter(tmp_path / "file"), 1.0)), ours, atol=close)


def test_phi3_has_several_projections_in_one(tmp_path, models, llama_cpp):
    """A Llama is a Phi-3 whose q, k and v are one weight, and gate and up another one."""
    _, facts, tensors, model = models("phi3")
    theirs, path = llama_cpp(facts | {"sliding_window": 0}, tensors, architecture="phi3", fused=True)
    np.testing.assert_allclose(theirs.logits(IDS), model.logits(model.params, jnp.asarray(IDS)[None])[0], atol=1e-4)
    layer = "model.layers.{i}"
    fused = KeyMap(
        *(
            linear(f"model/layers/self_attn/{x}_proj/kernel", f"{layer}.self_attn.qkv_proj", "i in out out", part=n)
            for n, x in enumerate("qkv")
        ),
        *(
            linear(f"model/layers/mlp/{x}_proj/kernel", f"{layer}.mlp.gate_up_proj", "i in out", part=n)
            for n, x in enumerate(("gate", "up"))
        ),
    )
    adapters = adapters_of(model)
    save_gguf(tmp_path / "file", adapters, fused + model.key_map, base=path, params=model.params)
    found = theirs.logits(IDS, (theirs.adapter(tmp_path / "file"), 1.0))
    np.testing.assert_allclose(found, logits(model, (adapters, 1.0)), atol=1e-4)


def test_a_table_that_is_the_head_where_the_gguf_has_both(tmp_path, models, llama_cpp):
    facts = SIZES | MODELS["qwen2"] | {"tie_word_embeddings": True}
    tensors = {name: tensor for name, tensor in tensors_of(facts).items() if name != "lm_head.weight"}
    model = lora.recipes.load(write(tmp_path / "tied", facts, tensors))
    theirs, path = llama_cpp(facts, tensors, with_head=True)
    adapters = adapters_of(model, ends=False)
    rules = {"model/embed_tokens/embedding": lora.Lora(2, alpha=1.0)}
    plan = lora.plan(model.logits, model.params, jnp.asarray(IDS)[None], rules=rules)
    for name, adapter in lora.init(jax.random.key(2), model.params, plan).items():
        a, b = (0.3 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate((adapter.a, adapter.b)))
        adapters[name] = dataclasses.replace(adapter, a=a, b=b)
    save_gguf(tmp_path / "file", adapters, model.key_map, base=path, tied=True)
    found = theirs.logits(IDS, (theirs.adapter(tmp_path / "file"), 1.0))
    np.testing.assert_allclose(found, logits(model, (adapters, 1.0)), atol=2e-4)
    with pytest.raises(lora.LoraError, match="adapts neither"):
        save_gguf(tmp_path / "file", adapters, model.key_map, base=tmp_path / "tied")


def test_what_llama_cpp_refuses_is_refused_before(tmp_path, models, llama_cpp):
    """A file for another model: llama.cpp refuses it when it is loaded, and `base` as a GGUF when it is written."""
    folder, facts, tensors, model = models("llama")
    first = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    other, path = llama_cpp(facts | {"num_hidden_layers": 1}, first)
    adapters = adapters_of(model)
    save_gguf(tmp_path / "file", adapters, model.key_map, base=folder)
    assert not other.adapter(tmp_path / "file")
    with pytest.raises(lora.LoraError, match=r"blk\.1\..* is not there"):
        save_gguf(tmp_path / "file", adapters, model.key_map, base=path)
