"""Parts of an adapted weight: slices of it, rows of an embedding, some of the matrices of a stack.

Single rows are plain arrays: W[ids] + (alpha / r) A[ids] B is as thin as what the program itself reads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core._compat import JaxprEqn, bind
from lora_jax.core.arrays import is_key
from lora_jax.core.packed import is_packed, unpacked
from lora_jax.transform.adapted_weight import AdaptedWeight
from lora_jax.transform.primitives.registry import no_rule, rule


@rule("slice")
def slice_(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * weight.ndim
    return [_cut(weight, [slice(*index) for index in zip(start, limit, strides, strict=True)])]


@rule("split")
def split(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    axis, end, parts = eqn.params["axis"], 0, []
    for size in map(int, eqn.params["sizes"]):
        start, end = end, end + size
        parts.append(_cut(weight, [slice(start, end) if i == axis else slice(None) for i in range(weight.ndim)]))
    return parts


def _cut(weight: AdaptedWeight, index: list[slice]) -> Any:
    """Return weight[index]. A single entry of the inputs or outputs is a row, and a plain array."""
    out: Any = weight
    for axis, part in enumerate(index):
        start, stop, stride = part.indices(weight.shape[axis])
        if len(range(start, stop, stride)) != weight.shape[axis]:
            out = _cut_one(out, axis, functools.partial(_sliced, start=start, stop=stop, stride=stride))
    return out


def _cut_one(weight: Any, axis: int, fn: Callable[[jax.Array, int], jax.Array]) -> Any:
    if not isinstance(weight, AdaptedWeight):
        return fn(weight, axis)
    value, group = _picked(weight.value, axis, fn), weight.operand.group(axis)
    if value.shape[axis] != 1:
        return weight.replace(value, weight.operand.replace_axes(axis, 1, 1, fn))
    row = weight.replace(value, weight.operand.rows(axis, 1, fn))
    return row.merged() if group in ("inputs", "outputs") else row


def _picked(value: Any, axis: int, fn: Callable[[jax.Array, int], jax.Array]) -> Any:
    """Return fn of the value. Some of the matrices of a packed stack stay packed."""
    if is_packed(value) and axis < len(value.stack):
        return value.on_stack(lambda leaf: fn(leaf, axis))
    return fn(unpacked(value), axis)


def _sliced(array: jax.Array, at: int, start: int, stop: int, stride: int) -> jax.Array:
    return lax.slice_in_dim(array, start, stop, stride, axis=at)


def _dynamically_sliced(array: jax.Array, at: int, start: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, jnp.maximum(start, 0), size, axis=at)  # which would count it from the end


@rule("dynamic_slice")
def dynamic_slice(eqn: JaxprEqn, weight: Any, *starts: Any) -> list[Any]:
    if not isinstance(weight, AdaptedWeight):
        return no_rule(eqn, weight, *starts)
    out: Any = weight
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if size != weight.shape[axis]:
            out = _cut_one(out, axis, functools.partial(_dynamically_sliced, start=starts[axis], size=size))
    return [out]


@rule("gather")
def gather(eqn: JaxprEqn, weight: Any, indices: Any) -> list[Any]:
    """Look up rows of an embedding, or some of the stacked matrices: one axis is indexed and all others are whole.

    Rows are a plain array, W[ids] + (alpha / r) A[ids] B.
    """
    if not isinstance(weight, AdaptedWeight):
        return no_rule(eqn, weight, indices)
    dims, sizes, operand = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], weight.operand
    batched, batch_of_indices = dims.operand_batching_dims, dims.start_indices_batching_dims
    indexed = [i for i in dims.start_index_map if i in dims.collapsed_slice_dims or sizes[i] != weight.shape[i]]
    ignored = [i for i in dims.start_index_map if i not in indexed]  # clipped to the whole axis, whatever the index
    whole = all(n == weight.shape[i] for i, n in enumerate(sizes) if i not in (*indexed, *batched))
    stacked = all(operand.group(i) in ("stack", "unknown") for i in batched)
    clips = eqn.params["mode"] == lax.GatherScatterMode.CLIP
    if len(indexed) != 1 or sizes[indexed[0]] != 1 or not (whole and stacked) or (ignored and not clips):
        return no_rule(eqn, weight, indices, why="picks more than whole rows from it")
    fill = eqn.params["fill_value"]
    if not operand.is_additive and fill is not None and fill == fill and fill != 0:  # NaN and 0 are what they were
        return no_rule(eqn, weight, indices, why=f"fills it with {fill} out of bounds, which its adapter would scale")
    [axis], free = indexed, [i for i in range(indices.ndim - 1) if i not in batch_of_indices]
    column = dims.start_index_map.index(axis)
    unit = [("w", axis)] if axis not in dims.collapsed_slice_dims else []  # the axis stays, of size 1

    def take(array: jax.Array, at: int, fill: float = 0) -> jax.Array:
        lead = [operand.axes.stack.index(i) for i in batched]  # every array begins with the stack axes
        front = range(len(lead))
        fn = _take_along(eqn, at - sum(i < at for i in lead), fill)
        for _ in front:
            fn = jax.vmap(fn)
        ids = jnp.moveaxis(indices[..., column : column + 1], batch_of_indices, front)
        rows = fn(jnp.moveaxis(array, lead, front), ids)
        rows = jnp.moveaxis(rows, front, [i if i < at else i + len(free) - 1 for i in lead])
        return jnp.expand_dims(rows, at + len(free)) if unit else rows

    # The axes of the rows with the indices in the place of the indexed axis, and those of the program's result.
    in_place: list[Any] = [("w", i) for i in range(weight.ndim)]
    in_place[axis : axis + 1] = [*(("i", i) for i in free), *unit]
    window = iter([("w", i) for i in range(weight.ndim) if i not in (*dims.collapsed_slice_dims, *batched)])
    of_batch = dict(zip(batch_of_indices, batched, strict=True))
    batch = iter([("w", of_batch[i]) if i in of_batch else ("i", i) for i in range(indices.ndim - 1)])
    result = [next(window if i in dims.offset_dims else batch) for i in range(len(in_place))]
    picked = operand.rows(axis, len(free) + len(unit), take, batched)
    order = tuple(in_place.index(label) for label in result)
    value = weight.value
    is_nan = fill is None or fill != fill  # out of bounds: what it is multiplied with makes all of a weight NaN
    in_stack = is_packed(value) and axis < len(value.stack) and not value.on_host  # where no ids are
    if in_stack and order == tuple(range(len(order))) and not batched and is_nan:
        value = value.on_stack(lambda leaf: take(leaf, axis, math.nan if _has_nan(leaf) else 0))
    else:
        [value] = bind(eqn, [unpacked(value), indices])
    rows = weight.replace(value, picked.permute(order))
    return [rows.merged() if operand.group(axis) in ("inputs", "outputs") else rows]


def _has_nan(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _take_along(eqn: JaxprEqn, at: int, value: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the gather of an equation along one axis of any array; what is out of bounds is `value`."""

    def fn(array: jax.Array, indices: jax.Array) -> jax.Array:
        n = indices.ndim - 1
        dims = lax.GatherDimensionNumbers(
            offset_dims=tuple(i for i in range(array.ndim - 1 + n) if not at <= i < at + n),
            collapsed_slice_dims=(at,),
            start_index_map=(at,),
        )
        sizes = tuple(1 if i == at else size for i, size in enumerate(array.shape))
        fill = None if is_key(array) else value
        return lax.gather(array, indices, dims, sizes, mode=eqn.params["mode"], fill_value=fill)

    return fn
