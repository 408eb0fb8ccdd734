"""Adapters for readers that take less than HF PEFT does: vLLM and loralib. Both take LoRA alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array, KeyMap
from lora_jax.interop.peft.formats.format import Module, Modules
from lora_jax.interop.peft.formats.registry import LORA
from lora_jax.interop.peft.to_modules import TorchModules, torch_modules

ALWAYS = 2**28  # entries that all factors of one rank may have together
GROWTH = 2**8  # or this times as many as they had; searches for ranks end with some that differ by a factor of ten


def for_vllm(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> TorchModules:
    """Return modules with one rank and scales of 1: vLLM reads no patterns.

    Raises:
        LoraError: as `torch_modules`; some are experts in one parameter; one rank for all would take too much memory.
    """
    found = torch_modules(adapters, key_map, params, LORA)
    if packed := [name for name, match in found.matches.items() if match.entry.is_of_experts]:
        raise LoraError(f"profile='vllm' has no place for experts in one parameter, found {packed[0]}: merge these.")
    return found._replace(modules=_one_rank(found.modules))


def for_loralib(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> dict[str, Array]:
    """Return tensors as loralib names them, with the scales in B: it keeps none."""
    modules = torch_modules(adapters, key_map, params, LORA).modules
    factors = {name: LORA.rescaled(module, 1.0).arrays for name, module in modules.items()}
    return {f"{name}.lora_{x}": pair[x.lower()] for name, pair in factors.items() for x in "AB"}


def _one_rank(modules: Mapping[str, Module]) -> Modules:
    """Return all modules with the largest rank, and scales of 1.

    Raises:
        LoraError: one module has so large a rank that the others would take far more memory than they do.
    """
    rank = max(len(module.arrays["a"]) for module in modules.values())
    sizes = {name: sum(array.size for array in module.arrays.values()) for name, module in modules.items()}
    padded = sum(rank * (size // len(modules[name].arrays["a"])) for name, size in sizes.items())
    if padded > max(ALWAYS, GROWTH * sum(sizes.values())):
        raise LoraError(
            f"profile='vllm' has one rank for all: with the largest one, {rank}, the factors would have {padded:,} "
            f"entries in the place of {sum(sizes.values()):,}. Merge the modules of that rank, or use profile='peft'."
        )

    def pad(array: Array, axis: int) -> Array:
        return np.pad(array, [(0, rank - array.shape[axis] if i == axis else 0) for i in range(array.ndim)])

    found = {}
    for name, module in modules.items():
        arrays = LORA.rescaled(module, 1.0).arrays
        found[name] = Module({"a": pad(arrays["a"], 0), "b": pad(arrays["b"], 1)}, 1.0)
    return found
