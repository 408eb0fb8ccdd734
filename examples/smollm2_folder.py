"""A published model and a task, as files that `lora-jax train` takes, without an account or a download by hand.

    python examples/smollm2_folder.py SmolLM2-135M-Instruct headlines.jsonl

The first is a folder as on the Hugging Face Hub: SmolLM2-135M-Instruct, out of a GGUF file that a Python package brings
(its weights were rounded to 4 bits there, and are bfloat16 here). The second has 2,066 conversations: the opening of a
news story of the BBC, and its headline as the answer.
"""

import json
import sys
from pathlib import Path
from typing import Any

import assets
import decoder
import finetune_decoder
import ml_dtypes
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

import lora_jax as lora
from lora_jax.checkpoints.atomic_dir import written, written_file


def write_model(file: decoder.File, folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json into a new folder."""
    config = decoder.config_of(file)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(decoder.abstract_params(config), sep="/").items()}
    tensors = {}
    for place in decoder.KEY_MAP.match(shapes).values():
        for name in place.tensors().values():
            tensor = decoder.torch_tensor(file, config, name)
            tensors[name] = np.ascontiguousarray(tensor).astype(ml_dtypes.bfloat16)
    with written(folder) as new:
        # Written by Python, the file has the rights of a new one; of safetensors' own nobody else could read it.
        (new / "model.safetensors").write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        (new / "config.json").write_text(json.dumps(facts(config), indent=2), encoding="utf-8")
        decoder.load_tokenizer(file).save(str(new / "tokenizer.json"))
        special = {"bos_token": decoder.START, "eos_token": decoder.STOP, "pad_token": decoder.STOP}
        template = {"chat_template": file.metadata["tokenizer.chat_template"]}
        (new / "tokenizer_config.json").write_text(json.dumps(special | template, indent=2), encoding="utf-8")


def facts(config: decoder.Config) -> dict[str, Any]:
    """What config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": 8192,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": round(config.epsilon, 10),
        "rope_theta": config.rope_base,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_examples(stories: list[finetune_decoder.Story], path: Path) -> None:
    """Write a conversation a line."""
    with written_file(path) as new, new.open("w", encoding="utf-8") as lines:
        for story in stories:
            asked = {"role": "user", "content": finetune_decoder.REQUEST + story.opening}
            answered = {"role": "assistant", "content": story.headline}
            system = {"role": "system", "content": finetune_decoder.SYSTEM}
            print(json.dumps({"messages": [system, asked, answered]}), file=lines)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/smollm2_folder.py MODEL_FOLDER EXAMPLES.jsonl")
    try:
        [weights], [news] = assets.fetch(assets.SMOLLM2), assets.fetch(assets.BBC_NEWS)
        write_model(decoder.open_gguf(weights), Path(sys.argv[1]))
        write_examples(finetune_decoder.read_stories(news), Path(sys.argv[2]))
    except (assets.AssetError, lora.LoraError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
