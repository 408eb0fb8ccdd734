"""All that the real HF PEFT writes into a folder reaches the merged files: the logits are those of PEFT's model."""

import json

import jax
import numpy as np
import pytest
from test_interop import DECODER, loaded, moved, outputs, params_of

peft = pytest.importorskip("peft", reason="needs HF PEFT: make test-interop")
torch = pytest.importorskip("torch", reason="needs torch: make test-interop")
import transformers as hf  # noqa: E402

import lora_jax as lora  # noqa: E402
from lora_jax import key_maps  # noqa: E402

PATH = "model/embed_tokens/embedding"
EMBED = {"target_modules": ["q_proj", "embed_tokens"]}
OPTIONS = {  # of LoraConfig
    "pissa": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "tokens": {"trainable_token_indices": [1, 7]},
    "biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "head": {"modules_to_save": ["lm_head"]},
    "head's adapter": {"target_modules": ["q_proj", "lm_head"]},
    "table": EMBED,
    "whole table": {"modules_to_save": ["embed_tokens"]},
    "tied": {**EMBED, "ensure_weight_tying": True},
    "tied and whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # PEFT's own, of what is tested here
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


def base(tied):
    """A Qwen 2, which has biases."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, **options)).eval()


def trained(tied, folder, save_embedding_layers=False, **options):
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
    )
    model = moved(peft.get_peft_model(base(tied), config))
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return outputs(model, "qwen2")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [*OPTIONS, "table beside its base"])
def test_merged_folders_have_pefts_logits(name, tied, tmp_path):
    base(tied).save_pretrained(tmp_path / "base", max_shard_size="8KB" if name == "table" else "1GB")
    options = EMBED | {"save_embedding_layers": True} if name == "table beside its base" else OPTIONS[name]
    expected = trained(tied, tmp_path / "peft", **options)
    lora.merge_checkpoint(tmp_path / "base", tmp_path / "peft", tmp_path / "out", tied="untie")
    model = type(base(tied)).from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(outputs(model, "qwen2"), expected, atol=2e-5, rtol=1e-5)
    assert np.abs(expected - outputs(base(tied), "qwen2")).max() > 1e-3, "the adapters change something"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    apart = ("head", "head's adapter", "table", "whole table", "table beside its base")
    assert config["tie_word_embeddings"] == (tied and name not in apart)


@pytest.mark.parametrize("name", ["pissa", "olora", "biases", "lora_bias", "head", "table"])
def test_what_is_loaded_and_merged_with_a_key_map(name, tmp_path):
    base(False).save_pretrained(tmp_path / "base")
    expected = trained(False, tmp_path / "peft", **OPTIONS[name])
    adapters, others = lora.load_peft(tmp_path / "peft", params_of(base(False))[0], key_maps.LLAMA)
    lora.merge_checkpoint(tmp_path / "base", adapters, tmp_path / "out", key_maps.LLAMA, others=others)
    model = type(base(False)).from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(outputs(model, "qwen2"), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["adapter", "whole"])
def test_peft_keeps_both_ends_equal(how, tmp_path):
    """What is written with tied="both" is read by PEFT without a warning, and is the model with another table."""
    model = base(True)
    params, _ = params_of(model)
    query = "model/layers/0/self_attn/q_proj/kernel"
    axes = lora.KernelAxes((), (0,), (1,))
    adapters = {
        path: jax.tree.map(
            lambda a, i=i: jax.random.normal(jax.random.key(i), a.shape) / 3,
            lora.Lora(3, 5).factors(jax.random.key(0), params[path].shape, axes),
        )
        for i, path in enumerate((PATH, query))
    }
    others = {}
    if how == "whole":
        others = {PATH: lora.merge(params, {PATH: adapters.pop(PATH)})[PATH]}
    lora.save_peft(tmp_path, adapters, key_maps.LLAMA, others=others, params=params, tied="both")
    found = loaded(base(True), tmp_path)
    merged = lora.merge(params | others, adapters)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor(np.asarray(merged[PATH])))
        model.model.layers[0].self_attn.q_proj.weight.copy_(torch.tensor(np.asarray(merged[query]).T))
    np.testing.assert_allclose(outputs(found, "qwen2"), outputs(model, "qwen2"), atol=2e-5, rtol=1e-5)
    again, whole = lora.load_peft(tmp_path, params, key_maps.LLAMA)
    for path, w in lora.merge(params | whole, again).items():
        np.testing.assert_allclose(w, merged[path], rtol=1e-6, atol=1e-6)


def test_pefts_adapter_of_a_tied_table_in_jax(tmp_path):
    """Of the lookups alone: with a head of its own the model is PEFT's; with one table it is refused."""
    expected = trained(True, tmp_path / "peft", **EMBED)
    params, _ = params_of(base(True))
    with pytest.raises(lora.LoraError, match=r"changes the lookups of 'model.embed_tokens.weight' alone"):
        lora.load_peft(tmp_path / "peft", params, key_maps.LLAMA)
    apart = params | {"lm_head/kernel": params[PATH].T}
    adapters, _ = lora.load_peft(tmp_path / "peft", apart, key_maps.LLAMA)
    merged = lora.merge(apart, adapters)
    model = base(False)
    state = {name: tensor.clone() for name, tensor in base(True).state_dict().items()}
    for path, match in key_maps.LLAMA.match({path: leaf.shape for path, leaf in merged.items()}).items():
        state[match.tensors()[()]] = torch.tensor(match.to_torch(np.asarray(merged[path])))
    model.load_state_dict(state)
    np.testing.assert_allclose(outputs(model, "qwen2"), expected, atol=2e-5, rtol=1e-5)


TIED = {
    "whole table": {"modules_to_save": ["embed_tokens"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "table": EMBED,
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "rank-stabilised": {**EMBED, "use_rslora": True},
    "tokens": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("name", TIED)
def test_copies_that_peft_keeps_equal_are_one_table_in_jax(name, tmp_path):
    """With `ensure_weight_tying` a file says twice what is of both ends; a model with one table reads it as one."""
    expected = trained(True, tmp_path / "peft", ensure_weight_tying=True, **TIED[name])
    params, _ = params_of(base(True))
    adapters, others = lora.load_peft(tmp_path / "peft", params, key_maps.LLAMA)
    assert PATH in adapters | others
    state = lora.to_torch(lora.merge(params | others, adapters), key_maps.LLAMA)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = base(True)
    model.load_state_dict({key: torch.tensor(tensor) for key, tensor in state.items()}, strict=True)
    np.testing.assert_allclose(outputs(model, "qwen2"), expected, atol=2e-5, rtol=1e-5)
