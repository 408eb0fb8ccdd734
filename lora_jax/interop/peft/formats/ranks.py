"""Ranks and alphas of modules as entries of a config: the most common ones, and patterns for the others."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha_option: str) -> dict[str, Any]:
    """Return rank and alpha of most modules, and patterns for those that have others."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    longest = sorted(ranks, key=lambda name: (-len(name), name))  # the first pattern that matches counts
    return {
        "r": rank,
        alpha_option: alpha,
        "rank_pattern": {name: ranks[name] for name in longest if ranks[name] != rank},
        "alpha_pattern": {name: alphas[name] for name in longest if alphas[name] != alpha},
    }


def alpha_of(scale: float, rank: float) -> int | float:
    """Return scale * rank; where alpha was a whole number, alpha / rank * rank need not be one."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
