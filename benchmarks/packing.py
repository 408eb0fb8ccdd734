"""Packing by lora.recipes and by grain: how full the rows are, and the time of an epoch and of going to its middle.

python benchmarks/packing.py
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import grain
import numpy as np
import tyro

from lora_jax.core.text import format_table
from lora_jax.recipes.packed_rows import pack, packed_batches
from lora_jax.recipes.tokens import Tokenized


@dataclass(frozen=True)
class Config:
    """Compare ways to pack examples into rows."""

    examples: int = 20_000
    length: int = 2048  # of a row
    rows: int = 8  # of a batch
    sigma: float = 0.9  # of the logarithm of lengths, whose median is an eighth of a row
    million: bool = False  # also time the packing of a million lengths


def make_tokens(config: Config) -> Tokenized:
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(config.length / 8), config.sigma, config.examples).astype(int)
    starts = np.concatenate([[0], np.cumsum(np.clip(lengths, 1, config.length) + 1)])
    ids = random.integers(0, 32_000, starts[-1]).astype(np.int32)
    return Tokenized(ids, np.ones(len(ids), bool), starts)


def grains(tokens: Tokenized, config: Config, how: Any, bins: int) -> Any:
    """Return grain's dataset of rows, read in this process."""

    def read(n: int) -> dict[str, np.ndarray]:
        part = slice(tokens.starts[n], tokens.starts[n + 1])
        ids, learned = tokens.ids[part], tokens.learned[part]
        return {"ids": ids[:-1], "targets": ids[1:], "weights": learned[1:].astype(np.float32)}

    examples = grain.MapDataset.range(len(tokens)).shuffle(seed=0).map(read)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    struct = dict.fromkeys(("ids", "targets", "weights"), config.length)
    return how(examples.to_iter_dataset(options), length_struct=struct, num_packing_bins=bins, shuffle_bins=False)


def measure(make: Callable[[], Iterator[Any]]) -> tuple[float, float, int]:
    """Return the seconds of an epoch, those to go to its middle, and the number of what it gives."""
    start = time.perf_counter()
    states = []
    iterator: Any = make()
    for _ in iterator:
        states.append(iterator.get_state())
    epoch = time.perf_counter() - start
    start = time.perf_counter()
    again: Any = make()
    again.set_state(states[len(states) // 2])
    next(again)
    return epoch, time.perf_counter() - start, len(states)


def main(config: Config) -> None:
    tokens = make_tokens(config)
    total = int(tokens.lengths.sum())
    print(f"{len(tokens):,} examples, {total:,} tokens, rows of {config.length:,}.")
    rows = len(pack(tokens.lengths, config.length, seed=0))
    epoch, middle, count = measure(lambda: packed_batches(tokens, config.rows, config.length, seed=0))
    table: list[tuple[str, int, float, float, float]] = [
        ("packed_batches", rows, total / rows / config.length, epoch, middle)
    ]
    print(f"{1e3 * epoch / count:.2f} ms a batch of {config.rows} rows.")
    for name, how in (("first", "FirstFitPackIterDataset"), ("best", "BestFitPackIterDataset")):
        for bins in (8, 64, 256):
            data = grains(tokens, config, getattr(grain.experimental, how), bins)
            epoch, middle, rows = measure(data.__iter__)
            called = f"grain, {name} fit, {bins} rows at a time"
            table.append((called, rows, total / rows / config.length, epoch, middle))
    shown = [
        [called, f"{rows:,}", f"{full:.1%}", f"{epoch:.1f} s", f"{total / epoch / 1e6:.1f} M", f"{middle:.2f} s"]
        for called, rows, full, epoch, middle in table
    ]
    print(format_table(["", "rows", "filled", "epoch", "tokens a second", "to the middle"], shown, right=5))
    if config.million:
        lengths = np.random.default_rng(0).choice(tokens.lengths, 1_000_000)
        start = time.perf_counter()
        pack(lengths, config.length, seed=0)
        print(f"A million examples are packed in {time.perf_counter() - start:.1f} s.")


if __name__ == "__main__":
    main(tyro.cli(Config))
