"""The command that writes adapters in another format: `convert`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lora_jax import checkpoint
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.cli.folders import (
    NO_NAMES,
    OWN,
    Adapters,
    Component,
    Contents,
    Model,
    NameOptions,
    Names,
    Output,
    Step,
    format_in,
    read_adapters,
    read_modules,
    table_of,
)
from lora_jax.cli.output import print_json, say
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.text import printable
from lora_jax.interop.conversions import FORMATS, About, fitted
from lora_jax.interop.module_adapters import ModuleAdapters, module_adapters
from lora_jax.interop.peft.dtypes import in_fp32
from lora_jax.interop.peft.save import save_peft
from lora_jax.interop.peft.tied_tables import Tied

From = Literal["peft", "gguf", "mlx", "kohya", "orbax"]
To = Literal["peft", "vllm", "vllm-by-expert", "sglang", "loralib", "gguf", "mlx", "kohya", "diffusers", "orbax"]


def convert(
    adapters: Adapters,
    output: Output,
    /,
    to: To = "peft",
    source: Annotated[From | None, tyro.conf.arg(name="from")] = None,
    base: Model = None,
    component: Component = "unet",
    names: NameOptions = NO_NAMES,
    tied: Tied = "refuse",
    step: Step = None,
    json: bool = False,
) -> int:
    """Write adapters in another format.

    Example: lora-jax convert runs/llama/peft llama.gguf --to gguf --base Llama-3.2-1B

    Args:
        adapters: a folder of lora_jax.checkpoint.save, of lora_jax.Checkpoints, of HF PEFT or of mlx-lm; a GGUF; or a
            file of safetensors of sd-scripts, LyCORIS, ComfyUI or diffusers.
        output: a new folder, or a new file for gguf, kohya and diffusers.
        to: HF PEFT; the parts of it that vLLM and SGLang read (one rank, one scale; vllm-by-expert for models that vLLM
            has with modules of each expert); loralib's names; gguf for
            llama.cpp and Ollama; mlx for mlx-lm; kohya for sd-scripts and ComfyUI; diffusers; or the orbax folder of
            lora_jax.checkpoint, in which adapters that name their modules have these names as their paths.
        source: the format of ADAPTERS, where the files do not tell it.
        base: the folder of the model: gguf needs it, and files of image models, whose names have lost their dots.
        component: of an image model: unet, transformer, text_encoder, text_encoder_2 or text_encoder_3.
        tied: "both" writes an adapter of the table of tokens for the head too, for programs that have one table.
        step: of a folder of Checkpoints: which one, by default the newest.
        json: print JSON instead of text.
    """
    _check_output(output, to)
    about = About(base, component)
    kind = format_in(adapters, step, source)
    found = None
    if kind != OWN and to in FORMATS and tied == "refuse":
        names.refuse(adapters)
        found = read_modules(adapters, kind, about)
    if found is None:
        contents = read_adapters(adapters, step, about, kind)
        return _convert_in_memory(adapters, contents, output, to, about, names, tied, json)
    _write_modules(output, found, to, about)
    return print_written(output, _ranks(found), json)


def _convert_in_memory(
    adapters: Path, contents: Contents, output: Path, to: To, about: About, names: Names, tied: Tied, json: bool
) -> int:
    """Convert what has to be read as a whole: folders of orbax, and those of PEFT with more than modules."""
    found, others = contents.adapters, contents.others
    if to == OWN:
        if contents.key_map is not None:  # from which training goes on
            found, others = in_fp32((found, others))
        checkpoint.save(output, found, others)
    elif to in ("peft", "vllm", "vllm-by-expert", "sglang", "loralib"):
        save_peft(output, found, table_of(adapters, contents, names), others=others, profile=to, tied=tied)
    else:
        if others or tied != "refuse":
            what = printable(f"others ({next(iter(others))!r})" if others else f"tied={tied!r}")
            raise LoraError(f"files for {to} have no place for {what}: merge instead, or write --to peft.")
        table = table_of(adapters, contents, names)
        _write_modules(output, module_adapters("convert", found, table, formats=FORMATS[to].kinds), to, about)
    return print_written(output, ranks_of(found), json)


def _write_modules(output: Path, found: ModuleAdapters, to: str, about: About) -> None:
    write = FORMATS[to].write
    assert write is not None  # all that `To` has can be written
    write(output, fitted(found, to), about)


def _check_output(output: Path, to: str) -> None:
    """Raise if the output is there already, or has a name by which the programs of its format do not find it."""
    ending = FORMATS[to].ending if to in FORMATS else None
    if ending is None:
        check_target(output, None)
    elif os.path.lexists(output):
        raise LoraError(f"{output} exists; it is left as it is. Give another path.")
    elif output.suffix != ending:
        raise LoraError(
            f"{output}: {to} is one file, whose name ends in {ending}, by which programs find it: write to "
            f"{output.with_name(output.name + ending)}."
        )


def _ranks(found: ModuleAdapters) -> dict[str, int | None]:
    """Return the rank of each module that is a LoRA; of experts, that of each."""
    return {
        name: len(module.arrays["a"]) // found.experts.get(name, 1) if found.format.is_low_rank else None
        for name, module in found.outlines.items()
    }


def ranks_of(adapters: Mapping[str, Adapter]) -> dict[str, int | None]:
    """Return the rank of each adapter that is a LoRA."""
    return {path: one.a.shape[-1] if isinstance(one, LoraAdapter) else None for path, one in adapters.items()}


def print_written(output: Path, ranks: Mapping[str, int | None], as_json: bool) -> int:
    """Print where adapters were written, and return the exit code."""
    if as_json:
        print_json({"output": str(output), "ranks": dict(ranks)})
    else:
        say(f"{len(ranks)} adapters written to {output}.")
    return 0
