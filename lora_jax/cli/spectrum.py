"""How large a change s A B is, and of what rank in effect: from its singular values, without forming it."""

import math
from typing import NamedTuple

import numpy as np

from lora_jax.interop.key_map import Array


class Spectrum(NamedTuple):
    """The change of one or more matrices of one weight.

    Args:
        norm: the Frobenius norm of all of them together.
        effective_rank: exp of the entropy of the singular values' shares, which is r if all are equal (Roy and
            Vetterli 2007, "The effective rank"); the mean over the matrices that change.
        finite: whether no factor has a NaN or an infinity.
    """

    norm: float
    effective_rank: float
    finite: bool


def spectrum(a: Array, b: Array, scale: float) -> Spectrum:
    """Of `scale * a @ b`, with a [*stack, d, r] and b [*stack, r, k].

    >>> found = spectrum(np.eye(4, 2), np.eye(2, 3), 3.0)
    >>> print(f"{found.norm:.3f} {found.effective_rank:.3f}")
    4.243 2.000
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Spectrum(math.nan, math.nan, False)
    # A = Q R, B^T = Q' R': the singular values of A B are those of the small R R'^T.
    left = np.asarray(np.linalg.qr(a.astype(np.float64), mode="r"))
    right = np.asarray(np.linalg.qr(b.astype(np.float64).swapaxes(-1, -2), mode="r"))
    small = left @ right.swapaxes(-1, -2)
    values = abs(scale) * np.linalg.svd(small, compute_uv=False).reshape(-1, small.shape[-1])
    changing = values[values.sum(-1) > 0]
    shares = changing / changing.sum(-1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)
    rank = float(np.exp(entropy).mean()) if len(changing) else 0.0
    return Spectrum(float(np.sqrt(np.square(values).sum())), rank, True)
