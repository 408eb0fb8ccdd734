"""Adapters merged by a method: sums, pruning, DARE, TIES and KnOTS, and HF PEFT's results by its names."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lora_jax.adapters.combine import check_parts, combine
from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.algebra import peft_results, ways
from lora_jax.algebra.arguments import check_method, check_options
from lora_jax.algebra.compress import Report, compress
from lora_jax.algebra.sparsify import Majority, drop_at_random
from lora_jax.algebra.stacked_factors import Options
from lora_jax.algebra.truncation import Limit, limit
from lora_jax.core.adapter import Adapter, AdapterWrapper
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import path_key

CALL = "compose([(adapters, weight), ...], method)"


METHODS = ("sum", *ways.WAYS)


def compose(
    parts: Sequence[tuple[Mapping[str, Adapter], Any]],
    method: str = "sum",
    *,
    density: float | None = None,
    majority: Majority = "total",
    rank: int | None = None,
    energy: float | None = None,
    iterations: int | None = None,
    key: jax.Array | None = None,
    params: Any = None,
    compat: Literal["peft"] | None = None,
    report: Report | None = None,
) -> dict[str, Adapter]:
    """Merge adapters by a method, and truncate what comes out to a rank.

    - `"sum"`: the exact sum (`combine`); negative weights take a part away. Truncated only if a limit is given.
    - `"magnitude_prune"`, `"dare"`: the sum of changes of which the largest entries are kept, or random ones.
    - `"ties"`, `"dare_ties"`: the same entries; then signs are elected, and entries are the mean of those that agree.
    - `"knots_ties"`, `"knots_dare_ties"`: the same with the changes' coefficients in one basis.

    Weights are applied before signs are elected, so that a negative weight turns a change round; with weights of 1 a
    mean is the mean. The changes are formed at the weight's size, one matrix after another, but for `"sum"` and
    `"knots_..."`, which work on factors; all in fp64 on this host. Stacked matrices are merged one by one, as those of
    layers apart would be.

    DARE: Yu et al. 2023, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    arXiv 2311.03099. TIES: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv
    2306.01708. KnOTS: Stoica et al. 2024, "Model merging with SVD to tie the Knots", arXiv 2410.19735.

    Args:
        parts: `[(adapters, weight), ...]`, as of `combine`. A path that a part lacks is one that it does not change.
        method: one of these; with `compat="peft"` the `combination_type` of PEFT's `add_weighted_adapter`.
        density: the share of entries that is kept, above 0 and at most 1. Not for sums.
        majority: whether the sign of the sum is elected, "total", or the sign that more parts have, "frequency".
        rank: of the result; or
        energy: the share of the squared norm of each merged change that is kept, by as small a rank as that takes.
        iterations: of a randomised decomposition to a `rank`, for large matrices; None for the exact one.
        key: of the masks of DARE, which depend on it, the path and the number of the part alone, and of `iterations`.
        params: as of `combine`, for sums that need them.
        compat: "peft" for what PEFT 0.21 computes, where it is not the sum too (`lora_jax/algebra/peft_results.py`).
        report: called with the path and a `Truncation(rank, energy)` of each change that was truncated.

    Returns:
        `{path: adapter}`, a `LoraAdapter` with a scale of 1, or a `FullAdapter` where the parts are; in fp32, but for
        sums.

    Raises:
        LoraError: there is no such method; an option is missing, out of its range, or not of this method; what
            `combine` raises; an adapter is neither LoRA in any form nor `Full`, which only sums take.

    >>> import jax, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> a, b = jax.random.normal(jax.random.key(0), (6, 2)), jax.random.normal(jax.random.key(1), (2, 5))
    >>> one, other = ({"w": lora.LoraAdapter(x, b, axes, 2.0)} for x in (a, a[::-1]))
    >>> lora.compose([(one, 1.0), (other, 1.0)], "ties", density=0.5, rank=3)["w"].a.shape
    (6, 3)
    """
    check_parts(CALL, parts)
    if compat not in (None, "peft"):
        raise LoraError(f"compose(compat={compat!r}): expected 'peft' or None.")
    sides = (METHODS, tuple(peft_results.METHODS))
    check_method(method, *(sides if compat is None else sides[::-1]), compat)
    sparse, elects, draws = _needs(method, compat)
    check_options(method, density, majority, key, sparse=sparse, elects=elects, draws=draws)
    if compat is None and method == "sum":
        if iterations is not None:
            raise LoraError("compose(method='sum') is truncated exactly, by its factors: leave iterations out.")
        total = combine(parts, params=params)
        return total if rank is energy is None else compress(total, rank=rank, energy=energy, report=report)
    to = _limit(method, parts, compat, (rank, energy, iterations, key))
    found: dict[str, list[tuple[Adapter, float]]] = {}
    for adapters, weight in parts:
        for path, adapter in adapters.items():
            found.setdefault(path, []).append((_of_numbers(path, adapter, weight), float(weight)))
    merge = peft_results.merge if compat == "peft" else ways.merge
    done: dict[str, Adapter] = {}
    for path, terms in found.items():
        own = None if key is None else path_key(key, path)
        done[path], left = merge(path, terms, method, Options(density, majority, own, to))
        if report is not None and left is not None:
            report(path, left)
    return done


# What is given --------------------------------------------------------------------------------------------------------


def _needs(method: str, compat: str | None) -> tuple[bool, bool, bool]:
    """Return whether a method takes a density, elects signs, draws random numbers."""
    if compat == "peft":
        way = peft_results.METHODS[method]
        return way.sparsify is not None, way.elects, way.sparsify is drop_at_random
    if method == "sum":
        return False, False, False
    return True, ways.WAYS[method].elects, ways.WAYS[method].sparsify is drop_at_random


def _limit(method: str, parts: Sequence[Any], compat: str | None, given: tuple[Any, Any, Any, Any]) -> Limit | None:
    """Return how small a merged change becomes; None where it stays of the rank that it has."""
    rank, energy, iterations, key = given
    call = f"compose(method={method!r})"
    if compat == "peft" and method not in peft_results.ON_CHANGES:
        if (rank, energy, iterations) != (None, None, None):
            raise LoraError(f"{call} works on factors, as PEFT has it: leave rank, energy and iterations out.")
        return None
    if compat == "peft" and rank is None and energy is None:
        factors = [_factors(adapter) for adapters, _ in parts for adapter in adapters.values()]
        rank = max((found.a.shape[-1] for found in factors if found is not None), default=1)
    if compat is None and ways.WAYS[method].knots and rank is energy is iterations is None:
        return None
    return limit(call, rank, energy, iterations, key)


def _inside(adapter: Adapter) -> Adapter:
    while isinstance(adapter, AdapterWrapper):
        adapter = adapter.asked
    return adapter


def _factors(adapter: Adapter) -> LoraAdapter | None:
    found = _inside(adapter).to_lora()
    return found if isinstance(found, LoraAdapter) else None


def _of_numbers(path: str, adapter: Adapter, weight: Any) -> Adapter:
    """Return an adapter with factors, or a `FullAdapter`, if these have numbers."""
    adapter = _inside(adapter)
    found = adapter if isinstance(adapter, FullAdapter) else _factors(adapter)
    if found is None:
        raise LoraError(
            f"{path!r} is a {type(adapter).__name__}, whose change has no entries to choose from without the weight: "
            "method='sum' adds these up."
        )
    if any(isinstance(array, jax.core.Tracer) for array in (*jax.tree.leaves(found), weight)):
        raise LoraError(f"{path!r} is traced, and only method='sum' can be: call compose outside of jax.jit.")
    refuse_spread({path: found})
    if not all(np.isfinite(np.asarray(array)).all() for array in jax.tree.leaves(found)):
        raise LoraError(f"{path!r} holds infinity or NaN: take the adapters of an earlier checkpoint.")
    return found
