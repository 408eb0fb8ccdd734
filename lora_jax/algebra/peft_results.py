"""What HF PEFT's `add_weighted_adapter` computes, by its names of methods (version 0.21).

Those without `_svd` work on A and on B, each with the square root of weight times scale, and the product of what they
make has cross terms A_i B_j: it is not the sum of changes, except of one adapter. Signs are elected before weights are
applied, so that a negative weight has no vote of its own. `cat` is exact, as `combine` is, and `svd` is the nearest to
the sum of its rank.

Where this differs from PEFT: random masks are drawn by JAX; the new adapters have a scale of 1 for rsLoRA too, where
PEFT's keep rsLoRA's scale and so are too large by the square root of the rank; and DoRA is refused, whose lengths PEFT
leaves out.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.adapters.full import FullAdapter
from lora_jax.algebra.sparsify import Array, Sparsify, drop_at_random, elected_mean, keep_largest, keyed, weighted_sum
from lora_jax.algebra.stacked_factors import Factors, Merged, Options, Terms, as_adapter, factors_of_terms
from lora_jax.algebra.truncation import truncated
from lora_jax.core.errors import LoraError


class Method(NamedTuple):
    """How PEFT merges arrays of one shape.

    Args:
        sparsify: what is done to each of them before; None for nothing.
        elects: whether signs are elected.
    """

    sparsify: Sparsify | None = None
    elects: bool = False


ON_FACTORS = {
    "linear": Method(),
    "magnitude_prune": Method(keep_largest),
    "ties": Method(keep_largest, elects=True),
    "dare_linear": Method(drop_at_random),
    "dare_ties": Method(drop_at_random, elects=True),
}
ON_CHANGES = {"svd": ON_FACTORS["linear"]} | {f"{n}_svd": m for n, m in ON_FACTORS.items() if n != "linear"}
METHODS = {**ON_FACTORS, "cat": Method(), **ON_CHANGES}


def works_on_changes(method: str, parts: int) -> bool:
    """Return whether a method decomposes changes; of one adapter PEFT scales the factors, whatever is asked for."""
    return method in ON_CHANGES and parts > 1


def merge(path: str, terms: Terms, method: str, options: Options) -> Merged:
    """Return the merged adapter of one weight, and what is left if it was truncated.

    Raises:
        LoraError: an adapter has no factors; two are for different weights, or of different ranks where these are added
            up.
    """
    if any(isinstance(adapter, FullAdapter) for adapter, _ in terms):
        raise LoraError(f"{path!r} is a FullAdapter, and PEFT merges factors alone: leave it out, or compat='peft'.")
    first, factors = factors_of_terms(path, terms)
    n, weights = len(factors[0].a), [weight for _, weight in terms]
    ranks = [one.a.shape[-1] for one in factors]
    if method in ON_FACTORS and len({*ranks}) > 1:
        raise LoraError(f"{path!r} has adapters of the ranks {ranks}, and {method!r} adds up factors of one rank.")
    if works_on_changes(method, len(terms)):
        assert options.to is not None

        def merged(i: int) -> Array:
            return _merged(ON_CHANGES[method], [one.change(i) for one in factors], weights, options, i, CHANGE)

        a, b, left = truncated(merged, n, options.to)
        return as_adapter(first, a, b), left
    found = [_merged_factors(method, factors, weights, options, i) for i in range(n)]
    return as_adapter(first, np.stack([a for a, _ in found]), np.stack([b for _, b in found])), None


def _merged_factors(
    method: str, factors: Sequence[Factors], weights: Sequence[float], options: Options, number: int
) -> tuple[Array, Array]:
    """Return A [d, r] and B [r, k] of one of the stacked matrices."""
    scaled = np.asarray([weight * one.scale for one, weight in zip(factors, weights, strict=True)])
    of_a, of_b = [one.a[number] for one in factors], [one.b[number] for one in factors]
    if method == "cat" and len(factors) > 1:
        return np.concatenate([s * a for s, a in zip(scaled, of_a, strict=True)], axis=1), np.concatenate(of_b)
    way = ON_FACTORS["linear" if len(factors) == 1 else method]
    roots = np.sqrt(np.abs(scaled))
    a = _merged(way, of_a, [*(roots * np.where(scaled < 0, -1, 1))], options, number, OF_A)
    return a, _merged(way, of_b, [*roots], options, number, OF_B)


CHANGE, OF_A, OF_B = 0, 1, 2  # which arrays of a part a mask is for


def _merged(
    way: Method, arrays: Sequence[Array], weights: Sequence[Any], options: Options, number: int, what: int
) -> Array:
    """Return the weighted sum, or the elected mean, of what is left of arrays of one shape."""
    if way.sparsify is not None and options.density is not None and options.density < 1:
        keys = [keyed(options.key_of(number), i, what) for i in range(len(arrays))]
        arrays = [way.sparsify(x, options.density, key) for x, key in zip(arrays, keys, strict=True)]
    if not way.elects:
        return weighted_sum(arrays, weights)
    weighted = [weight * array for weight, array in zip(weights, arrays, strict=True)]
    return elected_mean(weighted, arrays, options.majority)
