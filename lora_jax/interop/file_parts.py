"""The bytes of a model's file in the steps in which they are read, changed and written."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.interop.key_map import Array
from lora_jax.interop.safetensors_index import DTYPES, Tensor, read
from lora_jax.interop.tensor_changes import Change, Changes, with_start

CHUNK = 2**20  # entries of a tensor that are added at a time: they fit into a CPU's cache
BLOCK = 2**22  # bytes that are copied at a time


class Part(NamedTuple):
    """Bytes of a file that are read and written in one step."""

    file: str
    start: int  # where they are read
    size: int
    at: int  # where they are written
    name: str = ""  # of the tensor that the bytes belong to, if it changes
    dtype: Any = None  # of this tensor
    base: Array | None = None  # what takes the place of the file's own numbers
    factors: tuple[Array, Array] | None = None  # L and R whose product is added
    delta: Array | None = None  # what is added entry by entry
    lengths: Array | None = None  # to which the rows are scaled


def parts_of(
    source: Path,
    file: str,
    size: int,
    tensors: Mapping[str, Tensor],
    changes: Changes,
    added: Mapping[str, Tensor],
    header: bytes,
    length: int,
) -> Iterator[Part]:
    """Yield all bytes of a file in order, with a new header in the place of one of this length, if there is one."""
    shift, at = len(header) - length, length
    if header:
        yield Part(file, 0, len(header), 0, base=np.frombuffer(header, np.uint8))
    touched = {n: t for n, t in tensors.items() if t.file == file and n in changes and n not in added}
    for name, tensor in sorted(touched.items(), key=lambda item: item[1].start):
        yield from _copied(file, at, tensor.start, shift)
        at = tensor.start + tensor.size
        yield from _changed(source, tensor, name, changes[name], shift)
    yield from _copied(file, at, size, shift)
    end = size + shift
    for name, tensor in added.items():
        shift = end - tensor.start
        if name in changes:
            yield from _changed(source, tensor, name, changes[name], shift)
        else:
            yield from _copied(file, tensor.start, tensor.start + tensor.size, shift)
        end += tensor.size


def _copied(file: str, start: int, end: int, shift: int) -> Iterator[Part]:
    """Yield bytes that do not change."""
    for at in range(start, end, BLOCK):
        yield Part(file, at, min(BLOCK, end - at), at + shift)


def _changed(source: Path, tensor: Tensor, name: str, change: Change, shift: int) -> Iterator[Part]:
    """Yield some rows of a changed tensor at a time."""
    dtype: Any = np.dtype(DTYPES[tensor.dtype])
    change = with_start(name, change, lambda: read(source, tensor, dtype).reshape(tensor.shape))
    if change.rows:
        yield from _around_rows(tensor, name, dtype, change.rows, shift)
        return
    base, delta = (None if array is None else array.reshape(-1) for array in (change.base, change.delta))
    done = 0  # entries
    for pair in change.factors or (None,):
        height, width = (math.prod(tensor.shape), 1) if pair is None else (len(pair[0]), pair[1].shape[1])
        step = _rows(height, CHUNK // width)
        for start in range(0, height, step):
            some, count = slice(start, start + step), min(step, height - start) * width
            entries = slice(done, done + count)
            begin = tensor.start + done * dtype.itemsize
            yield Part(
                tensor.file,
                begin,
                count * dtype.itemsize,
                begin + shift,
                name,
                dtype,
                None if base is None else base[entries],
                None if pair is None else (pair[0][some], pair[1]),
                None if delta is None else delta[entries],
                None if change.lengths is None else change.lengths[some],
            )
            done += count


def _around_rows(tensor: Tensor, name: str, dtype: Any, rows: Mapping[int, Array], shift: int) -> Iterator[Part]:
    """Yield a table with some rows in the places of its own."""
    size = tensor.size // tensor.shape[0]
    at = tensor.start
    for i in sorted(rows):
        begin = tensor.start + i * size
        yield from _copied(tensor.file, at, begin, shift)
        yield Part(tensor.file, begin, size, begin + shift, name, dtype, base=rows[i])
        at = begin + size
    yield from _copied(tensor.file, at, tensor.start + tensor.size, shift)


def _rows(n: int, most: int) -> int:
    """Return how many of n rows to add at a time: if possible a large divisor of n, which one program serves."""
    most = max(1, min(n, most))
    return next((rows for rows in range(most, most // 2, -1) if n % rows == 0), most)
