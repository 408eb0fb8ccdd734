"""Work on a weight part by part, so that what is computed of it in fp32 is never as large as the weight."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.arrays import concrete

PART = 2**20  # numbers in a part: some megabytes of fp32, and few enough parts that their loop costs nothing


def can_split(w: Any) -> bool:
    """Return whether an array is on one device: over a mesh, a part along a split axis would have to be gathered."""
    return concrete(w) and len(w.sharding.device_set) == 1


def parts_of(shape: Sequence[int], together: Sequence[int]) -> tuple[int, int]:
    """Return an axis, and into how many equal parts along it an array is split.

    Args:
        shape: of the array.
        together: axes that a part has as a whole.

    >>> parts_of((1, 4096, 1024), (1,)), parts_of((64, 64), (0,)), parts_of((8, 2**20), (0, 1))
    ((2, 4), (1, 1), (0, 1))
    """
    free = [axis for axis in range(len(shape)) if axis not in together]
    if not free:
        return 0, 1
    axis = max(free, key=lambda axis: shape[axis])
    fewest = min(shape[axis], max(1, math.ceil(math.prod(shape) / PART)))
    return axis, next(n for n in range(fewest, shape[axis] + 1) if shape[axis] % n == 0)


def in_parts(fn: Callable[[Any, int], Any], axis: int, size: int, parts: int) -> Any:
    """Return what `fn` makes of the parts of an array, one after the other.

    The loop is Python's: in one of XLA's, a compiler makes fp32 of the whole array before the loop.

    Args:
        fn: a compiled function of where a part begins and how long it is, that returns arrays with the axis.
        axis, parts: as of `parts_of`.
        size: of the axis.
    """
    if parts == 1:
        return fn(0, size)
    step = size // parts
    found = [jax.block_until_ready(fn(np.int32(start), step)) for start in range(0, size, step)]
    return jax.tree.map(lambda *own: jnp.concatenate(own, axis), *found)


def part(array: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    """Return a part of an array along an axis, in a compiled function."""
    return array if array.shape[axis] == size else jax.lax.dynamic_slice_in_dim(array, start, size, axis)
