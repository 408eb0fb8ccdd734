"""Find the tensors of a published model in its files: `model.safetensors`, or an index and its shards.

Of a file, only the header and the tensors that are asked for are read. Files come from anywhere: what they say is
checked, and nothing in them is executed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import LoraError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
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
        LoraError: a file is missing or damaged; a tensor is in two files, or in none that the index names.
    """
    if not folder.is_dir():
        raise LoraError(f"there is no folder {folder}.")
    files, names = _indexed(folder / INDEX) if (folder / INDEX).is_file() else ([SINGLE], [])
    found: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise LoraError(f"there is no {folder / file}: a model is in {SINGLE}, or in the shards of {INDEX}.")
        for name, tensor in header(folder / file).items():
            if name in found:
                raise LoraError(f"{folder} holds {name!r} twice, in {found[name].file} and {file}.")
            found[name] = tensor
    if missing := [name for name in names if name not in found]:
        raise LoraError(
            f"{folder / INDEX} names {missing[0]!r}, which none of its shards has, and {len(missing) - 1} more: "
            "download the files again, all of one version."
        )
    return found, files


def _indexed(path: Path) -> tuple[list[str], list[str]]:
    """Return the files and the tensors that an index names; it may name files beside it and no other paths."""
    try:
        weights = json.loads(path.read_bytes())["weight_map"]
        files = sorted(dict.fromkeys(weights.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoraError(f"{path} is no index of safetensors: {str(error)[:200]}.") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise LoraError(f"{path} names {str(file)[:100]!r}, expected names of safetensors files beside it.")
    return files, list(weights)


def header(path: Path) -> dict[str, Tensor]:
    """Return where the tensors of a file are. `safetensors` checks that they are contiguous in the file."""
    from lora_jax.interop._safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} cannot be read: {str(error)[:200]}.") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: Mapping[str, Any] = json.loads(file.read(length))
    return {
        name: Tensor(path.name, facts["dtype"], tuple(facts["shape"]), 8 + length + begin, end - begin)
        for name, facts in entries.items()
        if name != "__metadata__"
        for begin, end in [facts["data_offsets"]]
    }


def read(folder: Path, tensor: Tensor, dtype: Any) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor as a flat array of this dtype."""
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        data = file.read(tensor.size)
    if len(data) != tensor.size:
        raise LoraError(f"{folder / tensor.file} became shorter while it was read.")
    return np.frombuffer(data, dtype)
