"""Find the tensors of a published model in its files: `model.safetensors`, or an index and its shards.

Of a file, only the header and the tensors that are asked for are read. Files come from anywhere: what they say is
checked, and nothing in them is executed.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.core.untrusted import open_file, parse_json, read_json, size_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DIFFUSERS = "diffusion_pytorch_model.safetensors"  # the same of diffusers' UNets and transformers, and its index
TENSORS = 2**19  # in all files; the largest models that are published have some 150,000
LARGEST_INDEX = 2**26  # bytes, 128 for each tensor
LARGEST_HEADER = 2**26
LONGEST = 1000  # characters of a tensor's name
LONGEST_FILE = 255  # bytes of the name of a file, as many as file systems take
AXES = 32  # of a tensor, as many as any version of NumPy has
# Entries that the other axes of empty tensors span together. AdaLoRA leaves nothing of some modules, whose tensors
# still have their inputs and outputs, some 70,000 for each module of the largest models.
BESIDE_EMPTY = 2**26
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Tensor(NamedTuple):
    """Where a tensor is in a file."""

    file: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    start: int  # its first byte
    size: int  # bytes


def tensors_in(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return all tensors of a model, in order, and the files that they are in.

    Raises:
        LoraError: a file is missing or damaged; a tensor is in two files, or in none that the index names; there are
            more than any model has.
    """
    if not os.path.isdir(folder):
        raise LoraError(f"there is no folder {folder}.")
    index = index_of(folder)
    files, names = ([SINGLE], []) if index is None else _indexed(index)
    if files == [SINGLE] and not os.path.lexists(folder / SINGLE) and os.path.lexists(folder / DIFFUSERS):
        files = [DIFFUSERS]
    found: dict[str, Tensor] = {}
    for file in files:
        if not os.path.lexists(folder / file):
            raise LoraError(f"there is no {folder / file}: a model is in {SINGLE}, or in the shards of {INDEX}.")
        for name, tensor in header(folder / file).items():
            if name in found:
                raise LoraError(f"{folder} holds {short(name)} twice, in {found[name].file!r} and {file!r}.")
            found[name] = tensor
        _check_count(folder, len(found))
    if missing := [name for name in names if name not in found]:
        raise LoraError(
            f"{index} names {short(missing[0])}, which none of its shards has, and {len(missing) - 1} more: "
            "download the files again, all of one version."
        )
    return found, files


def index_of(folder: Path) -> Path | None:
    """Return the index of a model's files, if it has one."""
    return next((folder / name for name in (INDEX, f"{DIFFUSERS}.index.json") if os.path.lexists(folder / name)), None)


def _indexed(path: Path) -> tuple[list[str], list[str]]:
    """Return the files and the tensors that an index names; it may name files beside it and no other paths."""
    try:
        entries = read_json(path, LARGEST_INDEX, "index of safetensors", values=LARGEST_INDEX // 32)
    except LoraError as error:
        raise LoraError(f"{path} is no index of safetensors: {error}") from None
    weights = entries.get("weight_map") if isinstance(entries, dict) else None
    if not isinstance(weights, dict):
        raise LoraError(f"{path} is no index of safetensors: it has no weight_map.")
    _check_count(path, len(weights))
    for file in weights.values():
        if not isinstance(file, str) or not _is_name_of_a_file(file):
            raise LoraError(f"{path} names {short(file)}, expected names of safetensors files beside it.")
    return sorted(dict.fromkeys(weights.values())), list(weights)


def _is_name_of_a_file(file: str) -> bool:
    """Return whether a name is one of a file beside the index, and no path."""
    plain = file.isprintable() and not any(c in file for c in "/\\")
    return plain and file.endswith(".safetensors") and not file.startswith(".") and len(file.encode()) <= LONGEST_FILE


def _check_count(where: Path, tensors: int) -> None:
    if tensors > TENSORS:
        raise LoraError(f"{where} has {tensors:,} tensors, expected at most {TENSORS:,}.")


def header(path: Path) -> dict[str, Tensor]:
    """Return where the tensors of a file are. `safetensors` checks that they are contiguous in the file.

    Raises:
        LoraError: it is no such file, or a damaged one; it has more or longer names, or tensors of more axes, than any
            model has; a tensor without entries has axes that would take memory.
    """
    from lora_jax.interop._safetensors import SafetensorError, safe_open

    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, size_of(file)):
            raise LoraError(
                f"{path} cannot be read: by its first bytes it has a header of {length:,} bytes, and it has "
                f"{size_of(file):,}; a header has at most {LARGEST_HEADER:,}."
            )
        text = file.read(length)
    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} cannot be read: {str(error)[:200]}.") from error
    entries: Mapping[str, Any] = parse_json(text, str(path), values=len(text))
    found = {
        name: Tensor(path.name, facts["dtype"], tuple(facts["shape"]), 8 + length + begin, end - begin)
        for name, facts in entries.items()
        if name != "__metadata__"
        for begin, end in [facts["data_offsets"]]
    }
    _check_shapes(path, found)
    return found


def _check_shapes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise for names, axes and sizes that no model has. The sizes of tensors with entries are those of the file."""
    _check_count(path, len(tensors))
    empty = 0
    for name, tensor in tensors.items():
        if len(name) > LONGEST:
            raise LoraError(f"{path} holds a name of {len(name):,} characters, expected at most {LONGEST}.")
        if len(tensor.shape) > AXES:
            raise LoraError(f"{path}: {short(name)} has {len(tensor.shape)} axes, expected at most {AXES}.")
        if 0 in tensor.shape:
            empty += math.prod(n for n in tensor.shape if n)
        if empty > BESIDE_EMPTY:
            raise LoraError(
                f"{path}: {short(name)} of shape {list(tensor.shape)} has no entries, and the axes of such tensors "
                f"would take {empty:,} with zeros, expected at most {BESIDE_EMPTY:,} in a file."
            )


def read(folder: Path, tensor: Tensor, dtype: Any) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor as a flat array of this dtype."""
    with open_file(folder / tensor.file) as file:
        file.seek(tensor.start)
        data = file.read(tensor.size)
    if len(data) != tensor.size:
        raise LoraError(f"{folder / tensor.file} became shorter while it was read.")
    return np.frombuffer(data, dtype)
