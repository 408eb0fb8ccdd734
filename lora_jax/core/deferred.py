"""The operations that a program applies to a packed weight, deferred until the weight is dequantized.

A program may transpose, reshape and cast each matrix of a packed weight on its way to a product. The packed arrays stay
as they are; the operations are recorded, and applied to the values of the dequantized matrices.

Axes: s stacked matrices, then the axes of one matrix. A spec has one entry for each axis of a matrix: the mesh axes
that split it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

Deferred = tuple[tuple[str, Any], ...]  # ("transpose", permutation), ("reshape", shape), ("cast", dtype), in this order
Size = Callable[[Any], int]  # into how many parts an entry of a spec splits an axis


def and_then(deferred: Deferred, name: str, how: Any) -> Deferred:
    """Return the operations and one more. Two transposes in a row become one, or none."""
    if name == "transpose" and deferred and deferred[-1][0] == "transpose":
        *before, (_, first) = deferred
        how, deferred = tuple(first[axis] for axis in how), tuple(before)
    same = name == "transpose" and tuple(how) == tuple(range(len(how)))
    return deferred if same else (*deferred, (name, how))


def shape_after(shape: tuple[int, ...], deferred: Deferred) -> tuple[int, ...]:
    """Return the shape of a matrix once the operations are applied."""
    for name, how in deferred:
        if name == "transpose":
            shape = tuple(shape[axis] for axis in how)
        elif name == "reshape":
            shape = how
    return shape


def dtype_after(dtype: Any, deferred: Deferred) -> Any:
    """Return the dtype of a matrix once the operations are applied."""
    return next((how for name, how in reversed(deferred) if name == "cast"), dtype)


def apply_deferred(w: jax.Array, stack: int, deferred: Deferred) -> jax.Array:
    """Transpose, reshape and cast each matrix of w [*s, ...], which has `stack` stack axes."""
    for name, how in deferred:
        if name == "cast":
            w = w.astype(how)
        elif name == "transpose":
            w = w.transpose(*range(stack), *(stack + axis for axis in how))
        else:
            w = w.reshape(*w.shape[:stack], *how)
    return w


def undo_deferred(w: jax.Array, stack: int, shape: tuple[int, ...], deferred: Deferred) -> jax.Array:
    """Invert `apply_deferred`: return the matrices [*s, *shape] that it maps to w. Casts are not undone."""
    for i, (name, how) in reversed(list(enumerate(deferred))):
        if name == "transpose":
            w = w.transpose(*range(stack), *(stack + axis for axis in _inverse(how)))
        elif name == "reshape":
            w = w.reshape(*w.shape[:stack], *shape_after(shape, deferred[:i]))
    return w


def spec_after(spec: Sequence[Any], shape: tuple[int, ...], deferred: Deferred, size: Size) -> tuple[Any, ...]:
    """Return the spec of a matrix once the operations are applied, from its spec and shape before them.

    An axis that a reshape divides in a way that the mesh does not is whole (None) in the result.
    """
    for i, (name, how) in enumerate(deferred):
        if name == "transpose":
            spec = [spec[axis] for axis in how]
        elif name == "reshape":
            spec = _reshaped_spec(spec, shape_after(shape, deferred[:i]), how, size)
    return tuple(spec)


def spec_before(spec: Sequence[Any], shape: tuple[int, ...], deferred: Deferred, size: Size) -> tuple[Any, ...]:
    """Invert `spec_after`: return the spec of a matrix before the operations, from its spec after them.

    `shape` is the shape before the operations.
    """
    for i, (name, how) in reversed(list(enumerate(deferred))):
        if name == "transpose":
            spec = [spec[axis] for axis in _inverse(how)]
        elif name == "reshape":
            spec = _reshaped_spec(spec, how, shape_after(shape, deferred[:i]), size)
    return tuple(spec)


def _inverse(permutation: Sequence[int]) -> list[int]:
    return [permutation.index(axis) for axis in range(len(permutation))]


def _reshaped_spec(spec: Sequence[Any], old: Sequence[int], new: Sequence[int], size: Size) -> list[Any]:
    """Return the spec after a reshape from `old` to `new`.

    Of axes that are merged into one, or that one is split into, only the first may be split over the mesh.
    """
    entries = iter([entry for entry, n in zip(spec, old, strict=True) if n != 1])
    out: list[Any] = []
    for _, count, sizes in blocks([n for n in old if n != 1], [n for n in new if n != 1]):
        first, *_ = [next(entries) for _ in range(count)]
        out += [first if sizes[0] % size(first) == 0 else None, *[None] * (len(sizes) - 1)]
    following = iter(out)
    return [None if n == 1 else next(following) for n in new]


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield the shortest runs of axes with equal products on both sides of a reshape.

    Each run is (its first axis in `old`, how many axes of `old` it has, its sizes in `new`).
    """
    i = j = 0
    while i < len(old):
        start, first = i, j
        i, j = i + 1, j + 1
        while math.prod(old[start:i]) != math.prod(new[first:j]):
            if math.prod(old[start:i]) < math.prod(new[first:j]):
                i += 1
            else:
                j += 1
        yield start, i - start, tuple(new[first:j])
