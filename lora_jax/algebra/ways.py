"""Pruning, DARE, TIES and KnOTS for the adapters of one weight."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.algebra import knots
from lora_jax.algebra.compress import compressed
from lora_jax.algebra.sparsify import Array, Sparsify, drop_at_random, elected_mean, keep_largest, keyed, weighted_sum
from lora_jax.algebra.stacked_factors import Factors, Merged, Options, Terms, as_adapter, factors_of_terms, wide
from lora_jax.algebra.truncation import truncated
from lora_jax.core.errors import LoraError


class Way(NamedTuple):
    """How changes are merged.

    Args:
        sparsify: what is done to each of them before it is weighted.
        elects: whether a sign is elected for each entry, or all are added up.
        knots: whether entries are coefficients in one basis, or those of the changes themselves.
    """

    sparsify: Sparsify
    elects: bool = False
    knots: bool = False


WAYS = {
    "magnitude_prune": Way(keep_largest),
    "dare": Way(drop_at_random),
    "ties": Way(keep_largest, elects=True),
    "dare_ties": Way(drop_at_random, elects=True),
    "knots_ties": Way(keep_largest, elects=True, knots=True),
    "knots_dare_ties": Way(drop_at_random, elects=True, knots=True),
}


def merge(path: str, terms: Terms, method: str, options: Options) -> Merged:
    """Return the merged adapter of one weight, and what is left if it was truncated.

    Raises:
        LoraError: the adapters are of several kinds, or for different weights; the density keeps nothing.
    """
    way, weights = WAYS[method], [weight for _, weight in terms]
    if any(isinstance(adapter, FullAdapter) for adapter, _ in terms):
        return _merge_whole(path, way, terms, options), None
    first, factors = factors_of_terms(path, terms)
    if way.knots:
        return _merge_in_one_basis(path, way, first, factors, weights, options)
    assert options.to is not None

    def merged(i: int) -> Array:
        return _merged(way, [one.change(i) for one in factors], weights, options, i)

    a, b, left = truncated(merged, len(factors[0].a), options.to)
    return as_adapter(first, a, b), left


def _merge_whole(path: str, way: Way, terms: Terms, options: Options) -> FullAdapter:
    """Return the merged change of arrays that have it whole, such as biases."""
    full = [adapter for adapter, _ in terms if isinstance(adapter, FullAdapter)]
    if len(full) < len(terms) or len({adapter.delta.shape for adapter in full}) > 1:
        raise LoraError(f"{path!r} has adapters of several kinds or shapes, which only method='sum' adds up.")
    total = _merged(way, [wide(adapter.delta) for adapter in full], [weight for _, weight in terms], options, 0)
    return FullAdapter(jnp.asarray(total.astype(np.float32)), full[0].axes)


def _merge_in_one_basis(
    path: str, way: Way, first: LoraAdapter, factors: Sequence[Factors], weights: Sequence[float], options: Options
) -> Merged:
    found = []
    for i in range(len(factors[0].a)):
        coefficients, basis = knots.in_one_basis([(one.scale * one.a[i], one.b[i]) for one in factors])
        found.append((_merged(way, coefficients, weights, options, i), basis))
    rank = max(len(basis) for _, basis in found)  # stacked matrices have one in common: zeros do not change any
    a = np.stack([np.pad(part, ((0, 0), (0, rank - part.shape[1]))) for part, _ in found])
    b = np.stack([np.pad(basis, ((0, rank - len(basis)), (0, 0))) for _, basis in found])
    adapter = as_adapter(first, a, b)
    return (adapter, None) if options.to is None else compressed(path, adapter, options.to)


def _merged(way: Way, changes: Sequence[Array], weights: Sequence[float], options: Options, number: int) -> Array:
    """Return the merged entries of arrays of one shape; `number` is that of the matrix among stacked ones."""
    assert options.density is not None
    keys = [keyed(options.key_of(number), i) for i in range(len(changes))]
    kept = [way.sparsify(change, options.density, key) for change, key in zip(changes, keys, strict=True)]
    weighted = [weight * change for weight, change in zip(weights, kept, strict=True)]
    return elected_mean(weighted, weighted, options.majority) if way.elects else weighted_sum(kept, weights)
