"""A sweep of learning rates and ranks in one run: all members train at once, over one copy of the base.

The task is that of `finetune_sentiment.py`. Each member is a LoRA of its own rank, with its own learning rate; the base
multiplies the tokens of all of them in one product for each weight. At half of the steps only the better half goes on.
The picture shows the accuracy on the validation sentences, and the table what each member is.

    python examples/sweep.py
    python examples/sweep.py --rates 1e-3 4e-3 --ranks 2 8 --epochs 1

Axes: N members, B sentences, T tokens.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import assets
import finetune_sentiment as demo
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import snippets
import tyro

import lora_jax as lora
from lora_jax.checkpoints.atomic_dir import written_file

Tree = Any


@dataclass(frozen=True)
class Config:
    """Train LoRA with each learning rate and each rank, in one run."""

    output: Path = Path("runs/sweep")  # where the picture and the best adapters go
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    ranks: tuple[int, ...] = (2, 8)
    alpha: float = 16.0  # the scale of rank r is alpha / r
    epochs: int = 1
    batch: int = 16  # sentences a step, the same for all members
    sentences: int = 2048  # of the training split, at most
    seed: int = 0


def make_optimizer(steps: int) -> Callable[..., optax.GradientTransformation]:
    """AdamW with warm-up and cosine decay, as a function of the member's peak learning rate."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps)

    def optimizer(learning_rate: jax.Array) -> optax.GradientTransformation:
        return optax.adamw(lambda count: learning_rate * shape(count), weight_decay=0.01)

    return optimizer


def sweep(task: demo.Task, config: Config) -> tuple[lora.Population, np.ndarray, list[str]]:
    """The members after training, their accuracies [N], and what was printed."""
    grid = list(itertools.product(config.ranks, config.rates))  # (rank, learning rate) of each member
    made = {
        rank: demo.make_lora(task, demo.Config(rank=rank, alpha=config.alpha), config.seed) for rank in config.ranks
    }
    logits = made[config.ranks[0]][0]
    train = snippets.balanced(task.splits["train"], config.sentences, config.seed)
    steps = len(train) // config.batch * config.epochs
    optimizer = make_optimizer(steps)

    def loss(trainable: Tree, params: Tree, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
        return demo.cross_entropy(logits(trainable, params, ids, mask), labels)

    members = [made[rank][1] for rank, _ in grid]
    population = lora.Population.create(members, optimizer, {"learning_rate": [rate for _, rate in grid]})
    step = lora.population_step(loss, optimizer)
    predict = jax.jit(jax.vmap(logits, in_axes=(0, None, None, None)))
    printed, done = [], 0
    for epoch in range(config.epochs):
        for ids, mask, labels in snippets.training_batches(train, config.batch, config.seed + epoch):
            population, metrics = step(population, task.params, ids, mask, labels)
            done += 1
            if done == steps // 2:  # the worse half stays as it is
                scores = accuracies(predict, population, task, "validation")
                population = population.keep_best(scores, len(grid) // 2, largest=True)
                printed.append(population.table({"loss": metrics["loss"], "accuracy": scores}))
                print(f"After {done} of {steps} steps:\n{printed[-1]}\n", flush=True)
    scores = accuracies(predict, population, task, "validation")
    printed.append(population.table({"accuracy": scores}))
    print(f"At the end:\n{printed[-1]}")
    return population, scores, printed


def accuracies(
    predict: Callable[..., jax.Array], population: lora.Population, task: demo.Task, name: str
) -> np.ndarray:
    """The share of right answers of each member [N]."""
    split = task.splits[name]

    def chosen(ids: np.ndarray, mask: np.ndarray) -> jax.Array:
        return jnp.argmax(predict(population.trainable, task.params, ids, mask), -1).T  # [B, N]

    found = snippets.in_batches(chosen, split.tokens)
    return np.mean(found == split.labels[:, None], axis=0)


def draw(config: Config, scores: np.ndarray, path: Path) -> None:
    """A heat map of accuracies, ranks by learning rates."""
    shown = 100 * scores.reshape(len(config.ranks), len(config.rates))
    figure, axes = plt.subplots(
        figsize=(1.2 * len(config.rates) + 2, 0.8 * len(config.ranks) + 1.6), layout="constrained"
    )
    image = axes.imshow(shown, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(shown):
        dark = value < (shown.min() + shown.max()) / 2
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(config.rates)), [f"{rate:g}" for rate in config.rates])
    axes.set_yticks(range(len(config.ranks)), [str(rank) for rank in config.ranks])
    axes.set(xlabel="learning rate", ylabel="rank", title="Validation accuracy (%)")
    figure.colorbar(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_file(path) as new:
        figure.savefig(new, dpi=120, format="png")
    plt.close(figure)


def run(task: demo.Task, config: Config) -> np.ndarray:
    """Train, draw, and save the best member's adapters."""
    population, scores, _ = sweep(task, config)
    draw(config, scores, config.output / "sweep.png")
    best = population.member(int(np.argmax(scores)))
    lora.checkpoint.save(config.output / "best", best["adapters"], {"head": best["head"]})
    print(f"The heat map is {config.output / 'sweep.png'}, the best adapters are in {config.output / 'best'}.")
    return scores


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        if not (config.rates and config.ranks):
            raise lora.LoraError("--rates and --ranks need a number each at least.")
        for rank in config.ranks:
            demo.check(replace(demo.Config(), rank=rank, epochs=config.epochs, batch=config.batch, seed=config.seed))
        run(demo.load_task(), config)
    except (assets.AssetError, lora.LoraError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
