"""Factors of one rank for all modules, filled up with zeros, within bounds: small files can stand for large arrays."""

from collections.abc import Mapping

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.expert_projections import of_all_experts, of_each_expert
from lora_jax.interop.peft.formats.format import Arrays, Module

ALWAYS = 2**28  # entries that all factors of one rank may have together
GROWTH = 2**8  # or this times as many as they had; searches for ranks end with some that differ by a factor of ten


def one_rank_for_all(modules: Mapping[str, Module], experts: Mapping[str, int], whose: str) -> int:
    """Return the largest rank, which all modules can have.

    Args:
        experts: how many, of modules that are experts in one parameter, each of which has the rank.
        whose: such as "profile='vllm' has", for the message.

    Raises:
        LoraError: one module has so large a rank that the others would take far more memory than they do.
    """
    ranks = {name: len(module.arrays["a"]) // experts.get(name, 1) for name, module in modules.items()}
    rank = max(ranks.values())
    sizes = {name: sum(array.size for array in module.arrays.values()) for name, module in modules.items()}
    padded_size = sum(rank * (size // ranks[name]) for name, size in sizes.items())
    if has_grown(padded_size, sum(sizes.values())):
        raise LoraError(
            f"{whose} one rank for all: with the largest one, {rank}, the factors would have {padded_size:,} "
            f"entries in the place of {sum(sizes.values()):,}. Merge the modules of that rank, or use profile='peft'."
        )
    return rank


def has_grown(entries: int, before: int) -> bool:
    """Return whether factors that were written with fewer entries would take more memory than they may."""
    return entries > max(ALWAYS, GROWTH * before)


def padded(arrays: Arrays, rank: int, experts: int | None = None) -> Arrays:
    """Return the same product with another, larger rank; `experts` are those of one parameter, with this rank each."""
    if experts is not None:
        each = of_each_expert(arrays, experts)
        return arrays | of_all_experts({"a": _padded(each["a"], 1, rank), "b": _padded(each["b"], 2, rank)})
    return arrays | {"a": _padded(arrays["a"], 0, rank), "b": _padded(arrays["b"], 1, rank)}


def _padded(array: Array, axis: int, size: int) -> Array:
    """Return an array with zeros at the end of an axis."""
    if array.shape[axis] == size:
        return array
    return np.pad(array, [(0, size - array.shape[axis] if i == axis else 0) for i in range(array.ndim)])
