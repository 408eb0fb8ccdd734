"""Where llama.cpp keeps the modules of transformers: the names of tensors, and what an architecture does to them.

A place in a file is the name of a tensor without ".weight": "blk.3.attn_q" is "model.layers.3.self_attn.q_proj". The
experts of a layer are three tensors, whatever they are in torch:

    "together"  mlp.experts.gate_up_proj, mlp.experts.down_proj   parameters of all experts, as in transformers 5
    "apart"     mlp.experts.7.gate_proj, .up_proj, .down_proj     modules of one expert, as in published files
    "mixtral"   block_sparse_moe.experts.7.w1, .w3, .w2           the same in Mixtral's files

Names and architectures are those of gguf 0.19 (`tensor_mapping.py`) and of the converters of llama.cpp beside it.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import nearest
from lora_jax.interop.name_templates import NameTable, fill

Experts = Literal["together", "apart", "mixtral"]
STYLES: tuple[Experts, ...] = ("together", "apart", "mixtral")

_LAYER, _BLOCK = "model.layers.{i}.", "blk.{i}."
_ENDS = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_FUSED = {  # of Phi-3: the outputs of several projections are in one module, and in one tensor likewise
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_ROUTER = "ffn_gate_inp"
_ROUTERS: dict[Experts, str] = {"together": "mlp.gate", "apart": "mlp.gate", "mixtral": "block_sparse_moe.gate"}
_GATE, _UP, _DOWN = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
_MIXTRAL = {"w1": _GATE, "w3": _UP, "w2": _DOWN}
# The tensors whose outputs, one after the other, are those of a module.
_OF_EXPERTS: dict[Experts, dict[str, tuple[str, ...]]] = {
    "together": {"mlp.experts.gate_up_proj": (_GATE, _UP), "mlp.experts.down_proj": (_DOWN,)},
    "apart": {f"mlp.experts.{{e}}.{p}_proj": (f"ffn_{p}_exps",) for p in ("gate", "up", "down")},
    "mixtral": {f"block_sparse_moe.experts.{{e}}.{w}": (own,) for w, own in _MIXTRAL.items()},
}


def _in_layers(names: Mapping[str, str], layer: str = _LAYER) -> dict[str, str]:
    return {layer + module: _BLOCK + tensor for module, tensor in names.items()}


class Architecture(NamedTuple):
    """What llama.cpp calls a family of models, and how it keeps them."""

    name: str
    modules: Mapping[str, str]  # templates of modules, and of the tensors that they are; without experts
    tied: bool = False  # whether the head is the table where a config does not say so
    permuted: bool = False  # rows of q and k are pairs side by side, where transformers has two halves
    experts: bool = False
    transposed: bool = False  # modules are Conv1D, of GPT-2

    @property
    def tensors(self) -> list[str]:
        """Return the templates of all tensors that adapters may be of."""
        of_experts = [_BLOCK + name for name in (_ROUTER, _GATE, _UP, _DOWN) if self.experts]
        return [*self.modules.values(), *of_experts]


_DENSE = _ENDS | _in_layers(_ATTENTION | _MLP)
ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("llama", _DENSE, permuted=True, experts=True),
        Architecture("qwen2", _DENSE),
        Architecture("qwen3", _DENSE),
        Architecture("qwen3moe", _ENDS | _in_layers(_ATTENTION), experts=True),
        Architecture("gemma", _DENSE, tied=True),
        Architecture("gemma2", _DENSE, tied=True),
        Architecture("gemma3", _DENSE, tied=True),
        Architecture("phi3", _ENDS | _in_layers(_FUSED)),
        Architecture(
            "gpt2",
            {"transformer.wte": "token_embd", "lm_head": "output"} | _in_layers(_GPT2, "transformer.h.{i}."),
            tied=True,
            transposed=True,
        ),
    )
}
# The `model_type` of transformers' configs.
MODEL_TYPES = {name: name for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2")}
MODEL_TYPES |= {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}

# Beginnings of the names of a language model inside another one, and what they are alone.
_INSIDE = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head": "lm_head"}


class Slot(NamedTuple):
    """Where a module is in a file."""

    tensors: tuple[str, ...]  # of their outputs, one after the other, are those of the module
    expert: int | None = None  # the tensors are stacks, and the module is one of these
    together: bool = False  # the module is all experts


class Source(NamedTuple):
    """The module that a tensor is in torch."""

    module: str  # of experts that are apart, with "{e}" in the place of the number
    tensors: tuple[str, ...]  # all tensors whose outputs are those of the module


def slot_of(architecture: Architecture, module: str) -> Slot:
    """Return where a module is in a file.

    >>> slot_of(ARCHITECTURES["qwen3moe"], "model.layers.2.mlp.experts.gate_up_proj").tensors
    ('blk.2.ffn_gate_exps', 'blk.2.ffn_up_exps')

    Raises:
        LoraError: llama.cpp has no such module in this architecture.
    """
    name = module
    for inside, alone in _INSIDE.items():
        if module.startswith(inside):
            name = alone + module.removeprefix(inside)
    templates = _tensors_of_modules(architecture.name)
    if (found := _table_of_modules(architecture.name).first(name)) is None:
        near = ", ".join(nearest(name, templates, n=3))
        raise LoraError(
            f"{short(module)} has no place in a GGUF of architecture {architecture.name!r}; the nearest are {near}. "
            "llama.cpp adapts the weights of linear layers, the table of tokens and the head: save adapters of these "
            "alone, or merge the others into the model and convert that."
        )
    order, numbers = found
    template = [*templates][order]
    expert = int(numbers["e"]) if "e" in numbers else None
    together = template.removeprefix(_LAYER) in _OF_EXPERTS["together"]
    return Slot(tuple(fill(tensor, numbers) for tensor in templates[template]), expert, together)


def source_of(architecture: Architecture, tensor: str, experts: Experts) -> Source | None:
    """Return the module that a tensor is, or None if adapters of this architecture have no such tensor.

    >>> source_of(ARCHITECTURES["llama"], "blk.2.ffn_up_exps", "apart").module
    'model.layers.2.mlp.experts.{e}.up_proj'
    """
    templates, table = _modules_of_tensors(architecture.name, experts)
    if (found := table.first(tensor)) is None:
        return None
    order, numbers = found
    module, tensors = [*templates.values()][order]
    return Source(fill(module, numbers | {"e": "{e}"}), tuple(fill(own, numbers) for own in tensors))


@functools.lru_cache(maxsize=64)
def _tensors_of_modules(architecture: str) -> dict[str, tuple[str, ...]]:
    """Return the tensors that each module is, in all ways to have experts."""
    own = ARCHITECTURES[architecture]
    templates: dict[str, tuple[str, ...]] = {module: (tensor,) for module, tensor in own.modules.items()}
    for style in STYLES if own.experts else ():
        templates[_LAYER + _ROUTERS[style]] = (_BLOCK + _ROUTER,)
        for module, tensors in _OF_EXPERTS[style].items():
            templates[_LAYER + module] = tuple(_BLOCK + tensor for tensor in tensors)
    return templates


@functools.lru_cache(maxsize=64)
def _table_of_modules(architecture: str) -> NameTable:
    return NameTable([*_tensors_of_modules(architecture)])


@functools.lru_cache(maxsize=64)
def _modules_of_tensors(architecture: str, experts: Experts) -> tuple[dict[str, Source], NameTable]:
    """Return the module that each tensor is, in one way to have experts."""
    own = ARCHITECTURES[architecture]
    templates = {tensor: Source(module, (tensor,)) for module, tensor in own.modules.items()}
    if own.experts:
        templates[_BLOCK + _ROUTER] = Source(_LAYER + _ROUTERS[experts], (_BLOCK + _ROUTER,))
        for module, tensors in _OF_EXPERTS[experts].items():
            source = Source(_LAYER + module, tuple(_BLOCK + tensor for tensor in tensors))
            templates |= dict.fromkeys(source.tensors, source)
    return templates, NameTable([*templates])


def style_of(modules: Iterable[str]) -> Experts:
    """Return how a model has its experts, by the names of its modules."""
    for name in modules:
        if re.search(r"\.experts\.\d+\.", name):
            return "mixtral" if ".block_sparse_moe." in name else "apart"
    return "together"
