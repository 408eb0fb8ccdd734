"""Files that are not trusted: what is read of one has a bound before it is read, and is checked before it is used."""

import json
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lora_jax.core.errors import LoraError
from lora_jax.core.text import printable

NESTED = 16  # levels of a JSON file; configs of adapters and of models have five at most
# Values of a JSON file. Each takes up to a hundred bytes of memory. Masks of AdaLoRA, a list for each module, are some
# hundred thousand of them.
VALUES = 2**20

_NO_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        LoraError: there is none; it cannot be read; it is none that ends, such as a named pipe or a device, which is
            not opened.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise LoraError(f"{path} is {_NO_FILES.get(stat.S_IFMT(mode), 'no file')}, expected a file.")
        return path.open("rb")
    except OSError as error:
        raise LoraError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise error if isinstance(error, LoraError) else LoraError(f"{path} cannot be read: {error}.") from None


def size_of(file: BinaryIO) -> int:
    """Return the number of bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_json(path: Path, most: int, what: str, values: int = VALUES, finite: bool = True) -> Any:
    """Return what a JSON file holds.

    Args:
        most: bytes that it may have.
        what: it is, for messages.
        values: numbers, strings, lists and objects that it may hold.
        finite: whether numbers have to be finite; configs of models have infinities.

    Raises:
        LoraError: it cannot be read, is larger, or is not JSON as `parse_json` takes it.
    """
    with open_file(path) as file:
        size = size_of(file)
        text = file.read(most + 1) if size <= most else b""
    if max(size, len(text)) > most:
        raise LoraError(f"{path} has more than {most:,} bytes, and is no {what}.")
    return parse_json(text, str(path), values, finite)


def parse_json(text: bytes, where: str, values: int = VALUES, finite: bool = True) -> Any:
    """Return what a JSON text holds, whose strings are text and whose numbers, if `finite`, are finite.

    Raises:
        LoraError: it is no JSON in UTF-8, names something twice, is nested too deep, or holds too many values.
    """
    if (found := sum(map(text.count, (b",", b":", b"[", b"{")))) > values:  # one at least stands before each value
        raise LoraError(f"{where} holds up to {found:,} values, expected at most {values:,}.")
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_with_each_name_once)
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{where} is no JSON: {str(error)[:200]}.") from None
    _check(entries, where, "it", NESTED, finite)
    return entries


def _with_each_name_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; of two entries with one name, readers take different ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, None] = {}
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"it says {name[:100]!r} twice")
            seen[name] = None
    return found


def _check(node: Any, where: str, name: str, depth: int, finite: bool) -> None:
    """Raise for what JSON's grammar allows and no file of ours has."""
    if isinstance(node, dict | list):
        if not depth:
            raise LoraError(f"{where} is nested more than {NESTED} levels deep.")
        for key, child in node.items() if isinstance(node, dict) else ((name, child) for child in node):
            _check_text(key, where)
            _check(child, where, key, depth - 1, finite)
    elif isinstance(node, str):
        _check_text(node, where)
    elif finite and isinstance(node, float) and not math.isfinite(node):
        raise LoraError(f"{where}: {printable(name[:100])} is {node}, expected a finite number.")


def _check_text(text: str, where: str) -> None:
    """Raise for halves of surrogate pairs, which no file or terminal can be given."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise LoraError(f"{where} holds {text[:100]!r}, which is no text.")
