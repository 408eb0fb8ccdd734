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

import jax
import numpy as np

from lora_jax.algebra.sparsify import (
    Array,
    Majority,
    Sparsify,
    drop_at_random,
    elected_mean,
    keep_largest,
    weighted_sum,
)
from lora_jax.algebra.truncation import Limit, Truncation, truncated

Factors = tuple[Array, Array, float]  # A [d, r], B [r, k] and the scale


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


class Options(NamedTuple):
    """Args: as of `compose`; `to` is for the methods on changes."""

    density: float | None
    majority: Majority
    key: jax.Array | None
    to: Limit | None


def merged(
    name: str, parts: Sequence[tuple[Factors, float]], options: Options
) -> tuple[Array, Array, Truncation | None]:
    """Return A [d, r] and B [r, k] of one matrix, with a scale of 1, and what was truncated.

    Args:
        name: of a method.
        parts: the factors of each adapter, and its weight.
    """
    weights = [weight * scale for (*_, scale), weight in parts]
    if len(parts) == 1:
        name = "linear"  # as PEFT has it, whatever is asked for
    if name == "cat":
        a = np.concatenate([weight * a for weight, ((a, _, _), _) in zip(weights, parts, strict=True)], axis=1)
        return a, np.concatenate([b for (_, b, _), _ in parts]), None
    if name in ON_CHANGES:
        changes = [scale * (a @ b) for (a, b, scale), _ in parts]
        total = _merged(ON_CHANGES[name], changes, [weight for _, weight in parts], options, "change")
        assert options.to is not None
        a, b, left = truncated(lambda _: total, 1, options.to)
        return a[0], b[0], left
    method, roots = ON_FACTORS[name], np.sqrt(np.abs(weights))
    a = _merged(
        method, [a for (a, _, _), _ in parts], list(roots * np.where(np.asarray(weights) < 0, -1, 1)), options, "a"
    )
    return a, _merged(method, [b for (_, b, _), _ in parts], list(roots), options, "b"), None


def _merged(method: Method, arrays: Sequence[Array], weights: Sequence[Any], options: Options, what: str) -> Array:
    """Return the weighted sum, or the elected mean, of what is left of arrays of one shape."""
    if method.sparsify is not None and options.density is not None and options.density < 1:
        keys = [keyed(options.key, what, i) for i in range(len(arrays))]
        arrays = [method.sparsify(x, options.density, key) for x, key in zip(arrays, keys, strict=True)]
    if not method.elects:
        return weighted_sum(arrays, weights)
    weighted = [weight * array for weight, array in zip(weights, arrays, strict=True)]
    return elected_mean(weighted, arrays, options.majority)


KEYS = {"change": 0, "a": 1, "b": 2}


def keyed(key: jax.Array | None, what: str, number: int) -> jax.Array | None:
    """Return the key of one array of one part."""
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), KEYS[what])
