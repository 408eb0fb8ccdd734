"""Weights of 4 or 8 bits as other libraries publish them: the numbers that their bytes stand for.

    W = (q - zero) * scale

q is a number of few bits. Numbers of one block of W share a scale, and a zero if the format has some. Each format says
how q lies in bytes, which size a block has, and how scales are written. Everything here is NumPy, so that a weight is
read without a device; `files` says which tensors of a folder belong to one weight.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

Array = np.ndarray[Any, Any]
NUMBERS = 2**18  # that are decoded at a time: few enough for a CPU's cache
NO_SCALE = 255  # of e8m0: not a number
EXPONENT = 127  # what e8m0 adds to an exponent

# Two floats of 4 bits a byte, the low half first: a sign, two bits of an exponent, one of a mantissa (e2m1; Open
# Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0, 5.3.3).
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BYTES = np.arange(256)


def _integers(bits: int) -> Array:
    """Return the integers in each byte, the lowest bits first, of which half of the range has been added."""
    starts = np.arange(0, 8, bits)
    return ((_BYTES[:, None] >> starts) % 2**bits - 2 ** (bits - 1)).astype(np.float32)


# For each way to write q, the numbers that each byte holds, fp32 [256, n].
TABLES: dict[str, Array] = {
    "e2m1": _E2M1[np.stack([_BYTES % 16, _BYTES // 16], -1)],
    "e4m3": _BYTES.astype(np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)[:, None],
    "int8": _BYTES.astype(np.uint8).view(np.int8).astype(np.float32)[:, None],
    "packed 2": _integers(2),
    "packed 4": _integers(4),
    "packed 8": _integers(8),
}


def numbers(kind: str, data: Array, columns: int) -> Array:
    """Return the numbers q of some rows, fp32 [rows, columns].

    Args:
        kind: a key of `TABLES`.
        data: the bytes of the rows, u8 [rows, bytes]; the last may have numbers beyond `columns`.

    >>> numbers("e2m1", np.array([[0x21, 0xF0]], np.uint8), 4)
    array([[ 0.5,  1. ,  0. , -6. ]], dtype=float32)
    """
    return TABLES[kind][data].reshape(len(data), -1)[:, :columns]


def powers(exponents: Array) -> Array:
    """Return scales that are powers of 2, fp32, from their exponents plus 127 (e8m0, section 5.4.1 of the same).

    >>> powers(np.array([0, 126, 127, 254, 255], np.uint8)).tolist()
    [5.877471754111438e-39, 0.5, 1.0, 1.7014118346046923e+38, nan]
    """
    found = np.ldexp(np.float32(1), np.minimum(exponents, NO_SCALE - 1).astype(np.int32) - EXPONENT)
    return np.where(exponents == NO_SCALE, np.float32(np.nan), found)


def grid_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks of this size there are along each axis; at the ends they may be smaller.

    >>> grid_shape((576, 256), (128, 128))
    (5, 2)
    """
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def decoded(
    kind: str,
    data: Array,
    scales: Array,
    block: tuple[int, int],
    shape: tuple[int, int],
    dtype: Any,
    zeros: Array | None = None,
    groups: Array | None = None,
) -> Array:
    """Return W = (q - zero) * scale, computed in fp32 and rounded once to `dtype`.

    Args:
        kind: a key of `TABLES`.
        data: bytes of q, u8 [rows, bytes].
        scales: fp32, one for each block.
        block: how many rows and columns share a scale.
        shape: rows and columns.
        dtype: of W.
        zeros: fp32, as `scales`; None for none.
        groups: for each column, which column of `scales` it belongs to; None for those of its block.
    """
    rows, columns = shape
    found = np.empty(shape, dtype)

    def spread(grid: Array, own: Array) -> Array:
        """Return a number for each entry of some rows of W."""
        return grid[own][:, groups] if groups is not None else np.repeat(grid[own], block[1], 1)[:, :columns]

    step = max(1, NUMBERS // max(columns, 1) // block[0]) * block[0]
    with np.errstate(all="ignore"):  # the caller refuses what is not finite
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            own = np.arange(part.start, part.stop) // block[0]
            w = numbers(kind, data[part], columns)
            if zeros is not None:
                w = w - spread(zeros, own)
            found[part] = w * spread(scales, own)
    return found
