"""The models that PEFT's files in data/peft are for, as functions of `{path: array}`: they have to give its outputs.

Kernels are [in, out]; paths are those of `lora_jax.key_maps`. Parameters are made from torch's tensors here by name and
transposition alone, so that key maps are compared with something that knows nothing of them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np


def from_torch(tensors, conv1d=False):
    """`{path: array}` from torch's weights: linear ones transposed, convolutions with their channels last."""
    params = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        path = module.replace(".", "/")
        if re.search(r"(^|[._])(emb|embed_tokens|wte|wpe)\.weight$", name):
            params[f"{path}/embedding"] = tensor
        elif leaf == "weight" and tensor.ndim == 1:
            params[f"{path}/scale"] = tensor
        elif leaf == "weight" and tensor.ndim == 2:
            params[f"{path}/kernel"] = tensor if conv1d and name != "lm_head.weight" else tensor.T
        elif leaf == "weight":
            params[f"{path}/kernel"] = tensor.transpose(*range(2, tensor.ndim), 1, 0)
        elif leaf == "bias":
            params[f"{path}/bias"] = tensor
        else:  # experts [E, out, in]
            params[f"{path}/{leaf}/kernel"] = tensor.transpose(0, 2, 1)
    return {path: jnp.asarray(array) for path, array in params.items()}


def broadcasting(fn):
    """For code that is written as torch's: the tests forbid arrays of different ranks to meet unasked."""

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"):
            return fn(*args, **kwargs)

    return wrapped


@broadcasting
def mlp(p, ids):
    x = p["emb/embedding"][ids]
    x = jax.nn.relu(x @ p["lin0/kernel"] + p["lin0/bias"])
    return x @ p["lin1/kernel"] @ p["head/kernel"] + p["head/bias"]


def rms_norm(x, scale, eps=1e-6):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, bias, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


def rotate(x):
    """[B, T, heads, d], each half of the features with the other one, by position."""
    d, t = x.shape[-1] // 2, jnp.arange(x.shape[1])
    angles = t[:, None] / 10000 ** (jnp.arange(d) / d)[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = x[..., :d], x[..., d:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q, k, v):
    """[B, T, heads, d], fewer heads for k and v -> [B, T, heads * d]."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v).reshape(*q.shape[:2], -1)


@broadcasting
def llama(p, ids, head=4, eps=1e-6):
    x = p["model/embed_tokens/embedding"][ids]
    layers = 1 + max(int(path.split("/")[2]) for path in p if path.startswith("model/layers/"))
    for i in range(layers):
        at = f"model/layers/{i}/"
        h = rms_norm(x, p[at + "input_layernorm/scale"], eps)
        q, k, v = (h @ p[f"{at}self_attn/{n}_proj/kernel"] for n in "qkv")
        q, k, v = (a.reshape(*a.shape[:2], -1, head) for a in (q, k, v))
        if at + "self_attn/q_norm/scale" in p:
            q, k = (rms_norm(a, p[f"{at}self_attn/{n}_norm/scale"], eps) for n, a in (("q", q), ("k", k)))
        x = x + attend(rotate(q), rotate(k), v) @ p[at + "self_attn/o_proj/kernel"]
        h = rms_norm(x, p[at + "post_attention_layernorm/scale"], eps)
        x = x + (experts if at + "mlp/gate/kernel" in p else gated)(p, at + "mlp/", h)
    return rms_norm(x, p["model/norm/scale"], eps) @ p["lm_head/kernel"]


def gated(p, at, h):
    gate, up = (h @ p[f"{at}{name}_proj/kernel"] for name in ("gate", "up"))
    return (jax.nn.silu(gate) * up) @ p[at + "down_proj/kernel"]


def experts(p, at, h, top=2):
    """All experts for all tokens, and of each token the sum over its best two, by their shares among all."""
    share = jax.nn.softmax(h @ p[at + "gate/kernel"])
    best, which = jax.lax.top_k(share, top)
    weights = (jax.nn.one_hot(which, share.shape[-1]) * best[..., None]).sum(-2)
    h = jnp.broadcast_to(h, (share.shape[-1], *h.shape))
    gate, up = jnp.split(jnp.einsum("ebtd,edk->ebtk", h, p[at + "experts/gate_up_proj/kernel"]), 2, axis=-1)
    y = jnp.einsum("ebtk,ekd->ebtd", jax.nn.silu(gate) * up, p[at + "experts/down_proj/kernel"])
    return jnp.einsum("ebtd,bte->btd", y, weights)


@broadcasting
def gpt2(p, ids, heads=2):
    x = p["transformer/wte/embedding"][ids] + p["transformer/wpe/embedding"][jnp.arange(ids.shape[1])]

    def dense(h, path):
        return h @ p[f"{path}/kernel"] + p[f"{path}/bias"]

    def norm(h, path):
        return layer_norm(h, p[f"{path}/scale"], p[f"{path}/bias"])

    for i in range(1 + max(int(path.split("/")[2]) for path in p if path.startswith("transformer/h/"))):
        at = f"transformer/h/{i}/"
        q, k, v = jnp.split(dense(norm(x, at + "ln_1"), at + "attn/c_attn"), 3, axis=-1)
        x = x + dense(attend(*(a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))), at + "attn/c_proj")
        h = jax.nn.gelu(dense(norm(x, at + "ln_2"), at + "mlp/c_fc"), approximate=True)
        x = x + dense(h, at + "mlp/c_proj")
    return norm(x, "transformer/ln_f") @ p["lm_head/kernel"]
