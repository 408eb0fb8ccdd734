"""The change of a given rank that is nearest to another one: of stacked matrices, or of products of two factors.

It consists of the largest singular values and their vectors (Eckart and Young 1936, "The approximation of one matrix by
another of lower rank").
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.argument_checks import check_key
from lora_jax.core.errors import LoraError
from lora_jax.initialization.svd import balanced_factors, randomised_svd, singular_values, svd

ROUNDING = 1e-12  # of a share that is asked for: 1 is reached by all singular values, whatever their sum is rounded to


class Truncation(NamedTuple):
    """What is left of a change.

    Args:
        rank: of what is left.
        energy: the share of the squared Frobenius norm that it has, of all stacked matrices together; the squared norm
            of the rest is 1 less this.
    """

    rank: int
    energy: float


class Limit(NamedTuple):
    """How small a change becomes: to a rank, or to the smallest rank that holds a share of its squared norm.

    Args:
        rank: r, or None.
        energy: a share above 0 and at most 1, or None.
        iterations: None for exact singular values. Otherwise a randomised decomposition with this many steps of
            subspace iteration, which is much faster for large matrices (Halko et al. 2009, arXiv 0909.4061).
        key: of the random numbers of that.
    """

    rank: int | None
    energy: float | None
    iterations: int | None = None
    key: jax.Array | None = None


def limit(call: str, rank: Any, energy: Any, iterations: Any = None, key: Any = None) -> Limit:
    """Return the limit that arguments of a call say.

    Raises:
        LoraError: neither or both are given; one is out of its range; iterations without a rank or a key.
    """
    if (rank is None) == (energy is None):
        raise LoraError(f"{call}(rank={rank!r}, energy={energy!r}): give one of them, such as rank=8 or energy=0.99.")
    if rank is not None and not _is_whole(rank, least=1):
        raise LoraError(f"{call}(rank={rank!r}): expected a whole number of at least 1, such as 8.")
    if energy is not None and not (isinstance(energy, int | float | np.number) and 0 < energy <= 1):
        raise LoraError(f"{call}(energy={energy!r}): expected a share above 0 and at most 1, such as 0.99.")
    if iterations is not None:
        if not _is_whole(iterations, least=0):
            raise LoraError(f"{call}(iterations={iterations!r}): expected a whole number such as 4, or None.")
        if rank is None:
            raise LoraError(f"{call}(iterations={iterations}) finds a few singular values, not all: give a rank.")
        if key is None:
            raise LoraError(f"{call}(iterations={iterations}) draws random numbers: give it key=jax.random.key(0).")
        check_key(f"{call}(..., key=key)", key)
    return Limit(rank, None if energy is None else float(energy), iterations, key)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least


def truncated(matrix: Callable[[int], Any], n: int, to: Limit, scale: float = 1.0) -> tuple[Any, Any, Truncation]:
    """Return factors of the changes of one rank that are nearest to n stacked matrices.

    One matrix is formed and decomposed at a time, in fp64 on this host; by a randomised decomposition in fp32 on JAX's
    device. For `energy` each is formed twice, since the rank in common is not known before.

    Args:
        matrix: returns matrix number i, [d, k].
        n: how many there are.
        to: how small. A rank above min(d, k) is taken to be that.
        scale: s of s A B, not 0.

    Returns:
        A [n, d, r] and B [n, r, k] in fp32, and what they hold.
    """
    if to.rank is None:
        values = np.stack([singular_values(np.asarray(matrix(i), np.float64)) for i in range(n)])
        to = to._replace(rank=rank_of(values, to))
    total, parts = 0.0, []
    for i in range(n):
        wide = np.asarray(matrix(i), np.float64)
        total += float(np.square(wide).sum())
        parts.append(_svd(wide, min(int(to.rank or 1), *wide.shape), to, i))
    u, values, vt = (np.stack(part) for part in zip(*parts, strict=True))
    a, b = balanced_factors(u, values, vt, scale)
    energy = min(float(np.square(values).sum()) / total, 1.0) if total else 1.0
    return a.astype(np.float32), b.astype(np.float32), Truncation(values.shape[-1], energy)


def _svd(matrix: Any, rank: int, to: Limit, number: int) -> tuple[Any, Any, Any]:
    if to.iterations is None or to.key is None:
        return svd(matrix, slice(rank))
    key = jax.random.fold_in(to.key, number)
    found = randomised_svd(key, jnp.asarray(matrix, jnp.float32)[None], rank, to.iterations)
    u, values, vt = (np.asarray(array, np.float64)[0] for array in found)
    return u, values, vt


def rank_of(values: Any, to: Limit) -> int:
    """Return the rank that a limit means for stacked matrices with these singular values [n, m], at most m."""
    if to.energy is None:
        return min(int(to.rank or 1), values.shape[-1])
    squares = np.square(values / max(float(values.max()), np.finfo(values.dtype).tiny)).sum(0)  # no square overflows
    reached = np.cumsum(squares) >= to.energy * squares.sum() * (1 - ROUNDING)
    return int(np.argmax(reached)) + 1


def product_svd(a: Any, b: Any) -> tuple[Any, Any, Any]:
    """Return U [n, d, m], S [n, m] and V^T [n, m, k] of A B, without forming it. NumPy or JAX.

    A = Q R and B^T = Q' R', so that A B is Q (R R'^T) Q'^T, and only the small matrix in the middle is decomposed.

    Args:
        a, b: [n, d, r] and [n, r, k].
    """
    xp = a.__array_namespace__()
    with jax.default_matmul_precision("highest"):
        q, left = xp.linalg.qr(a)
        p, right = xp.linalg.qr(b.swapaxes(-1, -2))
        u, values, vt = svd(left @ right.swapaxes(-1, -2), slice(None))
        return q @ u, values, vt @ p.swapaxes(-1, -2)
