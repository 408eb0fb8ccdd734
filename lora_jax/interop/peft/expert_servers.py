"""The experts of a LoRA as vLLM and SGLang have them, whose models have either joined experts or each by itself.

    flat, of vLLM for models with joined experts (`is_3d_moe_weight`), and of HF PEFT:
        experts.base_layer.lora_A [E r, d], lora_B [2 f, r E]     of gate_up_proj
        experts.lora_A            [E r, f], lora_B [d, r E]       of down_proj; either both are there or none
    by expert, of vLLM for all other models, and of SGLang:
        experts.3.gate_proj.lora_A [r, d], lora_B [f, r], and likewise up_proj and down_proj

Read from vLLM's `lora/model_manager.py` (`_stack_moe_lora_weights`, `_convert_3d_to_2d_moe_lora`) and
`lora/lora_model.py`, and from SGLang 0.5.23's `srt/lora/lora.py` and `mem_pool.py`.
"""

from typing import NamedTuple

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.entries import Entry
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.name_templates import literal
from lora_jax.interop.peft.expert_projections import (
    PROJECTIONS,
    apart,
    check_order_of_outputs,
    check_projections,
)
from lora_jax.interop.peft.formats.format import Arrays, Module
from lora_jax.interop.peft.to_modules import TorchModules


class _Parameter(NamedTuple):
    arrays: Arrays  # a [experts * r, in] and b [out, r * experts]
    experts: int
    kind: str


def experts_of(found: TorchModules) -> dict[str, int]:
    """Return how many experts there are, of modules that are experts in one parameter."""
    return {name: match.experts for name, match in found.matches.items() if match.entry.is_of_experts}


def flat(found: TorchModules, key_map: KeyMap) -> TorchModules:
    """Return modules in which each layer has both of its parameters of experts, in the order of the forward pass.

    vLLM takes the names in the file for those of both. The one that is missing gets factors of zeros.

    Raises:
        LoraError: one is none whose projections are known; the key map does not tell whether the experts have gates.
    """
    modules, entries, shapes = dict(found.modules), [], {}
    for parent, parameters in _by_layer(found, "vLLM has").items():
        first = next((last for last in ("gate_up_proj", "up_proj") if last in parameters), _first_of(parent, key_map))
        known = next(iter(parameters.values()))
        for last in (first, "down_proj"):
            name = f"{parent}.{last}"
            if last not in parameters:
                modules[name] = Module(_of_zeros(known, last, halves=len(PROJECTIONS[first])), 1.0)
            arrays = modules[name].arrays
            entries.append(Entry(literal(name), literal(name), "expert in out", known.kind))
            shapes[name] = (known.experts, arrays["a"].shape[-1], len(arrays["b"]))
    return found._replace(modules=modules, matches=found.matches | KeyMap(*entries).match(shapes))


def by_expert(found: TorchModules, whose: str) -> TorchModules:
    """Return modules in which experts of one parameter are modules of their own.

    Args:
        whose: such as "SGLang has", for messages.

    Raises:
        LoraError: one is none whose projections are known.
    """
    of_experts = experts_of(found)
    modules = {name: module for name, module in found.modules.items() if name not in of_experts}
    entries, shapes = [], {}
    for parent, parameters in _by_layer(found, whose).items():
        for last, (arrays, experts, kind) in parameters.items():
            check_order_of_outputs(f"{parent}.{last}", kind, whose)
            for projection, own in apart(f"{parent}.{last}", arrays, experts).items():
                for expert in range(experts):
                    name = f"{parent}.{expert}.{projection}"
                    modules[name] = Module({x: array[expert] for x, array in own.items()}, 1.0)
                    entries.append(Entry(literal(name), literal(name), "in out", "linear"))
                    shapes[name] = (own["a"].shape[-1], own["b"].shape[1])
    matches = {name: match for name, match in found.matches.items() if name not in of_experts}
    return found._replace(modules=modules, matches=matches | KeyMap(*entries).match(shapes))


def _by_layer(found: TorchModules, whose: str) -> dict[str, dict[str, _Parameter]]:
    """Return the parameters of experts by the modules that hold them and by their last names."""
    layers: dict[str, dict[str, _Parameter]] = {}
    for name, experts in experts_of(found).items():
        check_projections(name, whose)
        parent, _, last = name.rpartition(".")
        own = _Parameter(found.modules[name].arrays, experts, found.matches[name].entry.kind)
        layers.setdefault(parent, {})[last] = own
    return layers


def _first_of(parent: str, key_map: KeyMap) -> str:
    """Return the parameter that experts have before down_proj, by the names in the key map."""
    names = [entry.name.rpartition(".")[2] for entry in key_map.entries if entry.is_of_experts]
    for last in ("gate_up_proj", "up_proj"):
        if last in names:
            return last
    raise LoraError(
        f"vLLM has the factors of both parameters of experts, and {short(parent)} has those of down_proj alone: give "
        "the key map an entry for gate_up_proj, or for up_proj where experts have no gates."
    )


def _of_zeros(other: _Parameter, last: str, halves: int) -> Arrays:
    """Return factors of zeros for the parameter of experts that goes with another one.

    Args:
        last: name of the parameter.
        halves: how many projections the one before down_proj has in its outputs.
    """
    a, b = other.arrays["a"], other.arrays["b"]
    inputs, outputs = (len(b) // halves, a.shape[1]) if last == "down_proj" else (len(b), halves * a.shape[1])
    return {"a": np.zeros((len(a), inputs), a.dtype), "b": np.zeros((outputs, len(a)), b.dtype)}
