"""`lora-jax train` beside transformers and HF PEFT on torch: the losses of the same steps, and the time of one.

Both begin with the same adapters and take the same packed rows in the same order, in fp32, with AdamW of the same
settings and the same schedule. All else is their own: the model's code, masks, loss, derivatives and optimizer.

    pip install '.[cli,interop]'
    python examples/smollm2_folder.py SmolLM2-135M-Instruct headlines.jsonl
    python benchmarks/beside_peft.py SmolLM2-135M-Instruct headlines.jsonl    # the tables of docs/train.md
    taskset -c 0 python benchmarks/beside_peft.py ...                         # on one core: where others are busy too
    python benchmarks/beside_peft.py --tiny                                   # a small random model: no measurement
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import peft
import torch
import transformers as hf
import tyro

import lora_jax as lora
from lora_jax.core.text import format_table
from lora_jax.recipes.tokens import Tokenized
from lora_jax.recipes.training_run import prepare

Batch = dict[str, np.ndarray]  # from `packed_batches`
Inputs = dict[str, torch.Tensor]  # of a model of transformers
Step = tuple[float, float]  # the loss, and the norm of its gradient
Seconds = tuple[float, float]  # by the clock, and of CPU time
OURS, PLAIN, RECOMPUTED = "lora-jax train", "transformers + PEFT", "with gradient checkpointing"
NOT_LEARNED = -100  # the label of a token that counts for no loss
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Config:
    """Train with both, and compare."""

    model: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    data: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    steps: int = 20  # each of them timed
    recompute: bool = True  # also time transformers with its layers computed again in the backward pass, as here
    threads: int = len(os.sched_getaffinity(0))  # of torch, by default one for each core that there is; so it is in JAX
    tiny: bool = False  # small sizes, a random model and random tokens, to see that all works
    options: lora.recipes.Options = field(
        # Without a warm-up, whose first rate is 0 in transformers and not here.
        default_factory=lambda: lora.recipes.Options(
            rank=8, alpha=16, lr=1e-3, warmup=0.0, max_length=512, batch_tokens=1024, dtype="float32", epochs=1
        )
    )


# The same batches, for torch ------------------------------------------------------------------------------------------


def packed_inputs(batch: Batch) -> Inputs:
    """Return packed rows as they are: transformers sees by positions that start again where another text begins."""
    labels = torch.from_numpy(np.where(batch["weights"] > 0, batch["targets"], NOT_LEARNED).astype(np.int64))
    ids, positions = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("ids", "positions"))
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "shift_labels": labels}


def padded_inputs(batch: Batch) -> Inputs:
    """Return each text of packed rows in a row of its own, as transformers takes texts that nobody packed."""
    texts = []
    for row in range(len(batch["ids"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            ids, targets, learned = (batch[name][row][here] for name in ("ids", "targets", "weights"))
            whole = np.append(ids, targets[-1])
            texts.append((whole, np.append(NOT_LEARNED, np.where(learned > 0, targets, NOT_LEARNED))))
    longest = max(len(ids) for ids, _ in texts)
    shape = len(texts), longest
    ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, NOT_LEARNED, np.int64)
    for i, (own, its) in enumerate(texts):
        ids[i, : len(own)], mask[i, : len(own)], labels[i, : len(own)] = own, 1, its
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in found.items()}


class TorchRun:
    """A training run of transformers and HF PEFT, as users write it.

    Args:
        model: a folder.
        adapters: the folder of those that it begins with.
        options: of the run; lr, schedule, warmup, weight_decay and clip are read.
        steps: of the schedule.
        attention: how transformers computes it.
        recompute: whether layers are computed again in the backward pass.
    """

    def __init__(
        self,
        model: Path,
        adapters: Path,
        options: lora.recipes.Options,
        steps: int,
        attention: str = "sdpa",
        recompute: bool = False,
    ) -> None:
        base = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention)
        base.config.use_cache = False  # with one, texts of a row are not told apart
        self.model = peft.PeftModel.from_pretrained(base, adapters, is_trainable=True).train()
        if recompute:
            self.model.enable_input_require_grads()
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, options.lr, weight_decay=options.weight_decay, fused=True)
        up = round(options.warmup * steps)
        self.schedule = hf.get_scheduler(options.schedule, self.optimizer, up, steps)
        self.clip = options.clip or float("inf")

    def step(self, inputs: Inputs) -> Step:
        """Take a step, and return the loss and the norm of its gradient."""
        loss = self.model(**inputs).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()


# The comparison -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def task(config: Config) -> Iterator[tuple[Path, Tokenized]]:
    """The folder of a model, and examples as tokens."""
    if not config.tiny:
        if config.model is None or config.data is None:
            raise SystemExit("error: give a model's folder and a file of examples, or --tiny.")
        tokenizer = lora.recipes.Tokenizer.load(config.model)
        examples = lora.recipes.read_examples(config.data)
        yield config.model, lora.recipes.tokenized(examples, tokenizer, config.options.max_length)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, initializer_range=0.3)).save_pretrained(folder)
        yield Path(folder), random_tokens(40, TINY["vocab_size"], config.options.max_length)


def random_tokens(examples: int, vocabulary: int, longest: int) -> Tokenized:
    """Return examples of random tokens; the first third of each is not learned."""
    random = np.random.default_rng(0)
    lengths = random.integers(4, longest, examples, endpoint=True) + 1
    learned = [np.arange(n) >= n // 3 for n in lengths]
    ids = random.integers(0, vocabulary, lengths.sum(), np.int32)
    return Tokenized(ids, np.concatenate(learned), np.append(0, np.cumsum(lengths)))


def compare(config: Config, folder: Path, tokens: Tokenized) -> None:
    """Take the steps with each in turn, and print losses and times."""
    options = replace(config.options, max_steps=config.steps)
    model = lora.recipes.load(folder, options.dtype, bits=options.bits)
    run = prepare(model, tokens, options)
    state = run.state
    with tempfile.TemporaryDirectory() as start:
        lora.save_peft(start, state.trainable, model.key_map, base_model=str(folder), task_type="CAUSAL_LM")
        of_torch = {PLAIN: TorchRun(folder, Path(start), options, run.steps)}
        if config.recompute:
            of_torch[RECOMPUTED] = TorchRun(folder, Path(start), options, run.steps, recompute=True)

    def ours(batch: Batch) -> Step:
        nonlocal state
        state, metrics = run.step(state, model.params, jax.device_put(batch))
        return float(metrics["loss"]), float(metrics["grad_norm"])

    def theirs(one: TorchRun) -> Callable[[Batch], Step]:
        return lambda batch: one.step(packed_inputs(batch))

    programs = {OURS: ours, **{name: theirs(one) for name, one in of_torch.items()}}
    found: dict[str, list[Step]] = {name: [] for name in programs}
    seconds: dict[str, list[Seconds]] = {name: [] for name in programs}
    for _, batch in zip(range(run.steps), run.batches, strict=False):
        for name, program in programs.items():
            clocks = time.perf_counter(), time.process_time()
            found[name].append(program(batch))
            seconds[name].append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
    print(f"\n{loss_table(np.array(found[OURS]), np.array(found[PLAIN]))}\n")
    print(time_table({name: np.array(own[1:]) for name, own in seconds.items()}))  # the first has more to do


def loss_table(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Say the loss of each step, and how far losses and norms of gradients are apart; [steps, 2] each."""
    losses, norms = (ours - theirs)[:, 0], (ours / theirs - 1)[:, 1]
    rows = [
        [str(n), f"{one:.6f}", f"{other:.6f}", f"{apart:+.1e}", f"{norm:+.1e}"]
        for n, (one, other, apart, norm) in enumerate(zip(ours[:, 0], theirs[:, 0], losses, norms, strict=True), 1)
    ]
    header = ["step", OURS, PLAIN, "loss apart", "gradient's norm apart"]
    most = f"Losses are at most {abs(losses).max():.1e} apart, and norms of gradients {abs(norms).max():.1e} of them."
    return f"{format_table(header, rows, right=0)}\n{most}"


def time_table(seconds: dict[str, np.ndarray]) -> str:
    """Say the median time of a step, and of its ratio to that of the first program, which came just before."""
    first, *_ = seconds.values()
    rows = []
    for name, own in seconds.items():
        (took, cpu), (ratio, of_cpu) = np.median(own, 0), np.median(own / first, 0)
        rows.append([name, f"{took:.2f} s", f"{ratio:.2f}", f"{cpu:.2f} s", f"{of_cpu:.2f}"])
    return format_table(["a step", "median", f"of {OURS}", "of CPU time", f"of {OURS}"], rows, right=1)


def main(config: Config) -> None:
    if config.tiny:
        small = replace(config.options, rank=2, alpha=4, lr=1e-2, max_length=16, batch_tokens=32, epochs=4)
        config = replace(config, options=small)
    torch.set_num_threads(config.threads)
    with task(config) as (folder, tokens):
        rows, length = config.options.rows, config.options.max_length
        print(f"{rows} rows of {length} tokens, fp32, torch with {config.threads} threads.")
        versions = {"JAX": jax, "torch": torch, "transformers": hf, "PEFT": peft}
        print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()))
        compare(config, folder, tokens)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
