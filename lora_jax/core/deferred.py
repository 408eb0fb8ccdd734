"""What a program did to each matrix of a packed weight, which is done to the values once they are unpacked.

Axes: s stacked matrices; of a matrix, its own axes. A spec has an entry for each of these: the mesh axes that split it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

View = tuple[tuple[str, Any], ...]  # ("transpose", permutation), ("reshape", shape) and ("cast", dtype), in their order
Size = Callable[[Any], int]  # into how many parts an entry of a spec splits an axis


def viewed_shape(shape: tuple[int, ...], view: View) -> tuple[int, ...]:
    for name, how in view:
        if name == "transpose":
            shape = tuple(shape[axis] for axis in how)
        elif name == "reshape":
            shape = how
    return shape


def viewed_dtype(dtype: Any, view: View) -> Any:
    return next((how for name, how in reversed(view) if name == "cast"), dtype)


def view_matrices(w: jax.Array, stack: int, view: View) -> jax.Array:
    """[*s, ...], each matrix transposed, reshaped and cast."""
    for name, how in view:
        if name == "cast":
            w = w.astype(how)
        elif name == "transpose":
            w = w.transpose(*range(stack), *(stack + axis for axis in how))
        else:
            w = w.reshape(*w.shape[:stack], *how)
    return w


def unview_matrices(w: jax.Array, stack: int, shape: tuple[int, ...], view: View) -> jax.Array:
    """The other way round: [*s, *shape], whose view is w; its dtype is left as it is."""
    for i, (name, how) in reversed(list(enumerate(view))):
        if name == "transpose":
            w = w.transpose(*range(stack), *(stack + axis for axis in _inverse(how)))
        elif name == "reshape":
            w = w.reshape(*w.shape[:stack], *viewed_shape(shape, view[:i]))
    return w


def viewed_spec(spec: Sequence[Any], shape: tuple[int, ...], view: View, size: Size) -> tuple[Any, ...]:
    """Where a matrix's view is; an axis that a reshape takes apart otherwise than the mesh does is whole."""
    for i, (name, how) in enumerate(view):
        if name == "transpose":
            spec = [spec[axis] for axis in how]
        elif name == "reshape":
            spec = _reshaped_spec(spec, viewed_shape(shape, view[:i]), how, size)
    return tuple(spec)


def unviewed_spec(spec: Sequence[Any], shape: tuple[int, ...], view: View, size: Size) -> tuple[Any, ...]:
    """The other way round: where a matrix is whose view is there."""
    for i, (name, how) in reversed(list(enumerate(view))):
        if name == "transpose":
            spec = [spec[axis] for axis in _inverse(how)]
        elif name == "reshape":
            spec = _reshaped_spec(spec, how, viewed_shape(shape, view[:i]), size)
    return tuple(spec)


def _inverse(permutation: Sequence[int]) -> list[int]:
    return [permutation.index(axis) for axis in range(len(permutation))]


def _reshaped_spec(spec: Sequence[Any], old: Sequence[int], new: Sequence[int], size: Size) -> list[Any]:
    """Of axes that are merged or split, the first one may be split over the mesh."""
    entries = iter([entry for entry, n in zip(spec, old, strict=True) if n != 1])
    out: list[Any] = []
    for _, count, sizes in blocks([n for n in old if n != 1], [n for n in new if n != 1]):
        first, *_ = [next(entries) for _ in range(count)]
        out += [first if sizes[0] % size(first) == 0 else None, *[None] * (len(sizes) - 1)]
    following = iter(out)
    return [None if n == 1 else next(following) for n in new]


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The shortest runs of axes of equal size on both sides of a reshape: start, count, new sizes."""
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
