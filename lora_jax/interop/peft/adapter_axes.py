"""The axes of an adapter, which may be those of the weight as it is used the other way round, or of fewer matrices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.dora import DoraAdapter
from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout, spans


def with_axes(adapter: Adapter, axes: KernelAxes, path: str, source: str) -> Adapter:
    """Return the adapter with these axes.

    A LoRA of a table that is used as a head is transposed. Where one side has an A for all matrices along an axis, and
    the other side one for each, it is written to each; or the one that all have is taken.

    Args:
        source: where the axes are from, for the error: "the plan" or "the key map".

    Raises:
        LoraError: it has other axes, and cannot be transposed to these; matrices that should share their A do not.
    """
    if isinstance(adapter, FullAdapter | RowsAdapter) and not axes.stack:
        return dataclasses.replace(adapter, axes=axes)
    for candidate in (adapter, adapter.transpose()) if isinstance(adapter, LoraAdapter) else (adapter,):
        if candidate.axes == axes:
            return candidate
    wrong = f"{path!r} has {axes} by {source}, but its adapter has {adapter.axes}"
    if type(adapter) in (LoraAdapter, DoraAdapter):
        more = {*axes.stack} - {*adapter.axes.stack}
        if adapter.axes.with_stack(more) == axes and more <= {*adapter.axes.outputs}:
            return _of_each(adapter, axes)
        fewer = {*adapter.axes.stack} - {*axes.stack}
        if axes.with_stack(fewer) == adapter.axes and fewer <= {*axes.outputs}:
            found = _of_all(adapter, axes)
            if found is None:
                wrong += ", and the A of its matrices differ"
            else:
                return found
    raise LoraError(f"{wrong}: {_mend(adapter, axes)}.")


def _of_each(adapter: Adapter, axes: KernelAxes) -> Adapter:
    """Return the adapter with an A for each matrix of a larger stack, whose outputs had one together."""
    shape = adapter.kernel_shape()
    arrays = _arrays(adapter)
    for name, array in arrays.items():
        layout = adapter.layout[name]
        have, want = _axes_of(layout, adapter.axes), _axes_of(layout, axes)
        moved = array.transpose([have.index(axis) for axis in want if axis in have])
        spread = moved[tuple(slice(None) if axis in have else None for axis in want)]
        sizes = [shape[axis] if isinstance(axis, int) else array.shape[have.index(axis)] for axis in want]
        arrays[name] = np.broadcast_to(spread, sizes)
    return _with_arrays(adapter, arrays, axes)


def _of_all(adapter: Adapter, axes: KernelAxes) -> Adapter | None:
    """Return the adapter with one A for the matrices of a smaller stack, or None if they have different ones.

    Matrices whose A is zero have no adapter, and take that of the others.
    """
    arrays = _arrays(adapter)
    for name, array in arrays.items():
        layout = adapter.layout[name]
        have, want = _axes_of(layout, adapter.axes), _axes_of(layout, axes)
        gone = [axis for axis in have if axis not in want]
        moved = array.transpose([have.index(axis) for axis in [*gone, *want]])
        if not gone:
            arrays[name] = moved
            continue
        each = moved.reshape(-1, *moved.shape[len(gone) :])
        own = [one for one in each if one.any()] or [each[0]]
        if not all(np.array_equal(one, own[0]) for one in own):
            return None
        arrays[name] = own[0]
    return _with_arrays(adapter, arrays, axes)


def _arrays(adapter: Adapter) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays that have axes of the weight."""
    return {
        name: np.asarray(jax.device_get(array))
        for name, array in adapter.arrays().items()
        if array is not None and {"inputs", "outputs"} & {*adapter.layout.get(name, ())}
    }


def _with_arrays(adapter: Adapter, arrays: dict[str, Any], axes: KernelAxes) -> Adapter:
    changed = {name: jnp.asarray(array) for name, array in arrays.items()}
    return dataclasses.replace(adapter, axes=axes, **changed)  # type: ignore[type-var]


def _axes_of(layout: Layout, axes: KernelAxes) -> Sequence[int | str]:
    """Return what each axis of an array is: an axis of the weight, or the name of one of its own."""
    return [part if axis is None else axis for part, _, group in spans(layout, axes) for axis in group]


def _mend(adapter: Adapter, axes: KernelAxes) -> str:
    """Return what is to be done: name the stack in a rule, where one side has factors of its own for each matrix."""
    stack = sorted({*adapter.axes.stack, *axes.stack})
    if adapter.axes.stack == axes.stack:
        return "mend its entry in the key map"
    rule = f"lora.Lora(rank=8, stack={stack[0] if len(stack) == 1 else tuple(stack)})"
    return (
        f"plan it with a rule that names the stack, as in {rule}, so that each matrix has factors of its own, or mend "
        "its entry in the key map"
    )
