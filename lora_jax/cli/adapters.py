"""The commands that take adapters: `inspect`, `verify` and `convert`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lora_jax import checkpoint
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.analysis.inspection import Inspection, WeightSummary
from lora_jax.analysis.inspection import inspect as inspected
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.cli.folders import Adapters, NameOptions, Names, Output, Step, for_files, read_adapters, table_of
from lora_jax.cli.output import draw_spectra, print_json, print_table, say
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.text import printable
from lora_jax.interop.merge_checkpoint import check_checkpoint
from lora_jax.interop.peft.dtypes import in_fp32
from lora_jax.interop.peft.save import save_peft
from lora_jax.interop.peft.tied_tables import Tied

NO_NAMES = Names()


def inspect(
    adapters: Adapters,
    /,
    plot: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None,
    step: Step = None,
    json: bool = False,
) -> int:
    """Show the rank and scale of adapters, and the norm and effective rank of each weight's change.

    Example: lora-jax inspect runs/sentiment/adapters --plot deltas.png

    Args:
        adapters: a folder of lora_jax.checkpoint.save, of lora_jax.Checkpoints, or of HF PEFT.
        plot: also draw the norms and effective ranks as bars, into this PNG.
        step: of a folder of Checkpoints: which one, by default the newest.
        json: print JSON instead of the table.
    """
    found = _summary(adapters, step)
    if plot is not None:
        draw_spectra(list(found.values()), plot)
    if json:
        print_json([_as_json(weight) for weight in found.values()])
    else:
        print_table(*found.rows(), right=5)
        say(found.summary())
    return 0


def verify(
    adapters: Adapters,
    /,
    base: Annotated[Path | None, tyro.conf.arg(metavar="BASE")] = None,
    tied: Tied = "refuse",
    names: NameOptions = NO_NAMES,
    step: Step = None,
    json: bool = False,
) -> int:
    """Check that adapters are sound: finite, with an effect, and fitting a base. Exits with 1 if not.

    Example: lora-jax verify runs/sentiment/peft --base MiniLM-L6

    Args:
        adapters: a folder of lora_jax.checkpoint.save, of lora_jax.Checkpoints, or of HF PEFT.
        base: a folder with the base's safetensors: each adapter needs its tensor there.
        tied: as of `merge`, for a base with one tensor for the table of tokens and the head.
        step: of a folder of Checkpoints: which one, by default the newest.
        json: print JSON instead of text.
    """
    problems = [
        printable(f"{path}: {problem}")
        for path, weight in _summary(adapters, step).items()
        if (problem := _problem(weight))
    ]
    if base is not None:
        given, table, others = for_files(adapters, names, step)
        try:
            check_checkpoint(base, given, table, others=others, tied=tied)
        except LoraError as error:
            problems.append(str(error))
    if json:
        print_json({"sound": not problems, "problems": problems})
    else:
        print("\n".join(problems) or printable(f"{adapters} is sound."))
    return 1 if problems else 0


def convert(
    adapters: Adapters,
    output: Output,
    /,
    to: Literal["peft", "vllm", "loralib", "orbax"] = "peft",
    names: NameOptions = NO_NAMES,
    tied: Tied = "refuse",
    step: Step = None,
    json: bool = False,
) -> int:
    """Write adapters in another format.

    Example: lora-jax convert runs/llama/adapters for-vllm --to vllm --key-map llama --stacked

    Args:
        adapters: a folder of lora_jax.checkpoint.save, of lora_jax.Checkpoints, or of HF PEFT.
        output: a new folder.
        to: HF PEFT; the part of it that vLLM reads (one rank, one scale); loralib's names; or the orbax folder of
            lora_jax.checkpoint, in which adapters from PEFT have its module names as their paths.
        tied: "both" writes an adapter of the table of tokens for the head too, for programs that have one table.
        step: of a folder of Checkpoints: which one, by default the newest.
        json: print JSON instead of text.
    """
    check_target(output, None)
    contents = read_adapters(adapters, step)
    found, others = contents.adapters, contents.others
    if to == "orbax":
        if contents.key_map is not None:  # from which training goes on
            found, others = in_fp32((found, others))
        checkpoint.save(output, found, others)
    else:
        save_peft(output, found, table_of(adapters, contents, names), others=others, profile=to, tied=tied)
    return print_written(output, found, json)


# What they share ------------------------------------------------------------------------------------------------------


def print_written(output: Path, adapters: Mapping[str, Adapter], as_json: bool) -> int:
    """Print where adapters were written, and return the exit code."""
    if as_json:
        ranks = {path: one.a.shape[-1] if isinstance(one, LoraAdapter) else None for path, one in adapters.items()}
        print_json({"output": str(output), "ranks": ranks})
    else:
        say(f"{len(adapters)} adapters written to {output}.")
    return 0


def _summary(folder: Path, step: int | None) -> Inspection:
    """Return what there is to say of a folder's adapters, with the kinds of torch's modules where it has them."""
    contents = read_adapters(folder, step)
    kinds = contents.kinds
    found = inspected(contents.adapters)
    weights = {path: dataclasses.replace(one, kind=kinds.get(path, one.kind)) for path, one in found.items()}
    return Inspection(weights)


def _problem(weight: WeightSummary) -> str | None:
    """Return what is wrong with an adapter; None if nothing is."""
    if not weight.finite:
        return "holds a NaN or an infinity"
    return "does not change anything" if weight.norm == 0 else None


def _as_json(weight: WeightSummary) -> dict[str, object]:
    facts = dataclasses.asdict(weight)
    spectrum = {name: facts[name] for name in ("norm", "effective_rank", "finite")}
    names = ("kind", "shape", "matrices", "rank", "scale")
    return {"weight": weight.path, **{name: facts[name] for name in names}, "spectrum": spectrum}
