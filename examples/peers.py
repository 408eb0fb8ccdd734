"""What adapters of weights are compared with: other ways to train little of a frozen encoder, as plain functions.

Bottleneck adapters, prompt tuning and prefix tuning change what goes on between the weights. So the encoder of
minilm.py is written out once more, over the same parameters, with room for what they add.

Axes: B sentences, T tokens, D hidden, H heads, P vectors of a prompt or prefix, M width of a bottleneck.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import finetune_sentiment as demo
import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
States = Callable[..., jax.Array]  # (what is trained, params, ids [B, T], mask [B, T]) -> [B, D]
Start = Callable[[jax.Array], Tree]  # key -> what is trained


@dataclass(frozen=True)
class Task(demo.Task):
    """The parameters do not say how many heads the encoder has."""

    heads: int = 12


# The encoder ---------------------------------------------------------------------------------------------------------


def encode(
    params: Tree,
    ids: jax.Array,
    mask: jax.Array,
    heads: int,
    prompt: jax.Array | None = None,
    prefixes: Tree = None,
    bottlenecks: Tree = None,
) -> jax.Array:
    """Ids [B, T] -> the mean of the tokens' states [B, D], as `minilm.Encoder` gives it.

    Args:
        mask: [B, T]; with a prompt or prefixes [B, P + T], whether each of these vectors and then each token is seen.
        prompt: [P, D], before the token embeddings.
        prefixes: by layer, two [P, D], before the keys and values.
        bottlenecks: by layer and sublayer, see `bottleneck_layer`.
    """
    x = embed(params, ids)
    if prompt is not None:
        x = jnp.concatenate([jnp.broadcast_to(prompt[None], (len(ids), *prompt.shape)), x], 1)
    x = norm(params["norm"], x)
    for name in layers(params):
        x = block(params[name], x, mask, heads, prefixes and prefixes[name], bottlenecks and bottlenecks[name])
    tokens = ids.shape[1]
    x, kept = x[:, -tokens:], mask[:, -tokens:, None].astype(x.dtype)
    return (x * kept).sum(1) / kept.sum(1)


def layers(params: Tree) -> list[str]:
    return [f"layer_{i}" for i in range(sum(name.startswith("layer_") for name in params))]


def embed(params: Tree, ids: jax.Array) -> jax.Array:
    position, kind = (params[name]["embedding"] for name in ("position", "token_type"))
    return params["word"]["embedding"][ids] + position[None, : ids.shape[1]] + kind[None, :1]


def block(
    p: Tree, x: jax.Array, mask: jax.Array, heads: int, prefix: Tree = None, bottleneck: Tree = None
) -> jax.Array:
    attention = p["attention"]
    q, k, v = (dense(attention[name], x) for name in ("query", "key", "value"))
    if prefix:
        k, v = (
            jnp.concatenate([jnp.broadcast_to(more[None], (len(x), *more.shape)), own], 1)
            for more, own in ((prefix["key"], k), (prefix["value"], v))
        )
    y = dense(attention["output"], attend(q, k, v, mask, heads))
    x = norm(attention["norm"], x + (bottleneck_layer(bottleneck["attention"], y) if bottleneck else y))
    y = dense(p["output"], jax.nn.gelu(dense(p["intermediate"], x), approximate=False))
    return norm(p["norm"], x + (bottleneck_layer(bottleneck["output"], y) if bottleneck else y))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, heads: int) -> jax.Array:
    """Queries [B, T, D], keys and values [B, S, D], mask [B, S] -> [B, T, D]"""
    shape = q.shape
    q, k, v = (z.reshape(*z.shape[:2], heads, -1) for z in (q, k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, -1e9))
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(shape)


def dense(p: Tree, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"][None, None]


def norm(p: Tree, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-12)
    return x * p["scale"][None, None] + p["bias"][None, None]


# What is trained: how it enters the encoder, and how it starts -------------------------------------------------------


def probe(task: Task, size: int) -> tuple[States, Start]:
    """Nothing but the head, which all methods have."""
    return lambda _, params, ids, mask: task.encode(params, ids, mask), lambda key: {}


def full(task: Task, size: int) -> tuple[States, Start]:
    """All parameters; the copy is for the step, which donates what it trains."""
    return lambda trained, _, ids, mask: task.encode(trained, ids, mask), lambda key: jax.tree.map(
        jnp.copy, task.params
    )


def bottleneck(task: Task, width: int) -> tuple[States, Start]:
    """Two dense layers after each sublayer.

    Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751; the norms, which the paper
    trains too, stay frozen here.
    """

    def states(trained: Tree, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return encode(params, ids, mask, task.heads, bottlenecks=trained)

    def one(key: jax.Array) -> Tree:
        down = jax.random.normal(key, (task.hidden, width)) / math.sqrt(task.hidden)
        return {
            "down": {"kernel": down, "bias": jnp.zeros(width)},
            "up": {"kernel": jnp.zeros((width, task.hidden)), "bias": jnp.zeros(task.hidden)},
        }

    def start(key: jax.Array) -> Tree:
        keys = iter(jax.random.split(key, 2 * len(layers(task.params))))
        return {name: {"attention": one(next(keys)), "output": one(next(keys))} for name in layers(task.params)}

    return states, start


def bottleneck_layer(p: Tree, y: jax.Array) -> jax.Array:
    """y + gelu(y @ down [D, M]) @ up [M, D], biases left out; up starts at zero."""
    return y + dense(p["up"], jax.nn.gelu(dense(p["down"], y)))


def prompt(task: Task, length: int) -> tuple[States, Start]:
    """Vectors before the token embeddings, which start as those of words of the training sentences.

    Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.
    """

    def states(trained: Tree, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return encode(params, ids, seen(mask, length), task.heads, prompt=trained["prompt"])

    def start(key: jax.Array) -> Tree:
        return {"prompt": task.params["word"]["embedding"][some_words(task, key, length)]}

    return states, start


def prefix(task: Task, length: int) -> tuple[States, Start]:
    """Keys and values in each layer, which start as those of words of the training sentences.

    Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190; without the MLP
    that the paper makes them by.
    """

    def states(trained: Tree, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return encode(params, ids, seen(mask, length), task.heads, prefixes=trained)

    def start(key: jax.Array) -> Tree:
        words = some_words(task, key, length)[None]
        x, trained = norm(task.params["norm"], embed(task.params, words)), {}
        for name in layers(task.params):
            p = task.params[name]
            trained[name] = {kind: dense(p["attention"][kind], x)[0] for kind in ("key", "value")}
            x = block(p, x, words >= 0, task.heads)
        return trained

    return states, start


def seen(mask: jax.Array, length: int) -> jax.Array:
    """[B, T] -> [B, P + T]: every sentence sees all of a prompt or prefix."""
    return jnp.concatenate([jnp.ones((len(mask), length), bool), mask], 1)


def some_words(task: Task, key: jax.Array, length: int) -> jax.Array:
    """Ids [P] drawn from the training sentences."""
    return jax.random.choice(key, np.concatenate(task.splits["train"].tokens), (length,))
