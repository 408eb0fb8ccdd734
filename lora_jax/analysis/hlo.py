"""The text of a compiled program: its computations, their instructions, and how often each loop runs.

XLA's CPU and GPU compilers write the number of turns of a loop beside it. The one for TPUs does not: there it is read
off the loop's condition (index < limit) and its body (index + step).
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(?.*\{$")
INSTRUCTION = re.compile(r"(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = results operation(operands), rest`."""

    name: str
    results: str  # the dtypes and shapes of what it returns
    operation: str
    rest: str  # the operands, and what follows
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Return the names of its operands."""
        depth, end = 1, len(self.rest)
        for i, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                end = i
                break
        return tuple(re.findall(r"%([\w.\-]+)", self.rest[:end]))

    def called(self, *names: str) -> tuple[str, ...]:
        """Return the computations that it calls under these names, such as "body"; each may be a list."""
        found = re.findall(rf"\b(?:{'|'.join(names)})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest)
        return tuple(name.strip().lstrip("%") for many, one in found for name in (many.split(",") if many else [one]))

    def field(self, pattern: str) -> str | None:
        """Return what the group of a pattern matches among what follows the operands."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None


@dataclass(frozen=True)
class Module:
    """A compiled program: its computations by their names, and the one that is run."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def instruction(self, computation: str, name: str) -> Instruction | None:
        """Return the instruction of this name in a computation; None if there is none."""
        return self._by_name(computation).get(name)

    def _by_name(self, computation: str) -> dict[str, Instruction]:
        if computation not in self._names:
            self._names[computation] = {one.name: one for one in self.computations.get(computation, ())}
        return self._names[computation]

    @functools.cached_property
    def _names(self) -> dict[str, dict[str, Instruction]]:
        return {}

    def root(self, computation: str) -> Instruction | None:
        """Return the instruction whose result a computation returns."""
        return next((one for one in self.computations.get(computation, ()) if one.is_root), None)

    def trips(self, loop: Instruction) -> int | None:
        """Return how often the body of a `while` runs; None where the text does not say it."""
        if known := loop.field(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        [condition], [body] = loop.called("condition"), loop.called("body")
        root = self.root(condition)
        if root is None or root.operation not in ("compare", "fusion") or len(root.operands) != 2:
            return None
        index, limit = (self.instruction(condition, name) for name in root.operands)
        at = index.field(r"index=(\d+)") if index else None
        end = self._constant(condition, limit.name) if limit else None
        if at is None or end is None:
            return None
        return max(1, -(-end // self._step(body, int(at))))

    def _step(self, body: str, at: int) -> int:
        """Return by how much one turn of a loop raises the element `at` of what it carries."""
        root = self.root(body)
        if root is None or root.operation != "tuple" or at >= len(root.operands):
            return 1
        counter = self.instruction(body, root.operands[at])
        if counter is None or counter.operation != "add":
            return 1
        steps = [n for name in counter.operands if (n := self._constant(body, name))]
        return steps[0] if steps else 1

    def _constant(self, computation: str, name: str) -> int | None:
        found = self.instruction(computation, name)
        if found is None or found.operation != "constant":
            return None
        number = re.match(r"(\d+)\)", found.rest)
        return int(number[1]) if number else None


def parse(text: str) -> Module:
    """Read a compiled program, `jitted.lower(...).compile().as_text()`.

    >>> text = '''ENTRY %main (x: f32[2]) -> f32[2] {
    ...   %x = f32[2]{0} parameter(0)
    ...   ROOT %y = f32[2]{0} negate(%x)
    ... }'''
    >>> module = parse(text)
    >>> module.entry, [(one.operation, one.operands) for one in module.computations["main"]]
    ('main', [('parameter', ()), ('negate', ('x',))])
    """
    computations: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if not line.startswith(" ") and (head := HEAD.match(line)) and " = " not in line:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and (found := INSTRUCTION.match(line.strip())):
            root, own, results, operation, rest = found.groups()
            computations[name].append(Instruction(own, results, operation, rest, bool(root)))
        elif line.startswith("}") and not line.startswith("}}"):  # the text of a kernel may go over several lines
            name = ""
    return Module({name: tuple(lines) for name, lines in computations.items()}, entry)


def arrays(results: str) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield the dtype, the shape and the bytes, without padding, of each array in the text of a type.

    >>> list(arrays("(bf16[2,3]{1,0:T(8,128)(2,1)}, s4[8]{0}, pred[])"))
    [('bf16', (2, 3), 12), ('s4', (8,), 4), ('pred', (), 1)]
    """
    for dtype, dims in ARRAY.findall(results):
        shape = tuple(int(n) for n in dims.split(",") if n)
        found = re.search(r"\d+", dtype)
        bits = int(found[0]) if found else 8
        yield dtype, shape, -(-math.prod(shape) * bits // 8)


def nbytes(results: str) -> int:
    """Return the bytes of all arrays in the text of a type."""
    return sum(n for _, _, n in arrays(results))
