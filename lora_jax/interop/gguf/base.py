"""What a writer or a reader of GGUF adapters has to know of the model that they are for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.core.argument_checks import refuse
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.gguf import file as gguf_file
from lora_jax.interop.gguf.names import ARCHITECTURES, MODEL_TYPES, Architecture
from lora_jax.interop.model_config import CONFIG, model_facts

Base = str | os.PathLike[str] | Mapping[str, Any]
A_BASE = (
    'the folder of the model with its config.json, the GGUF of the model, or a dict such as {"model_type": "qwen3"}'
)


class ModelFacts(NamedTuple):
    """What is known of a model."""

    where: str  # it is known from, for messages
    architecture: Architecture
    heads: int | None
    kv_heads: int | None
    experts: int | None
    tied: bool | None  # whether the head is the table; None where that is not known
    own_head: bool  # whether the model's GGUF has a head beside the table
    shapes: Mapping[str, tuple[int, ...]] | None  # of the tensors of the model's GGUF, where that is at hand


def facts_of(call: str, base: Any) -> ModelFacts:
    """Return what a model's folder, its GGUF or its config says.

    Raises:
        LoraError: there is no such file; the model is of an architecture that this version does not write; numbers are
            missing, or are none.
    """
    if isinstance(base, Mapping):
        return _of_config(f"{call}: `base`", base)
    if not isinstance(base, str | os.PathLike):
        refuse(call, "base", base, A_BASE)
    path = Path(base)
    if path.is_file() and path.name != CONFIG:
        return _of_gguf(path)
    folder = path.parent if path.name == CONFIG else path
    if not (folder / CONFIG).is_file():
        raise LoraError(f"{call}: there is no {folder / CONFIG}; `base` is {A_BASE}.")
    return _of_config(str(folder / CONFIG), model_facts(folder))


def _of_config(where: str, config: Mapping[str, Any]) -> ModelFacts:
    kind = config.get("model_type")
    if kind == "gemma3" and isinstance(config.get("text_config"), Mapping):  # with a part that sees
        config = {**config, **config["text_config"]}
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise LoraError(
            f"{where} has the model_type {short(kind)}; adapters as GGUF are written for {', '.join(MODEL_TYPES)}."
        )
    architecture = ARCHITECTURES[MODEL_TYPES[kind]]
    heads = _number(where, config, "num_attention_heads", "n_head")
    kv_heads = _number(where, config, "num_key_value_heads")
    tied = config.get("tie_word_embeddings", architecture.tied)
    if not isinstance(tied, bool):
        raise LoraError(f"{where}: tie_word_embeddings is {short(tied)}, expected true or false.")
    experts = _number(where, config, "num_experts", "num_local_experts")
    return ModelFacts(where, architecture, heads, kv_heads or heads, experts, tied, not tied, None)


def _of_gguf(path: Path) -> ModelFacts:
    header = gguf_file.header(path)
    facts, where = header.facts, str(path)
    if facts.get("general.type", "model") != "model":
        raise LoraError(f"{where} is of type {short(facts['general.type'])}, expected a model: `base` is {A_BASE}.")
    architecture = architecture_of(where, facts)
    heads = _number(where, facts, f"{architecture.name}.attention.head_count")
    kv_heads = _number(where, facts, f"{architecture.name}.attention.head_count_kv")
    experts = _number(where, facts, f"{architecture.name}.expert_count")
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    own_head = "output.weight" in shapes
    return ModelFacts(
        where, architecture, heads, kv_heads or heads, experts, None if own_head else True, own_head, shapes
    )


def architecture_of(where: str, facts: Mapping[str, Any]) -> Architecture:
    """Return the architecture that a GGUF is of."""
    name = facts.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise LoraError(f"{where} is of the architecture {short(name)}; this version knows {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]


def _number(where: str, facts: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first of these numbers that is there, None where none is or it is 0."""
    for key in keys:
        found = facts.get(key)
        if found is None:
            continue
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise LoraError(f"{where}: {key} is {short(found)}, expected a whole number.")
        return found or None
    return None
