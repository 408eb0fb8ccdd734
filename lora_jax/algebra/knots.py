"""KnOTS: the changes of several adapters in one basis, where their entries mean the same directions.

Stoica et al. 2024, "Model merging with SVD to tie the Knots", arXiv 2410.19735. The changes D_i = A_i B_i [d, k], one
above the other, are decomposed together: D_i = V_i S U^T with one U [k, R] and S for all. What is merged are the
coefficients V_i S [d, R], by TIES for example; U^T gives the change of the merged ones. The paper stacks the transposed
changes, as torch has weights.

Nothing of a weight's size is formed: with A_i = Q_i R_i, the R_i B_i one above the other [R, k] have the same S and U.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.initialization.svd import svd

Array = np.ndarray[Any, Any]
SMALLEST = 1e-7  # singular values beside the largest one that are no rounding of fp32 factors


def in_one_basis(factors: Sequence[tuple[Array, Array]]) -> tuple[list[Array], Array]:
    """Return the coefficients of changes, and the basis that they have in common.

    Args:
        factors: A_i [d, r_i] and B_i [r_i, k] of each, the scale being in one of them.

    Returns:
        V_i S [d, R] of each, and U^T [R, k] with orthonormal rows: D_i is their product. R is the rank of all changes
        together.

    >>> rng = np.random.default_rng(0)
    >>> factors = [(rng.normal(size=(6, r)), rng.normal(size=(r, 4))) for r in (1, 2)]
    >>> coefficients, basis = in_one_basis(factors)
    >>> basis.shape, all(np.allclose(c @ basis, a @ b) for c, (a, b) in zip(coefficients, factors))
    ((3, 4), True)
    """
    parts = [np.linalg.qr(a) for a, _ in factors]
    core = np.concatenate([r @ b for (_, r), (_, b) in zip(parts, factors, strict=True)])  # [R, k]
    p, values, basis = svd(core, slice(None))
    count = max(int((values > SMALLEST * values[0]).sum()), 1)
    rows = np.cumsum([r.shape[0] for _, r in parts])[:-1]
    scaled = p[:, :count] * values[:count]
    return [q @ own for (q, _), own in zip(parts, np.split(scaled, rows), strict=True)], basis[:count]
