"""What a GGUF file of a whole model says beside its tensors: sizes, positions and the vocabulary.

The keys are those that llama.cpp's own converter writes for the architectures llama (Llama, Mistral, SmolLM), qwen2 and
qwen3. What it would have to guess is refused by name.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.core.untrusted import read_json
from lora_jax.interop.key_map import Array

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by `model_type`
TOKENIZER = "tokenizer.json"
LARGEST_TOKENIZER = 2**27  # bytes; those of 250,000 tokens have some 30 million
VALUES = 2**24
_INSTEAD = "Merge into safetensors, lora.merge_checkpoint, and convert these with llama.cpp's convert_hf_to_gguf.py."
_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_LLAMA_3 += r"|\s+(?!\S)|\s+"
# How texts are cut before they become tokens, as tokenizer.json has it, and what llama.cpp calls it.
_BYTES, _BYTES_OF_WORDS = ("ByteLevel", False), ("ByteLevel", True)
_CUTS = {
    (("Split", _LLAMA_3), _BYTES): "llama-bpe",
    (("Split", _LLAMA_3.replace("{1,3}", "")), _BYTES): "qwen2",
    (("Digits", True), _BYTES_OF_WORDS): "smollm",
    (_BYTES_OF_WORDS,): "gpt-2",
}


def architecture_of(facts: Mapping[str, Any], where: str) -> str:
    """Return the architecture of a model in GGUF, by its config.

    Raises:
        LoraError: another model; a config that llama.cpp computes something else for.
    """
    found = facts.get("model_type")
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise LoraError(
            f"{where}: model_type is {short(found)}, expected one of {', '.join(ARCHITECTURES)}. {_INSTEAD}"
        )
    if (activation := facts.get("hidden_act", "silu")) != "silu":
        raise LoraError(f"{where}: hidden_act is {short(activation)}, expected 'silu'. {_INSTEAD}")
    window, most = facts.get("sliding_window"), facts.get("max_position_embeddings")
    is_used = found == "mistral" or facts.get("use_sliding_window") is True
    if is_used and window is not None and not (type(window) is type(most) is int and window >= most):
        raise LoraError(f"{where}: sliding_window is {short(window)}, which {found} of GGUF does not have. {_INSTEAD}")
    return ARCHITECTURES[found]


def sizes_of(facts: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the sizes that a config states, by their names there.

    Raises:
        LoraError: one is missing, or no number above 0; heads do not divide each other.
    """
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
             "max_position_embeddings")  # fmt: skip
    found = {name: facts.get(name) for name in names}
    found["num_key_value_heads"] = facts.get("num_key_value_heads") or found["num_attention_heads"]
    for name, value in found.items():
        if type(value) is not int or not 0 < value < 2**31:
            raise LoraError(f"{where}: {name} is {short(value)}, expected a number above 0.")
    sizes = {name: int(value) for name, value in found.items() if value is not None}
    head = facts.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    if type(head) is not int or head % 2 or not 0 < head < 2**20:
        raise LoraError(f"{where}: head_dim is {short(head)}, expected an even number above 0.")
    return sizes | {"head_dim": head}


def add_sizes(writer: Any, facts: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    """Write the sizes of a model."""
    epsilon = facts.get("rms_norm_eps", 1e-6)
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise LoraError(f"{where}: rms_norm_eps is {short(epsilon)}, expected a number above 0.")
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(float(epsilon))
    writer.add_vocab_size(sizes["vocab_size"])


# Positions ------------------------------------------------------------------------------------------------------------


def add_positions(writer: Any, scaling_types: Any, facts: Mapping[str, Any], sizes: Mapping[str, int], where: str
) -> Array | None:  # fmt: skip
    """Write how positions are turned; return Llama 3's factors of frequencies, fp32, which are a tensor in GGUF.

    Args:
        writer: of GGUF.
        scaling_types: the names of kinds of positions, `gguf.RopeScalingType`.
        facts: of config.json.
        sizes: as of `sizes_of`.
        where: the file, for messages.
    """
    own = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    if not isinstance(own, dict):
        raise LoraError(f"{where}: the parameters of positions are {short(own)}, expected an object.")
    theta = _number(own, "rope_theta", _number(facts, "rope_theta", 10_000.0, where), where)
    writer.add_rope_freq_base(theta)
    kind = own.get("rope_type", own.get("type", "default"))
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise LoraError(f"{where}: rope_type is {short(kind)}, expected default, linear, yarn or llama3. {_INSTEAD}")
    if kind == "default":
        return None
    factor = _number(own, "factor", None, where)
    if kind == "llama3":
        return _llama3(own, theta, factor, sizes["head_dim"], where)
    writer.add_rope_scaling_type(scaling_types.LINEAR if kind == "linear" else scaling_types.YARN)
    writer.add_rope_scaling_factor(factor)
    if kind == "yarn":
        unknown = [n for n in own if n not in ("rope_type", "type", "factor", "rope_theta", _ORIGINAL)]
        if unknown:
            raise LoraError(f"{where}: yarn has {short(unknown[0])}, expected its factor alone. {_INSTEAD}")
        writer.add_rope_scaling_orig_ctx_len(int(_number(own, _ORIGINAL, None, where)))
    return None


_ORIGINAL = "original_max_position_embeddings"


def _number(facts: Mapping[str, Any], name: str, default: float | None, where: str) -> float:
    value = facts.get(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise LoraError(f"{where}: {name} is {short(value)}, expected a number above 0.")
    return float(value)


def _llama3(own: Mapping[str, Any], theta: float, factor: float, head: int, where: str) -> Array:
    """Return what each frequency is divided by: long waves by `factor`, short ones by 1, those between by a mixture."""
    low, high, length = (
        _number(own, name, default, where)
        for name, default in (("low_freq_factor", 1.0), ("high_freq_factor", 4.0), (_ORIGINAL, 8192.0))
    )
    waves = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    share = np.clip((length / waves - low) / (high - low), 0, 1) if high != low else (length / waves > low) * 1.0
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


# The vocabulary -------------------------------------------------------------------------------------------------------


def add_vocabulary(gguf: Any, writer: Any, source: Path, size: int, cut: str | None) -> None:
    """Write the tokens of a tokenizer of bytes and merges (BPE), its special tokens, and the template of chats.

    Args:
        gguf: the package.
        writer: its writer.
        source: the folder of the model.
        size: of the vocabulary, which may have more entries than the tokenizer has tokens.
        cut: what llama.cpp calls the way in which texts are cut first, such as "llama-bpe"; None for that which
            tokenizer.json has, if it is known.

    Raises:
        LoraError: there is no such tokenizer, or one of another kind.
    """
    path = source / TOKENIZER
    facts = read_json(path, LARGEST_TOKENIZER, "tokenizer", values=VALUES, finite=False)
    model = facts.get("model") if isinstance(facts, dict) else None
    tokens = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(tokens, dict) or model.get("byte_fallback") is True:
        found = model.get("type") if isinstance(model, dict) else None
        raise LoraError(
            f"{path}: the tokenizer is {short(found)}{' of SentencePiece' if tokens else ''}, expected BPE over bytes, "
            f"as of Llama 3, Qwen and SmolLM. {_INSTEAD}"
        )
    names, types = _tokens(tokens, facts.get("added_tokens") or [], size, gguf.TokenType, path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut or _cut_of(facts.get("pre_tokenizer"), path))
    writer.add_token_list(names)
    writer.add_token_types(types)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (source / name).exists():
            read_json(source / name, LARGEST_TOKENIZER, "config of a tokenizer", values=VALUES, finite=False)
    try:
        special = gguf.SpecialVocab(source, load_merges=True, n_vocab=size)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OSError,
    ) as error:  # of files, in gguf's reader
        raise LoraError(f"the tokenizer in {source} cannot be read by gguf: {short(str(error))}.") from error
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokens: Mapping[str, Any], added: Any, size: int, types: Any, path: Path) -> tuple[list[str], list[int]]:
    """Return the name and the type of each entry of the vocabulary; entries without a token are unused."""
    names, kinds = [f"[PAD{i}]" for i in range(size)], [int(types.UNUSED)] * size
    several = added if isinstance(added, list) else [added]
    entries = [(name, at, types.NORMAL) for name, at in tokens.items()]
    for one in several:
        if not isinstance(one, dict) or not isinstance(one.get("content"), str):
            raise LoraError(f"{path}: added_tokens hold {short(one)}, expected objects with a content and an id.")
        name = one["content"]
        is_control = one.get("special") is True or (name.startswith("<|") and name.endswith("|>"))
        entries.append((name, one.get("id"), types.CONTROL if is_control else types.USER_DEFINED))
    for name, at, kind in entries:
        if type(at) is not int or not 0 <= at < size:
            raise LoraError(f"{path}: token {short(name)} has the id {short(at)}, and the model {size:,} entries.")
        names[at], kinds[at] = name, int(kind)
    return names, kinds


def _cut_of(cut: Any, path: Path) -> str:
    """Return what llama.cpp calls the way in which a tokenizer cuts texts."""
    several = cut.get("pretokenizers") if isinstance(cut, dict) and cut.get("type") == "Sequence" else [cut]
    steps = tuple(map(_step, several)) if isinstance(several, list) else ()
    if steps not in _CUTS:
        raise LoraError(
            f"{path}: how texts are cut, {short(cut)}, is none of {', '.join(_CUTS.values())}. Say what llama.cpp "
            "calls it, as in merge_gguf(..., cut='tekken')."
        )
    return _CUTS[steps]


def _step(step: Any) -> Any:
    """Return what a step of cutting does, to be looked up."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Split" and isinstance(step.get("pattern"), dict) and step.get("behavior") == "Isolated":
        return kind, str(step["pattern"].get("Regex"))
    if kind == "Digits":
        return kind, step.get("individual_digits") is True
    if kind == "ByteLevel" and step.get("add_prefix_space") is False:
        return kind, step.get("use_regex", True) is True
    return None
