"""Models of text and images, whose text model is read. tests/interop_peft compares with transformers."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_recipes_models import SIZES, facts_of, tensors_of, write

import lora_jax as lora
from lora_jax.cli.run_model import load
from lora_jax.recipes.config import parse_config
from lora_jax.recipes.rope import Rope

SPELLINGS = {  # of the same tensors, in published files and in those that some programs save
    "published": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    "saved": {"model.": "model.language_model.", "lm_head.": "lm_head."},
}
IMAGES = {
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": np.full((4, 4), 2.0, np.float32),
    "multi_modal_projector.mm_soft_emb_norm.weight": np.full(3, 3.0, np.float32),
}
WHOLE = {
    "gemma3": ("gemma3", {"architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256}),
    "mistral": ("mistral3", {"architectures": ["Mistral3ForConditionalGeneration"], "spatial_merge_size": 2}),
}


def whole(name, **changes):
    """The config of a model of text and images around one of the text models."""
    kind, more = WHOLE[name]
    return {"model_type": kind, **more, "vision_config": {"hidden_size": 4}, "text_config": facts_of(name), **changes}


def spelled(tensors, spelling):
    marks = SPELLINGS[spelling]
    named = {
        next(new + name.removeprefix(old) for old, new in marks.items() if name.startswith(old)): tensor
        for name, tensor in tensors.items()
    }
    inside = "model." if spelling == "saved" else ""
    return named | {inside + name: tensor for name, tensor in IMAGES.items()}


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_text_model_is_read(name, spelling, tmp_path):
    tensors = tensors_of(facts_of(name))
    alone = lora.recipes.load(write(tmp_path / "alone", facts_of(name), tensors))
    model = lora.recipes.load(write(tmp_path / "whole", whole(name), spelled(tensors, spelling)))
    jax.tree.map(np.testing.assert_array_equal, model.params, alone.params)
    assert model.config.wrapper == whole(name)["model_type"]
    assert model.replace(config=alone.config).config == alone.config
    names = {entry.name for entry in model.key_map.entries if entry.name.endswith(("up_proj", "lm_head"))}
    assert "model.language_model.layers.{i}.mlp.up_proj" in names
    assert "lm_head" in names


def test_published_configs_leave_out_what_transformers_fills_in():
    text = {
        "model_type": "gemma3_text",
        **{"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024},
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    facts = {
        **{"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256},
        **{"boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144, "eos_token_id": [1, 106]},
        **{"initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0"},
        "text_config": text,
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "vision_use_head": False},
    }
    config = parse_config(facts)
    assert (config.heads, config.kv_heads, config.head_dim, config.vocabulary) == (8, 4, 256, 262_208)
    assert (config.epsilon, config.query_scale, config.tied, config.eos) == (1e-6, 1 / 16, True, (1, 106))
    assert config.ropes == (Rope(1e6, "linear", (("factor", 8.0),)), Rope(1e4))
    assert config.windows[:6] == (1024,) * 5 + (None,)
    assert lora.recipes.decoder.count_of(config) == 3_880_263_168  # of gemma-3-4b, without what sees images
    large = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 168}
    found = parse_config(facts | {"text_config": text | large})
    assert (found.heads, found.kv_heads, found.head_dim, found.query_scale) == (32, 16, 128, 168**-0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "text_config is None, expected the config of a model of type 'gemma3_text'"),
        ({"text_config": SIZES | {"model_type": "llama"}}, "text_config is 'llama', expected"),
        ({"text_config": facts_of("gemma3", soft_skills=1)}, "config.json, text_config: soft_skills is 1"),
        ({"text_config": facts_of("gemma3", final_logit_softcapping=30.0)}, "caps no logits, expected null"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "expected .'Gemma3ForConditionalGeneration'"),
        ({"audio_config": {}}, "audio_config is {}, and nothing here knows"),
        ({"quantization_config": {"quant_method": "gptq"}}, "packed by 'gptq'"),
        ({"model_type": "qwen2_5_vl"}, "Of models of text and images, those of gemma3 and mistral3 are read"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(lora.LoraError, match=message):
        parse_config(whole("gemma3", **changes))


def test_whose_flag_of_a_tied_head_counts():
    """The outer one, which transformers 5 reads, where there is one."""
    text = facts_of("gemma3", tie_word_embeddings=False)
    assert not parse_config(whole("gemma3", text_config=text)).tied
    assert parse_config(whole("gemma3", text_config=text, tie_word_embeddings=True)).tied
    assert not parse_config(whole("mistral")).tied


def test_tensors_that_are_missing_or_that_nothing_reads(tmp_path):
    tensors = spelled(tensors_of(facts_of("gemma3")), "published")
    more = tensors | {"audio_tower.layer.weight": np.zeros(2, np.float32)}
    with pytest.raises(lora.LoraError, match=r"(?s)1 tensor\(s\) that nothing reads.*audio_tower"):
        lora.recipes.load(write(tmp_path / "more", whole("gemma3"), more))
    less = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(lora.LoraError, match=r"(?s)lacks 1 .*language_model\.model\.layers\.1\.mlp\.up_proj\.weight"):
        lora.recipes.load(write(tmp_path / "less", whole("gemma3"), less))
    alone = tensors_of(facts_of("gemma3")) | IMAGES
    with pytest.raises(lora.LoraError, match=r"(?s)2 tensor\(s\) that nothing reads.*vision_tower"):
        lora.recipes.load(write(tmp_path / "alone", facts_of("gemma3"), alone))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_adapters_are_merged_and_what_sees_images_stays(spelling, tmp_path, capsys):
    facts = whole("gemma3", text_config=facts_of("gemma3", tie_word_embeddings=True))
    tensors = spelled(tensors_of(facts["text_config"]), spelling)
    folder = write(tmp_path / "model", facts, tensors, shards=2)
    model = load(folder, lora.recipes.Options())
    assert capsys.readouterr().err.count("vision_tower and multi_modal_projector are left out") == 1
    adapters = lora.init(jax.random.key(0), model.params, model.plan(lora.Lora(rank=2)))
    adapters = jax.tree.map(lambda a: a + 0.1, adapters)
    lora.save_peft(tmp_path / "peft", adapters, model.key_map)
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in names
    lora.merge_checkpoint(folder, tmp_path / "peft", tmp_path / "merged")
    found = lora.recipes.load(tmp_path / "merged")
    expected = lora.merge(model.params, adapters)
    close(found.params, expected)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert merged.keys() == tensors.keys()
    kept = [name for name in merged if "vision_tower" in name or "multi_modal_projector" in name]
    assert len(kept) == len(IMAGES)
    for name in kept:
        np.testing.assert_array_equal(merged[name], tensors[name])
    again, _ = lora.load_peft(tmp_path / "peft", model.params, model.key_map)
    close(lora.merge(model.params, again), expected)


def test_adapters_of_either_text_model_fit_the_other(tmp_path):
    """Names that were saved for the text model alone, or by older versions of transformers, are read."""
    tensors = tensors_of(facts_of("gemma3"))
    alone = lora.recipes.load(write(tmp_path / "alone", facts_of("gemma3"), tensors))
    model = lora.recipes.load(write(tmp_path / "whole", whole("gemma3"), spelled(tensors, "published")))
    adapters = lora.init(jax.random.key(0), alone.params, alone.plan({".*/q_proj/kernel": lora.Lora(rank=2)}))
    older = alone.key_map.renamed("model.", "language_model.model.")
    for name, key_map in {"alone": alone.key_map, "older": older}.items():
        lora.save_peft(tmp_path / f"peft {name}", adapters, key_map)
        found, _ = lora.load_peft(tmp_path / f"peft {name}", model.params, model.key_map)
        jax.tree.map(np.testing.assert_array_equal, found, adapters)
