"""The cross-entropy of each row of logits, with its derivative written out, so that few passes read the logits.

With q = (1 - a) onehot(label) + a / V, l the (capped) logits and z the weight of the z-loss,

    loss = lse(l) - sum(q l) + z lse(l)^2,        d loss / d l = (1 + 2 z lse(l)) softmax(l) - q.

The z-loss is that of Chowdhery et al. 2022, "PaLM", arXiv 2204.02311; soft caps are those of Gemma 2, arXiv 2408.00118.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

IGNORED = (
    -1
)  # a label whose row has a loss of 0, if its logits are finite; a row of another one that is no class has NaN


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of each row. Split over mesh axes, the sum over devices of what each has computed is the loss."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float | None = None
    axis: tuple[str, ...] = ()  # mesh axes of a `shard_map` that split the vocabulary

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the losses [...] of logits [..., V] in fp32 or wider, for labels [...]."""
        return _cross_entropy(self, logits, labels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cross_entropy(c: CrossEntropy, logits: jax.Array, labels: jax.Array) -> jax.Array:
    return _parts(c, logits, labels)[0]


@_cross_entropy.defjvp
def _tangent(c: CrossEntropy, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    logits, labels = primals
    loss, capped, lse, is_label, counts = _parts(c, logits, labels)
    slope = jnp.exp(capped - lse[..., None])
    if c.z_loss:
        slope = slope * (1 + 2 * c.z_loss * lse)[..., None]
    slope = slope - is_label.astype(slope.dtype) * (1 - c.label_smoothing)
    if c.label_smoothing:
        slope = slope - c.label_smoothing / _classes(c, logits)
    if c.soft_cap is not None:
        slope = slope * (1 - (capped / c.soft_cap) ** 2)
    return loss, jnp.sum(slope * tangents[0], -1) * counts


def _parts(c: CrossEntropy, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """Return the loss, the capped logits, their logsumexp, where the label is, and how often each row counts."""
    capped = logits if c.soft_cap is None else c.soft_cap * jnp.tanh(logits / c.soft_cap)
    largest = _over(c, lax.pmax, jnp.max(capped, -1))
    lse = largest + jnp.log(_over(c, lax.psum, jnp.sum(jnp.exp(capped - largest[..., None]), -1)))
    own = labels - (lax.axis_index(c.axis) * logits.shape[-1] if c.axis else 0)
    # The barrier has all words' numbers depend on the labels: else JAX computes one array of the logits' shape of them,
    # before it loops over the blocks, which each block would read.
    own, words, zero = lax.optimization_barrier((own, jnp.arange(logits.shape[-1]), jnp.zeros((), capped.dtype)))
    is_label = own[..., None] == jnp.expand_dims(words, range(own.ndim))
    loss = (lse + c.z_loss * lse**2 if c.z_loss else lse) / _devices(c)
    loss = loss - (1 - c.label_smoothing) * jnp.sum(jnp.where(is_label, capped, zero), -1)
    if c.label_smoothing:
        loss = loss - c.label_smoothing / _classes(c, logits) * jnp.sum(capped, -1)
    is_class = jnp.where(labels < _classes(c, logits), 1, jnp.nan)
    counts = jnp.where(labels == IGNORED, 0, is_class).astype(loss.dtype)
    return loss * counts, capped, lse, is_label, counts


def _over(c: CrossEntropy, reduce: Callable[..., Any], array: jax.Array) -> Any:
    return reduce(array, c.axis) if c.axis else array


def _devices(c: CrossEntropy) -> int:
    return lax.axis_size(c.axis) if c.axis else 1


def _classes(c: CrossEntropy, logits: jax.Array) -> int:
    return logits.shape[-1] * _devices(c)
