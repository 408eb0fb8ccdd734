"""The factors of torch's modules as llama.cpp multiplies with them, and back.

A pair in a file is a [r, in] and b [out, r], as torch has A and B; of the experts of a layer a [E, r, in] and b
[E, out, r]; of the table of tokens a [tokens, r], which is A turned, and b [d, r]. In the architecture llama the
outputs of q and k are in another order: with rotary embeddings, the two numbers that turn together are side by side,
where transformers has all first ones and then all second ones.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.gguf.base import ModelFacts
from lora_jax.interop.gguf.names import Slot
from lora_jax.interop.key_map import Array
from lora_jax.interop.module_adapters import of_all_experts, of_each_expert
from lora_jax.interop.peft.dtypes import common_dtype, widened
from lora_jax.interop.peft.formats.format import Arrays, Module

TABLE, HEAD = "token_embd", "output"
ALPHA = "adapter.lora.alpha"
ENDS = {"a": ".weight.lora_a", "b": ".weight.lora_b"}


class Pair(NamedTuple):
    """The two factors of a tensor."""

    a: Array
    b: Array


class Tensors(NamedTuple):
    """Tensors that are written together, and the modules that they are made of."""

    names: tuple[str, ...]
    slots: Mapping[str, Slot]  # of each module; several are experts of one tensor
    experts: int | None = None  # in each of the tensors


# To files -------------------------------------------------------------------------------------------------------------


def to_pairs(tensors: Tensors, modules: Mapping[str, Module], facts: ModelFacts) -> list[Pair]:
    """Return the factors of each of these tensors, with the scale in B and in fp32 or wider where it is not 1."""
    names, slots, experts = tensors
    first, slot = next(iter(slots.items()))
    if slot.expert is not None:
        return [_stacked(slots, modules, experts or 0)]
    arrays, scale = modules[first]
    a, b = arrays["a"], arrays["b"]
    if slot.together:
        each = of_each_expert(arrays, experts or 1)
        parts = np.split(each["b"], len(names), axis=1)  # [E, out, r] each
        return [Pair(each["a"], _scaled(part, scale)) for part in parts]
    if names[0] == TABLE:
        turned = [Pair(b.T, _scaled(a, scale).T)] if len(names) > 1 else []  # of the head that is the table
        return [Pair(a.T, _scaled(b, scale)), *turned]
    heads = rotary_heads(names[0], facts)
    return [Pair(a, _scaled(b if heads is None else side_by_side(b, heads, first), scale))]


def _stacked(slots: Mapping[str, Slot], modules: Mapping[str, Module], experts: int) -> Pair:
    """Return the factors of modules that are experts of one tensor, with zeros for experts and ranks that lack."""
    found: dict[int, Pair] = {}
    for name, slot in slots.items():
        arrays, scale = modules[name]
        found[slot.expert or 0] = Pair(arrays["a"], _scaled(arrays["b"], scale))
    first = next(iter(found.values()))
    rank = max(len(pair.a) for pair in found.values())
    a = np.zeros((experts, rank, first.a.shape[1]), common_dtype(pair.a for pair in found.values()))
    b = np.zeros((experts, len(first.b), rank), common_dtype(pair.b for pair in found.values()))
    for expert, pair in found.items():
        a[expert, : len(pair.a)], b[expert, :, : len(pair.a)] = pair
    return Pair(a, b)


def _scaled(array: Array, scale: float) -> Array:
    if scale == 1:
        return array
    wide = widened(array)
    return wide * np.asarray(scale, wide.dtype)


def rotary_heads(tensor: str, facts: ModelFacts) -> int | None:
    """Return how many heads share the outputs of a tensor whose rows llama.cpp has in its own order, else None.

    Raises:
        LoraError: the number is not known.
    """
    last = tensor.rpartition(".")[2]
    if not facts.architecture.permuted or last not in ("attn_q", "attn_k"):
        return None
    heads = facts.heads if last == "attn_q" else facts.kv_heads
    if heads is None:
        raise LoraError(
            f"{facts.where} does not say how many heads the model has, and the rows of {tensor} are in the order of "
            "heads: num_attention_heads and num_key_value_heads of its config do."
        )
    return heads


def side_by_side(b: Array, heads: int, name: str) -> Array:
    """Return rows of B in llama.cpp's order: 0 1 2 | 3 4 5 of a head of 6 outputs become 0 3 1 4 2 5."""
    return _heads_apart(b, heads, name).reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def in_halves(b: Array, heads: int, name: str) -> Array:
    """Return rows of B in the order of transformers, the inverse of `side_by_side`."""
    return _heads_apart(b, heads, name).reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _heads_apart(b: Array, heads: int, name: str) -> Array:
    if len(b) % (2 * heads):
        raise LoraError(
            f"{short(name)} has {len(b)} outputs, which are not {heads} heads of an even size: `base` is another model."
        )
    return b


# From files -----------------------------------------------------------------------------------------------------------


def from_pair(tensor: str, pair: Pair, heads: int | None) -> Arrays:
    """Return torch's factors of a module that is one tensor."""
    a, b = pair
    if tensor == TABLE:
        return {"a": a.T, "b": b}
    return {"a": a, "b": b if heads is None else in_halves(b, heads, tensor)}


def all_experts(pairs: Sequence[Pair | None], scales: Sequence[float], one_a: bool) -> Module:
    """Return the factors of all experts of a layer, whose outputs are those of these tensors one after the other.

    Args:
        pairs: of each tensor, None for one without an adapter, whose outputs are as many as those of the others.
        one_a: all have the same a and scale, and so the module has that a. Else the ranks add up: each tensor has the
            others' as zeros.
    """
    known = [pair for pair in pairs if pair is not None]
    if one_a and len(known) == len(pairs):
        each = {"a": known[0].a, "b": np.concatenate([pair.b for pair in known], axis=1)}
        return Module(of_all_experts(each), scales[0])
    experts, outputs, _ = known[0].b.shape
    rank = sum(pair.a.shape[1] for pair in known)
    b = np.zeros((experts, len(pairs) * outputs, rank), np.float32)
    at = 0
    for i, (pair, scale) in enumerate(zip(pairs, scales, strict=True)):
        if pair is not None:
            own = pair.a.shape[1]
            b[:, i * outputs : (i + 1) * outputs, at : at + own] = _scaled(pair.b, scale)
            at += own
    a = np.concatenate([pair.a for pair in known], axis=1)
    return Module(of_all_experts({"a": a, "b": b}), 1.0)
