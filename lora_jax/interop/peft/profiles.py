"""Adapters for readers that take less than HF PEFT does: vLLM, SGLang and loralib. All take LoRA alone."""

from collections.abc import Mapping
from typing import Any, Literal

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array, KeyMap
from lora_jax.interop.peft.common_rank import one_rank_for_all, padded
from lora_jax.interop.peft.expert_servers import by_expert, experts_of, flat
from lora_jax.interop.peft.formats.format import Module, Modules
from lora_jax.interop.peft.formats.registry import LORA
from lora_jax.interop.peft.to_modules import TorchModules, torch_modules


def for_vllm(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> TorchModules:
    """Return modules with one rank and scales of 1: vLLM reads no patterns. Joined experts are flat, both parameters.

    Raises:
        LoraError: as `torch_modules`; experts are none of those that vLLM has; one rank for all would take too much
            memory.
    """
    return flat(_alike(adapters, key_map, params, "vllm"), key_map)


def for_vllm_by_expert(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> TorchModules:
    """Return the same with modules of each expert, for the models whose experts vLLM does not join."""
    return by_expert(_alike(adapters, key_map, params, "vllm-by-expert"), "profile='vllm-by-expert' has")


def for_sglang(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> TorchModules:
    """Return modules with one rank and scales of 1, and modules of each expert: SGLang reads no patterns either, and
    takes the scale for alpha / r whatever the config says of `use_rslora`.
    """
    found = _alike(adapters, key_map, params, "sglang")
    for name in experts_of(found):
        if name.endswith(".up_proj"):
            raise LoraError(f"profile='sglang' has experts with gates, and {name!r} has none: merge it instead.")
    return by_expert(found, "profile='sglang' has")


FOR_SERVERS = {"vllm": for_vllm, "vllm-by-expert": for_vllm_by_expert, "sglang": for_sglang}
PROFILES = ("peft", *FOR_SERVERS, "loralib")
Profile = Literal["peft", "vllm", "vllm-by-expert", "sglang", "loralib"]


def _alike(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any, profile: str) -> TorchModules:
    """Return all modules with one rank, and scales of 1."""
    found = torch_modules(adapters, key_map, params, LORA)
    return found._replace(modules=_one_rank(found.modules, experts_of(found), profile))


def for_loralib(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> dict[str, Array]:
    """Return tensors as loralib names them, with the scales in B: it keeps none."""
    modules = torch_modules(adapters, key_map, params, LORA).modules
    factors = {name: LORA.rescaled(module, 1.0).arrays for name, module in modules.items()}
    return {f"{name}.lora_{x}": pair[x.lower()] for name, pair in factors.items() for x in "AB"}


def _one_rank(modules: Mapping[str, Module], experts: Mapping[str, int], profile: str) -> Modules:
    """Return all modules with the largest rank, and scales of 1.

    Raises:
        LoraError: as `one_rank_for_all`.
    """
    rank = one_rank_for_all(modules, experts, f"profile={profile!r} has")
    return {name: of_rank(module, rank, experts.get(name)) for name, module in modules.items()}


def of_rank(module: Module, rank: int, experts: int | None = None) -> Module:
    """Return a module with this rank, which is larger, and a scale of 1; `experts` are those of one parameter."""
    return Module(padded(LORA.rescaled(module, 1.0).arrays, rank, experts), 1.0)
