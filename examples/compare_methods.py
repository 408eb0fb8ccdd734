"""What each kind of adapter, and what else is done in its place, gives and costs on the task of finetune_sentiment.py.

Every method trains the head and something of its own on the same sentences of film reviews, in the same number of
steps. It is then asked about other sentences of film reviews, and about ones that it was not trained for: reviews at
Amazon and editorials of the New York Times. The learning rate is chosen on validation sentences with one seed; with the
best one there are several seeds. Each run is written to `methods.json` when it ends; what is there is not run again.

    python examples/compare_methods.py                   # about 40 minutes on two cores; goes on where it was
    python examples/compare_methods.py --quick           # a random tiny encoder, a few steps: does it run?
    python examples/compare_methods.py --output docs     # draws docs/methods.png from docs/methods.json

Axes: B sentences, T tokens, D hidden.
"""

import dataclasses
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import assets
import finetune_sentiment as demo
import finetune_sharded as sharded
import jax
import matplotlib
import numpy as np
import optax
import peers
import snippets
import tyro
from peers import Start, States, Task

import lora_jax as lora
from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.core.text import format_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Tree = Any
Schedule = Callable[[Any], Any]  # steps taken -> rate

TESTS = {"movie": "film reviews", "amazon": "Amazon reviews", "nyt": "NYT editorials"}
IA3_TARGETS = r"layer_\d+/(attention/(key|value)|intermediate)/kernel"


@dataclass(frozen=True)
class Setting:
    """What all runs share, and so what `methods.json` is for."""

    steps: int = 80
    batch: int = 16
    longest: int = 24  # tokens: longer sentences are left out
    sentences: int = 500  # in the validation set and in each test set
    seeds: int = 3
    rounds: int = 15  # steps of each method that are timed, in turn with the others


@dataclass(frozen=True)
class Config:
    """Compare methods of fine-tuning."""

    output: Path = Path("runs/methods")  # where methods.json and methods.png go
    quick: bool = False  # a random tiny encoder, made-up sentences and a few steps


# The methods ---------------------------------------------------------------------------------------------------------


def trained(tree: Tree) -> Tree:
    """The same tree of booleans: False at the frozen arrays of adapters."""

    def is_adapter(node: Any) -> bool:
        return isinstance(node, lora.Adapter)

    return jax.tree.map(lambda node: node.trainable() if is_adapter(node) else True, tree, is_leaf=is_adapter)


def adamw(schedule: Schedule, steps: int, size: int) -> optax.GradientTransformation:
    return lora.freeze_base(optax.adamw(schedule, weight_decay=0.01), trained)


def lora_fa(schedule: Schedule, steps: int, size: int) -> optax.GradientTransformation:
    return lora.lora_fa(schedule, weight_decay=0.01)


def shrinking(schedule: Schedule, steps: int, size: int) -> optax.GradientTransformation:
    """From half as many ranks more than `size` down to it."""
    optimizer = adamw(schedule, steps, size)
    return lora.adapt_budget(optimizer, target_rank=size, total_steps=steps, warmup=steps // 10, final=steps // 4)


def adapted(
    rule: Callable[[int], Any], targets: str = demo.TARGETS["all"]
) -> Callable[[Task, int], tuple[States, Start]]:
    """The encoder with adapters, by a rule of lora_jax for a given rank."""

    def make(task: Task, size: int) -> tuple[States, Start]:
        one = snippets.pad(task.splits["train"].tokens[:1], 1)
        plan = lora.plan(task.encode, task.params, *one, rules={targets: rule(size)})
        apply = lora.lora_apply(task.encode)
        return (
            lambda adapters, params, ids, mask: apply(params, adapters, ids, mask),
            lambda key: lora.init(key, task.params, plan),
        )

    return make


@dataclass(frozen=True)
class Method:
    """One way to fine-tune. Its first size is the one that is compared; its rates are for that size."""

    name: str
    make: Callable[[Task, int], tuple[States, Start]]
    rates: tuple[float, ...]
    size_is: str = ""  # rank, width or length
    sizes: tuple[int, ...] = (0,)
    optimizer: Callable[[Schedule, int, int], optax.GradientTransformation] = adamw
    penalty: Callable[[Tree], Any] = lambda trained: 0.0  # beside the cross-entropy

    def named(self, size: int) -> str:
        return f"{self.name}, {self.size_is} {size}" if self.size_is else self.name


# Alpha is 16 as in the demo: at rank 8 the scale is 2. LoHa of rank 4 has as many parameters as LoRA of rank 8. AdaLoRA
# starts with 12 ranks a matrix, and 8 are left on average.
METHODS = (
    Method("probe", peers.probe, (3e-3, 1e-2, 3e-2, 1e-1)),
    Method("LoRA", adapted(lambda r: lora.Lora(r, 16)), (1e-3, 2e-3, 5e-3), "rank", (8, 2, 32)),
    Method("rsLoRA", adapted(lambda r: lora.RsLora(r, 16)), (3e-4, 1e-3, 3e-3), "rank", (32,)),
    Method("LoRA-FA", adapted(lambda r: lora.LoraFa(r, 16)), (3e-3, 1e-2, 3e-2), "rank", (8,), lora_fa),
    Method("DoRA", adapted(lambda r: lora.Dora(r, 16)), (1e-3, 2e-3, 5e-3), "rank", (8,)),
    Method("LoHa", adapted(lambda r: lora.Loha(r, 2 * r)), (5e-3, 2e-2, 5e-2), "rank", (4,)),
    Method(
        "AdaLoRA",
        adapted(lambda r: lora.AdaLora(3 * r // 2, 3 * r)),
        (5e-3, 2e-2, 5e-2),
        "rank",
        (8,),
        shrinking,
        lambda adapters: 0.5 * lora.orthogonality(adapters),
    ),
    Method("LoKr", adapted(lambda r: lora.Lokr(r, 16)), (3e-3, 1e-2, 3e-2), "rank", (8,)),
    Method("VeRA", adapted(lambda r: lora.Vera(r)), (1e-2, 3e-2, 1e-1, 3e-1), "rank", (256,)),
    Method("IA3", adapted(lambda _: lora.Ia3(), IA3_TARGETS), (1e-2, 3e-2, 1e-1)),
    Method("bottleneck", peers.bottleneck, (1e-3, 3e-3, 1e-2), "width", (32, 4)),
    Method("prefix", peers.prefix, (5e-3, 2e-2, 5e-2), "length", (16,)),
    Method("prompt", peers.prompt, (5e-3, 2e-2, 5e-2), "length", (16,)),
    Method("full fine-tuning", peers.full, (1e-4, 3e-4, 1e-3)),
)


# Training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A method at one size, compiled once for all seeds and rates."""

    create: Callable[[int, float], lora.TrainState]  # (seed, rate) -> state
    step: Callable[..., tuple[lora.TrainState, dict[str, jax.Array]]]  # (state, params, rate, ids, mask, labels)
    predict: demo.Logits


def build(task: Task, method: Method, size: int, setting: Setting) -> Program:
    states, start = method.make(task, size)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, setting.steps // 20), setting.steps)

    def optimizer(rate: Any) -> optax.GradientTransformation:
        return method.optimizer(lambda count: rate * shape(count), setting.steps, size)

    def logits(trainable: Tree, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        ids, mask = ids[:, : setting.longest], mask[:, : setting.longest]  # beyond it, there is padding alone
        return demo.classify(trainable["head"], states(trainable["encoder"], params, ids, mask))

    def loss(trainable: Tree, params: Tree, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
        return demo.cross_entropy(logits(trainable, params, ids, mask), labels) + method.penalty(trainable["encoder"])

    def create(seed: int, rate: float) -> lora.TrainState:
        trainable = {"encoder": start(jax.random.key(seed)), "head": demo.new_head(task, seed)}
        return lora.TrainState.create(trainable, optimizer(rate))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: lora.TrainState, params: Tree, rate: jax.Array, *batch: jax.Array) -> Any:
        return lora.train_step(loss, optimizer(rate), state, params, *batch)

    return Program(create, step, jax.jit(logits))


def train(task: Task, program: Program, setting: Setting, seed: int, rate: float) -> tuple[Tree, dict[str, Any]]:
    """What was trained, and the figures of the run."""
    state = program.create(seed, rate)
    batches = snippets.training_batches(task.splits["train"], setting.batch, seed)
    losses = []
    for batch in itertools.islice(batches, setting.steps):
        state, metrics = program.step(state, task.params, rate, *batch)
        losses.append(float(metrics["loss"]))
    return state.trainable, {
        "trained": trained_numbers(state.trainable),
        "loss": round(float(np.mean(losses[-max(1, setting.steps // 10) :])), 4),
        "validation": ask(task, program, state.trainable, "validation"),
    }


def trained_numbers(trainable: Tree) -> int:
    marks = zip(jax.tree.leaves(trainable), jax.tree.leaves(trained(trainable)), strict=True)
    return sum(leaf.size for leaf, is_trained in marks if is_trained)


def ask(task: Task, program: Program, trainable: Tree, name: str) -> float:
    """The accuracy on the validation sentences or on those of a test."""
    return round(demo.accuracy_of(program.predict, trainable, task.params, task, name), 4)


def compare(task: Task, setting: Setting, results: "Results", methods: Sequence[Method] = METHODS) -> None:
    """Run what the results lack."""

    @functools.cache
    def program(method: Method, size: int) -> Program:
        return build(task, method, size, setting)

    def run(method: Method, size: int, rate: float, seed: int, rivals: Sequence[dict[str, Any]] = ()) -> None:
        """Train, and ask for the tests too if no rival is better."""
        which = {"method": method.name, "size": size, "rate": rate, "seed": seed}
        if results.having(**which):
            return
        trainable, found = train(task, program(method, size), setting, seed, rate)
        if all(score(found) > score(rival) for rival in rivals):
            found |= {name: ask(task, program(method, size), trainable, name) for name in TESTS}
        results.add(which | found)
        print(", ".join(f"{name} {value}" for name, value in results.runs[-1].items()), flush=True)

    for method in methods:
        size = method.sizes[0]
        for rate in method.rates:
            run(method, size, rate, 0, rivals=results.having(method=method.name, size=size, seed=0))
        for seed in range(1, setting.seeds):
            run(method, size, results.best_rate(method), seed)
    if not results.times:
        programs = {method.name: program(method, method.sizes[0]) for method in methods}
        results.set_times(time_in_turn(task, setting, programs))
    for method in methods:
        for size, seed in itertools.product(method.sizes[1:], range(setting.seeds)):
            run(method, size, results.best_rate(method), seed)


def time_in_turn(task: Task, setting: Setting, programs: dict[str, Program]) -> dict[str, list[float]]:
    """Seconds of a step of each method: every round has one of each, forwards and backwards by turns."""
    batch = next(snippets.training_batches(task.splits["train"], setting.batch, seed=0))
    states = {name: program.create(0, 0.0) for name, program in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(-1, setting.rounds):  # the first round may compile
        gc.collect()
        for name in list(programs)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(programs[name].step(states[name], task.params, 0.0, *batch))
            seconds[name] += [time.perf_counter() - start] if i >= 0 else []
    return seconds


# Results -------------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """What is in a file of results, which is written anew with each of them."""

    path: Path
    setting: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)  # seconds of a step, by method and round

    @classmethod
    def open(cls, path: Path, setting: Setting) -> "Results":
        """The results so far.

        Raises:
            LoraError: those in the file are of another setting.
        """
        results = cls(path, dataclasses.asdict(setting))
        if path.exists():
            found = json.loads(path.read_text())
            if found["setting"] != results.setting:
                raise lora.LoraError(
                    f"{path} has results of {found['setting']}, expected {results.setting}: give another --output."
                )
            results.runs, results.times = found["runs"], found["times"]
        return results

    def having(self, **which: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run[name] == value for name, value in which.items())]

    def best_rate(self, method: Method) -> float:
        """That of the best run with the first seed."""
        return max(self.having(method=method.name, size=method.sizes[0], seed=0), key=score)["rate"]

    def at_best_rate(self, method: Method, size: int) -> list[dict[str, Any]]:
        return self.having(method=method.name, size=size, rate=self.best_rate(method))

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self._write()

    def set_times(self, times: dict[str, list[float]]) -> None:
        self.times = {name: [round(t, 5) for t in seconds] for name, seconds in times.items()}
        self._write()

    def _write(self) -> None:
        lines = ",\n".join(json.dumps(run) for run in self.runs)
        text = (
            f'{{"setting": {json.dumps(self.setting)},\n"runs": [\n{lines}\n],\n"times": {json.dumps(self.times)}}}\n'
        )
        with written_file(self.path) as new:
            new.write_text(text)


def score(run: dict[str, Any]) -> tuple[float, float]:
    """The accuracy on the validation sentences; of equal ones, the lower training loss is better."""
    return run["validation"], -run["loss"]


@dataclass(frozen=True)
class Row:
    """A method at one size: accuracies in percent, an entry for each seed; times over LoRA's, one for each round."""

    method: Method
    size: int
    rate: float
    trained: int
    accuracy: dict[str, np.ndarray]
    time: np.ndarray | None  # of the first size only

    @property
    def name(self) -> str:
        return self.method.named(self.size)


def rows(results: Results, methods: Sequence[Method] = METHODS) -> list[Row]:
    found = []
    for method in methods:
        for size in method.sizes:
            runs = results.at_best_rate(method, size)
            accuracy = {name: 100 * np.array([run[name] for run in runs]) for name in TESTS}
            time = np.array(results.times[method.name]) / np.array(results.times["LoRA"])
            own_time = time if size == method.sizes[0] else None
            found.append(Row(method, size, results.best_rate(method), runs[0]["trained"], accuracy, own_time))
    return found


def table(rows: list[Row]) -> str:
    header = ["method", "trained parameters", "learning rate", *TESTS.values(), "time a step"]
    cells = []
    for row in rows:
        accuracies = [f"{accuracy.mean():.1f}{spread(accuracy)}" for accuracy in row.accuracy.values()]
        time = "" if row.time is None else f"{np.median(row.time):.2f}"
        cells.append([row.name, f"{row.trained:,}", f"{row.rate:g}", *accuracies, time])
    return format_table(header, cells, right=6)


def spread(accuracy: np.ndarray) -> str:
    return f" ± {accuracy.std(ddof=1):.1f}" if len(accuracy) > 1 else ""


FAMILIES = {  # colour, and a marker for each method
    "#0072b2": {"LoRA": "o", "rsLoRA": "s", "LoRA-FA": "v", "DoRA": "D", "LoHa": "^", "AdaLoRA": "p"},
    "#009e73": {"LoKr": "s", "VeRA": "o", "IA3": "D"},
    "#d55e00": {"bottleneck": "o", "prefix": "s", "prompt": "D"},
    "#333333": {"probe": "x", "full fine-tuning": "*"},
}


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy by trained parameters and by time: means and standard deviations over seeds, quartiles of time."""
    figure, grid = plt.subplots(
        2, 2, figsize=(13, 8), layout="constrained", sharex="col", sharey="row", width_ratios=(3, 2)
    )
    for colour, markers in FAMILIES.items():
        for name, marker in markers.items():
            same = sorted((row for row in rows if row.method.name == name), key=lambda row: row.trained)
            if same:
                draw_method(grid[0], same, ("movie",), colour, marker)
                draw_method(grid[1], same, ("amazon", "nyt"), colour, marker)
    for axes, title in zip(grid[:, 0], ("film reviews", "mean of Amazon and NYT"), strict=True):
        axes.set(ylabel=f"accuracy (%), {title}")
    grid[1, 0].set(xscale="log", xlabel="trained parameters, the head among them")
    grid[1, 1].set(xlabel="time of a step / time of a step of LoRA")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    with written_file(path) as new:
        figure.savefig(new, dpi=120, format=path.suffix[1:] or "png")
    plt.close(figure)


def draw_method(axes: Sequence[Any], same: list[Row], names: Sequence[str], colour: str, marker: str) -> None:
    """All sizes of one method by their parameters, joined by a line, and its first size by its time."""
    values = [np.mean([row.accuracy[name] for name in names], axis=0) for row in same]
    means, deviations = [v.mean() for v in values], [v.std(ddof=1) if len(v) > 1 else 0 for v in values]
    sizes = ", ".join(str(row.size) for row in same)
    label = f"{same[0].method.name} ({same[0].method.size_is} {sizes})" if same[0].method.size_is else same[0].name
    points: dict[str, Any] = {"color": colour, "marker": marker, "ms": 9, "mfc": "none", "mew": 1.8, "lw": 1}
    bars: dict[str, Any] = {"ecolor": colour, "elinewidth": 1, "ls": "none", "alpha": 0.4}  # open markers hide nothing
    trained = [row.trained for row in same]
    axes[0].plot(trained, means, label=label, **points)
    axes[0].errorbar(trained, means, deviations, **bars)
    for row, mean, deviation in zip(same, means, deviations, strict=True):
        if row.time is not None:
            low, median, high = np.quantile(row.time, (0.25, 0.5, 0.75))
            axes[1].plot(median, mean, **points)
            axes[1].errorbar(median, mean, deviation, [[median - low], [high - median]], **bars)


# The two tasks -------------------------------------------------------------------------------------------------------


def load_task(setting: Setting) -> Task:
    task = demo.load_task()
    amazon, nyt = (
        snippets.tokenize(snippets.read(path), task.tokenizer) for path in assets.fetch(assets.VADER_TRANSFER)
    )
    train, validation, movie = (task.splits[name] for name in ("train", "validation", "test"))
    asked = {"validation": validation, "movie": movie, "amazon": amazon, "nyt": nyt}
    short = {name: snippets.shorter(split, setting.longest) for name, split in asked.items()}
    splits = {name: snippets.balanced(split, setting.sentences) for name, split in short.items()}
    splits["train"] = snippets.shorter(train, setting.longest)
    return Task(**{**vars(task), "splits": splits})


def quick_task(setting: Setting) -> Task:
    """The tiny encoder of finetune_sharded.py with one layer; the three tests are about the same made-up sentences."""
    task, heads = sharded.tiny_task(), 4
    splits = {name: snippets.balanced(task.splits["test"], setting.sentences) for name in ("validation", *TESTS)}
    parts = vars(task) | {
        "encode": functools.partial(peers.encode, heads=heads),
        "params": {name: part for name, part in task.params.items() if name != "layer_1"},
        "splits": splits | {"train": task.splits["train"]},
    }
    return Task(**parts, heads=heads)


QUICK = Setting(steps=2, batch=8, sentences=32, seeds=2, rounds=1)
QUICK_METHODS = tuple(
    dataclasses.replace(method, sizes=(min(4, method.sizes[0]),), rates=method.rates[:1]) for method in METHODS
)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    setting, methods = (QUICK, QUICK_METHODS) if config.quick else (Setting(), METHODS)
    try:
        results = Results.open(config.output / "methods.json", setting)
        task = quick_task(setting) if config.quick else load_task(setting)
        compare(task, setting, results, methods)
    except (assets.AssetError, lora.LoraError) as error:
        sys.exit(f"error: {error}")
    found = rows(results, methods)
    draw(found, config.output / "methods.png")
    print(f"\n{table(found)}\n\nThe picture is {config.output / 'methods.png'}.")


if __name__ == "__main__":
    main()
