"""A mixture of experts: each token goes to the few experts that its router scores highest.

Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv 1701.06538. Tokens are sorted by their experts, and all
of an expert's tokens are multiplied by it together (ragged products): no capacity, and no token is dropped.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def mixture(
    p: Any, x: jax.Array, scores: jax.Array, act: Callable[[jax.Array], jax.Array], top: int, normalized: bool
) -> jax.Array:
    """Return the weighted sum of the experts of each token [B, T, D].

    Args:
        p: `gate_up_proj/kernel` [E, D, 2 F] and `down_proj/kernel` [E, F, D].
        x: [B, T, D].
        scores: of the router [B, T, E], before the softmax.
        act: the activation of the gates.
        top: how many experts each token goes to.
        normalized: whether their weights are scaled to a sum of 1.
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32), axis=-1), top)
    if normalized:
        weights = weights / weights.sum(-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1))  # one entry for each token and expert, sorted by the expert
    token, experts = order // top, scores.shape[-1]
    counts = jnp.bincount(chosen.reshape(-1), length=experts).astype(jnp.int32)
    rows = x.reshape(-1, x.shape[-1])
    gate_up = jax.lax.ragged_dot(rows[token], p["gate_up_proj"]["kernel"].astype(x.dtype), counts)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    y = jax.lax.ragged_dot(act(gate) * up, p["down_proj"]["kernel"].astype(x.dtype), counts)
    y = y * weights.reshape(-1)[order][:, None].astype(y.dtype)
    return jnp.zeros_like(rows).at[token].add(y).reshape(x.shape)
