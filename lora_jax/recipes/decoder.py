"""A decoder of published models, as one function of its parameters: layers are stacked and run by one scan.

    parameters    model/embed_tokens/embedding              [V, D]
                  model/layers/self_attn/q_proj/kernel      [L, D, H, R], and so on: `shapes` has all of them
                  model/norm/scale                          [D]
                  lm_head/kernel                            [D, V], unless the embedding is the head

They are named as the tensors of transformers are, with the layers along the first axis.

Axes: B rows, T tokens, S tokens to attend to, V vocabulary, D hidden, H heads, K heads of keys and values, R of a head,
F of the MLP, E experts, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lora_jax.recipes.attention import EVERYTHING, Places, attend
from lora_jax.recipes.config import Config
from lora_jax.recipes.experts import mixture
from lora_jax.training.policies import thin

Params = Any
Remat = bool | Callable[..., Any]  # whether a layer is computed again in the backward pass, or what is kept of it


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in the first `filled` of S slots, and where each of these tokens is."""

    keys: jax.Array  # [L, B, S, K, R]
    values: jax.Array  # [L, B, S, K, R]
    places: Places  # of segment -1 where a slot is empty
    filled: jax.Array  # i32

    @classmethod
    def empty(cls, config: Config, rows: int, slots: int, dtype: Any) -> "Cache":
        zeros = jnp.zeros((config.layers, rows, slots, config.kv_heads, config.head_dim), dtype)
        nowhere = jnp.full((rows, slots), -1, jnp.int32)
        return cls(zeros, zeros, Places(nowhere, nowhere), jnp.zeros((), jnp.int32))


def hidden_states(
    config: Config,
    params: Params,
    ids: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
    remat: Remat = True,
) -> tuple[jax.Array, Cache | None]:
    """Return the states after the last norm, and the cache with these tokens added.

    A token sees those of its own segment, in the row and in the cache, whose position is not after its own.

    Args:
        config: what the decoder computes.
        params: its parameters.
        ids: tokens, i32 [B, T].
        positions: i32 [B, T], from 0 for each text; by default the place in the row.
        segments: i32 [B, T], a number for each text of a row; by default one text.
        cache: of the tokens before these.
        remat: True: compute each layer again in the backward pass, and keep its input and the thin products of its
            adapters (`lora.policies.thin`). False: keep what JAX keeps. Or a policy of `jax.checkpoint`; the input of a
            layer is called "layer_input".

    Returns:
        [B, T, D] in the dtype of the embedding, and the cache.
    """
    places = Places.of(ids, positions, segments)
    body = params["model"]
    x = body["embed_tokens"]["embedding"][ids]
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    rotations = _rotations(config, places.positions)

    def layer(x: jax.Array, own: Any) -> tuple[jax.Array, Any]:
        p, window, rope, seen = own
        x = checkpoint_name(x, "layer_input")
        rotation = rotations[0] if len(config.ropes) == 1 else jax.lax.dynamic_index_in_dim(rotations, rope, 0, False)
        y, seen = attention(p["self_attn"], norm(config, p["input_layernorm"], x), rotation, window, seen)
        if config.norms_after:
            x = x + norm(config, p["post_attention_layernorm"], y)
            y = _mlp(config, p["mlp"], norm(config, p["pre_feedforward_layernorm"], x))
            return x + norm(config, p["post_feedforward_layernorm"], y), seen
        x = x + y
        return x + _mlp(config, p["mlp"], norm(config, p["post_attention_layernorm"], x)), seen

    def attention(p: Params, x: jax.Array, rotation: jax.Array, window: Any, seen: Any) -> tuple[jax.Array, Any]:
        q, k, v = (dense(p[name], x, "btd,dhr->bthr") for name in ("q_proj", "k_proj", "v_proj"))
        if config.qk_norm:
            q, k = norm(config, p["q_norm"], q), norm(config, p["k_norm"], k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = seen = tuple(_write(old, new, cache.filled) for old, new in zip(seen, (k, v), strict=True))
        y = attend(q, k, v, places, there, window, config.query_scale, config.attention_cap)
        return dense(p["o_proj"], y, "bthr,hrd->btd"), seen

    there = places
    seen: Any = None
    if cache is not None:
        there = Places(*(_write(old, new, cache.filled) for old, new in zip(cache.places, places, strict=True)))
        seen = cache.keys, cache.values
    windows = np.array([EVERYTHING if window is None else window for window in config.windows], np.int32)
    step = (
        layer if remat is False else jax.checkpoint(layer, policy=thin if remat is True else remat, prevent_cse=False)
    )
    x, seen = jax.lax.scan(step, x, (body["layers"], windows, np.array(config.rope_of, np.int32), seen))
    if cache is not None:
        keys, values = seen
        cache = Cache(keys, values, there, cache.filled + ids.shape[1])
    return norm(config, body["norm"], x), cache


def head(config: Config, params: Params) -> jax.Array:
    """Return the matrix of the head [D, V]: the embedding transposed, where that is the head as well."""
    if config.tied:
        return params["model"]["embed_tokens"]["embedding"].T
    return params["lm_head"]["kernel"]


def logits_of(config: Config, params: Params, hidden: jax.Array) -> jax.Array:
    """Return the logits of the states after the last norm [B, T, D], in fp32 [B, T, V]."""
    w = head(config, params).astype(hidden.dtype)
    logits = jnp.einsum("btd,dv->btv", hidden, w, preferred_element_type=jnp.float32)
    return logits if config.logit_cap is None else config.logit_cap * jnp.tanh(logits / config.logit_cap)


# Parts of a layer -----------------------------------------------------------------------------------------------------


def norm(config: Config, p: Params, x: jax.Array) -> jax.Array:
    """Normalize [..., D] by its root mean square, in fp32. Zhang and Sennrich 2019, arXiv 1910.07467."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.epsilon)
    scale = p["scale"].astype(jnp.float32) + config.norm_offset
    return (y * jnp.expand_dims(scale, range(y.ndim - 1))).astype(x.dtype)


def dense(p: Params, x: jax.Array, axes: str) -> jax.Array:
    """Multiply by a kernel, along the axes that an einsum names, and add the bias if there is one."""
    y = jnp.einsum(axes, x, p["kernel"].astype(x.dtype))
    return y + p["bias"].astype(y.dtype)[None, None] if "bias" in p else y


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Turn the pairs of entries i and i + R / 2 of each head [B, T, H, R] by the angles of its position."""
    (a, b), (cos, sin) = jnp.split(x.astype(jnp.float32), 2, axis=-1), rotation
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _rotations(config: Config, positions: jax.Array) -> jax.Array:
    """Return cosines and sines for each kind of positions, fp32 [kinds, 2, B, T, 1, R / 2]."""
    found = []
    for rope in config.ropes:
        rates = rope.rates(config.head_dim).astype(np.float32)
        angles = positions[:, :, None, None].astype(jnp.float32) * rates[None, None, None]
        found.append(jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.amplitude)
    return jnp.stack(found)


def _mlp(config: Config, p: Params, x: jax.Array) -> jax.Array:
    act = _ACTIVATIONS[config.activation]
    if config.experts:
        scores = dense(p["gate"], x, "btd,de->bte")
        return mixture(p["experts"], x, scores, act, config.experts_per_token, config.norm_topk)
    gate, up = (dense(p[name], x, "btd,df->btf") for name in ("gate_proj", "up_proj"))
    return dense(p["down_proj"], act(gate) * up, "btf,fd->btd")


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def _write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Return [B, S, ...] with the tokens [B, T, ...] from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


# Shapes ---------------------------------------------------------------------------------------------------------------


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by its path.

    >>> from lora_jax.recipes.config import parse_config
    >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> shapes(parse_config({"model_type": "llama", "vocab_size": 100, **sizes}))["model/layers/mlp/up_proj/kernel"]
    (2, 64, 128)
    """
    c = config
    d, f, heads, r = c.hidden, c.intermediate, c.heads, c.head_dim
    kernels: dict[str, tuple[int, ...]] = {
        "self_attn/q_proj": (d, heads, r),
        "self_attn/k_proj": (d, c.kv_heads, r),
        "self_attn/v_proj": (d, c.kv_heads, r),
        "self_attn/o_proj": (heads, r, d),
    }
    if c.experts:
        kernels |= {"mlp/gate": (d, c.experts)}
        kernels |= {"mlp/experts/gate_up_proj": (c.experts, d, 2 * f), "mlp/experts/down_proj": (c.experts, f, d)}
    else:
        kernels |= {"mlp/gate_proj": (d, f), "mlp/up_proj": (d, f), "mlp/down_proj": (f, d)}
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if c.norms_after:
        norms |= {"pre_feedforward_layernorm": d, "post_feedforward_layernorm": d}
    if c.qk_norm:
        norms |= {"self_attn/q_norm": r, "self_attn/k_norm": r}
    layers = {f"{name}/kernel": shape for name, shape in kernels.items()}
    for name, shape in kernels.items():
        if name.rpartition("/")[2] in c.biases:
            layers[f"{name}/bias"] = shape[2:] if name.endswith("o_proj") else shape[1:]
    layers |= {f"{name}/scale": (n,) for name, n in norms.items()}
    found: dict[str, tuple[int, ...]] = {"model/embed_tokens/embedding": (c.vocabulary, d), "model/norm/scale": (d,)}
    found |= {f"model/layers/{name}": (c.layers, *shape) for name, shape in layers.items()}
    return found if c.tied else found | {"lm_head/kernel": (d, c.vocabulary)}


def count_of(config: Config) -> int:
    """Return the number of parameters."""
    return sum(map(math.prod, shapes(config).values()))
