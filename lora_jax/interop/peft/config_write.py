"""`adapter_config.json` of adapters that are written for HF PEFT: what follows from their tensors."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Placed
from lora_jax.interop.peft.config_read import KNOWN
from lora_jax.interop.peft.formats import Module, decompose_factor, rank_of

# What no tensor tells.
DEFAULTS = ("inference_mode", "init_lora_weights", "init_weights", "lora_dropout", "save_projection")


def facts_of(
    kind: str, found: Mapping[str, Module], placed: Mapping[str, Placed], whole: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that every version of PEFT knows, and those that differ from their defaults.

    Args:
        found: what the modules hold.
        placed: a parameter of each of them.
        whole: what the config says of tensors that are written whole: `bias` and `modules_to_save`.
    """
    experts = sorted(name for name in found if placed[name].entry.is_of_experts)
    modules = sorted(name for name in found if name not in experts)
    kinds = {placed[name].entry.kind for name in modules}
    facts = {
        "peft_type": "LORA" if kind == "DORA" else kind,
        "target_modules": modules,
        "inference_mode": True,
        "modules_to_save": whole["modules_to_save"],
    }
    if kind in ("LOHA", "LOKR"):
        facts |= {"init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0, "use_effective_conv2d": False}
        if kind == "LOKR":
            factor = decompose_factor([arrays for arrays, _ in found.values()])
            facts |= {"decompose_both": False, "decompose_factor": factor}
        return facts | _patterns(*_ranks_and_alphas(kind, found), "alpha")
    facts |= {"bias": whole["bias"], "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds}
    if kind == "VERA":
        (arrays, _), *_ = found.values()
        facts["bias"] = whole["bias"].replace("lora", "vera")
        return facts | {"r": rank_of(kind, arrays), "init_weights": True, "vera_dropout": 0.0}
    facts |= {"init_lora_weights": True, "lora_dropout": 0.0}
    if kind == "ADALORA":
        return facts | _schedule(found)
    facts |= {"use_rslora": False, "use_dora": kind == "DORA"} | ({"target_parameters": experts} if experts else {})
    return facts | _patterns(*_of_experts_together(found, placed, experts), "lora_alpha")


def with_more(facts: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The config with further entries.

    Raises:
        LoraError: one that PEFT does not have for this kind, or that contradicts what is written.
    """
    kind = facts["peft_type"]
    free = {name for name in ("base_model_name_or_path", "task_type") if facts[name] is None} | {*DEFAULTS}
    told = {"target_parameters": None, "lora_bias": False, "exclude_modules": None, "trainable_token_indices": None}
    told |= facts
    for name, value in more.items():
        if name not in KNOWN[kind]:
            raise LoraError(f"config[{name!r}] is {short(value)}, which {kind} does not have: leave it out.")
        if name in told and told[name] != value and name not in free:
            raise LoraError(
                f"config[{name!r}] is {short(value)}, but by what is written it is {short(told[name])}: leave it out."
            )
    return {**facts, **more}


def _ranks_and_alphas(kind: str, found: Mapping[str, Module]) -> tuple[dict[str, int], dict[str, float]]:
    """By module. PEFT keeps LoKr's second factor whole where the rank is at least half of its longer side."""
    ranks = {}
    for name, (arrays, _) in found.items():
        rank = rank_of(kind, arrays)
        ranks[name] = rank if rank is not None else (max(arrays["a"].shape) + 1) // 2
    return ranks, {name: _plain(found[name].scale * rank) for name, rank in ranks.items()}


def _of_experts_together(
    found: Mapping[str, Module], placed: Mapping[str, Placed], experts: Sequence[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """By what patterns are matched with: of experts the module that they are in."""
    both: dict[str, tuple[int, float]] = {}
    for name, (arrays, scale) in found.items():
        module = name.rpartition(".")[0] if name in experts else name
        rank = len(arrays["a"]) // placed[name].experts
        own = (rank, _plain(scale * rank))
        if both.setdefault(module, own) != own:
            raise LoraError(f"{module} has experts of rank and alpha {both[module]} and {own}; PEFT has one for all.")
    return {name: rank for name, (rank, _) in both.items()}, {name: alpha for name, (_, alpha) in both.items()}


def _patterns(ranks: Mapping[str, int], alphas: Mapping[str, float], name_of_alpha: str) -> dict[str, Any]:
    """Rank and alpha of most modules, and patterns for the others."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    longest = sorted(ranks, key=lambda name: (-len(name), name))  # the first pattern that matches counts
    return {
        "r": rank,
        name_of_alpha: alpha,
        "rank_pattern": {name: ranks[name] for name in longest if ranks[name] != rank},
        "alpha_pattern": {name: alphas[name] for name in longest if alphas[name] != alpha},
    }


def _schedule(found: Mapping[str, Module]) -> dict[str, Any]:
    """What AdaLoRA's ranks and scale follow from in PEFT: masks of what began with the largest rank.

    PEFT loads none without a schedule of steps: this is the shortest that it takes.
    """
    ranks = {name: len(arrays["e"]) for name, (arrays, _) in found.items()}
    most = max(ranks.values())
    masks = {f"{name}.lora_E": [i < rank for i in range(most)] for name, rank in ranks.items()}
    alpha = _plain(next(iter(found.values())).scale * (most + 1e-5))
    pattern = masks if min(ranks.values()) < most else None
    return {"init_r": most, "lora_alpha": alpha, "rank_pattern": pattern, "tinit": 0, "tfinal": 0, "total_step": 1}


def _plain(number: float) -> int | float:
    """alpha is a whole number where it was one: alpha / rank * rank need not be."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number
