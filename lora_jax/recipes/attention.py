"""Attention of packed rows: each token sees the tokens of its own text that are not after it, and not too far before.

Where all scores would take too much memory, they are computed for some queries at a time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SCORES = 2**29  # bytes of the scores of all heads that are formed at once, in fp32
FEWEST = 256  # queries that are taken together at least: products of fewer rows are slow on accelerators
EVERYTHING = np.iinfo(np.int32).max  # a window that has all tokens
_NEVER = -0.7 * float(np.finfo(np.float32).max)  # a score: softmax makes 0 of it, and no NaN where a row has no other


class Places(NamedTuple):
    """Where tokens are: the position in their text, and which text of the row it is; i32 [B, T] each."""

    positions: jax.Array
    segments: jax.Array

    @classmethod
    def of(cls, ids: jax.Array, positions: jax.Array | None, segments: jax.Array | None) -> "Places":
        """Return the places of the tokens of a row, by default of one text from its beginning."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
        return cls(positions, jnp.ones(ids.shape, jnp.int32) if segments is None else segments)

    def see(self, others: "Places", window: Any) -> jax.Array:
        """Return which of other tokens each of these sees, bool [B, T, S]."""
        back = self.positions[:, :, None] - others.positions[:, None]
        return (self.segments[:, :, None] == others.segments[:, None]) & (back >= 0) & (back < window)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Places,
    keys: Places,
    window: Any,
    scale: float,
    cap: float | None,
) -> jax.Array:
    """Return what each query attends to [B, T, H, R]; H / K heads of queries share one of keys and values.

    Args:
        q: [B, T, H, R].
        k, v: [B, S, K, R].
        queries, keys: where these tokens are.
        window: how many tokens a token sees, its own among them; a number, or a traced one.
        scale: of the products of queries and keys.
        cap: c of c * tanh(score / c), if there is one.
    """
    b, t, h, _ = q.shape
    n = min(-(-4 * b * h * t * k.shape[1] // SCORES), -(-t // FEWEST))
    block = functools.partial(_attend_block, k=k, v=v, keys=keys, window=window, scale=scale, cap=cap)
    if n <= 1:
        return block((q, queries))
    size = -(-t // n)

    def split(array: jax.Array) -> jax.Array:  # [B, T, ...] to [n, B, T / n, ...]; what is added belongs to no text
        padded = jnp.pad(array, [(0, 0), (0, n * size - t), *[(0, 0)] * (array.ndim - 2)], constant_values=-1)
        return jnp.moveaxis(padded.reshape(b, n, size, *array.shape[2:]), 1, 0)

    parts = jax.tree.map(split, (q, queries))
    y = jax.lax.map(jax.checkpoint(block, prevent_cse=False), parts)
    return jnp.moveaxis(y, 0, 1).reshape(b, n * size, h, -1)[:, :t]


def _attend_block(
    q_and_places: tuple[jax.Array, Places],
    k: jax.Array,
    v: jax.Array,
    keys: Places,
    window: Any,
    scale: float,
    cap: float | None,
) -> jax.Array:
    q, queries = q_and_places
    mask = queries.see(keys, window)
    if cap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
    b, t, h, r = q.shape
    grouped = q.reshape(b, t, k.shape[2], h // k.shape[2], r)
    scores = jnp.einsum("btkgr,bskr->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], cap * jnp.tanh(scores / cap), _NEVER)
    y = jnp.einsum("bkgts,bskr->btkgr", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return y.reshape(b, t, h, r)
