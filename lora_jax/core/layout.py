"""Layouts: which of a weight's axes the arrays of an adapter have.

A layout names the groups of the weight's axes that an array has, in order: `("stack", "inputs", "rank")` for LoRA's A.
Any name that is no group of `KernelAxes` stands for one axis of the array's own. From layouts follow the shape of the
weight, the partition specs of the arrays, and what becomes of them when a program reshapes the weight.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError

Layout = tuple[str, ...]


def spans(layout: Layout, axes: KernelAxes) -> Iterator[tuple[str, int, tuple[int | None, ...]]]:
    """Yield each part of a layout, the array axis that it starts at, and the weight's axes in it.

    An axis of the array's own is yielded with `(None,)`.
    """
    start = 0
    for part in layout:
        group = getattr(axes, part) if part in axes._fields else (None,)
        yield part, start, group
        start += len(group)


def field_names(node: Any, static: bool) -> list[str]:
    """Return the fields of an adapter or operand, or of its class: those of arrays, or those of static facts."""
    return [f.name for f in dataclasses.fields(node) if bool(f.metadata.get("static")) == static]


def of_weight(arrays: Mapping[str, Any], layouts: Mapping[str, Layout]) -> dict[str, Any]:
    """Return the arrays that have axes of the weight or of its factors; the others are settings, such as a scale."""
    axes = {*KernelAxes._fields, "rank"}
    return {name: array for name, array in arrays.items() if axes & {*layouts.get(name, ())}}


def weight_shape(arrays: Mapping[str, Any], layouts: Mapping[str, Layout], axes: KernelAxes) -> tuple[int, ...]:
    """Return the shape of the weight that these arrays fit.

    Raises:
        LoraError: the arrays do not fit one another.
    """
    shapes = tuple((name, tuple(arrays[name].shape), layout) for name, layout in layouts.items() if name in arrays)
    return _weight_shape(shapes, axes)


@functools.lru_cache(maxsize=4096)  # asked of every adapter in every call
def _weight_shape(arrays: tuple[tuple[str, tuple[int, ...], Layout], ...], axes: KernelAxes) -> tuple[int, ...]:
    sizes: dict[Any, dict[str, int]] = {}  # by the weight's axes, and by the names of axes of the arrays' own
    for name, shape, layout in arrays:
        expected = sum(len(group) for *_, group in spans(layout, axes))
        if len(shape) != expected:
            raise LoraError(
                f"has {name} of shape {list(shape)}, expected {expected} axes. Several sets of adapters at once go "
                "through jax.vmap(apply, in_axes=(None, 0, ...))."
            )
        for part, start, group in spans(layout, axes):
            for i, axis in enumerate(group):
                sizes.setdefault(part if axis is None else axis, {})[name] = shape[start + i]
    of_weight = range(sum(map(len, axes)))
    if missing := [axis for axis in of_weight if axis not in sizes]:
        raise LoraError(f"has no array along axis {missing[0]} of its weight: its kind has to define `kernel_shape`.")
    for axis in [*(name for name in sizes if isinstance(name, str)), *of_weight]:
        found = sizes[axis]
        if len(set(found.values())) > 1:
            entries = ", ".join(
                f"{n} {'entries ' if i == 0 else ''}in {name}" for i, (name, n) in enumerate(found.items())
            )
            what = axis if isinstance(axis, str) else f"axis {axis}"
            raise LoraError(f"is not of one piece: its {what} has {entries}.")
    return tuple(next(iter(sizes[axis].values())) for axis in of_weight)
