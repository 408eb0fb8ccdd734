"""Files of safetensors that are written one tensor at a time, so that no more than one is in memory.

The format: 8 bytes with the length of a JSON text, that text, which says where each tensor begins and ends, and then
the tensors one after the other (https://github.com/huggingface/safetensors).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.safetensors_index import DTYPES

NAMES = {np.dtype(dtype): name for name, dtype in reversed(DTYPES.items())}  # of dtypes in files

Form = tuple[tuple[int, ...], Any]  # the shape and the dtype of a tensor


def write_safetensors(
    path: Path, tensors: Mapping[str, Form], array_of: Callable[[str], Array], metadata: Mapping[str, str]
) -> None:
    """Write a file of tensors, each of which is asked for once and then let go.

    Args:
        path: of the new file.
        tensors: the shape and the dtype of each.
        array_of: returns one of them by its name.
        metadata: what the header says beside.

    Raises:
        LoraError: a tensor is of a dtype that the format does not have, or is not as `tensors` says.
        OSError: the file cannot be written, which `checkpoints.atomic_dir.written` makes a LoraError of.
    """
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name][1]).itemsize, name))  # so that all are aligned
    with path.open("xb") as file:
        file.write(_header(path, tensors, order, metadata))
        for name in order:
            file.write(_bytes(path, name, array_of(name), tensors[name]))


def _header(path: Path, tensors: Mapping[str, Form], order: list[str], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a file with these tensors in order."""
    for name in order:
        if np.dtype(tensors[name][1]) not in NAMES:
            found = np.dtype(tensors[name][1]).name
            raise LoraError(f"{path}: {name!r} is of {found}, expected one of {', '.join(DTYPES)}.")
    named = ((name, NAMES[np.dtype(dtype)], shape) for name in order for shape, dtype in [tensors[name]])
    return header_of(named, {"__metadata__": dict(metadata)} if metadata else {})


def header_of(tensors: Iterable[tuple[str, str, Sequence[int]]], beside: Mapping[str, Any]) -> bytes:
    """Return the first bytes of a file that holds tensors of these names, dtypes and shapes in order.

    Args:
        tensors: dtypes as files call them.
        beside: further entries, "__metadata__".
    """
    entries, at = dict(beside), 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        entries[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [at, end]}
        at = end
    return framed(entries)


def framed(entries: Mapping[str, Any]) -> bytes:
    """Return the length of a header and the header, which ends at a multiple of 8 bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(path: Path, name: str, array: Array, form: Form) -> Any:
    """Return a tensor's bytes, which is a copy only where its numbers are not in order already."""
    shape, dtype = tuple(form[0]), np.dtype(form[1])
    if array.shape != shape or array.dtype != dtype:
        found = f"{array.dtype.name} {list(array.shape)}"
        raise LoraError(f"{path}: {name!r} is {found}, expected {dtype.name} {list(shape)}.")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
