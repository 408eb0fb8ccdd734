"""The entries of an `adapter_config.json`, read from the file and checked one by one.

The file is not trusted: it may be large, nested, of other types than expected, or hold regular expressions that take
for ever.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_jax.core.errors import LoraError, short
from lora_jax.core.untrusted import read_json
from lora_jax.interop.peft.module_patterns import ModulePatterns

LIMIT = 2.0**127  # fp32 holds all numbers below
LARGEST = 8 * 2**20  # bytes of a config; those that PEFT writes have a few thousand
NAMES = 2**16  # names in a list; a model of many experts has some ten thousand modules
LONGEST = 1000  # characters of a name

T = TypeVar("T")


class Options:
    """The entries of a config, whose file is named in each error.

    Args:
        path: of the file.
        entries: what it says, where that has been read already.

    Raises:
        LoraError: the file cannot be read, or holds no JSON object. The methods raise it for an entry that is not of
            the type that is asked for.
    """

    def __init__(self, path: Path, entries: dict[str, Any] | None = None) -> None:
        self.path = path
        self.entries = _read(path) if entries is None else entries

    def error(self, text: str) -> LoraError:
        return LoraError(f"{self.path}: {text}")

    def get(self, name: str) -> Any:
        """Return an entry as it is, None if there is none."""
        return self.entries.get(name)

    def flag(self, name: str) -> bool:
        return bool(self.entries.get(name))

    def number(self, name: str, default: float) -> float:
        """Return a number that fp32 can hold."""
        return self._number(name, self.entries.get(name, default), whole=False)

    def whole_number(self, name: str, default: int) -> int:
        """Return a whole number of at least 1."""
        return self._number(name, self.entries.get(name, default), whole=True)

    def names(self, name: str) -> tuple[str, ...]:
        """Return a list of strings, empty if there is none."""
        value = self.entries.get(name) or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.error(f"{name} is {short(value)}, expected a list of names.")
        if len(value) > NAMES or any(len(one) > LONGEST for one in value):
            longest = max(map(len, value))
            raise self.error(
                f"{name} has {len(value):,} names of up to {longest:,} characters, expected at most {NAMES:,} of "
                f"{LONGEST:,}."
            )
        return tuple(value)

    def patterns(self, name: str, whole: bool) -> ModulePatterns[Any]:
        """Return `{regular expression: number}`, with whole numbers of at least 1 if `whole`."""
        found = self.entries.get(name) or {}
        if not isinstance(found, dict):
            raise self.error(f"{name} is {short(found)}, expected an object of patterns and numbers.")
        table = ModulePatterns(found, f"{self.path}: {name}")
        for pattern, value in found.items():
            self._number(f"{name}[{short(pattern)}]", value, whole)
        return table

    def rows(self, name: str) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """Return numbers of rows, or `{module: numbers of rows}`."""
        found = self.entries.get(name)
        lists = found if isinstance(found, dict) else {"": found or []}
        for rows in lists.values():
            if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
                raise self.error(f"{name} has {short(rows)}, expected a list of numbers of rows.")
        return {module: tuple(rows) for module, rows in lists.items()} if lists is found else tuple(lists[""])

    def _number(self, name: str, value: Any, whole: bool) -> Any:
        types = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, types) or not abs(value) < LIMIT or (whole and value < 1):
            expected = "a whole number of at least 1" if whole else "a finite number of fp32"
            raise self.error(f"{name} is {short(value)}, expected {expected}.")
        return value


def _read(path: Path) -> dict[str, Any]:
    entries = read_json(path, LARGEST, "config of an adapter")
    if not isinstance(entries, dict):
        raise LoraError(f"{path} holds a {type(entries).__name__}, expected an object of options.")
    return entries


def value_of_module(patterns: Mapping[str, T], module: str, default: T) -> T:
    """Return the value of the first pattern that matches the module's name, whole or from one of its dots on."""
    table = patterns if isinstance(patterns, ModulePatterns) else ModulePatterns(patterns)
    return table.value_of(module, default)
