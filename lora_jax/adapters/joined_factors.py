"""The factors of joined weights, [W1 | W2 | ...]: of outputs side by side, and of stacked matrices.

Parts are pairs (A [*stack, *inputs, r], s B [*stack, r, *outputs]), or None for a part that is frozen.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def side_by_side(parts: Sequence[Pair | None], sizes: Sequence[int], rank_axis: int, axis: int) -> Pair:
    """Return [A1 | A2 | ...] and diag(B1, B2, ...), whose product is [A1 B1 | A2 B2 | ...].

    Args:
        sizes: of the parts along the outputs that are joined.
        rank_axis, axis: of B: its rank, and the outputs that are joined.
    """
    a, b = [], []
    for part, size, end in zip(parts, sizes, itertools.accumulate(sizes), strict=True):
        if part is not None:
            padding = [(0, 0)] * part[1].ndim
            padding[axis] = (end - size, sum(sizes) - end)
            a.append(part[0])
            b.append(jnp.pad(part[1], padding))
    return jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=rank_axis)


def stacked(parts: Sequence[Pair | None], sizes: Sequence[int], rank_axis: int, axis: int) -> Pair:
    """Return the factors of matrices stacked along an axis, all with the largest rank; zeros for frozen parts.

    Args:
        sizes: of the parts along the stack axis.
        rank_axis, axis: of B: its rank, and the stack axis.
    """
    first = next(part for part in parts if part is not None)
    rank = max(part[1].shape[rank_axis] for part in parts if part is not None)

    def padded(array: jax.Array, at: int) -> jax.Array:
        missing = rank - array.shape[at]
        return jnp.pad(array, [(0, missing if i == at % array.ndim else 0) for i in range(array.ndim)])

    def zeros(like: jax.Array, size: int) -> jax.Array:
        return jnp.zeros((*like.shape[:axis], size, *like.shape[axis + 1 :]), like.dtype)

    pairs = [
        (zeros(first[0], n), zeros(first[1], n)) if part is None else part for part, n in zip(parts, sizes, strict=True)
    ]
    a, b = [padded(a, -1) for a, _ in pairs], [padded(b, rank_axis) for _, b in pairs]
    return jnp.concatenate(a, axis=axis), jnp.concatenate(b, axis=axis)
