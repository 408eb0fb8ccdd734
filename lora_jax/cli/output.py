"""How commands print their results: tables, JSON, plots and progress bars."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_jax.analysis.inspection import WeightSummary
from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.core.text import printable

UNLIMITED = 10_000  # columns of a table that goes to a file or another program
BARS = 1000  # of a picture: Matplotlib draws 65,536 dots in each direction


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: int = 0) -> None:
    """Print columns under their header, the last `right` of them aligned to the right.

    In a terminal, long names are folded to its width; elsewhere, each row is one line of plain text.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, name in enumerate(header):
        numeric = i >= len(header) - right
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    Console(width=None if sys.stdout.isatty() else UNLIMITED).print(table)


def say(text: str) -> None:
    """Print a line. Names in it may come from files that are not trusted: it stays one line whatever they hold."""
    print(printable(text))


def print_json(value: Any) -> None:
    """Print a value as JSON, which lacks NaN and infinities: they become null."""

    def clean(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: clean(child) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [clean(child) for child in node]
        return None if isinstance(node, float) and not np.isfinite(node) else node

    print(json.dumps(clean(value), indent=2))


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, and yield a function that sets it to (bytes done, bytes in all)."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def draw_spectra(rows: Sequence[WeightSummary], path: Path) -> None:
    """Draw the norm and the effective rank of each weight's change as bars, into a PNG file.

    Of more weights than a picture can be high, the first ones are drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    more, rows = len(rows) - BARS, rows[:BARS]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.22 * len(rows)), sharey=True, layout="constrained")
    places = range(len(rows))
    left.barh(places, [row.norm or 0.0 for row in rows], color="#1f6fb4")
    right.barh(places, [row.rank or 0 for row in rows], color="#d8e4ef", label="rank")
    right.barh(places, [row.effective_rank or 0.0 for row in rows], color="#c44e52", height=0.5, label="effective rank")
    left.set_yticks(places, [_label(row.path) for row in rows], parse_math=False)
    left.set(xlabel="norm of the change", ylim=(len(rows) - 0.4, -0.6))
    if more > 0:
        left.set(ylabel=f"and {more:,} more")
    right.set(xlabel="rank")
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", labelsize=8, length=0)
    try:
        with written_file(path) as new:
            figure.savefig(new, dpi=120, format="png")
    finally:
        plt.close(figure)


def _label(name: str) -> str:
    """Return a name as a picture has room for it: its end tells more than its beginning."""
    name = printable(name)
    return name if len(name) <= 80 else f"...{name[-77:]}"
