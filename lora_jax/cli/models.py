"""The commands that take published weights: `merge`, `plan` and `diff`."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.analysis.differences import compare
from lora_jax.analysis.spectrum import low_rank
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.cli.convert import print_written, ranks_of
from lora_jax.cli.folders import NO_NAMES, Adapters, Base, Component, NameOptions, Output, Step, Tuned, for_files
from lora_jax.cli.output import print_json, print_table, progress_bar, say
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.core.text import count, printable, size
from lora_jax.interop.conversions import About
from lora_jax.interop.entries import Entry
from lora_jax.interop.gguf.merged import merge_gguf
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.merge_checkpoint import Tensors, merge_checkpoint, read_tensors
from lora_jax.interop.merge_quantized import merge_quantized
from lora_jax.interop.merge_rows import Survival
from lora_jax.interop.model_config import model_facts
from lora_jax.interop.name_templates import literal
from lora_jax.interop.peft.save import save_peft
from lora_jax.interop.peft.tied_tables import Tied
from lora_jax.interop.safetensors_index import Tensor


def merge(
    base: Base,
    adapters: Adapters,
    output: Output,
    /,
    to: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "as_it_is",
    tied: Tied = "refuse",
    component: Component = "unet",
    names: NameOptions = NO_NAMES,
    step: Step = None,
    json: bool = False,
) -> int:
    """Merge adapters into the weights of a Hugging Face model on disk, in little memory.

    Example: lora-jax merge MiniLM-L6 runs/sentiment/peft merged

    Args:
        base: a folder with model.safetensors, or an index and its shards.
        adapters: a folder of HF PEFT, of lora_jax.checkpoint.save, of lora_jax.Checkpoints or of mlx-lm; a GGUF; or a
            file of safetensors for image models.
        output: a new folder for the merged model.
        to: what the merged weights are written in: as_it_is in the base; the linear layers in fp8 or int8, with a scale
            for each output, or fp8_block, for each 128 x 128 numbers, as vLLM reads them; bf16, of a base that is
            published in few bits; or one file for llama.cpp, which needs the package gguf: gguf:q8_0, gguf:bf16,
            gguf:f16, gguf:f32.
        tied: of adapters of the table of tokens alone, where the base has one tensor for it and the head: refuse them;
            untie, which writes a head of its own; or change both.
        component: of an image model, whose adapters are merged; BASE is its folder.
        step: of a folder of Checkpoints: which one, by default the newest.
        json: print the rounding loss of each tensor as JSON; with --to, and how much is kept of its change.
    """
    given, table, others = for_files(adapters, names, step, About(base, component))
    if to != "as_it_is":
        with progress_bar("merging") as progress:
            if to.startswith("gguf:"):
                dtype = to.removeprefix("gguf:")
                found = merge_gguf(base, given, output, table, dtype=dtype, others=others, tied=tied, progress=progress)
            else:
                found = merge_quantized(base, given, output, table, to=to, others=others, tied=tied, progress=progress)
        return _print_survival(found, output, json)
    with progress_bar("merging") as progress:
        losses = merge_checkpoint(
            base, target=output, adapters=given, key_map=table, others=others, tied=tied, progress=progress
        )
    if json:
        print_json(losses)
        return 0
    worst = sorted(losses.items(), key=lambda item: (-item[1], item[0]))[:5]
    print_table(["most is lost to rounding in", "of the change"], [[n, f"{x:.2%}"] for n, x in worst], right=1)
    say(f"{len(losses)} tensors merged into {output}.")
    return 0


def _print_survival(found: Mapping[str, Survival], output: Path, as_json: bool) -> int:
    """Print what is left of the changes of the tensors, and return the exit code."""
    if as_json:
        print_json({name: survival._asdict() for name, survival in found.items()})
        return 0
    least = sorted(found.items(), key=lambda item: (item[1].kept, item[0]))[:5]
    rows = [[name, f"{own.kept:.2%}", f"{own.loss:.2f}"] for name, own in least]
    print_table(["least is kept in", "of the change", "noise over change"], rows, right=2)
    say(f"{len(found)} tensors merged into {output}.")
    return 0


def plan(base: Base, /, modules: str, rank: int = 8, json: bool = False) -> int:
    """Show what adapters for some modules of a model would cost: parameters, memory, and FLOPs for each token.

    Example: lora-jax plan SmolLM2-135M --modules ".*self_attn.*" --rank 16

    Args:
        base: a folder with model.safetensors, or an index and its shards. Only the headers are read.
        modules: a regular expression for whole names of modules, as model.layers.0.self_attn.q_proj.
        rank: of the adapters.
        json: print JSON instead of the table.
    """
    places = read_tensors(base).places
    rows: list[dict[str, Any]] = []
    for module in _modules(base, places, modules):
        shape = places[f"{module}.weight"].shape
        if rank > min(shape):
            raise LoraError(
                f"{printable(module)} of shape {list(shape)}: rank {rank} is above {min(shape)}, give it at most that."
            )
        rows.append(
            {"module": module, "shape": list(shape), "parameters": rank * sum(shape), "flops": 2 * rank * sum(shape)}
        )
    if json:
        print_json(rows)
        return 0
    cells = [
        [r["module"], r["shape"], f"{r['parameters']:,}", size(4 * r["parameters"]), count(r["flops"])] for r in rows
    ]
    print_table(["module", "shape", "parameters", "bytes", "FLOPs a token"], cells, right=3)
    total, whole = sum(r["parameters"] for r in rows), sum(int(np.prod(place.shape)) for place in places.values())
    print(
        f"{len(rows)} modules: {total:,} parameters beside {whole:,} ({total / (total + whole):.2%}), "
        f"{size(4 * total)}."
    )
    return 0


def diff(
    before: Base,
    after: Tuned,
    output: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUTPUT]")] = None,
    /,
    rank: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    energy: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None,
    modules: str = r".*",
    rest: bool = False,
    json: bool = False,
) -> int:
    """Show what changed between two versions of a model, or extract it: the adapters that are nearest to the change.

    Without an output, lora-jax diff base tuned, it shows by how much each tensor changed and with which rank.

    Example: lora-jax diff base tuned adapters --rank 16

    Args:
        before: a folder with safetensors.
        after: the same model with other weights.
        output: a new folder of HF PEFT, for the adapters.
        rank: of the adapters.
        energy: or the share of each change's squared norm to hold, such as 0.95, with as small a rank as that takes.
        modules: a regular expression for whole names of the modules that get adapters, if they changed.
        rest: go on if other tensors changed too, though the adapters lack their changes.
        json: print JSON instead of the table.
    """
    if output is None:
        if rank is not None or energy is not None or rest:
            raise LoraError("--rank, --energy and --rest are for adapters: give the folder to write them to.")
        return _show(before, after, modules, json)
    check_target(output, None)
    old, new = read_tensors(before), read_tensors(after)
    if list(old) != list(new) and sorted(old) != sorted(new):
        other = sorted(set(old) ^ set(new))[0]
        raise LoraError(f"only one of {before} and {after} has {other!r}: they are not versions of one model.")
    kind = "conv1d" if model_facts(before).get("model_type") == "gpt2" else "linear"
    chosen = dict.fromkeys(_modules(before, old.places, modules))
    entries, adapters, rows, left = [], {}, [], []
    for name, change in _changes(before, after, old, new):
        module = name.removesuffix(".weight")
        if module not in chosen:
            left.append(name)
            continue
        a, b, share = low_rank(change if kind == "conv1d" else change.T, rank, energy)
        entries.append(Entry(literal(module), literal(module), "in out", kind))
        adapters[module] = LoraAdapter(jnp.asarray(a), jnp.asarray(b), KernelAxes((), (0,), (1,)), 1.0)
        rows.append([module, list(change.shape), a.shape[1], f"{share:.2%}"])
    if left and not rest:
        raise LoraError(f"{len(left)} other tensors changed too, {left[0]!r} first. To go on without them: --rest.")
    if not adapters:
        raise LoraError(f"no module that {modules!r} matches has changed.")
    save_peft(output, adapters, KeyMap(*entries))
    if not json:
        print_table(["module", "shape", "rank", "of the change"], rows, right=2)
    return print_written(output, ranks_of(adapters), json)


def _show(before: Path, after: Path, modules: str, as_json: bool) -> int:
    """Print what changed in the tensors of these modules, and return the exit code."""
    matches = _regular(modules).fullmatch
    old, new = (
        Tensors(folder, {name: place for name, place in read_tensors(folder).places.items() if matches(_module(name))})
        for folder in (before, after)
    )
    found = compare(old, new)
    if not (found or found.unchanged or found.mismatches):
        raise LoraError(f"{modules!r} matches no module of {before}; a pattern stands for a whole name.")
    if as_json:
        changes = {path: dataclasses.asdict(change) for path, change in found.items()}
        print_json({"changes": changes, "unchanged": found.unchanged, "mismatches": found.mismatches})
        return 0
    if found:
        print_table(*found.rows(), right=5)
    print(found.summary())
    return 0


# What they share ------------------------------------------------------------------------------------------------------


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _regular(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LoraError(f"{pattern!r} is no regular expression: {error}.") from error


def _modules(base: Path, places: Mapping[str, Tensor], pattern: str) -> list[str]:
    """Return the modules that have a matrix and whose whole name matches.

    Raises:
        LoraError: there are none, or the pattern is no regular expression.
    """
    matches = _regular(pattern).fullmatch
    matrices = [name.removesuffix(".weight") for name, place in places.items()
                if name.endswith(".weight") and len(place.shape) == 2]  # fmt: skip
    found = [module for module in matrices if matches(module)]
    if not found:
        raise LoraError(
            f"{pattern!r} matches no module of {base} with a matrix; a pattern stands for a whole name, and the "
            f"nearest are {', '.join(nearest(pattern, matrices, n=3)) or 'none'}."
        )
    return found


def _changes(
    before: Path, after: Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the name and the change in fp32 of each tensor that differs."""
    for name in old:
        w0, w1 = (np.asarray(tensors[name], np.float32) for tensors in (old, new))
        if w0.shape != w1.shape:
            raise LoraError(f"{name!r} has shape {list(w0.shape)} in {before}, and {list(w1.shape)} in {after}.")
        if not np.array_equal(w0, w1):
            yield name, w1 - w0
