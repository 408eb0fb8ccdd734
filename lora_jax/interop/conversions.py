"""The formats that adapters are converted between, and what tells whose files they are."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.core.untrusted import open_file
from lora_jax.interop.gguf.file import MAGIC
from lora_jax.interop.gguf.read import read_gguf
from lora_jax.interop.gguf.write import write_gguf
from lora_jax.interop.image import reader as image_reader
from lora_jax.interop.image.writers import DIFFUSERS_FORMATS, KOHYA_FORMATS, write_diffusers, write_kohya
from lora_jax.interop.mlx import write as mlx_write
from lora_jax.interop.mlx.read import read_mlx
from lora_jax.interop.module_adapters import ModuleAdapters, by_module, mapped, module_adapters
from lora_jax.interop.peft import files
from lora_jax.interop.peft.common_rank import one_rank_for_all
from lora_jax.interop.peft.formats.format import Module
from lora_jax.interop.peft.formats.registry import FORMATS as PEFT_FORMATS
from lora_jax.interop.peft.formats.registry import LORA
from lora_jax.interop.peft.profiles import of_rank
from lora_jax.interop.peft.save import save_peft
from lora_jax.interop.peft_modules import read_peft, write_peft
from lora_jax.interop.safetensors_index import header


class About(NamedTuple):
    """What the files of some formats leave out of the model that their adapters are for."""

    base: Path | None = None  # its folder
    component: str = "unet"  # of an image model


Server = Literal["vllm", "vllm-by-expert", "sglang"]  # profiles of `save_peft`
SERVERS: tuple[Server, ...] = get_args(Server)
Read = Callable[[Path, About], ModuleAdapters | None]
Write = Callable[[Path, ModuleAdapters, About], None]


class FileFormat(NamedTuple):
    """A format of files, read and written one module at a time."""

    kinds: tuple[str, ...]  # names of `peft.formats` that it has a place for; others are written as the LoRA they are
    ending: str | None = None  # of the name, where it is one file and no folder
    is_of: Callable[[Path], bool] | None = None  # whether a path holds such adapters; None if they are not told apart
    read: Read | None = None  # returns None where adapters have to be read as a whole
    write: Write | None = None


def fitted(found: ModuleAdapters, to: str) -> ModuleAdapters:
    """Return adapters in a kind that a format has a place for: as they are, or as the LoRA that they are.

    Raises:
        LoraError: they are none.
    """
    if found.format.name in FORMATS[to].kinds:
        return found
    return module_adapters(f"a file for {to}", *by_module(found), formats=FORMATS[to].kinds)


def format_of(path: Path) -> str | None:
    """Return the format of a file or a folder, a key of `FORMATS`; None if it is none of these."""
    return next((name for name, own in FORMATS.items() if own.is_of is not None and own.is_of(path)), None)


# What tells a format -------------------------------------------------------------------------------------------------


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with open_file(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def _is_image(path: Path) -> bool:
    file = image_reader.file_of(path)
    return file.is_file() and file.suffix == image_reader.ENDING


# How each is read and written -----------------------------------------------------------------------------------------


def _read_image(path: Path, about: About) -> ModuleAdapters:
    """Read one component, by the modules of its model where that is at hand: dots are underscores in most files."""
    modules = None
    if about.base is not None:
        modules = _modules_in(about.base)
    return image_reader.read_image(path, modules, component=about.component)


def _modules_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the modules of a model by the files of its weights, whatever these are called, with their windows."""
    if not (found := sorted(folder.glob("*.safetensors"))):
        raise LoraError(f"there is no file of safetensors in {folder}: the model's folder is where its weights are.")
    shapes = {name: place.shape for file in found for name, place in header(file).items()}
    return image_reader.modules_of_tensors(shapes)


def _write_gguf(path: Path, found: ModuleAdapters, about: About) -> None:
    if about.base is None:
        raise LoraError(
            "GGUF has an architecture's own names and order of rows: say where the model is, --base FOLDER."
        )
    write_gguf(path, mapped(found, _without_fp64), base=about.base)


def _without_fp64(module: Module) -> Module:
    """Return a module in fp32 where it is in fp64, which no program has in files of adapters but for PEFT's."""
    arrays = module.arrays.items()
    return Module({name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in arrays}, module.scale)


def _write_for_servers(profile: Server, path: Path, found: ModuleAdapters, about: About) -> None:
    """Write a folder of PEFT with one rank and a scale of 1 for all, which every server reads rightly."""
    if found.experts:  # which become other modules, all of them together
        save_peft(path, *by_module(found), profile=profile)
        return
    rank = one_rank_for_all(found.outlines, {}, f"{profile} has")
    write_peft(path, mapped(found, lambda module: of_rank(module, rank)))


LORA_ALONE = (LORA.name,)
FORMATS: Mapping[str, FileFormat] = {
    "gguf": FileFormat(
        LORA_ALONE,
        ".gguf",
        _is_gguf,
        lambda path, about: read_gguf(path, base=about.base),
        _write_gguf,
    ),
    "mlx": FileFormat(
        ("LORA", "DORA"),
        is_of=lambda path: (path / mlx_write.WEIGHTS).exists(),
        read=lambda path, about: read_mlx(path),
        write=lambda path, found, about: mlx_write.write_mlx(path, found),
    ),
    "peft": FileFormat(
        tuple(name for name, kind in PEFT_FORMATS.items() if kind.is_written and not kind.shared_tensors),
        is_of=lambda path: (path / files.CONFIG).exists(),
        read=lambda path, about: read_peft(path),
        write=lambda path, found, about: write_peft(path, found),
    ),
    **{server: FileFormat(LORA_ALONE, write=functools.partial(_write_for_servers, server)) for server in SERVERS},
    "kohya": FileFormat(
        KOHYA_FORMATS,
        image_reader.ENDING,
        _is_image,
        _read_image,
        lambda path, found, about: write_kohya(path, {about.component: found}),
    ),
    "diffusers": FileFormat(
        DIFFUSERS_FORMATS,
        image_reader.ENDING,
        write=lambda path, found, about: write_diffusers(path, {about.component: found}),
    ),
}
