"""The files of a folder that HF PEFT reads and writes.

Files are not trusted: nothing in them is executed, and no name in them becomes a path.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.checkpoints import replaceable
from lora_jax.checkpoints.atomic_dir import written
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.formats.format import Format
from lora_jax.interop.peft.shared_outer import with_experts_numbered
from lora_jax.interop.peft.tensor_names import names_as_peft_has_them
from lora_jax.interop.safetensors_index import DTYPES, Tensor, header, read
from lora_jax.interop.safetensors_writer import write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LORALIB = "lora.safetensors"  # for loralib, which has no config
_FLOATS = ("F64", "F32", "F16", "BF16")


def check_folder_of_peft(folder: Path) -> None:
    """Raise for a file, and for a folder that this library has saved in its own format."""
    if folder.is_file():
        raise LoraError(f"{folder} is a file, expected the folder of {CONFIG} and {WEIGHTS}: {folder.parent}.")
    if (folder / "description").is_dir() and not (folder / CONFIG).exists():
        raise LoraError(f"{folder} holds no {CONFIG}, but adapters as lora.checkpoint.load(folder) loads them.")


def read_tensors(path: Path, format: Format) -> dict[str, Array]:
    """Return the tensors of a file by their names without the prefix. The header is checked before anything is read.

    Raises:
        LoraError: as `places_of_tensors`, `names_as_peft_has_them` and `with_experts_numbered`.
    """
    places = places_of_tensors(path)
    names = names_as_peft_has_them(places, format.shared_tensors, path)
    tensors = {
        names[name]: read(path.parent, place, DTYPES[place.dtype]).reshape(place.shape)
        for name, place in places.items()
    }
    try:
        return with_experts_numbered(tensors)
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from None


def places_of_tensors(path: Path) -> dict[str, Tensor]:
    """Return where the tensors of a file are, by their names in it.

    Raises:
        LoraError: there is no such file, or it cannot be read; it holds a tensor that is not of floats.
    """
    if not os.path.lexists(path):
        torch = path.with_name("adapter_model.bin")
        hint = f" {torch.name} is a pickle, which may run any code: save it again as safetensors." * torch.is_file()
        raise LoraError(f"there is no {path}.{hint}")
    places = header(path)
    for name, place in places.items():
        if place.dtype not in _FLOATS:
            found = np.dtype(DTYPES[place.dtype]).name if place.dtype in DTYPES else place.dtype
            raise LoraError(
                f"{path}: {short(name)} is of {found}, expected a floating dtype of 16 bits or more: numbers of 8 bits "
                "have scales, which no adapter of PEFT holds."
            )
    return places


def format_of(name: str) -> replaceable.Format:
    """Return what a folder of adapters in HF PEFT's format has in it, or one of loralib's, by its file of tensors."""
    names = (LORALIB,) if name == LORALIB else (CONFIG, WEIGHTS)
    return replaceable.Format("adapters of loralib" if name == LORALIB else "adapters of PEFT", names[:1], names)


def write_folder(folder: Path, name: str, tensors: Mapping[str, Array], config: Mapping[str, Any] | None) -> None:
    """Write a folder with a file of tensors and, unless it is None, the config: all of it or nothing.

    Raises:
        LoraError: it cannot be written, or holds something else; nothing has changed then.
    """
    forms = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    with written(folder, format_of(name)) as new:
        write_safetensors(new / name, forms, lambda key: tensors[key], {"format": "pt"})
        if config is not None:
            write_config(new, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the config into a folder."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
