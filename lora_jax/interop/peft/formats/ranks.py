"""Ranks and alphas of modules as entries of a config: the most common ones, and patterns for the others."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.interop.peft.module_patterns import ModulePatterns


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha_option: str) -> dict[str, Any]:
    """Return rank and alpha of most modules, and patterns for those that have others."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        alpha_option: alpha,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
    }


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return patterns for the modules that do not have the default.

    These are their names, if all modules get their own values by them, of which the first that matches counts in the
    order of a file, where they are sorted. Where one name ends with another, or has characters with a meaning in
    patterns, they are expressions that match these names alone.
    """
    plain = {name: values[name] for name in sorted(values) if values[name] != default}
    if all(re.fullmatch(r"[\w.-]+", name) for name in plain):
        table = ModulePatterns(plain)
        if all(table.value_of(name, default) == value for name, value in values.items()):
            return plain
    return {f"^{re.escape(name)}": value for name, value in plain.items()}


def alpha_of(scale: float, rank: float) -> int | float:
    """Return alpha = scale * rank as it was once written.

    Scales are fp32, so that 0.35 is 0.34999999404 there: of all numbers that are the same in fp32 it was the shortest.
    """
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=2**-23) else float(str(np.float32(alpha)))
