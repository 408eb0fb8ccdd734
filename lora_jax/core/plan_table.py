"""The table of a plan: a row for each weight, or one for all layers' weights that are alike."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.core.axes import KernelAxes
from lora_jax.core.text import count, format_table, size


class Row(NamedTuple):
    """What a plan's table says of one weight."""

    path: str
    shape: tuple[int, ...]
    axes: KernelAxes
    rule: str
    parameters: int  # of the adapter
    trained: int  # of these; the others are frozen
    nbytes: int
    flops: int
    shared: tuple[str, ...]  # which axes share a factor
    formed: tuple[str, ...]  # where the weight is formed at full size
    kept: tuple[int, int] | None  # bytes of x that a gradient keeps, by `keep`; None if a remat of the function decides


Group = tuple[str, list[Row]]  # what the rows are called, and the rows


def format_plan(rows: Sequence[Row], base_leaves: int, base_parameters: int, grouped: bool, advice: bool) -> str:
    """Return the table of a plan, its sums, and what else there is to know of its weights, or could be asked for."""
    groups = _groups(rows) if grouped else [(row.path, [row]) for row in rows]
    is_shorter = len(groups) < len(rows)
    cells = [[name, list(alike[0].shape), alike[0].axes, alike[0].rule, *[len(alike)] * is_shorter,
              f"{sum(row.parameters for row in alike):,}", size(sum(row.nbytes for row in alike)),
              count(sum(row.flops for row in alike)), *(_kept(alike) if advice else [])]
             for name, alike in groups]  # fmt: skip
    kept = ["x", "thin"] if advice else []
    header = ["path", "shape", "axes", "rule", *["weights"] * is_shorter, "parameters", "bytes", "FLOPs", *kept]
    table = format_table(header, cells, right=3 + len(kept) + is_shorter)
    parameters, trained = sum(row.parameters for row in rows), sum(row.trained for row in rows)
    of_these = f" ({trained:,} of them trained)" if trained < parameters else ""
    share = parameters / (base_parameters + parameters)
    summary = (
        f"{len(rows)} of {base_leaves} weights adapted: {parameters:,} parameters{of_these} beside "
        f"{base_parameters:,} ({share:.2%}), {size(sum(row.nbytes for row in rows))}. "
        "FLOPs are those added to one forward pass."
    )
    if not advice:
        return "\n".join([table, summary, *_formed(groups)])
    summary += (
        " x is what a gradient keeps of a weight's inputs for its adapter alone, thin the same with "
        'lora_apply(fn, keep="thin").'
    )
    each = ["A row for each weight: plan.table(grouped=False)."] if is_shorter else []
    return "\n".join([table, summary, *each, *_shared(rows), *_formed(groups)])


def _kept(rows: Sequence[Row]) -> list[str]:
    """Return what a gradient keeps of the inputs of these weights, with each way to keep."""
    found = [row.kept for row in rows if row.kept is not None]
    return [size(sum(column)) for column in zip(*found, strict=True)] if found else ["remat", "remat"]


def _groups(rows: Sequence[Row]) -> list[Group]:
    """Return rows that differ in the numbers of their layers alone as one group, in the order of their first ones."""
    alike: dict[tuple[tuple[str, ...], Row], list[tuple[list[str], Row]]] = {}
    for row in rows:
        between, numbers = _split(row.path)
        alike.setdefault((tuple(between), row._replace(path="", kept=None)), []).append((numbers, row))
    groups = []
    for (texts, _), members in alike.items():
        varying = [len(set(column)) > 1 for column in zip(*(numbers for numbers, _ in members), strict=True)]
        first = ["*" if varies else number for number, varies in zip(members[0][0], varying, strict=True)]
        name = "".join(part for pair in zip(texts, [*first, ""], strict=True) for part in pair)
        groups.append((name, [row for _, row in members]))
    return groups


def _split(path: str) -> tuple[list[str], list[str]]:
    """Return a path without the numbers of its layers, and these.

    Such a number stands by itself, or is the first one: w1 and w2 of one layer are two weights.

    >>> _split("layers_11/mlp/w1/kernel")
    (['layers_', '/mlp/w1/kernel'], ['11'])
    >>> _split("h3/experts/0/w1")
    (['h', '/experts/', '/w1'], ['3', '0'])
    """
    texts: list[str] = []
    numbers: list[str] = []
    end = 0
    for found in re.finditer(r"[0-9]+", path):
        before, after = path[: found.start()][-1:], path[found.end() :][:1]
        if not numbers or not (before.isalpha() or after.isalpha()):
            texts.append(path[end : found.start()])
            numbers.append(found.group())
            end = found.end()
    return [*texts, path[end:]], numbers


def _shared(rows: Sequence[Row]) -> list[str]:
    """Return lines that say which axes share a factor, one for all weights of a shape that do so in one way."""
    alike: dict[tuple[tuple[int, ...], str], list[Row]] = {}
    for row in rows:
        for words in row.shared:
            alike.setdefault((row.shape, words), []).append(row)
    lines = []
    for (_, words), found in alike.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        lines.append(f"{found[0].path!r}{more} {list(found[0].shape)}: {words}.")
    advice = "Where each index along an axis is a matrix of its own (experts, members), name that axis: stack=0."
    return [*lines, advice] if lines else []


def _formed(groups: Sequence[Group]) -> list[str]:
    many = [f"{name!r} is" if len(rows) == 1 else f"{len(rows)} x {name!r} are" for name, rows in groups]
    return [f"{one} formed at full size: {why}" for one, (_, rows) in zip(many, groups, strict=True)
            for why in rows[0].formed]  # fmt: skip
