"""Experts that share their outer factors, those on the side of the model, as SGLang and Tinker have them.

    experts.gate_proj.lora_A [1, r, d], lora_B [E, f, r], and likewise up_proj
    experts.down_proj.lora_A [E, r, f], lora_B [1, d, r]

in the place of [r, d], [f, r] and so on of each `experts.3.gate_proj`. The leading 1 is the sign: SGLang 0.5.23 looks
for it at the gates (`srt/lora/lora_manager.py`, `_detect_shared_outer_loras`).
"""

import re
from collections.abc import Mapping

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.common_rank import has_grown
from lora_jax.interop.safetensors_index import TENSORS

# The outer factor of each projection, by the names that SGLang takes for the same ones.
_OUTER = {"gate_proj": "A", "up_proj": "A", "down_proj": "B", "w1": "A", "w3": "A", "w2": "B"}
_NUMBERED = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
_STACKED = re.compile(r"(.*\.experts)\.(\w+)\.lora_([AB])\.weight")


def with_shared_outer(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors of all experts together where they share their outer factors, all of them; else as they are.

    >>> tensors = {f"m.experts.{expert}.gate_proj.lora_A.weight": np.ones((2, 4)) for expert in range(3)}
    >>> {name: tensor.shape for name, tensor in with_shared_outer(tensors).items()}
    {'m.experts.gate_proj.lora_A.weight': (1, 2, 4)}
    """
    found = dict(tensors)
    experts: dict[tuple[str, str, str], list[Array]] = {}
    for name in tensors:
        if (match := _NUMBERED.fullmatch(name)) is not None:
            experts.setdefault((match[1], match[3], match[4]), []).append(found.pop(name))
    for (parent, projection, x), own in experts.items():
        is_outer = _OUTER.get(projection) == x
        if projection not in _OUTER or (is_outer and not all(np.array_equal(one, own[0]) for one in own)):
            return dict(tensors)
        found[f"{parent}.{projection}.lora_{x}.weight"] = own[0][None] if is_outer else np.stack(own)
    gates = any(projection in ("gate_proj", "w1") for _, projection, _ in experts)
    return found if gates else dict(tensors)


def is_stacked(name: str, ndim: int) -> bool:
    """Return whether a tensor is one of the factors of all experts together."""
    return ndim == 3 and _STACKED.fullmatch(name) is not None


def with_experts_numbered(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors with those of all experts together as those of each expert, which takes no memory.

    Raises:
        LoraError: the factors of a projection are of different numbers of experts, or of more than any model has, or
            one is there twice.
    """
    found = dict(tensors)
    stacked = {name: tensor for name, tensor in tensors.items() if is_stacked(name, tensor.ndim)}
    counts: dict[str, int] = {}  # of experts
    for name, tensor in stacked.items():
        module = name.rpartition(".lora_")[0]
        counts[module] = max(counts.get(module, 1), len(tensor))
    entries = sum(tensor[:1].size * counts[name.rpartition(".lora_")[0]] for name, tensor in stacked.items())
    if 2 * sum(counts.values()) > TENSORS or has_grown(entries, sum(tensor.size for tensor in stacked.values())):
        count = 2 * sum(counts.values())
        raise LoraError(f"the factors of all experts would be {entries:,} numbers in {count:,} tensors.")
    for name, tensor in stacked.items():
        module = name.rpartition(".lora_")[0]
        if len(tensor) not in (1, counts[module]):
            raise LoraError(f"{short(name)} is of {len(tensor)} experts, and its partner of {counts[module]}.")
        parent, _, projection = module.rpartition(".")
        del found[name]
        for expert in range(counts[module]):
            own = f"{parent}.{expert}.{projection}{name.removeprefix(module)}"
            if own in found:
                raise LoraError(f"{short(own)} is there twice: by itself, and in {short(name)}.")
            found[own] = tensor[expert if len(tensor) > 1 else 0]
    return found
