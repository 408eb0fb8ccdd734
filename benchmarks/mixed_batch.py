"""What a mixed batch costs: each example with its own adapter of a bank, over the base and over one adapter for all.

The decoder of benchmarks/train_step.py, adapters on all six linear layers of each block. Times are those of the
processors, all cores together, so that what else the machine does counts little; ratios are of programs that run in
turn in one process.

    python benchmarks/mixed_batch.py                   # decoding and training
    python benchmarks/mixed_batch.py --only decode --rounds 20

Axes: B sequences, T tokens, S tokens in the cache, D width, H heads, R of a head, L layers.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import train_step as base
import tyro

import lora_jax as lora
from lora_jax.core.slots import way_of
from lora_jax.core.text import format_table


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time mixed batches."""

    rounds: int = 10  # how often each program is run, in turn with the others
    only: str = ""  # "decode" or "train"
    slots: int = 64
    cached: int = 128  # tokens in the cache, of each sequence


def bank_of(config: base.Config, params: Any, slots: int, rank: int) -> dict[str, Any]:
    """Adapters that differ, as `slots` trainings leave them."""
    x = jnp.zeros((1, 2, config.width))
    plan = lora.plan(lambda p, x: base.decode(config, p, x), params, x, rules={base.RULE: lora.Lora(rank)})
    one = lora.init(jax.random.key(1), params, plan)
    draws = np.random.default_rng(0)

    def stacked(leaf: Any, moves: bool) -> jax.Array:
        noise = draws.standard_normal((slots, *leaf.shape), np.float32) * (0.02 if moves else 0)
        return jnp.asarray(np.asarray(leaf) + noise)

    return jax.tree.map(stacked, one, lora.trainable_mask(one))


def next_token(c: base.Config, params: Any, x: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Embedded tokens [B, 1, D] and a cache [L, B, S, H, R] of each -> logits [B, 1, V]"""
    for i in range(c.layers):
        p = params[f"layer_{i}"]
        h = base.rms_norm(x, p["norm_1"])
        q, k, v = ((h @ p[name]).reshape(*h.shape[:2], c.heads, -1) for name in "qkv")
        k, v = jnp.concatenate([keys[i], k], axis=1), jnp.concatenate([values[i], v], axis=1)
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(c.width // c.heads))
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ p["o"]
        x = x + jax.nn.gelu(base.rms_norm(x, p["norm_2"]) @ p["up"]) @ p["down"]
    return base.rms_norm(x, params["norm"]) @ params["head"]


def ratios(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Time programs in turn: the median, over rounds, of each one's time over the first one's; and its best in ms.

    Not the time that goes by but what the cores of this process take.
    """
    for run in programs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            times[name].append(time.process_time() - start)
    first = np.array(next(iter(times.values())))
    return {name: (float(np.median(np.array(t) / first)), min(t) * 1e3) for name, t in times.items()}


def decoding(settings: Settings, params: Any, c: base.Config, rank: int, batch: int) -> list[Any]:
    """One token of each of a batch of sequences, whose adapters are spread over all slots."""
    bank, draws = bank_of(c, params, settings.slots, rank), np.random.default_rng(0)
    x = jnp.asarray(draws.standard_normal((batch, 1, c.width), np.float32))
    shape = (c.layers, batch, settings.cached, c.heads, c.width // c.heads)
    cache = [jnp.asarray(draws.standard_normal(shape, np.float32)) for _ in "kv"]
    ids = jnp.asarray(draws.permutation(np.arange(batch) % settings.slots))
    fn = functools.partial(next_token, c)
    apply = lora.lora_apply(fn)
    plain = jax.jit(fn)
    single = jax.jit(apply)
    # B is scaled when a bank is loaded, as lora.AdapterBank does it
    loaded = {path: dataclasses.replace(adapter, ratio=None) for path, adapter in bank.items()}
    mixed = jax.jit(lambda p, bank, ids, *a: apply(p, lora.select(bank, ids, in_axes=(0, 1, 1)), *a))
    one = jax.tree.map(lambda leaf: leaf[0], bank)
    expected = np.asarray(single(params, one, x, *cache))
    np.testing.assert_allclose(np.asarray(mixed(params, loaded, ids * 0, x, *cache)), expected, rtol=1e-3, atol=1e-3)
    found = ratios(
        {
            "base": lambda: plain(params, x, *cache),
            "one adapter": lambda: single(params, one, x, *cache),
            "mixed": lambda: mixed(params, loaded, ids, x, *cache),
        },
        settings.rounds,
    )
    way = way_of(batch, 1, settings.slots, rank)
    return [
        [f"decode, {batch} sequences, rank {rank}", name, way if name == "mixed" else "", f"{ratio:.2f}", f"{ms:.1f}"]
        for name, (ratio, ms) in found.items()
    ]


def training(settings: Settings, params: Any, c: base.Config, batch: int, tokens: int) -> list[Any]:
    """A training step of `batch` sequences with one adapter for all, and with eight tasks mixed."""
    bank, draws = bank_of(c, params, 8, c.rank), np.random.default_rng(0)
    x = jnp.asarray(draws.standard_normal((batch, tokens, c.width), np.float32))
    labels = jnp.asarray(draws.integers(0, c.vocabulary, (batch, tokens)))
    ids = jnp.asarray(draws.permutation(np.arange(batch) % 8))
    apply = lora.lora_apply(functools.partial(base.decode, c))
    single = jax.jit(jax.value_and_grad(lambda a, p, x: base.cross_entropy(apply(p, a, x), labels)))
    mixed = jax.jit(
        jax.value_and_grad(lambda b, p, x, ids: base.cross_entropy(apply(p, lora.select(b, ids), x), labels))
    )
    one = jax.tree.map(lambda leaf: leaf[0], bank)
    found = ratios(
        {"one adapter": lambda: single(one, params, x), "8 tasks": lambda: mixed(bank, params, x, ids)},
        settings.rounds,
    )
    way = way_of(batch, tokens, 8, c.rank)
    return [
        [f"train, {batch} x {tokens} tokens", name, way if name == "8 tasks" else "", f"{ratio:.2f}", f"{ms:.1f}"]
        for name, (ratio, ms) in found.items()
    ]


def main(settings: Settings = Settings()) -> None:
    c = base.Config()
    params = base.init_params(c, jax.random.key(0))
    cases: list[Callable[[], list[Any]]] = []
    if settings.only in ("", "decode"):
        pairs = ((8, 64), (16, 64), (8, 256), (16, 256))
        cases += [functools.partial(decoding, settings, params, c, rank, batch) for rank, batch in pairs]
    if settings.only in ("", "train"):
        shapes = ((8, 128), (1024, 1))
        cases += [functools.partial(training, settings, params, c, batch, tokens) for batch, tokens in shapes]
    for case in cases:
        print(format_table(("what", "program", "way", "over the first", "best, ms"), case()), end="\n\n", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
