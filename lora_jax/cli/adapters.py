"""The commands that look at adapters: `inspect` and `verify`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from lora_jax.analysis.inspection import Inspection, WeightSummary
from lora_jax.analysis.inspection import inspect as inspected
from lora_jax.cli.folders import NO_NAMES, Adapters, Component, Model, NameOptions, Step, for_files, read_adapters
from lora_jax.cli.output import draw_spectra, print_json, print_table, say
from lora_jax.core.errors import LoraError
from lora_jax.core.text import printable
from lora_jax.interop.conversions import About
from lora_jax.interop.merge_checkpoint import check_checkpoint
from lora_jax.interop.peft.tied_tables import Tied


def inspect(
    adapters: Adapters,
    /,
    plot: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None,
    base: Model = None,
    component: Component = "unet",
    step: Step = None,
    json: bool = False,
) -> int:
    """Show the rank and scale of adapters, and the norm and effective rank of each weight's change.

    Example: lora-jax inspect runs/sentiment/adapters --plot deltas.png

    Args:
        adapters: a folder of lora_jax.checkpoint.save, of lora_jax.Checkpoints, of HF PEFT or of mlx-lm; a GGUF; or
            a file of safetensors for image models.
        plot: also draw the norms and effective ranks as bars, into this PNG.
        base: the folder of the model, for GGUF and files of image models.
        component: of an image model, whose adapters are shown.
        step: of a folder of Checkpoints: which one, by default the newest.
        json: print JSON instead of the table.
    """
    found = _summary(adapters, step, About(base, component))
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
    base: Model = None,
    tied: Tied = "refuse",
    component: Component = "unet",
    names: NameOptions = NO_NAMES,
    step: Step = None,
    json: bool = False,
) -> int:
    """Check that adapters are sound: finite, with an effect, and fitting a base. Exits with 1 if not.

    Example: lora-jax verify runs/sentiment/peft --base MiniLM-L6

    Args:
        adapters: a folder of lora_jax.checkpoint.save, of lora_jax.Checkpoints, of HF PEFT or of mlx-lm; a GGUF; or
            a file of safetensors for image models.
        base: a folder with the base's safetensors: each adapter needs its tensor there.
        tied: as of `merge`, for a base with one tensor for the table of tokens and the head.
        component: of an image model, whose adapters are checked.
        step: of a folder of Checkpoints: which one, by default the newest.
        json: print JSON instead of text.
    """
    about = About(base, component)
    problems = [
        printable(f"{path}: {problem}")
        for path, weight in _summary(adapters, step, about).items()
        if (problem := _problem(weight))
    ]
    if base is not None:
        given, table, others = for_files(adapters, names, step, about)
        try:
            check_checkpoint(base, given, table, others=others, tied=tied)
        except LoraError as error:
            problems.append(str(error))
    if json:
        print_json({"sound": not problems, "problems": problems})
    else:
        print("\n".join(problems) or printable(f"{adapters} is sound."))
    return 1 if problems else 0


# What they share ------------------------------------------------------------------------------------------------------


def _summary(path: Path, step: int | None, about: About) -> Inspection:
    """Return what there is to say of adapters, with the kinds of torch's modules where the files have them."""
    contents = read_adapters(path, step, about)
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
