"""Singular value decompositions of stacked matrices, truncated or randomised.

Functions marked "NumPy or JAX" compute with the library that their argument belongs to, in the argument's precision.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.arrays import accumulator, matmul_highest
from lora_jax.core.axes import KernelAxes

Factors = tuple[jax.Array, jax.Array]  # A [n, d, r] and B [n, r, k], n being the number of stacked matrices

OVERSAMPLING = 10  # columns beyond the rank in a randomised SVD, as Halko et al. advise


def to_fp32(array: jax.Array) -> jax.Array:
    """Cast to fp32; arrays of a wider dtype stay as they are."""
    return array.astype(accumulator(array.dtype))


def to_matrices(w: jax.Array, axes: KernelAxes) -> jax.Array:
    """Reshape a weight, with its axes in its own order, to [n, d, k] in fp32 or wider."""
    order = [*axes.stack, *axes.inputs, *axes.outputs]
    return to_fp32(w).transpose(order).reshape(axes.fans(w.shape))


def flatten_stack(arrays: jax.Array) -> jax.Array:
    """Reshape [*stack, rows, columns] to [n, rows, columns] in fp32 or wider."""
    return to_fp32(arrays.reshape(-1, *arrays.shape[-2:]))


def svd(w: Any, which: Any) -> tuple[Any, Any, Any]:
    """Return selected singular values and vectors of W. NumPy or JAX.

    Args:
        w: [*n, d, k].
        which: the indices [r] or the slice of the singular values to return; number 0 is the largest.

    Returns:
        U [*n, d, r], S [*n, r] and V^T [*n, r, k].
    """
    u, values, vt = w.__array_namespace__().linalg.svd(w, full_matrices=False)
    return u[..., which], values[..., which], vt[..., which, :]


def singular_values(w: Any) -> Any:
    """Return all singular values [*n, min(d, k)] of W [*n, d, k], the largest first. NumPy or JAX."""
    return w.__array_namespace__().linalg.svdvals(w)


def randomised_svd(key: jax.Array, w: jax.Array, rank: int, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Approximate the largest singular values and vectors by subspace iteration (Halko et al. 2009, arXiv 0909.4061).

    Args:
        key: of the random subspace that the iteration starts from.
        w: [n, d, k].
        rank: how many singular values.
        iterations: multiplications of the subspace by W W^T; each turns it further towards the singular vectors.

    Returns:
        U [n, d, r], S [n, r] and V^T [n, r, k].
    """
    n, d, k = w.shape
    columns = min(rank + OVERSAMPLING, d, k)
    q, _ = jnp.linalg.qr(matmul_highest(w, jax.random.normal(key, (n, k, columns), w.dtype)))
    for _ in range(iterations):
        # Without an orthonormal basis after each product, all columns would soon be the first singular vector.
        p, _ = jnp.linalg.qr(matmul_highest(w.mT, q))
        q, _ = jnp.linalg.qr(matmul_highest(w, p))
    u, values, vt = svd(matmul_highest(q.mT, w), slice(rank))
    return matmul_highest(q, u), values, vt


def balanced_factors(u: Any, values: Any, vt: Any, scale: float) -> tuple[Any, Any]:
    """Split U S V^T into A and B of equal size such that s A B = U S V^T. NumPy or JAX.

    Args:
        u, values, vt: U [*n, d, r], S [*n, r] and V^T [*n, r, k].
        scale: s, not 0; its sign goes into B.

    Returns:
        A = U sqrt(S / |s|) [*n, d, r] and B = sign(s) sqrt(S / |s|) V^T [*n, r, k].
    """
    root = values.__array_namespace__().sqrt(values / abs(scale))
    return u * root[..., None, :], math.copysign(1.0, scale) * root[..., :, None] * vt


def principal_components(x: jax.Array, most: int) -> tuple[jax.Array, np.ndarray]:
    """Return the first `most` right singular vectors of x [n, rows, d] as columns [n, d, most], and what they explain.

    The second result [most] is the `explained_variance_ratio` of each, averaged over the n matrices.
    """
    _, values, vt = svd(x, slice(None))
    return vt[:, :most].mT, explained_variance_ratio(values)[:most]


def explained_variance_ratio(values: Any) -> np.ndarray:
    """Return S_i^2 / sum S^2 [m] of singular values [n, m], the largest first, averaged over n. NumPy or JAX.

    Matrices that are zero count as 0.
    """
    xp = values.__array_namespace__()
    energy = xp.square(values / xp.maximum(values[:, :1], xp.finfo(values.dtype).tiny))  # squares do not overflow
    shares = energy / xp.maximum(energy.sum(-1, keepdims=True), 1)
    return np.asarray(shares.mean(0))
