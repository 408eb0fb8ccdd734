"""What a model of a published folder computes, as its config.json says; of transformers 4 or 5.

Every field that changes what is computed is read here, or refused by its name.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import nearest
from lora_jax.interop.low_bits.config import MEND, parse_packing
from lora_jax.interop.model_config import CONFIG, model_facts
from lora_jax.recipes.config_fields import Fields
from lora_jax.recipes.rope import Rope, read_rope
from lora_jax.recipes.wrappers import WRAPPERS, text_facts

QKV = ("q_proj", "k_proj", "v_proj")
FULL, SLIDING = "full_attention", "sliding_attention"
OWN_LAYER_TYPES = ("qwen2", "qwen3", "gemma2", "gemma3_text")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")


class Family(NamedTuple):
    """What models of one `model_type` have in common.

    `defaults` are the fields that transformers does not require in a file.
    """

    architecture: str
    defaults: dict[str, Any]


_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA_2 = {"query_pre_attn_scalar": 256, "sliding_window": 4096}
# Published configs of Gemma 3 with images leave these out.
_GEMMA_3 = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {}),
    "mistral": Family("MistralForCausalLM", {"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", {}),
    "qwen3": Family("Qwen3ForCausalLM", {"head_dim": 128}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {}),
    "gemma": Family("GemmaForCausalLM", _GEMMA),
    "gemma2": Family(
        "Gemma2ForCausalLM", _GEMMA | _GEMMA_2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    ),
    "gemma3_text": Family("Gemma3ForCausalLM", _GEMMA | _GEMMA_2 | _GEMMA_3),
}


@dataclass(frozen=True)
class Config:
    """What a decoder computes.

    Args:
        family: `model_type` of config.json.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: sizes; `intermediate` of one expert, where
            there are experts.
        epsilon: of the norms.
        activation: "silu", "gelu" or "gelu_pytorch_tanh".
        ropes: different kinds of positions.
        rope_of: which of them each layer has.
        windows: how many tokens each layer sees, its own among them; None for all.
        tied: whether the embedding is the head as well.
        query_scale: what products of queries and keys are multiplied by.
        biases: names of the projections that have a bias.
        qk_norm: whether queries and keys are normalized, each head by itself.
        norm_offset: added to the scale of a norm: 1 for Gemma.
        norms_after: whether attention and MLP are normalized after as well.
        embedding_scale: what embeddings are multiplied by.
        attention_cap, logit_cap: c of `c * tanh(x / c)`, for these products and for logits; None for none.
        experts: in each layer; 0 for one dense MLP.
        experts_per_token: how many of them each token goes to.
        norm_topk: whether the weights of these add up to 1.
        eos: ids of the tokens that end a text.
        length: the longest text, in tokens, that the model is made for.
        wrapper: `model_type` of the model of text and images that it is the text model of; "" for none.

    Made by `read_config`, whose example shows one.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    activation: str
    ropes: tuple[Rope, ...]
    rope_of: tuple[int, ...]
    windows: tuple[int | None, ...]
    tied: bool
    query_scale: float
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    norm_offset: float = 0.0
    norms_after: bool = False
    embedding_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    norm_topk: bool = False
    eos: tuple[int, ...] = ()
    length: int = 0
    wrapper: str = ""


def read_config(folder: str | Path, ignore: Iterable[str] = ()) -> Config:
    """Return what the config.json of a folder describes.

    Args:
        folder: of a published model.
        ignore: names of fields that change nothing of what the model computes, and that are not known here.

    Returns:
        A `Config`.

    Raises:
        LoraError: there is no such file; another architecture; a field that asks for something that is not supported,
            or that is not known.

    >>> import json, tempfile, lora_jax as lora
    >>> from pathlib import Path
    >>> facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     config = lora.recipes.read_config(folder)
    >>> config.family, config.head_dim, config.tied
    ('llama', 16, False)
    """
    path = Path(folder) / CONFIG
    if not (facts := model_facts(Path(folder))):
        raise LoraError(f"there is no {path}, which says what the model computes.")
    return parse_config(facts, str(path), ignore)


def parse_config(facts: Mapping[str, Any], where: str = CONFIG, ignore: Iterable[str] = ()) -> Config:
    """Return what the fields of a config.json describe; arguments and errors as of `read_config`.

    >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> config = parse_config({"model_type": "llama", "vocab_size": 100, **sizes})
    >>> config.head_dim, config.kv_heads, config.windows, config.ropes
    (16, 4, (None, None), (Rope(theta=10000.0, kind='default', settings=()),))
    """
    found = facts.get("model_type")
    wrapper = found if isinstance(found, str) and found in WRAPPERS else ""
    if wrapper:
        facts, where = text_facts(facts, where, ignore), f"{where}, text_config"
    family = facts.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = (*FAMILIES, *WRAPPERS)
        near = f"; near is {nearest(family, known, n=1)[0]!r}" if isinstance(family, str) else ""
        hint = ""
        if facts.get("text_config") is not None:
            hint = f" Of models of text and images, those of {' and '.join(WRAPPERS)} are read, for texts alone."
        raise LoraError(f"{where}: model_type is {short(family)}, expected one of {', '.join(known)}{near}.{hint}")
    fields = Fields(FAMILIES[family].defaults | dict(facts), where)
    config = dataclasses.replace(_read(family, fields), wrapper=wrapper)
    fields.check_all_read(ignore)
    return config


def _read(family: str, fields: Fields) -> Config:
    _check_fixed(family, fields)
    is_gemma, is_gemma_2 = family.startswith("gemma"), family in ("gemma2", "gemma3_text")
    hidden, heads, layers = (fields.count(f"{n}") for n in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = fields.count("head_dim", hidden // heads)
    kv_heads = fields.count("num_key_value_heads", heads)
    length = fields.count("max_position_embeddings", 2**30)
    if heads % kv_heads or head_dim % 2:
        raise LoraError(
            f"{fields.where}: {heads} heads of {head_dim} numbers cannot share {kv_heads} heads of keys and values."
        )
    types = _layer_types(family, layers, fields)
    ropes, rope_of = _ropes(family, types, length, fields)
    scale = fields.number("query_pre_attn_scalar", head_dim) if is_gemma_2 else head_dim
    return Config(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=fields.count("vocab_size"),
        epsilon=fields.number("rms_norm_eps", 1e-6),
        activation=_activation(family, fields),
        ropes=ropes,
        rope_of=rope_of,
        windows=tuple(_window(fields) if kind == SLIDING else None for kind in types),
        tied=fields.flag("tie_word_embeddings"),
        query_scale=scale**-0.5,
        biases=_biases(family, fields),
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        norm_offset=1.0 if is_gemma else 0.0,
        norms_after=is_gemma_2,
        embedding_scale=hidden**0.5 if is_gemma else 1.0,
        attention_cap=fields.number_or_none("attn_logit_softcapping") if family == "gemma2" else None,
        logit_cap=fields.number_or_none("final_logit_softcapping") if is_gemma_2 else None,
        eos=_eos(fields),
        length=length,
        **_mlp(family, fields),
    )


def _check_fixed(family: str, fields: Fields) -> None:
    """Raise for fields that are right with one value alone."""
    for name in ("quantization_config", "compression_config"):
        if (packing := fields.get(name, None)) is not None and parse_packing(packing, fields.where) is None:
            raise LoraError(f"{fields.where}: the weights are packed by bitsandbytes. {MEND}")
    architecture = FAMILIES[family].architecture
    if (found := fields.facts.get("architectures")) and architecture not in found:
        fields.refuse("architectures", found, f"[{architecture!r}]: no other head is read")
    fields.only("attention_dropout", 0.0, 0)
    for name in ("use_bidirectional_attention", "rope_interleaved", "use_mrope", "is_encoder_decoder"):
        fields.only(name, False)
    fields.only("add_cross_attention", False)
    fields.only("is_decoder", False, True)
    fields.only("partial_rotary_factor", 1.0, 1)
    if family == "gemma3_text":
        fields.only("attn_logit_softcapping")


def _mlp(family: str, fields: Fields) -> dict[str, Any]:
    """Return the sizes of the MLP, or of the experts."""
    if family != "qwen3_moe":
        return {"intermediate": fields.count("intermediate_size")}
    fields.get("intermediate_size", None)  # of dense layers, of which there are none
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    for name in ("shared_expert_intermediate_size", "n_shared_experts"):
        fields.only(name, 0)
    names = ("num_experts", "num_local_experts")  # of transformers 4 and 5
    counts = [fields.count(name) for name in names if fields.get(name, None) is not None]
    if len(set(counts)) != 1:
        raise LoraError(f"{fields.where}: num_experts and num_local_experts are {counts}, expected one number.")
    top = fields.count("num_experts_per_tok", 8)
    if top > counts[0]:
        fields.refuse("num_experts_per_tok", top, f"at most the {counts[0]} experts that there are")
    return {
        "intermediate": fields.count("moe_intermediate_size"),
        "experts": counts[0],
        "experts_per_token": top,
        "norm_topk": fields.flag("norm_topk_prob"),
    }


def _activation(family: str, fields: Fields) -> str:
    """Return the activation of the MLP. Gemma's files of the first days name another one than it was trained with."""
    if not family.startswith("gemma"):
        found = fields.get("hidden_act", "silu")
        if found not in ACTIVATIONS:
            fields.refuse("hidden_act", found, f"one of {', '.join(ACTIVATIONS)}")
        return str(found)
    fields.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    return "gelu_pytorch_tanh"


def _biases(family: str, fields: Fields) -> tuple[str, ...]:
    if family == "qwen2":
        return QKV
    if family == "mistral":
        return ()
    attention = (*QKV, "o_proj") if fields.flag("attention_bias") else ()
    mlp = family == "llama" and fields.flag("mlp_bias")
    return (*attention, *(("gate_proj", "up_proj", "down_proj") if mlp else ()))


def _eos(fields: Fields) -> tuple[int, ...]:
    found = fields.get("eos_token_id", None)
    several = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in several):
        fields.refuse("eos_token_id", found, "an id, or a list of ids")
    return tuple(several)


# Layers of several types ----------------------------------------------------------------------------------------------


def _layer_types(family: str, layers: int, fields: Fields) -> tuple[str, ...]:
    """Return whether each layer sees all tokens, or those in a window."""
    expected = tuple(SLIDING if slides else FULL for slides in _slides(family, layers, fields))
    found = fields.get("layer_types", None)
    if found is None:
        return expected
    if not isinstance(found, list) or len(found) != layers or any(kind not in (FULL, SLIDING) for kind in found):
        fields.refuse("layer_types", found, f"a list of {layers}, each {FULL!r} or {SLIDING!r}")
    if family not in OWN_LAYER_TYPES and tuple(found) != expected:
        fields.refuse("layer_types", found, f"{expected[0]!r} for all layers of {family!r}")
    if SLIDING in found and fields.get("sliding_window", None) is None:
        fields.refuse("layer_types", found, f"no {SLIDING!r}, as there is no sliding_window")
    if SLIDING in found and family.startswith("qwen") and not fields.flag("use_sliding_window"):
        fields.refuse("layer_types", found, f"no {SLIDING!r}, as use_sliding_window is false")
    return tuple(found)


def _slides(family: str, layers: int, fields: Fields) -> list[bool]:
    """Return which layers have a window where the file does not say it layer by layer."""
    if family in ("llama", "gemma"):
        return [False] * layers
    has_window = fields.get("sliding_window", None) is not None
    if family.startswith("qwen"):
        has_window = fields.flag("use_sliding_window") and has_window
        first = fields.count("max_window_layers", layers, least=0)
        return [has_window and (family == "qwen3_moe" or i >= first) for i in range(layers)]
    if family == "gemma3_text":
        pattern = fields.count("sliding_window_pattern", fields.get("_sliding_window_pattern", None) or 6)
        return [has_window and (i + 1) % pattern != 0 for i in range(layers)]
    return [has_window and (family == "mistral" or i % 2 == 0) for i in range(layers)]


def _window(fields: Fields) -> int:
    return fields.count("sliding_window")


def _ropes(
    family: str, types: tuple[str, ...], length: int, fields: Fields
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """Return the different kinds of positions, and which each layer has."""
    is_gemma_3 = family == "gemma3_text"
    theta = fields.number("rope_theta", 1e6 if is_gemma_3 else 1e4)
    local = fields.number("rope_local_base_freq", 1e4) if is_gemma_3 else theta
    scaling, parameters = fields.get("rope_scaling", None), fields.get("rope_parameters", None)
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            fields.refuse(name, value, "an object")
    given = {**(parameters or {}), **(scaling or {})} if not is_gemma_3 else {}
    where = f"{fields.where}: rope"
    if not is_gemma_3:
        return (read_rope(where, given, theta, length),), (0,) * len(types)
    whole, near = (dict((parameters or {}).get(kind) or {}) for kind in (FULL, SLIDING))
    if parameters and FULL not in parameters and SLIDING not in parameters:
        fields.refuse("rope_parameters", parameters, f"an entry for {FULL!r} and one for {SLIDING!r}")
    ropes = (
        read_rope(f"{where} of {FULL}", {**whole, **(scaling or {})}, theta, length),
        read_rope(f"{where} of {SLIDING}", near, local, length),
    )
    return ropes, tuple(int(kind == SLIDING) for kind in types)
