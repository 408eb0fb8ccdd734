r"""Patterns of a config for names of modules: of those that match a name, the first one decides.

PEFT matches a pattern with the end of a name, from the beginning or from one of its dots on:
`re.match(rf"(.*\.)?({pattern})$", name)`. Most patterns are names, in which a dot stands for any character. They are
looked up by the end of a name, so that a config with a pattern for each module is read in a time linear in their
number. All others run in RE2, in a time that is linear in the length of the name.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from lora_jax.core.errors import LoraError, short

MOST = 2**16  # patterns; a model of many experts has some ten thousand modules
LONGEST = 2**16  # characters of a pattern; the names of a thousand modules beside one another have half as many
# Instructions of all regular expressions together: those that people write have some hundred each.
INSTRUCTIONS = 2**17
MEMORY = 2**10  # bytes for each character of an expression, which is room for ten instructions
# Steps that all names together take at most, which are instructions, or characters to compare, for each character of a
# name. 10,000 names of 60 characters and 100 expressions of 100 instructions are 6e9 steps, most of which RE2 skips.
STEPS = 2**33

# A name, with escapes for what would have a meaning in a pattern, at any dot or at the beginning alone.
_NAME = re.compile(r"(\^?)((?:[^\\^$*+?{}\[\]|()\n]|\\[^\w\n])*)\$?")

T = TypeVar("T")


class ModulePatterns(Mapping[str, T]):
    """`{pattern: value}`, compiled once.

    Args:
        values: `{pattern: value}`; the first one that matches a name counts.
        where: what they are, for messages.

    Raises:
        LoraError: a pattern is no regular expression of RE2; RE2 is needed and not installed; they are too many, or so
            large that matching them would take too long. The latter is also raised for names.
    """

    def __init__(self, values: Mapping[str, T], where: str = "a pattern") -> None:
        self._values, self._where, self._left = values, where, STEPS
        self._patterns = [*values]
        self._names = _Names()
        self._expressions: list[tuple[int, Any]] = []
        self._instructions = 0
        self._known: dict[str, int | None] = {}
        if len(values) > MOST:
            raise LoraError(f"{where} has {len(values):,} patterns, expected at most {MOST:,}.")
        for order, pattern in enumerate(values):
            if len(pattern) > LONGEST:
                raise LoraError(f"{where} has a pattern of {len(pattern):,} characters, expected at most {LONGEST:,}.")
            if (name := _NAME.fullmatch(pattern)) is not None:
                self._names.add(order, name[2], at_start=bool(name[1]))
                continue
            expression = _compiled(where, pattern)
            self._expressions.append((order, expression))
            self._instructions += expression.programsize
            if self._instructions > INSTRUCTIONS:
                raise LoraError(
                    f"{where} has regular expressions of more than {INSTRUCTIONS:,} instructions together: give each "
                    "module a pattern that is its name."
                )

    def __getitem__(self, pattern: str) -> T:
        return self._values[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def value_of(self, module: str, default: T) -> T:
        """Return the value of the first pattern that matches the module's name."""
        if module not in self._known:
            self._known[module] = self._first(module)
        order = self._known[module]
        return default if order is None else self._values[self._patterns[order]]

    def _first(self, module: str) -> int | None:
        """Return the position of the first pattern that matches."""
        self._left -= len(module) * (self._instructions + self._names.layouts)
        if self._left < 0:
            raise LoraError(
                f"{self._where}: to match {len(self):,} patterns with {len(self._known):,} modules and more takes more "
                f"than {STEPS:,} steps. Give each module a pattern that is its name."
            )
        known = self._names.first(module)
        for order, expression in self._expressions:
            if known is not None and known < order:
                break
            if expression.fullmatch(module) is not None:
                return order
        return known


class _Names:
    """Patterns that are names, found by the end of a module's name: by its length, and with dots for any character."""

    def __init__(self) -> None:
        # By the length; then by whether a name has to begin there, and by the places of dots; then by the characters.
        self._tables: dict[int, dict[tuple[bool, tuple[int, ...]], dict[str, int]]] = {}
        self.layouts = 0  # the number of the second ones

    def add(self, order: int, pattern: str, at_start: bool) -> None:
        """Add a pattern without its anchors."""
        characters = re.findall(r"\\?.", pattern)
        dots = tuple(i for i, character in enumerate(characters) if character == ".")
        tables = self._tables.setdefault(len(characters), {})
        self.layouts += (at_start, dots) not in tables
        name = "".join(character[-1] for character in characters)
        tables.setdefault((at_start, dots), {}).setdefault(name, order)

    def first(self, module: str) -> int | None:
        """Return the position of the first pattern that matches."""
        module = module.removesuffix("\n")  # as "$" does
        if "\n" in module:
            return None  # no "." matches one
        found: list[int] = []
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", module))):
            for (at_start, dots), table in self._tables.get(len(module) - start, {}).items():
                order = table.get(_with_dots(module[start:], dots))
                if order is not None and not (at_start and start):
                    found.append(order)
        return min(found, default=None)


def _with_dots(name: str, places: tuple[int, ...]) -> str:
    """Return a name with dots in some places."""
    characters = [*name]
    for i in places:
        characters[i] = "."
    return "".join(characters)


def _compiled(where: str, pattern: str) -> Any:
    """Return a pattern as RE2 runs it."""
    try:
        import re2
    except ImportError as error:
        raise LoraError(
            f"{where} has the regular expression {short(pattern)}, for which RE2 is needed: pip install google-re2."
        ) from error
    if re.search(r"{,\d*}", pattern):  # up to so many for Python, these very characters for RE2
        raise LoraError(f"{where} has {short(pattern)}, in which {{,n}} has two meanings: write {{0,n}}.")
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = MEMORY * (64 + len(pattern))
    try:
        return re2.compile(rf"(.*\.)?({pattern})\n?", options)
    except (re2.error, UnicodeError) as error:
        raise LoraError(f"{where} has {short(pattern)}, which is no regular expression of RE2: {error}.") from error
