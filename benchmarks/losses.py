"""What a loss without logits costs beside the plain one: time of a step, temporary memory, operations.

Each program is the loss and its gradient by the hidden states, of a frozen head; values and gradients are compared
before any of them is timed. Memory and operations are also counted at 8,192 tokens and 128,256 words, where the plain
loss is compiled and not run.

    python benchmarks/losses.py

Axes: T tokens, D width, V vocabulary.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax.core.text import format_table

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (hidden [T, D], head [D, V], labels [T]) -> scalar


@dataclass(frozen=True)
class Config:
    """Time losses over a vocabulary."""

    rounds: int = 7  # how often each program is run, in turn with the others
    tokens: int = 2048
    width: int = 512
    vocabulary: int = 16_000
    blocks: tuple[int, ...] = (128, 256, 512)  # rows at a time


def plain(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
    logits = (hidden @ head).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def compiled(loss: Loss, tokens: int, width: int, vocabulary: int) -> jax.stages.Compiled:
    shapes = ((tokens, width), jnp.float32), ((width, vocabulary), jnp.float32), ((tokens,), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


def temporary(program: jax.stages.Compiled) -> int:
    found: Any = program.memory_analysis()
    return int(found.temp_size_in_bytes)


def main(c: Config) -> None:
    losses: dict[str, Loss] = {"plain": plain}
    for rows in c.blocks:
        ours = functools.partial(lora.losses.linear_cross_entropy, ignore=None, chunk_rows=rows)
        losses[f"{rows} rows at a time"] = ours
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (c.tokens, c.width))
    head = jax.random.normal(keys[1], (c.width, c.vocabulary)) / c.width**0.5
    labels = jax.random.randint(keys[2], (c.tokens,), 0, c.vocabulary)
    programs = {name: compiled(loss, c.tokens, c.width, c.vocabulary) for name, loss in losses.items()}
    expected = programs["plain"](hidden, head, labels)
    for program in programs.values():
        for found, wanted in zip(program(hidden, head, labels), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(c.rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(hidden, head, labels))
            seconds[name].append(time.perf_counter() - start)
    large = {name: temporary(compiled(loss, 8192, 4096, 128_256)) for name, loss in losses.items()}
    header = ["loss", "time", "over plain", "temporary MB", "at 8,192 x 128k MB", "over plain"]
    table = []
    for name, program in programs.items():
        ratio = float(np.median(np.array(seconds[name]) / np.array(seconds["plain"])))
        small = temporary(program)
        table.append(
            [
                name,
                f"{min(seconds[name]):.2f} s",
                f"{ratio:.2f}",
                f"{small / 1e6:.0f}",
                f"{large[name] / 1e6:,.0f}",
                f"{large[name] / large['plain']:.3f}",
            ]
        )
    print(format_table(header, table, right=5))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
