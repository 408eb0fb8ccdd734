"""What TIES, DARE and pruning do to the entries of changes, which are arrays of one shape.

- Pruning by magnitude keeps the largest entries of each change.
- DARE drops entries at random and makes the others larger, so that the mean stays: Yu et al. 2023, "Language Models are
  Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", arXiv 2311.03099.
- TIES prunes by magnitude, elects a sign for each entry, and takes the mean of the changes that have it: Yadav et al.
  2023, "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708.

NumPy, on this host: none of it has a gradient that means anything.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lora_jax.core.errors import LoraError

Array = np.ndarray[Any, Any]
Majority = Literal["total", "frequency"]
Sparsify = Callable[[Array, float, jax.Array | None], Array]


def keep_largest(change: Array, density: float, key: jax.Array | None = None) -> Array:
    """Return a change with its `int(density * size)` entries of the largest magnitude, and zeros.

    Of equal ones the first are kept.

    >>> keep_largest(np.array([3.0, -1.0, 2.0, -4.0]), 0.5)
    array([ 3.,  0.,  0., -4.])
    """
    order = np.argsort(-np.abs(change), axis=None, kind="stable")
    kept = np.zeros(change.size, bool)
    kept[order[: _count(change.size, density)]] = True
    return np.where(kept.reshape(change.shape), change, 0)


def _count(size: int, density: float) -> int:
    count = int(density * size)
    if not count:
        raise LoraError(f"density={density} keeps none of {size} entries: give at least {1 / size:.2g}.")
    return count


def drop_at_random(change: Array, density: float, key: jax.Array | None) -> Array:
    """Return a change of which each entry is kept with the probability `density`, and divided by it; others are zero.

    Args:
        key: of the mask.
    """
    assert key is not None
    return np.where(np.asarray(jax.random.bernoulli(key, density, change.shape)), change / density, 0)


def weighted_sum(changes: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return w1 D1 + w2 D2 + ..."""
    return np.asarray(sum(weight * change for weight, change in zip(weights, changes, strict=True)))


def elected_mean(weighted: Sequence[Array], voters: Sequence[Array], majority: Majority) -> Array:
    """Return, for each entry, the mean of the changes whose voters have the sign that is elected there.

    Zeros have no sign, and take no part. Where there are none of the sign the mean is zero.

    Args:
        weighted: the changes, times their weights.
        voters: what signs are elected by, such as the weighted changes themselves.
        majority: "total" elects the sign of the sum, "frequency" the one that more voters have; a tie is positive.

    >>> changes = [np.array([2.0, -1.0]), np.array([-1.0, -3.0])]
    >>> elected_mean(changes, changes, "total")
    array([ 2., -2.])
    """
    votes = np.stack(voters)
    signs = np.sign(votes)
    elected = np.where((votes if majority == "total" else signs).sum(0) >= 0, 1, -1)
    agree = signs == elected
    return np.asarray((np.stack(weighted) * agree).sum(0) / np.maximum(agree.sum(0), 1))


def keyed(key: jax.Array | None, number: int, what: int = 0) -> jax.Array | None:
    """Return the key of one array of one part of a sum: the change, or 1 for A and 2 for B."""
    return None if key is None else jax.random.fold_in(jax.random.fold_in(key, number), what)
