"""Files of GGUF, the container of llama.cpp: facts about a model, and tensors, each read or written alone.

    "GGUF", the version, the number of tensors, the number of facts
    facts: a key, the type of the value, the value
    tensors: a name, the number of axes, the axes with the last one first, a type, where the numbers begin
    the numbers, from the next multiple of the alignment on, and each tensor's likewise

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). All is little-endian. A length that a file says is compared
with what is left of the file before it is used, and nothing is mapped into memory.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.core.errors import LoraError, short
from lora_jax.core.untrusted import open_file, size_of
from lora_jax.interop.key_map import Array

MAGIC = b"GGUF"
VERSION = 3
VERSIONS = (2, 3)  # they differ in nothing that little-endian machines see
ALIGNMENT = 32  # bytes, where no fact says otherwise
LARGEST_ALIGNMENT = 2**16
ALIGNMENT_KEY = "general.alignment"

TENSORS = 2**17  # as many as the largest models have twice over
FACTS = 2**12  # models have some fifty
ENTRIES = 2**22  # of lists that are gone through; vocabularies and merges of the largest models are a million
LONGEST = 2**10  # bytes of a key, of a name and of a value that is kept; longer values are skipped
AXES = 4  # as llama.cpp has them

# Types of values, and how `struct` calls those that are numbers.
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# Types of tensors that are read: their numbers in files, NumPy's dtypes, and of those that have them, their blocks.
TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
BLOCK = 32  # numbers, of which each is scale * code, or scale * code + least
BLOCKS = {
    "Q4_1": np.dtype([("scale", "<f2"), ("least", "<f2"), ("codes", "u1", (BLOCK // 2,))]),
    "Q8_0": np.dtype([("scale", "<f2"), ("codes", "i1", (BLOCK,))]),
}


class Stored(NamedTuple):
    """What a header says of one tensor."""

    type: int
    shape: tuple[int, ...]  # as NumPy has it: the last axis is the one whose numbers follow each other
    start: int  # bytes from the beginning of all tensors


class Header(NamedTuple):
    """What stands before the tensors."""

    facts: dict[str, Any]  # numbers and text; of lists and long text None, unless they were asked for
    tensors: dict[str, Stored]
    data: int  # where the tensors begin in the file
    alignment: int
    size: int  # bytes of the file


class Place(NamedTuple):
    """Where a tensor is in a file."""

    type: str  # a key of TYPES
    shape: tuple[int, ...]
    start: int  # its first byte
    size: int  # bytes

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of the array that `read` makes of it."""
        return np.dtype(DTYPES.get(self.type, np.float32))


# Reading --------------------------------------------------------------------------------------------------------------


class _Cursor:
    """A place in an open file, which goes no further than its end."""

    def __init__(self, path: Path, file: BinaryIO, lists: bool) -> None:
        self.path, self.file, self.lists = path, file, lists
        self.size, self.at, self.entries = size_of(file), 0, 0

    def need(self, count: int, what: str) -> None:
        """Raise unless so many bytes are left."""
        if count > self.size - self.at:
            raise LoraError(
                f"{self.path} is no whole GGUF: at byte {self.at:,} it has {what} of {count:,} bytes, and only "
                f"{self.size - self.at:,} are left. Bring it again."
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise LoraError(f"{self.path} became shorter while it was read.")
        self.at += count
        return data

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.at += count
        self.file.seek(self.at)

    def number(self, form: str, what: str) -> Any:
        form = f"<{form}"
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str, most: int) -> int:
        found: int = self.number("Q", f"the number of {what}")
        if found > most:
            raise LoraError(f"{self.path} has {found:,} {what}, expected at most {most:,}.")
        return found

    def name(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        if not 0 < length <= LONGEST:
            raise LoraError(f"{self.path} has {what} of {length:,} bytes, expected 1 to {LONGEST:,}.")
        return self._text(self.take(length, what), what)

    def value(self, kind: int, key: str) -> Any:
        """Return a value; None in the place of a list and of long text, which are skipped unless they are asked for."""
        what = f"the value of {short(key)}"
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == STRING:
            return self._string(what, LONGEST)
        if kind == ARRAY:
            return self._list(key, what)
        raise LoraError(f"{self.path}: {short(key)} has a value of type {kind}, which is none of GGUF's.")

    def _string(self, what: str, kept: int = 0) -> str | None:
        """Return a text, or None if it is longer than what is kept."""
        length = self.number("Q", what)
        if length > kept and not self.lists:
            self.skip(length, what)
            return None
        return self._text(self.take(length, what), what)

    def _list(self, key: str, what: str) -> list[Any] | None:
        of, count = self.number("I", what), self.number("Q", what)
        if of != STRING and of not in NUMBERS:
            raise LoraError(f"{self.path}: {short(key)} is a list of type {of}, expected numbers or text.")
        size = count * (8 if of == STRING else struct.calcsize(NUMBERS[of]))  # a text takes its length at least
        if of != STRING and not self.lists:
            self.skip(size, what)
            return None
        self.need(size, what)
        self.entries += count
        if self.entries > ENTRIES:
            raise LoraError(f"{self.path} has lists of {self.entries:,} entries, expected at most {ENTRIES:,}.")
        if of != STRING:
            return list(struct.unpack(f"<{count}{NUMBERS[of]}", self.take(size, what)))
        texts = [self._string(what) for _ in range(count)]
        return texts if self.lists else None

    def _text(self, data: bytes, what: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise LoraError(f"{self.path}: {what} is no UTF-8, but {short(data)}.") from None


def header(path: Path, *, lists: bool = False) -> Header:
    """Return what a file says before its tensors.

    Args:
        path: of the file.
        lists: keep lists and long text too, which a model's tokenizer is made of.

    Raises:
        LoraError: it is no GGUF of a version that this one knows, is cut short, or says something twice; it has more of
            something than any model has.
    """
    with open_file(path) as file:
        at = _Cursor(path, file, lists)
        if (found := at.take(min(4, at.size), "its first bytes")) != MAGIC:
            raise LoraError(f"{path} is no GGUF: it begins with {found!r}, expected {MAGIC!r}.")
        version = at.number("I", "its version")
        if version not in VERSIONS:
            why = ", which is of a big-endian machine" if version.to_bytes(4, "big")[0] in VERSIONS else ""
            raise LoraError(f"{path} is GGUF of version {version}{why}, expected one of {VERSIONS}.")
        tensors, facts = at.count("tensors", TENSORS), at.count("facts", FACTS)
        known = _facts(at, facts)
        places = _stored(at, tensors)
        alignment = known.get(ALIGNMENT_KEY, ALIGNMENT)
        fits = isinstance(alignment, int) and 0 < alignment <= LARGEST_ALIGNMENT and not alignment & (alignment - 1)
        if not fits or isinstance(alignment, bool):
            raise LoraError(f"{path}: {ALIGNMENT_KEY} is {short(alignment)}, expected a power of two up to 65,536.")
        return Header(known, places, _padded(at.at, alignment), alignment, at.size)


def _facts(at: _Cursor, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
        key = at.name("a key")
        if key in found:
            raise LoraError(f"{at.path} says {short(key)} twice.")
        found[key] = at.value(at.number("I", f"the type of {short(key)}"), key)
    return found


def _stored(at: _Cursor, count: int) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for _ in range(count):
        name = at.name("the name of a tensor")
        axes = at.number("I", f"the number of axes of {short(name)}")
        if name in found:
            raise LoraError(f"{at.path} holds {short(name)} twice.")
        if not 0 < axes <= AXES:
            raise LoraError(f"{at.path}: {short(name)} has {axes:,} axes, expected 1 to {AXES}.")
        shape = [at.number("Q", f"an axis of {short(name)}") for _ in range(axes)]
        kind, start = at.number("I", f"the type of {short(name)}"), at.number("Q", f"the place of {short(name)}")
        found[name] = Stored(kind, tuple(shape[::-1]), start)
    return found


def places(path: Path, found: Header) -> dict[str, Place]:
    """Return where the tensors are, one after the other in the file.

    Raises:
        LoraError: a tensor is empty, is of a type that is not read, does not begin where the one before it
            ends, or ends behind the file.
    """
    kinds = {number: name for name, number in TYPES.items()}
    result, expected = {}, 0
    for name, (kind, shape, start) in found.tensors.items():
        if kind not in kinds:
            raise LoraError(
                f"{path}: {short(name)} is of GGUF's type {kind}, expected one of {', '.join(TYPES)}: write it again "
                "as F32, as llama.cpp does with adapters by default."
            )
        if 0 in shape:
            raise LoraError(f"{path}: {short(name)} of shape {list(shape)} is empty, expected numbers.")
        if kinds[kind] in BLOCKS and shape[-1] % BLOCK:
            raise LoraError(
                f"{path}: {short(name)} is {kinds[kind]} of shape {list(shape)}; its last axis is no multiple of 32."
            )
        size = nbytes(kinds[kind], shape)
        if start != expected or found.data + start + size > found.size:
            raise LoraError(
                f"{path}: {short(name)} has bytes {start:,} to {start + size:,} of the tensors, expected to begin at "
                f"{expected:,} and to end within the {max(0, found.size - found.data):,} that there are."
            )
        result[name] = Place(kinds[kind], shape, found.data + start, size)
        expected = _padded(start + size, found.alignment)
    return result


def read(path: Path, place: Place) -> Array:
    """Return the numbers of one tensor; those in blocks in fp32, by the formula of their type."""
    with open_file(path) as file:
        file.seek(place.start)
        data = file.read(place.size)
    if len(data) != place.size:
        raise LoraError(f"{path} became shorter while it was read.")
    if place.type not in BLOCKS:
        return np.frombuffer(data, place.dtype).reshape(place.shape)
    blocks = np.frombuffer(data, BLOCKS[place.type])
    codes, scale = blocks["codes"], blocks["scale"].astype(np.float32)[:, None]
    if place.type == "Q8_0":
        return (codes * scale).reshape(place.shape)
    codes = np.concatenate([codes & 15, codes >> 4], axis=1)  # the first half of a block is in the low halves of bytes
    return (codes * scale + blocks["least"].astype(np.float32)[:, None]).reshape(place.shape)


def nbytes(kind: str, shape: Iterable[int]) -> int:
    """Return the size of a tensor."""
    numbers = math.prod(shape)
    return numbers // BLOCK * BLOCKS[kind].itemsize if kind in BLOCKS else numbers * np.dtype(DTYPES[kind]).itemsize


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


# Writing --------------------------------------------------------------------------------------------------------------


def write(
    path: str | Path,
    facts: Mapping[str, str | float],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterable[tuple[str, Array]],
) -> None:
    """Write a file. Its place is taken when it is complete.

    Args:
        facts: text is written as such, and a number as fp32.
        tensors: the type, a key of DTYPES, and the shape of each, in the order of the file.
        arrays: `(name, array)` in that order; each is written before the next one is asked for.

    Raises:
        LoraError: it cannot be written.
    """
    with written_file(path) as new, new.open("wb") as file:
        file.write(_header_of(facts, tensors))
        _fill(file)
        for (name, (kind, shape)), (own, array) in zip(tensors.items(), arrays, strict=True):
            if (own, array.shape, array.dtype) != (name, tuple(shape), np.dtype(DTYPES[kind])):
                raise LoraError(
                    f"{path}: {own} is {array.dtype} {list(array.shape)}, expected {name} as {kind} {list(shape)}."
                )
            data: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            file.write(data)
            _fill(file)


def _header_of(facts: Mapping[str, str | float], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(facts))]
    for key, value in facts.items():
        if isinstance(value, str):
            parts += [_text(key), struct.pack("<I", STRING), _text(value)]
        else:
            parts += [_text(key), struct.pack("<If", 6, value)]
    start = 0
    for name, (kind, shape) in tensors.items():
        form = f"<I{len(shape)}QIQ"
        parts += [_text(name), struct.pack(form, len(shape), *reversed(shape), TYPES[kind], start)]
        start = _padded(start + nbytes(kind, shape), ALIGNMENT)
    return b"".join(parts)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _fill(file: BinaryIO) -> None:
    """Write zeros up to the next multiple of the alignment."""
    file.write(bytes(-file.tell() % ALIGNMENT))
