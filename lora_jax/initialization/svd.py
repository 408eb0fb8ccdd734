"""Singular values and vectors of n matrices at once, in fp32 or wider."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes

Factors = tuple[jax.Array, jax.Array]  # A [n, d, r] and B [n, r, k], n being the number of stacked matrices

OVERSAMPLING = 10  # columns beyond the rank in a randomised SVD, as Halko et al. advise


def matrices(w: jax.Array, axes: KernelAxes) -> jax.Array:
    """W with its own axes -> [n, d, k], in fp32 or wider."""
    order = [*axes.stack, *axes.inputs, *axes.outputs]
    return wide(w).transpose(order).reshape(axes.fans(w.shape))


def wide(array: jax.Array) -> jax.Array:
    return array.astype(accumulator(array.dtype))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def svd(w: jax.Array, which: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Some singular values S [n, r] of w [n, d, k], the largest being number 0, with U [n, d, r] and V^T [n, r, k]."""
    u, values, vt = jnp.linalg.svd(w, full_matrices=False)
    return u[:, :, which], values[:, which], vt[:, which]


def randomised_svd(key: jax.Array, w: jax.Array, rank: int, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for the first r, from an SVD of w within a subspace that W W^T turns towards them at each iteration."""
    n, d, k = w.shape
    columns = min(rank + OVERSAMPLING, d, k)
    q, _ = jnp.linalg.qr(matmul(w, jax.random.normal(key, (n, k, columns), w.dtype)))
    for _ in range(iterations):
        # Without an orthonormal basis after each product, all columns would soon be the first singular vector.
        p, _ = jnp.linalg.qr(matmul(w.mT, q))
        q, _ = jnp.linalg.qr(matmul(w, p))
    u, values, vt = svd(matmul(q.mT, w), np.arange(rank))
    return matmul(q, u), values, vt


def shared(u: jax.Array, values: jax.Array, vt: jax.Array, scale: float) -> Factors:
    """A and B with s A B = U S V^T, the singular values shared evenly."""
    root = jnp.sqrt(values / abs(scale))
    return u * root[:, None, :], math.copysign(1.0, scale) * root[:, :, None] * vt


def principal(x: jax.Array, most: int) -> tuple[jax.Array, np.ndarray]:
    """The first right singular vectors of x [n, rows, d] as columns, and the shares of x^2 in them, averaged over n."""
    _, values, vt = jnp.linalg.svd(x, full_matrices=False)
    return vt[:, :most].mT, explained(values)[:most]


def explained(values: jax.Array) -> np.ndarray:
    """The share of each singular value [n, m], the largest first, in their sum of squares, averaged over n."""
    energy = jnp.square(values / jnp.maximum(values[:, :1], jnp.finfo(values.dtype).tiny))  # squares do not overflow
    shares = energy / jnp.maximum(energy.sum(-1, keepdims=True), 1)
    return np.asarray(shares.mean(0))
