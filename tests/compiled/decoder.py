"""A decoder of Llama's shape, with layers stacked for one scan, each recomputed in the backward pass; shapes alone.

Axes: L layers, B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

LINEARS = "layers/(q|k|v|o|gate|up|down)"


@dataclass(frozen=True)
class Size:
    layers: int = 2
    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 4096  # a scan over two layers says what one over 32 does, and so does a small head


def shapes(c: Size) -> dict[str, Any]:
    """The parameters, in bf16."""
    keys = c.kv_heads * (c.width // c.heads)
    each = {
        "q": (c.width, c.width),
        "k": (c.width, keys),
        "v": (c.width, keys),
        "o": (c.width, c.width),
        "gate": (c.width, c.inner),
        "up": (c.width, c.inner),
        "down": (c.inner, c.width),
        "norm1": (c.width,),
        "norm2": (c.width,),
    }
    layers = {name: jax.ShapeDtypeStruct((c.layers, *shape), jnp.bfloat16) for name, shape in each.items()}
    table = jax.ShapeDtypeStruct((c.vocabulary, c.width), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((c.width, c.vocabulary), jnp.bfloat16)
    return {"embed": table, "head": head, "norm": jax.ShapeDtypeStruct((c.width,), jnp.bfloat16), "layers": layers}


def specs(mesh: Any) -> dict[str, Any]:
    """Where the parameters are: split over "fsdp", and over "tensor" as Megatron does, where the mesh has these."""
    fsdp, tensor = (name if name in mesh.shape else None for name in ("fsdp", "tensor"))
    column, row = P(None, fsdp, tensor), P(None, tensor, fsdp)
    layers = {name: row if name in ("o", "down") else column for name in ("q", "k", "v", "o", "gate", "up", "down")}
    layers |= {"norm1": P(), "norm2": P()}
    return {"embed": P(tensor, fsdp), "head": P(fsdp, tensor), "norm": P(), "layers": layers}


def batch_axes(mesh: Any) -> tuple[str, ...]:
    return tuple(name for name in ("data", "fsdp") if name in mesh.shape)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype) * scale[None, None]


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


Linear = Callable[[str, jax.Array, Any], jax.Array]


def plain(name: str, x: jax.Array, w: Any) -> jax.Array:
    return x @ w


def make(
    c: Size,
    mesh: Any = None,
    attention: Callable[..., jax.Array] = plain_attention,
    linear: Linear = plain,
    remat: bool = True,
) -> Callable[[Any, jax.Array], jax.Array]:
    """`model(params, ids [B, T]) -> logits [B, T, V]`; of floats [B, T, D] in the place of ids, without the lookup."""
    rows = None if mesh is None else NamedSharding(mesh, P(batch_axes(mesh)))

    def kept(x: jax.Array) -> jax.Array:
        return x if rows is None else jax.lax.with_sharding_constraint(x, rows)

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        rows_, tokens, width = x.shape
        h = norm(x, p["norm1"])
        size = width // c.heads
        q = linear("q", h, p["q"]).reshape(rows_, tokens, c.heads, size)
        k = linear("k", h, p["k"]).reshape(rows_, tokens, c.kv_heads, size)
        v = linear("v", h, p["v"]).reshape(rows_, tokens, c.kv_heads, size)
        x = x + linear("o", attention(q, k, v).reshape(x.shape), p["o"])
        h = norm(x, p["norm2"])
        inner = jax.nn.silu(linear("gate", h, p["gate"])) * linear("up", h, p["up"])
        return kept(x + linear("down", inner, p["down"])), None

    def model(params: Any, ids: jax.Array) -> jax.Array:
        x = kept(ids if jnp.issubdtype(ids.dtype, jnp.floating) else params["embed"][ids])
        body = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable) if remat else layer
        x, _ = jax.lax.scan(body, x, params["layers"])
        return norm(x, params["norm"]) @ params["head"]

    return model


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    there = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - there)
