"""`lora.recipes` beside transformers: tiny random models of each family, saved by it, have its logits here.

And adapters of them, saved as PEFT folders, have PEFT's logits.
"""

import json

import jax
import numpy as np
import pytest

peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-interop")
torch = pytest.importorskip("torch", reason="needs torch: make test-interop")
import transformers as hf  # noqa: E402

import lora_jax as lora  # noqa: E402

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
WIDE = {"head_dim": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 5e5, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LOCAL = {"sliding_window": 5, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES = {
    "llama": (hf.LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama, tied": (hf.LlamaConfig, {"tie_word_embeddings": True, **WIDE}),
    "llama, biases": (hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": (hf.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama, linear": (hf.LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, yarn": (hf.LlamaConfig, {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}),
    "mistral": (hf.MistralConfig, {"sliding_window": None}),
    "mistral, window": (hf.MistralConfig, {"sliding_window": 5, **WIDE}),
    "qwen2": (hf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, windows": (hf.Qwen2Config, WINDOW),
    "qwen3": (hf.Qwen3Config, WIDE),
    "qwen3, yarn": (
        hf.Qwen3Config,
        {**WIDE, "rope_parameters": YARN | {"truncate": False}, "tie_word_embeddings": True},
    ),
    "qwen3 moe": (hf.Qwen3MoeConfig, {**WIDE, **EXPERTS}),
    "qwen3 moe, norm": (hf.Qwen3MoeConfig, {**WIDE, **EXPERTS, "norm_topk_prob": True, "sliding_window": 5}),
    "qwen3 moe, window": (hf.Qwen3MoeConfig, {**WIDE, **EXPERTS, "use_sliding_window": True, "sliding_window": 5}),
    "gemma": (hf.GemmaConfig, WIDE),
    "gemma2": (hf.Gemma2Config, {**WIDE, "sliding_window": 5, "query_pre_attn_scalar": 5}),
    "gemma2, caps": (hf.Gemma2Config, {**WIDE, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None}),
    "gemma3": (hf.Gemma3TextConfig, {**WIDE, **LOCAL}),
    "gemma3, linear": (hf.Gemma3TextConfig, {**WIDE, **LOCAL, "rope_parameters": GEMMA_ROPES}),
}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = VISION | {"image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"}
PIXTRAL = VISION | {"image_size": 8, "patch_size": 4, "model_type": "pixtral", "head_dim": 4}
# Models of text and images, of which the text model is read.
WRAPPED = {
    "gemma3, images": (
        hf.Gemma3Config,
        {"text_config": {**SIZES, **WIDE, **LOCAL, "rope_parameters": GEMMA_ROPES}, "vision_config": SIGLIP}
        | {"mm_tokens_per_image": 4, "image_token_index": 31},
    ),
    "mistral3": (
        hf.Mistral3Config,
        {"text_config": SIZES | WIDE | {"model_type": "mistral", "sliding_window": None}, "vision_config": PIXTRAL}
        | {"image_token_index": 31, "tie_word_embeddings": False},
    ),
}
OF_PEFT = ("llama 3.1", "mistral, window", "qwen2, windows", "qwen3", "qwen3 moe", "gemma", "gemma2", "gemma3")
IDS = np.arange(48).reshape(2, 24) * 7 % 32
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            kind, options = (CASES | WRAPPED)[name]
            torch.manual_seed(0)
            options = options if name in WRAPPED else SIZES | options
            model = class_of(name).from_config(kind(**options), attn_implementation="eager").eval()
            for module, norm in model.named_modules():  # transformers begins with norms that do nothing
                if module.endswith("norm"):
                    norm.weight.data += 0.3 * torch.randn_like(norm.weight)
                if getattr(norm, "bias", None) is not None:
                    norm.bias.data += 0.3 * torch.randn_like(norm.bias)
            made[name] = tmp_path_factory.mktemp("models") / "model"
            model.save_pretrained(made[name], max_shard_size="20KB" if "tied" in name else "1GB")
        return made[name]

    return folder


def class_of(name):
    return hf.AutoModelForImageTextToText if name in WRAPPED else hf.AutoModelForCausalLM


def of_torch(folder, name=""):
    return class_of(name).from_pretrained(folder, attn_implementation="eager").eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("name", [*CASES, *WRAPPED])
def test_logits_are_those_of_transformers(name, folders):
    expected = logits_of(of_torch(folders(name), name))
    model = lora.recipes.load(folders(name))
    with jax.default_matmul_precision("highest"):
        found = jax.jit(model.logits)(model.params, IDS)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1


def with_fields_of_4(facts):
    """What transformers 4 writes where transformers 5 writes `rope_parameters`, `layer_types` and other names."""
    facts, rope = dict(facts), dict(facts["rope_parameters"])
    facts["torch_dtype"] = facts.pop("dtype")
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        facts.pop(name, None)
    if "num_local_experts" in facts:
        facts["num_experts"] = facts.pop("num_local_experts")
    if facts["model_type"] == "gemma3_text":
        whole, near = rope["full_attention"], rope["sliding_attention"]
        facts |= {"rope_theta": whole.pop("rope_theta"), "rope_local_base_freq": near["rope_theta"]}
        facts |= {"sliding_window_pattern": 3, "rope_scaling": whole}
    else:
        facts |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    if facts["rope_scaling"]["rope_type"] == "default":
        facts["rope_scaling"] = None
    return facts


@pytest.mark.parametrize("name", [name for name in CASES if name != "gemma3"])
def test_configs_of_transformers_4(name, folders):
    facts = json.loads((folders(name) / "config.json").read_text())
    parse = lora.recipes.config.parse_config
    assert parse(with_fields_of_4(facts)) == parse(facts)


@pytest.mark.parametrize("name", [*OF_PEFT, *WRAPPED])
def test_adapters_have_pefts_logits(name, folders, tmp_path):
    model = lora.recipes.load(folders(name))
    adapters = lora.init(jax.random.key(0), model.params, model.plan(lora.Lora(rank=3, alpha=6)))
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(adapters)))
    leaves, treedef = jax.tree.flatten(adapters)
    pairs = zip(leaves, keys, strict=True)
    moved = [a + 0.1 * jax.random.normal(key, a.shape) if a.ndim > 2 else a for a, key in pairs]  # not their scales
    adapters = treedef.unflatten(moved)
    lora.save_peft(tmp_path / "peft", adapters, model.key_map, params=model.params, task_type="CAUSAL_LM")
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lora.lora_apply(model.logits))(model.params, adapters, IDS)
    base = of_torch(folders(name), name)
    before = logits_of(base)
    expected = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert np.abs(expected - before).max() > 0.1
    if name in WRAPPED:  # and so has the whole model with the adapters merged into its files
        lora.merge_checkpoint(folders(name), tmp_path / "peft", tmp_path / "merged")
        merged = of_torch(tmp_path / "merged", name)
        np.testing.assert_allclose(logits_of(merged), expected, atol=1e-4, rtol=0)
        images = {key: tensor for key, tensor in of_torch(folders(name), name).state_dict().items() if "tower" in key}
        assert len(images) > 10
        for key, tensor in images.items():
            assert torch.equal(merged.state_dict()[key], tensor), key
