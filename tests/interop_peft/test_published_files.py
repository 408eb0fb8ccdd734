"""Adapters of the real HF PEFT in published files: trained tokens, experts of each by itself, whole models."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_interop import DECODER, HEADS, MODELS, key_map_of, made, moved, outputs, params_of

peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-interop")
torch = pytest.importorskip("torch", reason="needs torch: make test-interop")
import transformers as hf  # noqa: E402

import lora_jax as lora  # noqa: E402
from lora_jax import key_maps  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape"),
]

MOE = {"num_experts_per_tok": 2}
EXPERTS = {  # models whose published files have a tensor for each expert and projection
    "qwen3moe": MODELS["qwen3moe"],
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, **HEADS, **MOE, num_local_experts=4)),
    "olmoe": lambda: hf.OlmoeForCausalLM(
        hf.OlmoeConfig(**DECODER, num_attention_heads=4, num_key_value_heads=2, **MOE, num_experts=4)
    ),
}


def experts_of(name):
    torch.manual_seed(0)
    return EXPERTS[name]().eval()


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_into_files_of_single_ones(name, targets, tmp_path):
    experts_of(name).save_pretrained(tmp_path / "base")
    files = load_file(tmp_path / "base" / "model.safetensors")
    assert any(".experts.3." in key for key in files), "the files have the experts apart"
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{one}" for one in targets]
    )
    model = moved(peft.get_peft_model(experts_of(name), config))
    model.save_pretrained(tmp_path / "peft")
    expected = outputs(model.merge_and_unload(), "qwen3moe")
    assert np.abs(expected - outputs(experts_of(name), "qwen3moe")).max() > 1e-3, "the adapters change something"
    params, _ = params_of(experts_of(name))
    adapters, others = lora.load_peft(tmp_path / "peft", params, key_maps.LLAMA)
    lora.merge_checkpoint(tmp_path / "base", tmp_path / "peft", tmp_path / "folder")
    lora.merge_checkpoint(tmp_path / "base", adapters, tmp_path / "adapters", key_maps.LLAMA, others=others)
    for how in ("folder", "adapters"):
        found = type(experts_of(name)).from_pretrained(tmp_path / how).eval()
        np.testing.assert_allclose(outputs(found, "qwen3moe"), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_into_files_both_ways(tied, tmp_path):
    """Of a model with one table for both ends, the rows are of both, as in PEFT."""
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}

    def base():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, **options)).eval()

    base().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = moved(peft.get_peft_model(base(), config))
    model.save_pretrained(tmp_path / "peft")
    expected = outputs(model, "llama")
    merged = outputs(model.merge_and_unload(), "llama")
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    params, _ = params_of(base())
    adapters, others = lora.load_peft(tmp_path / "peft", params, key_maps.LLAMA)
    lora.merge_checkpoint(tmp_path / "base", tmp_path / "peft", tmp_path / "folder")
    lora.merge_checkpoint(
        tmp_path / "base", adapters, tmp_path / "adapters", key_maps.LLAMA, others=others, params=params
    )
    for how in ("folder", "adapters"):
        found = hf.LlamaForCausalLM.from_pretrained(tmp_path / how).eval()
        np.testing.assert_allclose(outputs(found, "llama"), merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_loaded_by_torch(name, tmp_path):
    """All parameters, moved, become a file of which torch loads every tensor and misses none."""
    params, _ = params_of(made(name))
    moved_params = {path: leaf + 0.01 * (i % 3) for i, (path, leaf) in enumerate(params.items())}
    save_file(lora.to_torch(moved_params, key_map_of(name)), tmp_path / "model.safetensors")
    model = made(name)
    tensors = {key: torch.tensor(tensor) for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    left = [key for key in model.state_dict() if key not in tensors]
    own = [key for key, _ in model.named_parameters()]
    tensors |= {key: model.state_dict()[key] for key in left if key not in own}  # buffers, and second names
    model.load_state_dict(tensors, strict=True)
    found, _ = params_of(model)
    assert found.keys() == moved_params.keys()
    for path, leaf in moved_params.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_a_tied_head_is_in_a_file_once(tmp_path):
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, **options)).eval()
    model.save_pretrained(tmp_path)
    params, _ = params_of(model)
    save_file(
        lora.to_torch(jax.tree.map(lambda a: a * 1.5, params), key_maps.LLAMA),
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    found = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    np.testing.assert_array_equal(outputs(found, "llama"), outputs(model, "llama"))


def test_a_model_in_memory_and_one_that_was_compiled(tmp_path):
    """Names of `state_dict`, with the adapter's name, and those that `torch.compile` leaves."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = moved(peft.get_peft_model(made("llama"), config))
    model.save_pretrained(tmp_path)
    params, _ = params_of(made("llama"))
    expected, _ = lora.load_peft(tmp_path, params, key_maps.LLAMA)
    compiled = torch.compile(model, backend="eager")
    state = {name: t.detach().numpy() for name, t in compiled.state_dict().items() if "lora_" in name}
    assert all(name.startswith("_orig_mod.base_model.model.") and ".default." in name for name in state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    found, _ = lora.load_peft(tmp_path, params, key_maps.LLAMA)
    assert found.keys() == expected.keys()
    for path, adapter in expected.items():
        np.testing.assert_array_equal(found[path].a, adapter.a)
        np.testing.assert_array_equal(found[path].b, adapter.b)


def test_velora_computes_what_lora_does(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], velora_config={"num_groups": 4}, init_lora_weights=False)
    model = moved(peft.get_peft_model(made("llama"), config))
    expected = outputs(model, "llama")
    model.save_pretrained(tmp_path / "peft")
    assert any("velora" in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    made("llama").save_pretrained(tmp_path / "base")
    lora.merge_checkpoint(tmp_path / "base", tmp_path / "peft", tmp_path / "out")
    found = hf.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(outputs(found, "llama"), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["LORA", "ADALORA", "LOHA", "LOKR", "VERA"])
def test_no_default_of_pefts_configs_is_refused(name, tmp_path):
    """A config as PEFT writes it, with every key that this version of PEFT has."""
    kinds = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}
    more = {"ADALORA": {"total_step": 10}, "VERA": {"r": 4}}.get(name, {})
    config = (kinds | {"VERA": peft.VeraConfig})[name](target_modules=["q_proj"], **more)
    model = moved(peft.get_peft_model(made("llama"), config))
    model.save_pretrained(tmp_path)
    params, _ = params_of(made("llama"))
    assert len(lora.load_peft(tmp_path, params, key_maps.LLAMA)[0]) == 2
