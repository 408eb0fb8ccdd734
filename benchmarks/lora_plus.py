"""Does LoRA+ reach LoRA's final loss in fewer steps? A short training of the demo's model, over several seeds.

LoRA, and LoRA+ with each ratio, first get a learning rate of their own out of three, by their loss at the end of a
training with a seed that is not used again. Then all train on the same batches, from the same starts, for each of the
seeds. The schedule is the demo's: a short rise, and a cosine to zero. Losses are moving averages over 20 batches; the
one to reach is LoRA's own at its last step. Such an average may dip below its last value earlier, so LoRA's own first
step there is in the table as well.

    python benchmarks/lora_plus.py

Axes: B sentences, T tokens.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import lora_jax as lora
from lora_jax.core.text import format_table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import finetune_sentiment as demo

Tree = Any
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids [B, T], mask [B, T], labels [B]
Step = Callable[..., tuple[Tree, jax.Array]]  # (state, params, ids, mask, labels, rate) -> (state, loss)

WINDOW = 20  # batches in a moving average
METHODS = {"LoRA": 1.0, "LoRA+, ratio 4": 4.0, "LoRA+, ratio 16": 16.0}


@dataclass(frozen=True)
class Config:
    """Steps to LoRA's final loss, with LoRA and with LoRA+."""

    steps: int = 120
    batch: int = 16  # sentences a step
    tokens: int = 20  # the longest sentence that is used
    seeds: int = 5
    rates: tuple[float, float, float] = (8e-4, 2e-3, 5e-3)  # of LoRA; of LoRA+'s A, these over sqrt(ratio)


def batches(task: demo.Task, c: Config, seed: int) -> list[Batch]:
    """Short sentences of the training split in random order, as long as it takes."""
    split = task.splits["train"]
    short = [n for n, tokens in enumerate(split.tokens) if len(tokens) <= c.tokens]
    rng, order = np.random.default_rng(seed), np.zeros(0, int)
    while len(order) < c.steps * c.batch:
        order = np.concatenate([order, rng.permutation(short)])
    ids, lengths = np.zeros((c.steps * c.batch, c.tokens), np.int32), []
    for row, n in zip(ids, order, strict=False):
        row[: len(split.tokens[n])] = split.tokens[n]
        lengths.append([len(split.tokens[n])])
    mask = np.arange(c.tokens) < np.array(lengths)
    parts = (np.split(array, c.steps) for array in (ids, mask, split.labels[order[: len(ids)]]))
    return list(zip(*parts, strict=True))


def make_step(logits: demo.Logits, ratio: float) -> tuple[optax.GradientTransformation, Step]:
    """AdamW's update is proportional to its learning rate: this one comes with each step, and one program does for all.

    With a ratio of 1 this is plain LoRA.
    """
    optimizer = lora.lora_plus(lambda rate: optax.adamw(rate, weight_decay=0.01), 1.0, ratio)

    def loss(trainable: Tree, params: Tree, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
        return demo.cross_entropy(logits(trainable, params, ids, mask), labels)

    @jax.jit
    def step(state: Tree, params: Tree, ids: jax.Array, mask: jax.Array, labels: jax.Array, rate: jax.Array) -> Any:
        trainable, opt_state = state
        value, grads = jax.value_and_grad(loss)(trainable, params, ids, mask, labels)
        updates, opt_state = optimizer.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, jax.tree.map(lambda update: rate * update, updates))
        return (trainable, opt_state), value

    return optimizer, step


def train(task: demo.Task, c: Config, ratio: float, rate: float, seed: int, steps: dict[float, Any]) -> np.ndarray:
    """The moving average of the loss [steps - WINDOW + 1]; `steps` keeps the compiled ones."""
    logits, trainable = demo.make_lora(task, demo.Config(), seed)
    if ratio not in steps:
        steps[ratio] = make_step(logits, ratio)
    optimizer, step = steps[ratio]
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, c.steps // 20), c.steps)
    state, losses = (trainable, optimizer.init(trainable)), []
    for i, batch in enumerate(batches(task, c, seed)):
        state, loss = step(state, task.params, *batch, schedule(i))
        losses.append(float(loss))
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def first_below(curve: np.ndarray, target: float) -> float:
    """The step whose moving average is not above the target; infinite if there is none."""
    found = np.flatnonzero(curve <= target)
    return float(found[0] + WINDOW) if len(found) else np.inf


def tune(task: demo.Task, c: Config, steps: dict[float, Any]) -> dict[str, float]:
    """The rate of each method with the lowest loss at the end."""
    best = {}
    for method, ratio in METHODS.items():
        rates = [rate / ratio**0.5 for rate in c.rates]
        ends = [train(task, c, ratio, rate, c.seeds, steps)[-1] for rate in rates]
        best[method] = rates[int(np.argmin(ends))]
        tried = ", ".join(f"{end:.3f} with {rate:.2g}" for rate, end in zip(rates, ends, strict=True))
        print(f"{method}: {tried}", flush=True)
    return best


def table(curves: dict[str, list[np.ndarray]], best: dict[str, float]) -> str:
    rows = []
    for method, own in curves.items():
        last = np.array([curve[-1] for curve in own])
        reached = [first_below(curve, plain[-1]) for curve, plain in zip(own, curves["LoRA"], strict=True)]
        loss = f"{np.median(last):.3f} ({last.min():.3f} to {last.max():.3f})"
        each = ", ".join(f"{n:.0f}" for n in sorted(reached))
        rows.append([method, f"{best[method]:.2g}", loss, each, f"{np.median(reached):.0f}"])
    return format_table(["method", "rate of A", "final loss", "steps to LoRA's final loss", "median"], rows, right=1)


def main() -> None:
    c = tyro.cli(Config, description=__doc__)
    task = demo.load_task()
    steps: dict[float, Any] = {}
    best = tune(task, c, steps)
    curves = {
        method: [train(task, c, ratio, best[method], seed, steps) for seed in range(c.seeds)]
        for method, ratio in METHODS.items()
    }
    print(f"\n{table(curves, best)}\n")
    print(f"{c.steps} steps of {c.batch} sentences of at most {c.tokens} tokens, {c.seeds} seeds; inf: never.")


if __name__ == "__main__":
    main()
