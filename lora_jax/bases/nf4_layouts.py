"""Other layouts of NF4 weights: the bytes of files, and how versions before format 2 of saved bases laid weights out.

In both, a byte holds two codes, the first in the high half. In bitsandbytes' files and in earlier versions, blocks run
along the last axes of a weight. Such a weight, transposed, is one of this version: no number is quantized again.

Arrays are NumPy's or JAX's.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax.bases.nf4 import BLOCK, Nf4Weight


def to_bytes(codes: Any) -> Any:
    """Return codes uint4 [*s, d, k] as bytes uint8 [*s, d / 2, k]. Two codes of a byte are neighbours along d."""
    codes = codes.astype(jnp.uint8)
    return (codes[..., ::2, :] << 4) | codes[..., 1::2, :]


def from_bytes(pairs: Any) -> Any:
    """Invert `to_bytes`."""
    return _codes(pairs.mT).mT


def _codes(pairs: Any) -> Any:
    """Return the codes uint4 [..., 2 n] of bytes uint8 [..., n]."""
    both = pairs.__array_namespace__().stack([pairs >> 4, pairs & 15], axis=-1)
    return both.reshape(*pairs.shape[:-1], -1).astype(jnp.uint4)


def transposed(
    codes: Any, scales: Any, outer: Any, mean: Any, inner: tuple[int, ...], dtype: Any, kernel: bool | None = None
) -> Nf4Weight:
    """Return a weight whose blocks run along its last axes, as the transpose of one whose blocks run along d.

    Args:
        codes: bytes uint8 [*s, n / 2], of the n numbers of a matrix, padded to whole blocks.
        scales: [*s, n / 64].
        outer, mean, kernel: as of `Nf4Weight`.
        inner: the shape of one matrix.
        dtype: of its values.
    """
    stack, first = codes.shape[:-1], _first_in_block(inner)
    k = math.prod(inner[:first])
    own = (inner[1], inner[0]) if len(inner) == 2 else (math.prod(inner[first:]), *inner[:first])
    columns, blocks = (array.reshape(*stack, k, -1).mT for array in (_codes(codes), scales))
    w = Nf4Weight(columns, blocks, outer, mean, own, dtype, kernel=kernel)
    if len(own) > 1:
        w = w.with_deferred("transpose", (*range(1, len(own)), 0))
    return w if w.shape[len(stack) :] == inner else w.with_deferred("reshape", inner)


def of_format_1(arrays: Mapping[str, Any], fields: Mapping[str, Any]) -> Nf4Weight:
    """Return a weight of a saved base of format 1, of its arrays [*s, first axes, ...] and static fields."""
    inner, deferred = fields["inner"], fields.get("deferred", ())
    n = arrays["codes"].ndim - _first_in_block(inner) - 1  # stack axes
    codes, scales = (arrays[name].reshape(*arrays[name].shape[:n], -1) for name in ("codes", "scales"))
    w = transposed(
        codes, scales, arrays.get("outer"), arrays.get("mean"), inner, fields["value_dtype"], fields.get("kernel")
    )
    for name, how in deferred:
        w = w.with_deferred(name, how)
    return w


def _first_in_block(inner: tuple[int, ...]) -> int:
    """Return the first of the last axes of a matrix that hold whole blocks, as few as do; without any, 0."""
    return next((i for i in reversed(range(len(inner))) if math.prod(inner[i:]) % BLOCK == 0), 0)
