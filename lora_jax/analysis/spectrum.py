"""Singular values of the change that an adapter makes, and the adapter that is nearest to a given change."""

import math
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.initialization.svd import balanced_factors, explained_variance_ratio, singular_values, svd

Array = np.ndarray[Any, Any]


class Spectrum(NamedTuple):
    """The size of a change of one weight, which may be several stacked matrices.

    Args:
        norm: the Frobenius norm of all matrices together.
        effective_rank: the exponential of the entropy of the singular values' shares, which is r if all are equal (Roy
            and Vetterli 2007, "The effective rank"); the mean over the matrices that change.
        finite: whether neither a factor nor the scale is a NaN or an infinity; if one is, the other two are NaN.
    """

    norm: float
    effective_rank: float
    finite: bool


def spectrum(a: Array, b: Array, scale: float) -> Spectrum:
    """Return the spectrum of `scale * a @ b`, without forming that product.

    Args:
        a: [*stack, d, r].
        b: [*stack, r, k].
        scale: a factor.

    >>> found = spectrum(np.eye(4, 2), np.eye(2, 3), 3.0)
    >>> print(f"{found.norm:.3f} {found.effective_rank:.3f}")
    4.243 2.000
    """
    if not (math.isfinite(scale) and np.isfinite(a).all() and np.isfinite(b).all()):
        return Spectrum(math.nan, math.nan, False)
    # A = Q R and B^T = Q' R', so the singular values of A B are those of the small matrix R R'^T, which is not square
    # where the rank is above the inputs or the outputs.
    left = np.asarray(np.linalg.qr(a.astype(np.float64), mode="r"))
    right = np.asarray(np.linalg.qr(b.astype(np.float64).swapaxes(-1, -2), mode="r"))
    small = left @ right.swapaxes(-1, -2)
    values = abs(scale) * singular_values(small).reshape(-1, min(small.shape[-2:]))
    return Spectrum(float(np.sqrt(np.square(values).sum())), effective_rank(values), True)


def effective_rank(values: Array) -> float:
    """Return the mean of the effective ranks of the matrices that are not zero, given their singular values [n, r].

    >>> round(effective_rank(np.array([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])), 3)
    2.0
    """
    changing = values[values.sum(-1) > 0]
    shares = changing / changing.sum(-1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)
    return float(np.exp(entropy).mean()) if len(changing) else 0.0


def low_rank(change: Array, rank: int | None = None, energy: float | None = None) -> tuple[Array, Array, float]:
    """Return the product A B of a given rank that is nearest to a change, as two factors of equal size.

    It consists of the largest singular values and their vectors (Eckart and Young 1936, "The approximation of one
    matrix by another of lower rank").

    Args:
        change: [d, k].
        rank: r; if it is above min(d, k), that is taken.
        energy: the share of the squared norm of the change that A B has to reach, above 0 and at most 1. The rank is
            then the smallest with which it does. Give either this or `rank`.

    Returns:
        A [d, r] and B [r, k] in fp32, and the share of the squared norm that they reach.

    Raises:
        LoraError: neither or both are given; one is out of its range; the change is not finite.

    >>> a, b, share = low_rank(np.diag([3.0, 1.0, 0.5]), rank=1)
    >>> a.shape, b.shape, round(share, 3)
    ((3, 1), (1, 3), 0.878)
    """
    if (rank is None) == (energy is None):
        raise LoraError(f"low_rank(rank={rank}, energy={energy}): give one of them.")
    if rank is not None and rank < 1:
        raise LoraError(f"the rank is {rank}, expected at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise LoraError(f"the energy is {energy}, expected a share above 0 and at most 1.")
    if not np.isfinite(change).all():
        raise LoraError("the change holds a NaN or an infinity.")
    u, values, vt = svd(change.astype(np.float64), slice(None))
    shares = np.cumsum(explained_variance_ratio(values[None]))
    if energy is not None:
        rank = int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1
    count = min(int(rank or 1), len(values))
    a, b = balanced_factors(u[:, :count], values[:count], vt[:count], 1.0)
    return a.astype(np.float32), b.astype(np.float32), float(shares[count - 1])
