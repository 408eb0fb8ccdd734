"""Numbers, names, lists and tables as plain text."""

from collections.abc import Sequence
from typing import Any


def printable(text: str) -> str:
    """Return a text with escapes for all characters that a terminal would obey or hide, line breaks among them.

    Names come from files that anyone may have written: an escape sequence in one of them could clear the screen, a line
    break forge a line, and an override of the direction show another name.

    >>> print(printable("layer\\x1b[2J.0\\nis sound"))
    layer\\x1b[2J.0\\nis sound
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: int = 0) -> str:
    """Format columns under their header, the last `right` of them aligned to the right.

    >>> print(format_table(["name", "n"], [["a", 10], ["bc", 5]], right=1))
    name   n
    ----  --
    a     10
    bc     5
    """
    cells = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    left = len(header) - right
    lines = (
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def listed(lines: Sequence[str], most: int = 8) -> str:
    """Return the first lines, each indented on a line of its own, and how many more there are."""
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*(f"  {printable(line)}" for line in lines[:most]), *more])


def size(nbytes: int) -> str:
    """Format a number of bytes in decimal units.

    >>> size(295_424)
    '295.4 kB'
    """
    return f"{nbytes} B" if nbytes < 1000 else f"{_scaled(nbytes)}B"


def count(n: int) -> str:
    """Format a large number with an SI prefix.

    >>> count(1_234_567_890)
    '1.2 G'
    """
    return str(n) if n < 1000 else _scaled(n)


def _scaled(n: float) -> str:
    for prefix in " kMGTPE":
        if n < 999.95 or prefix == "E":
            return f"{n:.1f} {prefix}"
        n /= 1000
    raise AssertionError("unreachable")
