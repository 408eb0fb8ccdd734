"""The best adapter for a change that was made to all of a weight: its largest singular values."""

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array


def low_rank(change: Array, rank: int | None = None, energy: float | None = None) -> tuple[Array, Array, float]:
    """A [d, r] and B [r, k] whose product is nearest to a change [d, k], and the share of its squared norm in it.

    The largest singular values, shared evenly by A and B: no other product of this rank is nearer (Eckart and Young
    1936, "The approximation of one matrix by another of lower rank").

    Args:
        rank: r, at most min(d, k).
        energy: or the share to reach, above 0 and at most 1, with the smallest r that does.

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
    u, values, v = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    shares = np.cumsum(values**2) / max(float(np.sum(values**2)), np.finfo(np.float64).tiny)
    if energy is not None:
        rank = int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1
    count = min(int(rank or 1), len(values))
    root = np.sqrt(values[:count])
    a, b = (u[:, :count] * root).astype(np.float32), (root[:, None] * v[:count]).astype(np.float32)
    return a, b, float(shares[count - 1])
