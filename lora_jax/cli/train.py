"""The commands that run a model: `train`, `generate` and `eval`."""

import dataclasses
import logging
import os
import signal
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax import recipes
from lora_jax.cli import hosts
from lora_jax.cli.folders import Base, Output
from lora_jax.cli.output import say
from lora_jax.cli.run_model import is_pairs, load, load_tokenizer, read_tokens
from lora_jax.core.errors import LoraError
from lora_jax.core.text import size
from lora_jax.initialization.init import init
from lora_jax.interop.merge_checkpoint import merge_checkpoint
from lora_jax.interop.peft.save import check_peft, save_peft
from lora_jax.recipes import records
from lora_jax.recipes.compile_for import compile_for as compiled
from lora_jax.recipes.options import make_mesh, rules
from lora_jax.recipes.training_run import Data, Prepared, Reporter, Result, prepare

Examples = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
Given = Annotated[recipes.Options, tyro.conf.arg(name="")]  # without a prefix of their own
Topology = Annotated[str | None, tyro.conf.arg(metavar="NAME")]
DEFAULTS = recipes.Options()
PEFT, MERGED = "peft", "merged"


def train(
    model: Base,
    data: Examples,
    output: Output,
    /,
    options: Given = DEFAULTS,
    eval_data: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    merged: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    distributed: bool = False,
    compile_for: Topology = None,
) -> int:
    """Fine-tune a published model with LoRA, and write the adapters as HF PEFT reads them.

    The examples are JSON lines or Parquet of messages, of prompt and completion, or of text. With chosen and rejected,
    what is trained is DPO. Each option may be in a TOML or YAML file as well, --config FILE.

    It exits with 0 once all is written; with 1 after a line that says what is wrong, such as a loss that is not finite
    or a step that does not fit into the memory; with 2 for arguments that it does not have; with 130 after Ctrl-C; and
    with 143 if it was told to end, by SIGTERM or the notice of a preemption: all is saved then for --resume.

    Example: lora-jax train SmolLM2-135M-Instruct examples.jsonl runs/first --rank 16 --bits 4

    Args:
        model: a folder with config.json, safetensors and tokenizer.json.
        data: a file of examples.
        output: a new folder. In it, peft has the adapters, config.toml all settings, log.jsonl and curves.png how it
            went, and checkpoints what --resume goes on from.
        options: of the run.
        eval_data: a file of held-out examples, in the place of --eval-split.
        merged: write the model with the adapters merged, too.
        resume: go on with what is in the output folder; begin if nothing is.
        dry_run: show the plan and the memory that a step takes, and train nothing.
        distributed: be one of several processes, each of which was given this command: on the hosts of a TPU pod, under
            Slurm, Open MPI or Kubernetes; elsewhere with JAX_COORDINATOR_ADDRESS (host:port of process 0),
            JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment of each.
        compile_for: compile a step for a machine that is not there, such as v5e:4x4, say whether it fits, and train
            nothing. Of the model config.json is read, and of the data the first example, which says what is trained.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns there that a checkpoint waits for the one before
    if compile_for is not None:
        report = compiled(compile_for, model, options, pairs=is_pairs(data, options))
        print(report)
        return int(not report.fits)
    if distributed:
        _join()
    with hosts.ending_together():
        return _train(model, data, output, options, eval_data, merged, resume, dry_run)


def _train(
    model: Path,
    data: Path,
    output: Path,
    options: recipes.Options,
    eval_data: Path | None,
    merged: bool,
    resume: bool,
    dry_run: bool,
) -> int:
    """Do what `train` says, in each process."""
    options.check()
    places = {"model": str(model), "data": str(data), "output": str(output), "eval_data": str(eval_data or "")}
    hosts.check_same("the options", repr((options, places, merged, resume, dry_run)))
    now = datetime.now() if dry_run else _begin(output, options, places, resume)
    mesh, tokenizer = make_mesh(options), load_tokenizer(model, now)
    _check_adapters(model, options)
    tokens, held_out = _read(data, eval_data, tokenizer, options)
    hosts.check_same("the settings of the model", repr(recipes.read_config(model)))
    hosts.check_same("the examples", f"{tokens.fingerprint} {held_out and held_out.fingerprint}")
    loaded = load(model, options, mesh)
    if dry_run:
        _Console().begin(prepare(loaded, tokens, options))
        return 0
    with _Console() as console:
        result = recipes.finetune(loaded, tokens, held_out, output, options, console)
    if result.ended:
        _say(f"Told to end at step {result.steps}, which is saved: the same command with --resume goes on.")
        return 128 + signal.SIGTERM
    if jax.process_index() == 0:
        _write(output, model, loaded, result, merged)
    if held_out is not None and options.samples and jax.process_count() == 1:
        for sample in recipes.write_samples(loaded, result.adapters, tokenizer, held_out, options.samples):
            _say("")
            for name, text in dataclasses.asdict(sample).items():
                first, *more = text.splitlines() or [""]
                _say_lines([f"{name:7} {first}", *(f"{'':7} {line}" for line in more)])
    if result.before is not None and result.after is not None:
        _say(f"Loss of the held-out examples: {result.before:.4f} before, {result.after:.4f} at step {result.step}.")
    _say(f"Adapters are in {output / PEFT}.")
    return 0


def with_config(arguments: list[str]) -> list[str]:
    """Return the arguments of a command with those of a file, `--config FILE`, before them.

    What is given by the command line is given twice then, of which the last counts.

    >>> with_config(["inspect", "adapters"])
    ['inspect', 'adapters']
    """
    if arguments[:1] != ["train"]:
        return arguments
    given, rest = _without_config(arguments[1:])
    if given is None:
        return arguments
    values = records.read_config(Path(given))
    values.pop("date", None)  # of the run whose settings they are
    places = [values.pop(name, None) for name in ("model", "data", "output")]
    own = [i for i, text in enumerate(rest) if text.startswith("-")]
    if not rest[: own[0] if own else None]:  # none of the three is given
        if None in places:
            raise LoraError(f"{given} has not all of model, data and output: give them before the options.")
        rest = [*map(str, places), *rest]
        own = [i + 3 for i in own]
    start = own[0] if own else len(rest)
    flags = [part for name, value in values.items() for part in _flag(name, value)]
    return ["train", *rest[:start], *flags, *rest[start:]]


def _without_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the file of `--config FILE` or `--config=FILE`, and the other arguments."""
    for i, text in enumerate(arguments):
        if text == "--config":
            if i + 1 == len(arguments):
                raise LoraError("--config is the last argument: give the file after it.")
            return arguments[i + 1], [*arguments[:i], *arguments[i + 2 :]]
        if text.startswith("--config="):
            return text.removeprefix("--config="), [*arguments[:i], *arguments[i + 1 :]]
    return None, arguments


def _flag(name: str, value: Any) -> list[str]:
    """Return an option as the command line has it."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [] if value == "" else [f"--{name}={value}"]  # in one part, which may hold a hyphen at its beginning


def _join() -> None:
    """Find the other processes."""
    count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None, process_id=int(index) if index else None
        )
    except ValueError as error:  # something is missing, or no number
        raise LoraError(f"--distributed: {error}") from error


def _begin(output: Path, options: recipes.Options, places: dict[str, str], resume: bool) -> datetime:
    """Begin or go on in the output folder, on the first process, and tell the others when that was.

    Raises:
        LoraError: what is in the folder is none of this run. `hosts.ending_together` ends the others, which wait.
    """
    begun = _checked_folder(output, options, places, resume).toordinal() if jax.process_index() == 0 else 0
    if jax.process_count() > 1:
        begun = int(multihost_utils.broadcast_one_to_all(np.int32(begun)))
    return datetime.fromordinal(begun)


def _checked_folder(output: Path, options: recipes.Options, places: dict[str, str], resume: bool) -> datetime:
    """Return when the run in a folder was begun: templates that write the date of today write that one."""
    config = output / records.CONFIG
    entries = [*output.iterdir()] if output.is_dir() else []
    if entries or (output.exists() and not output.is_dir()):
        begun = records.read_date(config) if config in entries else None
        if begun is None:
            raise LoraError(f"{output} exists, and has no training run: give a new folder.")
        if entries != [config]:
            if not resume:
                raise LoraError(f"{output} has a training run: go on with it by --resume, or give another folder.")
            records.check_same(config, options, places)
            return begun
        # Settings alone are of a run that an error ended before its first step: it begins anew.
    now = datetime.now()
    records.write_config(config, options, places | {"date": now.date().isoformat()})
    return now


def _check_adapters(folder: Path, options: recipes.Options) -> None:
    """Check before anything is read that the options' adapters fit the model, and that HF PEFT has a place for them.

    Raises:
        LoraError: they could not be made, or not be saved once they are trained.
    """
    model = recipes.abstract(folder)
    plan = model.plan(rules(options, model))
    adapters = jax.eval_shape(lambda key, params: init(key, params, plan), jax.random.key(0), model.params)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), adapters)  # of no memory
    check_peft(zeros, model.key_map)


def _read(
    data: Path, eval_data: Path | None, tokenizer: recipes.Tokenizer, options: recipes.Options
) -> tuple[Data, Data | None]:
    """Return the examples as tokens, and those that are held out."""
    found = read_tokens(data, tokenizer, options, _say_lines)
    if eval_data is None:
        return recipes.hold_out(found, options.eval_split, options.seed)
    held_out = read_tokens(eval_data, tokenizer, options, _say_lines)
    if type(held_out) is not type(found):
        raise LoraError(f"{eval_data} has examples of another kind than {data}.")
    return found, held_out


def _write(output: Path, folder: Path, model: recipes.Model, result: Result, merged: bool) -> None:
    """Write what others read: the adapters, the picture, and the merged model."""
    adapters = jax.device_get(result.adapters)
    save_peft(output / PEFT, adapters, model.key_map, base_model=str(folder), task_type="CAUSAL_LM")
    records.draw_curves(result.log, output / records.CURVES)
    if merged and not (output / MERGED).exists():  # which a run that was ended already may have
        merge_checkpoint(folder, output / PEFT, output / MERGED)


# What is printed ------------------------------------------------------------------------------------------------------


class _Console(Reporter):
    """A line for the plan and the memory, then a bar with what was measured last; on the first process alone."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]step"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            disable=jax.process_index() != 0,
        )
        self._loss: float | None = None
        self._held_out = ""

    def __enter__(self) -> "_Console":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, run: Prepared) -> None:
        table = run.plan.table(advice=False)  # of which no option of the command takes any
        _say_lines([*table.splitlines(), "", *str(run.memory).splitlines(), "", str(run.batches)])
        self._task = self._progress.add_task("", total=run.steps, shown="")

    def line(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            self._loss = line["loss"] if self._loss is None else 0.9 * self._loss + 0.1 * line["loss"]
        else:
            self._held_out = f" held out {line[records.MEASURE]:.3f}"
        shown = self._held_out
        if "loss" in line:
            speed = line["tokens"] / line["seconds"]
            shown = f"loss {self._loss:.3f}{shown} lr {line['lr']:.1e} {speed:,.0f} tokens/s"
            if line["memory"]:
                shown += f" {size(line['memory'])}"
        self._progress.update(self._task, completed=line["step"], shown=shown)

    def failed(self, error: BaseException) -> None:
        hosts.tell(error)


def _say(text: str) -> None:
    """Print a line, on the first process alone."""
    if jax.process_index() == 0:
        say(text)


def _say_lines(lines: Iterable[str]) -> None:
    for line in lines:
        _say(line)
