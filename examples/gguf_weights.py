"""Reads GGUF, the file format of llama.cpp: metadata and tensors, the quantised ones too.

A file is a header, (key, value) pairs, one line about each tensor, and then the tensors. Sizes and places are checked
against the file's own size before anything is made of them. Nothing in a file is executed.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    file = gguf_weights.read(path)
    file.metadata["general.architecture"]                  # "llama"
    file.tensors["blk.0.attn_q.weight"].dequantize()       # [out, in], fp32
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class GgufError(ValueError):
    """What in the file is not as the format says, or is not read here."""


class Kind(NamedTuple):
    """How a tensor is stored: blocks of so many numbers in so many bytes each."""

    name: str
    numbers: int
    bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    3: Kind("Q4_1", 32, 20),
    8: Kind("Q8_0", 32, 34),
}
# What a file may also hold, to be refused by name.
OTHER_KINDS = {
    2: "Q4_0",
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    28: "F64",
    30: "BF16",
}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # as in `struct`
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]  # the last axis is the contiguous one; [out, in] for a linear layer
    kind: Kind
    blocks: Array  # bytes [blocks, bytes in one], a view of the file

    def dequantize(self) -> Array:
        """The numbers, in fp32."""
        return _DECODERS[self.kind.name](self.blocks).reshape(self.shape)


@dataclass(frozen=True)
class File:
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: Path) -> File:
    """The metadata, and the tensors as views of the file, which is mapped and not copied.

    Raises:
        GgufError: not a GGUF file of version 2 or 3; it ends early; a size, a place or a name is not possible; a
            tensor is stored in a way that is not read here.
    """
    if path.stat().st_size < 24:
        raise GgufError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes, fewer than a header.")
    try:
        return _read(np.asarray(np.memmap(path, np.uint8, mode="r")))
    except GgufError as error:
        raise GgufError(f"{path}: {error}") from None


def _read(data: Array) -> File:
    cursor = _Cursor(data)
    if (magic := cursor.take(4)) != b"GGUF":
        raise GgufError(f"this is not a GGUF file: it begins with {magic!r}, expected b'GGUF'.")
    if (version := cursor.scalar("I")) not in (2, 3):
        raise GgufError(f"the version is {version}, expected 2 or 3, little-endian.")
    tensor_count, pair_count = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.expect(tensor_count, 32, "tensors")  # the least that a line about one can take
    cursor.expect(pair_count, 13, "pairs of metadata")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise GgufError(f"the metadata have {key!r} twice.")
        metadata[key] = cursor.value(cursor.scalar("I"), key)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise GgufError(f"general.alignment is {alignment!r}, expected a whole number above 0.")
    lines = [_read_line(cursor) for _ in range(tensor_count)]
    start = math.ceil(cursor.at / alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, number, offset in lines:
        if name in tensors:
            raise GgufError(f"there are two tensors {name!r}.")
        if offset % alignment:
            raise GgufError(f"the tensor {name!r} is at {offset}, which is no multiple of {alignment}.")
        tensors[name] = _view(data, name, shape, number, start + offset)
    return File(metadata, tensors)


def _read_line(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    """The name of a tensor, its shape, the number of its kind and its place."""
    name, axes = cursor.string(), cursor.scalar("I")
    if not 1 <= axes <= 4:
        raise GgufError(f"the tensor {name!r} has {axes} axes, expected 1 to 4.")
    shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]  # the file has the contiguous axis first
    return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _view(data: Array, name: str, shape: tuple[int, ...], number: int, start: int) -> Tensor:
    if number not in KINDS:
        found = OTHER_KINDS.get(number, "of an unknown kind")
        known = ", ".join(kind.name for kind in KINDS.values())
        raise GgufError(f"the tensor {name!r} is {found} (type {number}); what is read here: {known}.")
    kind = KINDS[number]
    if shape[-1] % kind.numbers:
        raise GgufError(f"the tensor {name!r} is {kind.name}, with rows of {shape[-1]}: no multiple of {kind.numbers}.")
    size = math.prod(shape) // kind.numbers * kind.bytes
    if start + size > data.size:
        raise GgufError(f"the tensor {name!r} is {size} bytes at {start}, but the file ends at {data.size}.")
    return Tensor(shape, kind, data[start : start + size].reshape(-1, kind.bytes))


class _Cursor:
    """Reads on from where it is, and never beyond the end."""

    def __init__(self, data: Array) -> None:
        self.data, self.at = data, 0

    def expect(self, count: int, size: int, what: str) -> None:
        left = self.data.size - self.at
        if count * size > left:
            raise GgufError(
                f"{count} {what} at byte {self.at} take at least {count * size} bytes, but {left} are left."
            )

    def take(self, size: int) -> bytes:
        self.expect(size, 1, "bytes")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def scalar(self, code: str) -> Any:
        [value] = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise GgufError(f"the string before byte {self.at} is not UTF-8.") from None

    def value(self, number: int, key: str) -> Any:
        """One value of metadata; an array becomes a list."""
        if number == STRING:
            return self.string()
        if number == ARRAY:
            return self.array(key)
        if number not in SCALARS:
            raise GgufError(f"the metadata {key!r} have the unknown type {number}.")
        return self.scalar(SCALARS[number])

    def array(self, key: str) -> list[Any]:
        number, count = self.scalar("I"), self.scalar("Q")
        if number == STRING:
            self.expect(count, 8, "strings")
            return [self.string() for _ in range(count)]
        if number not in SCALARS:
            raise GgufError(f"the metadata {key!r} are an array of type {number}, expected numbers or strings.")
        size = struct.calcsize(f"<{SCALARS[number]}")
        self.expect(count, size, "numbers")
        return list(struct.unpack(f"<{count}{SCALARS[number]}", self.take(count * size)))


# A block [bytes] -> its numbers. ----------------------------------------------------------------------------------


def _f32(blocks: Array) -> Array:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _f16(blocks: Array) -> Array:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _q4_1(blocks: Array) -> Array:
    """x = scale * q + least: two fp16, then 16 bytes, with the first 16 q in their low halves, and the others."""
    scale, least, bytes_ = _f16(blocks[:, :2]), _f16(blocks[:, 2:4]), blocks[:, 4:]
    q = np.concatenate([bytes_ & 15, bytes_ >> 4], axis=1)
    return scale * q + least


def _q8_0(blocks: Array) -> Array:
    """x = scale * q: one fp16, then 32 int8."""
    return _f16(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


_DECODERS = {"F32": _f32, "F16": _f16, "Q4_1": _q4_1, "Q8_0": _q8_0}
