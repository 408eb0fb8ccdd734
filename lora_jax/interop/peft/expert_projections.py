"""Experts of one parameter, and the same by their projections, as vLLM, SGLang, MLX and older models have them.

transformers keeps the experts of a layer in two parameters: `experts.gate_up_proj`, whose outputs are those of the gate
and then those of the other projection, and `experts.down_proj`. Others have three projections, of each expert or with
all experts stacked. A LoRA of the joined parameter is one of each half, and both have its A. The other way round, two
LoRAs with one A are a LoRA of the same rank, and two with an A of their own are one of both ranks together:

    [gate; up] = [B_gate; B_up] A          [gate; up] = [B_gate 0; 0 B_up] [A_gate; A_up]
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.peft.formats.format import Arrays

HALVES = ("gate_proj", "up_proj")  # of gate_up_proj, in this order
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": HALVES,
    "up_proj": ("up_proj",),  # of experts without a gate
    "down_proj": ("down_proj",),
}


def of_each_expert(arrays: Arrays, experts: int) -> Arrays:
    """Return a [experts, r, in] and b [experts, out, r] of a LoRA of experts in one parameter."""
    a, b = arrays["a"], arrays["b"]
    return {
        "a": a.reshape(experts, -1, a.shape[-1]),
        "b": b.reshape(len(b), -1, experts).transpose(2, 0, 1),
    }


def of_all_experts(arrays: Arrays) -> Arrays:
    """Return a [experts * r, in] and b [out, r * experts], the inverse of `of_each_expert`."""
    a, b = arrays["a"], arrays["b"]
    return {"a": a.reshape(-1, a.shape[-1]), "b": b.transpose(1, 2, 0).reshape(b.shape[1], -1)}


def check_projections(name: str, whose: str) -> None:
    """Raise unless a parameter of experts is one whose projections are known.

    Args:
        whose: such as "MLX has", for the message.
    """
    if name.rpartition(".")[2] not in PROJECTIONS:
        raise LoraError(
            f"{whose} experts by their projections, and {short(name)} is none of {', '.join(PROJECTIONS)}: merge it "
            "instead."
        )


def check_order_of_outputs(name: str, kind: str, whose: str) -> None:
    """Raise unless it is known which outputs of a parameter of experts are those of the gates.

    Args:
        kind: a key of `entries.MODULE_KINDS`.
    """
    if kind == "experts_transposed" and name.endswith(".gate_up_proj"):  # in gpt-oss in turns, in Llama 4 in halves
        raise LoraError(
            f"{whose} experts by their projections, and {short(name)} is [experts, in, out], of which it is not known "
            "which outputs are those of the gate: merge it instead."
        )


def apart(name: str, arrays: Arrays, experts: int) -> dict[str, Arrays]:
    """Return a [experts, r, in] and b [experts, out, r] of each projection of a parameter, by the projections' names.

    >>> arrays = {"a": np.ones((3 * 2, 4)), "b": np.ones((10, 2 * 3))}
    >>> {name: {x: own[x].shape for x in own} for name, own in apart("m.experts.gate_up_proj", arrays, 3).items()}
    {'gate_proj': {'a': (3, 2, 4), 'b': (3, 5, 2)}, 'up_proj': {'a': (3, 2, 4), 'b': (3, 5, 2)}}
    """
    names = PROJECTIONS[name.rpartition(".")[2]]
    each = of_each_expert(arrays, experts)
    size = each["b"].shape[1] // len(names)
    return {own: {"a": each["a"], "b": each["b"][:, i * size : (i + 1) * size]} for i, own in enumerate(names)}


def together(halves: Sequence[Arrays], share: bool) -> Arrays:
    """Return the LoRA of a joined parameter from those of its halves, a [experts, r, in] and b [experts, out, r] each.

    Args:
        halves: in the order of the outputs.
        share: all have the same A, as `have_one_a` says, and so the joined one has it.
    """
    if share:
        return {"a": halves[0]["a"], "b": np.concatenate([half["b"] for half in halves], axis=1)}
    experts, ranks = len(halves[0]["a"]), [half["a"].shape[1] for half in halves]
    sizes = [half["b"].shape[1] for half in halves]
    b = np.zeros((experts, sum(sizes), sum(ranks)), halves[0]["b"].dtype)
    out = rank = 0
    for half in halves:
        own = half["b"]
        b[:, out : out + own.shape[1], rank : rank + own.shape[2]] = own
        out, rank = out + own.shape[1], rank + own.shape[2]
    return {"a": np.concatenate([half["a"] for half in halves], axis=1), "b": b}


def have_one_a(halves: Sequence[Arrays]) -> bool:
    """Return whether all halves have the same A, number for number."""
    return all(np.array_equal(half["a"], halves[0]["a"]) for half in halves[1:])


def without_one(half: Arrays) -> Arrays:
    """Return what changes nothing in the place of the other half: the same A, and a B of zeros."""
    return {"a": half["a"], "b": np.zeros_like(half["b"])}
