"""Fine-tune a real encoder for sentiment with LoRA, and see what it costs and gives.

MiniLM-L6 (22.6 million parameters) reads a sentence of a film review and says whether its raters were for or against
the film. Three ways of teaching it: a linear head on the frozen encoder (the probe), the head and LoRA adapters, the
head and all of the encoder.

    python examples/finetune_sentiment.py                         # LoRA and the probe
    python examples/finetune_sentiment.py --compare               # all three, three seeds each
    python examples/finetune_sentiment.py --predict "Not bad."    # with the adapters that were saved

Axes: B sentences, T tokens, D hidden.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import assets
import jax
import jax.numpy as jnp
import matplotlib
import minilm
import numpy as np
import optax
import snippets
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import load_file
from safetensors.numpy import save as serialized
from tokenizers import Tokenizer

import lora_jax as lora
from lora_jax import checkpoint
from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.core.text import format_table, size

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Tree = Any
Logits = Callable[..., jax.Array]  # (trainable, params, ids [B, T], mask [B, T]) -> [B, 2]

TARGETS = {
    "all": r"layer_\d+/(attention/(query|key|value|output)|intermediate|output)/kernel",
    "query-value": r"layer_\d+/attention/(query|value)/kernel",
}


@dataclass(frozen=True)
class Config:
    """Fine-tune MiniLM-L6 on film review sentences."""

    compare: bool = False  # frozen probe, LoRA and full fine-tuning, three seeds each
    predict: str | None = None  # say what the saved adapters make of this sentence, and do nothing else
    output: Path = Path("runs/sentiment")  # where adapters, merged weights and curves go
    targets: Literal["all", "query-value"] = "all"  # weights that get an adapter
    rank: int = 8  # width of the adapters
    alpha: float = 16.0  # their scale is alpha / rank
    learning_rate: float = 2e-3  # of LoRA
    full_learning_rate: float = 1e-4  # of full fine-tuning
    epochs: int = 2  # passes over the training sentences
    batch: int = 32  # sentences a step
    seed: int = 0  # of the starts and of the order of the sentences


def check(config: Config) -> None:
    """A wrong setting is said before any work.

    Raises:
        LoraError: which setting, and what it may be.
    """
    lora.Lora(config.rank, config.alpha)
    for name in ("epochs", "batch"):
        if getattr(config, name) < 1:
            raise lora.LoraError(f"--{name} is {getattr(config, name)}, expected at least 1.")
    for name in ("learning_rate", "full_learning_rate"):
        if not 0 < getattr(config, name) < math.inf:
            raise lora.LoraError(f"--{name.replace('_', '-')} is {getattr(config, name)}, expected a number above 0.")
    if config.seed < 0:
        raise lora.LoraError(f"--seed is {config.seed}, expected a whole number of at least 0.")


# The model and its three sets of trained parameters ----------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What all methods share: a frozen model, data, and how the model's weights are kept in files."""

    encode: Callable[..., jax.Array]  # (params, ids, mask) -> [B, D]
    params: Tree
    splits: dict[str, snippets.Split]
    tokenizer: Tokenizer
    save_weights: Callable[[Path, Tree], None]
    load_weights: Callable[[Path], Tree]

    @property
    def hidden(self) -> int:
        return self.params["norm"]["scale"].shape[0]


def load_task() -> Task:
    weights, tokenizer_file = assets.fetch(assets.MINILM)
    [sentences] = assets.fetch(assets.VADER)
    tokenizer = minilm.load_tokenizer(tokenizer_file, snippets.LENGTH)
    model = minilm.Encoder()

    def encode(params: Tree, ids: jax.Array, mask: jax.Array) -> Any:
        return model.apply({"params": params}, ids, mask)

    return Task(
        encode=encode,
        params=minilm.load(weights),
        splits=snippets.split_by_hash(snippets.read(sentences), tokenizer),
        tokenizer=tokenizer,
        save_weights=lambda path, params: minilm.save(path, params, original=weights),
        load_weights=minilm.load,
    )


def classify(head: Tree, states: jax.Array) -> jax.Array:
    """[B, D] -> [B, 2]"""
    return states @ head["kernel"] + head["bias"][None]


def new_head(task: Task, seed: int) -> Tree:
    kernel = jax.random.normal(jax.random.key(seed + 1000), (task.hidden, 2)) / math.sqrt(task.hidden)
    return {"kernel": kernel, "bias": jnp.zeros(2)}


def make_plan(task: Task, config: Config) -> lora.Plan:
    rules = {TARGETS[config.targets]: lora.Lora(config.rank, config.alpha)}
    one_batch = snippets.pad(task.splits["train"].tokens[:1], config.batch)
    return lora.plan(task.encode, task.params, *one_batch, rules=rules)


def make_lora(task: Task, config: Config, seed: int) -> tuple[Logits, Tree]:
    """The logits as a function of adapters and head, and where these start."""
    plan = make_plan(task, config)
    encode = lora.lora_apply(task.encode)

    def logits(trainable: Tree, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return classify(trainable["head"], encode(params, trainable["adapters"], ids, mask))

    return logits, {"adapters": lora.init(jax.random.key(seed), task.params, plan), "head": new_head(task, seed)}


def make_full(task: Task, seed: int) -> tuple[Logits, Tree]:
    def logits(trainable: Tree, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        del params  # all of them are trained
        return classify(trainable["head"], task.encode(trainable["encoder"], ids, mask))

    copy = jax.tree.map(jnp.copy, task.params)  # the step donates it
    return logits, {"encoder": copy, "head": new_head(task, seed)}


# Training ------------------------------------------------------------------------------------------------------------


class DivergedError(RuntimeError):
    """The loss, or its gradient, is no number any more."""


@dataclass
class Run:
    """What one training left behind."""

    method: str
    trainable: Tree = None
    optimizer_bytes: int = 0
    seconds_a_step: float = 0.0
    saved_bytes: int = 0
    test_accuracy: float = 0.0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, accuracy)


def cross_entropy(z: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()


def make_step(
    logits: Logits, trainable: Tree, rate: float, steps: int, microbatches: int = 1
) -> tuple[Callable[..., Any], lora.TrainState]:
    """AdamW with warm-up and cosine decay, and the mask that says what it may move."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    mask = {name: lora.trainable_mask(part) if name == "adapters" else True for name, part in trainable.items()}
    optimizer = lora.freeze_base(optax.adamw(schedule, weight_decay=0.01), mask)

    def loss(trainable: Tree, params: Tree, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> Any:
        z = logits(trainable, params, ids, mask)
        return cross_entropy(z, labels), {"accuracy": jnp.mean(z.argmax(-1) == labels)}

    return lora.jit_step(loss, optimizer, microbatches=microbatches), lora.TrainState.create(trainable, optimizer)


def train(
    run: Run,
    logits: Logits,
    trainable: Tree,
    task: Task,
    config: Config,
    seed: int,
    rate: float,
    keep: Callable[[Tree], None] | None = None,
) -> Run:
    """Train for `config.epochs` and evaluate four times in each; `keep` then saves the state, which is still good.

    Raises:
        DivergedError: the loss or its gradient is NaN or infinite. What was kept before stays.
    """
    data, params = task.splits["train"], {} if "encoder" in trainable else task.params
    steps = len(data) // config.batch * config.epochs
    evaluate_at = [round(steps * i / (4 * config.epochs)) for i in range(1, 4 * config.epochs + 1)]
    step, state = make_step(logits, trainable, rate, steps)
    predict = jax.jit(logits)
    run.optimizer_bytes = tree_bytes(state.opt_state)
    seconds: dict[tuple[int, ...], list[float]] = {}  # by shape: the first step of each compiles
    with progress_bar(run.method if seed == config.seed else f"{run.method} ({seed})", steps) as advance:
        for epoch in range(config.epochs):
            for ids, mask, labels in snippets.training_batches(data, config.batch, seed=1000 * seed + epoch):
                start = time.perf_counter()
                state, metrics = step(state, params, ids, mask, labels)
                loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
                if not math.isfinite(loss + float(metrics["grad_norm"])):
                    kept = f"those of step {run.validation[-1][0]} are" if keep and run.validation else "none were"
                    raise DivergedError(
                        f"the loss of {run.method} is {loss} at step {len(run.losses)}, and the norm of its gradient "
                        f"{float(metrics['grad_norm'])}; of its states, {kept} kept. Try a lower learning rate."
                    )
                run.losses.append(loss)
                seconds.setdefault(ids.shape, []).append(time.perf_counter() - start)
                advance(loss, accuracy, config.batch / seconds[ids.shape][-1])
                if len(run.losses) in evaluate_at:
                    run.validation.append(
                        (len(run.losses), accuracy_of(predict, state.trainable, params, task, "validation"))
                    )
                    if keep:
                        keep(state.trainable)
    run.trainable = state.trainable
    run.seconds_a_step = float(np.mean([t for times in seconds.values() for t in times[1:] or times]))
    run.test_accuracy = accuracy_of(predict, run.trainable, params, task, "test")
    return run


def accuracy_of(predict: Logits, trainable: Tree, params: Tree, task: Task, name: str, rows: int = 64) -> float:
    split = task.splits[name]
    z = snippets.in_batches(lambda ids, mask: predict(trainable, params, ids, mask), split.tokens, rows)
    return float(np.mean(z.argmax(-1) == split.labels))


def train_probe(run: Run, task: Task, seed: int, steps: int = 1000) -> Run:
    """The best linear head on the frozen encoder. Its states are computed once; each step sees all of them."""
    encode = jax.jit(task.encode)

    def states(name: str) -> jax.Array:
        tokens = task.splits[name].tokens
        return jnp.asarray(snippets.in_batches(lambda ids, mask: encode(task.params, ids, mask), tokens))

    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-2, steps), weight_decay=1e-4)

    @jax.jit
    def fit(head: Tree, x: jax.Array, labels: jax.Array) -> tuple[Tree, jax.Array]:
        def step(carry: Tree, _: None) -> tuple[Tree, jax.Array]:
            head, state = carry
            value, grads = jax.value_and_grad(lambda head: cross_entropy(classify(head, x), labels))(head)
            updates, state = optimizer.update(grads, state, head)
            return (optax.apply_updates(head, updates), state), value

        (head, _), losses = jax.lax.scan(step, (head, optimizer.init(head)), length=steps)
        return head, losses

    head, x, labels = new_head(task, seed), states("train"), task.splits["train"].labels
    run.optimizer_bytes = tree_bytes(optimizer.init(head))
    compiled = fit.lower(head, x, labels).compile()
    start = time.perf_counter()
    head, losses = jax.block_until_ready(compiled(head, x, labels))
    run.seconds_a_step = (time.perf_counter() - start) / steps
    run.trainable, run.losses = {"head": head}, losses.tolist()
    run.test_accuracy = float(np.mean(classify(head, states("test")).argmax(-1) == task.splits["test"].labels))
    return run


# Saving, and checking what was saved ----------------------------------------------------------------------------------


def save_adapters(folder: Path, trainable: Tree) -> None:
    checkpoint.save(folder, trainable["adapters"], {"head": trainable["head"]})


def save_head(path: Path, head: Tree) -> None:
    with written_file(path) as new:
        new.write_bytes(serialized({name: np.asarray(value) for name, value in head.items()}))


def export(task: Task, logits: Logits, trainable: Tree, output: Path) -> float:
    """Save the adapters, load them back, merge, save the merged weights, load those into the plain encoder.

    Also writes the adapters as HF PEFT reads them.

    Returns the largest difference in logits, over the test sentences, between adapter form and merged form.
    """
    save_adapters(output / "adapters", trainable)
    adapters, others = checkpoint.load(output / "adapters")
    task.save_weights(output / "merged" / "model.safetensors", lora.merge(task.params, adapters))
    save_head(output / "merged" / "head.safetensors", others["head"])
    lora.save_peft(
        output / "peft",
        adapters,
        minilm.KEY_MAP,
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        task_type="FEATURE_EXTRACTION",
    )

    plain = task.load_weights(output / "merged" / "model.safetensors")
    head = load_file(output / "merged" / "head.safetensors")
    adapted = jax.jit(lambda ids, mask: logits({"adapters": adapters, **others}, task.params, ids, mask))
    merged = jax.jit(lambda ids, mask: classify(head, task.encode(plain, ids, mask)))
    tokens = task.splits["test"].tokens
    return float(np.abs(snippets.in_batches(adapted, tokens) - snippets.in_batches(merged, tokens)).max())


def tree_bytes(tree: Tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# What the user sees ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(what: str, steps: int, done: int = 0) -> Iterator[Callable[[float, float, float], None]]:
    """A bar with loss, accuracy (a running mean), examples a second and the time that remains, in 80 columns."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f} accuracy {task.fields[accuracy]:.2f}"),
        TextColumn("{task.fields[speed]:.0f} ex/s"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=steps, completed=done, loss=math.nan, accuracy=0.5, speed=0.0)

        def advance(loss: float, accuracy: float, speed: float) -> None:
            fields = progress.tasks[bar].fields
            running = fields["accuracy"] + 0.05 * (accuracy - fields["accuracy"])
            progress.update(bar, advance=1, loss=loss, accuracy=running, speed=speed)

        yield advance


def table(runs: list[Run]) -> str:
    """One line a method; with several seeds, mean and standard deviation of the accuracy."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        same = [run for run in runs if run.method == method]
        accuracy = 100 * np.array([run.test_accuracy for run in same])
        spread = f" ± {accuracy.std(ddof=1):.1f}" if len(same) > 1 else ""
        trained = sum(leaf.size for leaf in jax.tree.leaves(same[0].trainable))
        seconds = float(np.mean([run.seconds_a_step for run in same]))
        figures = [f"{trained:,}", f"{seconds:.3f}", size(same[0].optimizer_bytes), size(same[0].saved_bytes)]
        rows.append([method, f"{accuracy.mean():.1f} %{spread}", *figures])
    header = ["method", "test accuracy", "trained parameters", "seconds a step", "optimizer state", "saved"]
    return format_table(header, rows, right=5)


def draw(runs: list[Run], path: Path) -> None:
    """Training loss and validation accuracy, a colour a method, a line a seed."""
    colours = {"LoRA": "#1f6fb4", "full fine-tuning": "#c44e52", "frozen probe": "#777777"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for n, run in enumerate(runs):
        first = run.method not in [earlier.method for earlier in runs[:n]]
        style: dict[str, Any] = {"color": colours[run.method], "lw": 1.3, "alpha": 0.8}
        label = run.method if first else None
        if run.validation:
            window = max(1, len(run.losses) // 20)
            smooth = np.convolve(run.losses, np.ones(window) / window, mode="valid")
            left.plot(np.arange(len(smooth)) + window, smooth, label=label, **style)
            steps, accuracy = zip(*run.validation, strict=True)
            right.plot(steps, 100 * np.array(accuracy), "o-", ms=3, label=label, **style)
        else:
            right.axhline(100 * run.test_accuracy, ls="--", label=label and f"{label} (test)", **style)
    left.set(xlabel="step", ylabel="training loss (moving average)", title="Loss")
    right.set(xlabel="step", ylabel="validation accuracy (%)", title="Accuracy")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    with written_file(path) as new:
        figure.savefig(new, dpi=120, format=path.suffix[1:] or "png")
    plt.close(figure)


def predict(task: Task, config: Config, sentence: str) -> str:
    folder = config.output / "adapters"
    if not folder.exists():
        raise lora.LoraError(f"there are no adapters in {folder} yet: run this once without --predict.")
    adapters, others = checkpoint.load(folder)
    ids, mask = snippets.pad([task.tokenizer.encode(sentence).ids], 1)
    states = lora.lora_apply(task.encode)(task.params, adapters, ids, mask)
    positive = float(jax.nn.softmax(classify(others["head"], states))[0, 1])
    return f"{'positive' if positive > 0.5 else 'negative'} ({max(positive, 1 - positive):.1%})"


def fine_tune(task: Task, config: Config) -> list[Run]:
    """Everything but the command line."""
    started, output = time.perf_counter(), config.output
    runs: list[Run] = []
    sentences = len(task.splits["train"])
    if config.batch > sentences:
        raise lora.LoraError(f"--batch is {config.batch}, but there are only {sentences} sentences to train on.")
    print(
        "Film review sentences: " + ", ".join(f"{len(s):,} {name}" for name, s in task.splits.items()) + ".", flush=True
    )
    for seed in range(config.seed, config.seed + (3 if config.compare else 1)):
        logits, trainable = make_lora(task, config, seed)  # what is wrong with the rules is said before any training

        probe = train_probe(Run("frozen probe"), task, seed)
        save_head(output / "probe" / "head.safetensors", probe.trainable["head"])
        probe.saved_bytes = bytes_on_disk(output / "probe")
        runs.append(probe)

        def keep(trainable: Tree) -> None:
            save_adapters(output / "last_good", trainable)

        adapted = train(Run("LoRA"), logits, trainable, task, config, seed, config.learning_rate, keep)
        adapted.saved_bytes = bytes_on_disk(output / "last_good")
        runs.append(adapted)
        if seed == config.seed:
            difference = export(task, logits, adapted.trainable, output)

        if config.compare:
            logits, trainable = make_full(task, seed)
            full = train(Run("full fine-tuning"), logits, trainable, task, config, seed, config.full_learning_rate)
            task.save_weights(output / "full" / "model.safetensors", full.trainable["encoder"])
            save_head(output / "full" / "head.safetensors", full.trainable["head"])
            full.saved_bytes = bytes_on_disk(output / "full")
            runs.append(full)

    draw(runs, output / "curves.png")
    print(f"\n{table(runs)}\n")
    print(
        f"Adapters are in {output / 'adapters'}, merged weights under the original file's names in {output / 'merged'},"
    )
    print(f"adapters for HF PEFT in {output / 'peft'}, curves in {output / 'curves.png'}.")
    print(f"Adapter form and merged form differ by at most {difference:.1e} in the logits of the test sentences.")
    print(f"{time.perf_counter() - started:.0f} s in all.")
    return runs


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        check(config)
        task = load_task()
        if config.predict is not None:
            print(predict(task, config, config.predict))
        else:
            fine_tune(task, config)
    except (assets.AssetError, lora.LoraError, DivergedError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
