"""Texts that a decoder writes after prompts, a token at a time, with the keys and values of earlier tokens kept."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.recipes import decoder
from lora_jax.recipes.config import Config
from lora_jax.recipes.decoder import Cache
from lora_jax.transform.apply import lora_apply

MULTIPLE = 64  # prompts are padded to such a length, so that few lengths are compiled


class Sampling(NamedTuple):
    """How the next token is chosen.

    Args:
        tokens: how many are written at most.
        draws: whether they are drawn; else the likeliest is taken.
        ends: ids of the tokens that end a text.
    """

    tokens: int
    draws: bool
    ends: tuple[int, ...]


def generate(
    config: Config,
    params: Any,
    adapters: Mapping[str, Adapter],
    prompts: Sequence[Sequence[int]],
    count: int,
    temperature: float,
    top_p: float,
    key: jax.Array | None,
    ends: tuple[int, ...],
) -> list[list[int]]:
    """Return what is written after each prompt; arguments as of `Model.generate`.

    Raises:
        LoraError: no prompts, or empty ones; ids that the model does not have; settings out of range; no key where
            tokens are to be drawn.
    """
    _check(config, prompts, count, temperature, top_p, key)
    ids, mask = pad(prompts)
    how = Sampling(count, temperature > 0, ends)
    key = jax.random.key(0) if key is None else key  # of which nothing is drawn
    tokens, lengths = _run(config, how, params, dict(adapters), ids, mask, key, max(temperature, 1e-6), top_p)
    return [row[:n].tolist() for row, n in zip(np.asarray(tokens), np.asarray(lengths), strict=True)]


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return prompts padded on the left, i32 [B, T], and which tokens are theirs, bool [B, T].

    >>> ids, mask = pad([[5, 6], [7]])
    >>> ids.shape, ids[1, -2:].tolist(), mask.sum(1).tolist()
    ((2, 64), [0, 7], [2, 1])
    """
    length = -(-max(map(len, prompts)) // MULTIPLE) * MULTIPLE
    ids = np.array([[0] * (length - len(row)) + list(row) for row in prompts], np.int32)
    return ids, np.arange(length)[None] >= np.array([[length - len(row)] for row in prompts])


def _check(config: Config, prompts: Any, count: int, temperature: float, top_p: float, key: jax.Array | None) -> None:
    call = "generate(prompts, ...)"
    if not prompts or not all(len(row) for row in prompts):
        raise LoraError(f"{call}: `prompts` are lists of at least one token each, found {short(prompts)}.")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if not 0 <= low <= high < config.vocabulary:
        raise LoraError(f"{call}: tokens are from {low} to {high}, but the model has {config.vocabulary}.")
    if not 1 <= count <= (config.length or 2**30) or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise LoraError(
            f"{call}: count={count}, temperature={temperature}, top_p={top_p}, expected at least 1, a number of "
            "at least 0, and a share above 0 up to 1."
        )
    if temperature > 0 and key is None:
        raise LoraError(f"{call}: temperature={temperature} draws tokens: give key=jax.random.key(0).")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    config: Config,
    how: Sampling,
    params: Any,
    adapters: Any,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the tokens [B, count], and how many of them each text has."""
    rows, length = ids.shape
    forward = functools.partial(lora_apply(functools.partial(_forward, config)), params, adapters)
    choose = functools.partial(_choose, draws=how.draws, temperature=temperature, top_p=top_p)

    cache = Cache.empty(config, rows, length + how.tokens, params["model"]["embed_tokens"]["embedding"].dtype)
    positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    logits, cache = forward(ids, positions, mask.astype(jnp.int32), cache)
    token = choose(logits, jax.random.fold_in(key, 0))

    def more(state: Any) -> jax.Array:
        i, _, _, done, *_ = state
        return (i < how.tokens) & ~done.all()

    def step(state: Any) -> Any:
        i, token, position, done, lengths, tokens, cache = state
        done = done | jnp.isin(token, jnp.array(how.ends, jnp.int32))
        tokens = tokens.at[:, i].set(token)
        lengths = jnp.where(done, lengths, i + 1)
        logits, cache = forward(token[:, None], position[:, None], jnp.ones((rows, 1), jnp.int32), cache)
        return i + 1, choose(logits, jax.random.fold_in(key, i + 1)), position + 1, done, lengths, tokens, cache

    zeros = jnp.zeros(rows, jnp.int32)
    tokens = jnp.zeros((rows, how.tokens), jnp.int32)
    state = jnp.int32(0), token, positions[:, -1] + 1, zeros > 0, zeros, tokens, cache
    *_, lengths, tokens, _ = jax.lax.while_loop(more, step, state)
    return tokens, lengths


def _forward(
    config: Config, params: Any, ids: jax.Array, positions: jax.Array, segments: jax.Array, cache: Cache
) -> tuple[jax.Array, Any]:
    """Return the logits of the last token of each row [B, V]."""
    hidden, filled = decoder.hidden_states(config, params, ids, positions, segments, cache, remat=False)
    return decoder.logits_of(config, params, hidden[:, -1:])[:, 0], filled


def _choose(logits: jax.Array, key: jax.Array, draws: bool, temperature: Any, top_p: Any) -> jax.Array:
    """Return the next token of each row [B]."""
    if not draws:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / temperature
    order = jnp.sort(logits, axis=-1, descending=True)
    shares = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1)
    kept = (shares < top_p).sum(-1, keepdims=True)  # of those before the last one that is needed
    lowest = jnp.take_along_axis(order, jnp.minimum(kept, logits.shape[-1] - 1), axis=-1)
    return jax.random.categorical(key, jnp.where(logits < lowest, -jnp.inf, logits)).astype(jnp.int32)
