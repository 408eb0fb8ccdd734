"""`lora.recipes.finetune` beside the same loop by hand, in turn in one process: what it costs, and what waits.

    python benchmarks/recipe_step.py            # a decoder of 30 million parameters, minutes on two cores
    python benchmarks/recipe_step.py --tiny     # of 0.3 million, whose steps are so short that the loop itself shows

By hand it is `packed_batches`, `lora.jit_step` and nothing else: no metrics are read, no log is written. `finetune` is
asked to evaluate after each block of steps, and is kept in that evaluation while the loop by hand takes a block of its
own. The first step of each block is left out of both, as a checkpoint is written then. "given in time" is the share of
steps that were given to the device while it was still busy with the one before.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import lora_jax as lora
from lora_jax.core.text import format_table
from lora_jax.recipes import training_run
from lora_jax.recipes.meter import Meter
from lora_jax.recipes.options import Options, make_optimizer, rules
from lora_jax.recipes.tokens import Tokenized


@dataclass(frozen=True)
class Config:
    """Time the training run of lora.recipes against a loop by hand."""

    rounds: int = 5  # blocks of each
    steps: int = 8  # of a block, the first of which is not counted
    tiny: bool = False  # a small model
    layers: int = 8
    width: int = 512
    vocabulary: int = 4096
    rows: int = 2
    length: int = 256
    rank: int = 16


def sized(config: Config) -> Config:
    if not config.tiny:
        return config
    return Config(config.rounds, 40, True, layers=2, width=64, vocabulary=1024, rows=2, length=64, rank=4)


def make_model(config: Config, folder: Path) -> lora.recipes.Model:
    """Return a model of random numbers, of a folder that has no more than config.json."""
    facts = {
        **{"model_type": "llama", "vocab_size": config.vocabulary, "hidden_size": config.width},
        **{"intermediate_size": 4 * config.width, "num_hidden_layers": config.layers, "num_attention_heads": 8},
        **{"num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": True},
    }
    (folder / "config.json").write_text(json.dumps(facts))
    model = lora.recipes.abstract(folder, jnp.float32)
    random = np.random.default_rng(0)
    return model.replace(
        params=jax.tree.map(lambda leaf: jnp.asarray(0.02 * random.normal(size=leaf.shape), leaf.dtype), model.params)
    )


def make_tokens(config: Config, count: int, seed: int) -> Tokenized:
    random = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(random.integers(8, config.length // 2, count))])
    ids = random.integers(0, config.vocabulary, starts[-1]).astype(np.int32)
    return Tokenized(ids, np.ones(len(ids), bool), starts)


class Watched(Meter):
    """Notes whether the step before is still under way when the next one was given."""

    given: ClassVar[list[bool]] = []

    def took(self, n: int, metrics: dict[str, Any], batch: Any) -> None:
        if self._waiting is not None:
            self.given.append(not self._waiting[1]["loss"].is_ready())
        super().took(n, metrics, batch)


def clocks() -> np.ndarray:
    """The time, and that of all cores that this process had, which other programs change less; in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


class ByHand:
    """The loop that one would write: a model, batches, a step."""

    def __init__(self, config: Config, model: lora.recipes.Model, tokens: Tokenized, options: Options) -> None:
        plan = model.plan(rules(options, model))
        optimizer = make_optimizer(options, options.max_steps)
        self.state = lora.TrainState.create(lora.init(jax.random.key(0), model.params, plan), optimizer)
        self.step = lora.jit_step(lora.recipes.answer_loss(model), optimizer)
        self.batches = lora.recipes.packed_batches(tokens, config.rows, config.length, seed=0, epochs=options.epochs)
        self.params, self.count = model.params, config.steps
        self.seconds: list[np.ndarray] = []
        self.waits: list[float] = []

    def block(self, counted: bool = True) -> None:
        """Take a block of steps; of those after the first, each is given while the one before is under way."""
        begun, first = clocks(), None
        for i in range(self.count):
            start = time.perf_counter()
            batch = jax.device_put(next(self.batches))
            self.waits.append(time.perf_counter() - start)
            self.state, metrics = self.step(self.state, self.params, batch)
            if i == 0:
                first = metrics["loss"]
            if i == 1:
                jax.block_until_ready(first)
                begun = clocks()
        jax.block_until_ready(self.state)
        if counted:
            self.seconds.append((clocks() - begun) / (self.count - 1))


class InTurn(training_run.Reporter):
    """Lets the loop by hand take a block whenever `finetune` has taken one, and nothing is under way."""

    def __init__(self, by_hand: ByHand) -> None:
        self.by_hand = by_hand
        self.block: list[np.ndarray] = []  # when each step of a block was read
        self.seconds: list[np.ndarray] = []

    def line(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            self.block.append(clocks())
            return
        if self.block:
            self.seconds.append((self.block[-1] - self.block[0]) / (len(self.block) - 1))
        self.by_hand.block(counted=bool(self.block))
        self.block = []


def row(name: str, seconds: np.ndarray) -> list[str]:
    """Return the medians of blocks, seconds [blocks, 2], and their spread."""
    shown = [f"{1e3 * np.median(s):.1f} ({1e3 * s.min():.1f} to {1e3 * s.max():.1f})" for s in seconds.T]
    return [name, *shown]


def main(config: Config) -> None:
    config = sized(config)
    steps = config.rounds * config.steps
    options = Options(
        rank=config.rank,
        max_length=config.length,
        batch_tokens=config.rows * config.length,
        max_steps=steps,
        eval_every=config.steps,
        epochs=1000,
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(config, Path(scratch))
        size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        tokens, held_out = make_tokens(config, 2000, 1), make_tokens(config, 4, 2)
        by_hand = ByHand(config, model, tokens, options)
        in_turn = InTurn(by_hand)
        with patch.object(training_run, "Meter", Watched):
            lora.recipes.finetune(model, tokens, held_out, Path(scratch) / "run", options, in_turn)
    print(
        f"{size / 1e6:.1f} million parameters, {config.rounds} blocks of {config.steps} steps, the first not counted."
    )
    ours, theirs = np.array(in_turn.seconds), np.array(by_hand.seconds)
    print(format_table(["loop", "ms a step", "ms of all cores"], [row("by hand", theirs), row("finetune", ours)]))
    [wall, cores] = np.median(theirs / ours, axis=0)
    print(f"tokens per second of finetune over those by hand: {wall:.3f}; by the time of all cores {cores:.3f}")
    wait, step = np.median(by_hand.waits), np.median(theirs[:, 0])
    print(f"making a batch and bringing it to the device: {1e3 * wait:.2f} ms, {wait / step:.1%} of a step")
    print(f"given in time: {np.mean(Watched.given):.1%} of {len(Watched.given)} steps")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
