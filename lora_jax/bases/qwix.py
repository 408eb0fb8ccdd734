"""Weights that the library qwix has packed, each a `QArray`: W = (code[q] - zero) * scale.

Codes have the shape of W. Scales and zero points have as many axes, and along each axis one entry for each tile of
codes. qwix is not imported: its nodes are recognized by the names of their classes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.tree_util import PyTreeDef

from lora_jax.bases.nf4 import CODE, code_table
from lora_jax.core.deferred import Deferred, Size
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed
from lora_jax.core.paths import READERS, Reader


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QwixWeight(Packed):
    """A weight of qwix. Its leading axes are stack axes as far as each index along them has scales of its own.

    Attributes:
        q: the codes, [*s, *inner], of 8 bits or less.
        scales: [*s, *tiles], of W's dtype.
        zero: zero points, [*s, *tiles], of q's dtype; or None.
        inner: the shape of one matrix as it was packed.
        value_dtype: the dtype that dequantized values are rounded to.
        kind: qwix's name of the format of the codes.
        node: the structure of qwix's node, without its arrays.
        deferred: what is done to each matrix after that.
        compute_sharding: of one matrix, as it was packed, while something is multiplied by it; None for none.
    """

    q: jax.Array  # [*s, *inner], of 8 bits or less
    scales: jax.Array  # [*s, *tiles], of W's dtype
    zero: jax.Array | None  # [*s, *tiles], of q's dtype
    inner: tuple[int, ...] = field(metadata={"static": True})
    value_dtype: Any = field(metadata={"static": True})
    kind: str = field(metadata={"static": True})  # qwix's name of the format of the codes
    node: PyTreeDef = field(metadata={"static": True})  # qwix's node, without its arrays
    deferred: Deferred = field(default=(), metadata={"static": True})
    compute_sharding: NamedSharding | None = field(default=None, metadata={"static": True})

    parts = ("q", "scales", "zero")

    @property
    def array_ndim(self) -> int:
        return len(self.inner)

    def dequantize(self) -> jax.Array:
        codes = code_table()[self.q] if self.kind == "nf4" else self.q
        w = codes.astype(self.scales.dtype).astype(jnp.float32)  # qwix rounds the codes to this dtype
        if self.zero is not None:
            w = _each(jnp.subtract, w, self.zero.astype(jnp.float32))
        return _each(jnp.multiply, w, self.scales.astype(jnp.float32))

    def as_given(self) -> Any:
        """Return the weight as a node of qwix."""
        return jax.tree.unflatten(self.node, self.arrays().values())

    def repack(self, w: jax.Array) -> "QwixWeight":
        """Return other matrices, packed with scales of each tile's largest |W|, or of its range with zero points."""
        w = w.astype(jnp.float32)
        scales, zero = _calibrated(w, self.scales.shape, self.q.dtype, self.kind, self.zero is not None)
        scales = _allowed(scales, self.kind).astype(self.scales.dtype)
        q = _each(jnp.divide, w, scales.astype(jnp.float32))
        if zero is not None:
            q = _each(jnp.add, q, zero.astype(jnp.float32))
        return dataclasses.replace(self, q=_rounded(q, self.q.dtype, self.kind), scales=scales, zero=zero)

    def array_specs(self, spec: Sequence[Any], size: Size) -> dict[str, tuple[Any, ...]]:
        """Return specs that split codes as W, and scales along axes with several tiles that the mesh divides evenly."""

        def split(tiles: Sequence[int]) -> tuple[Any, ...]:
            return tuple(
                entry if n > 1 and n % size(entry) == 0 else None for entry, n in zip(spec, tiles, strict=True)
            )

        own = {name: split(array.shape[len(self.stack) :]) for name, array in self.arrays().items()}
        return own | {"q": tuple(spec)}


def knows(node: Any) -> bool:
    """Return whether a node is a `QArray`, or qwix's box `WithAux` around one."""
    kind = type(node)
    if kind.__module__.partition(".")[0] != "qwix":
        return False
    return kind.__name__ == "QArray" or (kind.__name__ == "WithAux" and knows(node.array))


def read(node: Any) -> QwixWeight:
    """Convert a node of qwix to a packed weight of this library.

    Raises:
        LoraError: it does not hold arrays, or their shapes do not fit each other.
    """
    array = getattr(node, "array", node)
    q, scales, zero = array.qvalue, array.scale, array.zero_point
    tiles = [scales] if zero is None else [scales, zero]
    if not all(hasattr(part, "shape") and hasattr(part, "dtype") for part in (q, *tiles)):
        found = f"a {type(q).__name__} and a {type(scales).__name__}"
        raise LoraError(f"is a QArray of {found}, expected arrays: unbox the parameters first.")
    if any(len(t.shape) != len(q.shape) or any(map(_remainder, q.shape, t.shape)) for t in tiles):
        found = " and ".join(str(list(part.shape)) for part in tiles)
        raise LoraError(
            f"is a QArray of codes {list(q.shape)} with scales {found}, expected as many axes, and a scale for each of "
            "equal tiles: quantise the weight again."
        )
    most = max(len(q.shape) - 2, 0)
    n = next((i for i in range(most) if any(t.shape[i] != q.shape[i] for t in tiles)), most)
    kind = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype).name
    inner, dtype = tuple(q.shape[n:]), jnp.dtype(scales.dtype)
    return QwixWeight(q, scales, zero, inner, dtype, kind, jax.tree.structure(node))


READERS.append(Reader(knows, read))


def _remainder(n: int, parts: int) -> int:
    """Return n modulo parts; n itself for no parts, which do not divide it."""
    return n % parts if parts else n


def _each(fn: Callable[[jax.Array, jax.Array], jax.Array], w: jax.Array, tiles: jax.Array) -> jax.Array:
    """Apply a function of two arguments to each number of w and the entry of `tiles` for its tile."""
    one = tiles.reshape([size for n in tiles.shape for size in (n, 1)])
    return fn(_in_tiles(w, tiles.shape), one).reshape(w.shape)


def _in_tiles(w: jax.Array, tiles: Sequence[int]) -> jax.Array:
    """Reshape each axis to two: the tile, and the position within it."""
    return w.reshape([size for n, m in zip(w.shape, tiles, strict=True) for size in (m, n // m)])


def _calibrated(
    w: jax.Array, tiles: Sequence[int], dtype: Any, kind: str, asymmetric: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Return the scale of each tile, and its zero point if the format is asymmetric."""
    parts, within = _in_tiles(w, tiles), tuple(range(1, 2 * w.ndim, 2))
    if not asymmetric:
        return _not_tiny(jnp.max(jnp.abs(parts), axis=within) / _largest(dtype, kind)), None
    smallest, largest = jnp.min(parts, axis=within, initial=0.0), jnp.max(parts, axis=within, initial=0.0)
    bounds = jnp.iinfo(dtype)
    scales = _not_tiny((largest - smallest) / (bounds.max - bounds.min))
    return scales, _rounded(bounds.min - smallest / scales, dtype, kind)


def _allowed(scales: jax.Array, kind: str) -> jax.Array:
    """Round scales to those that a format can store: powers of 2 (mx...), or floats of 8 bits (nvfp4)."""
    if kind.startswith("mx"):
        return 2.0 ** jnp.ceil(jnp.log2(scales))
    if kind != "nvfp4":
        return scales
    eight_bits = jnp.finfo(jnp.float8_e4m3fn)
    bounds = float(eight_bits.smallest_subnormal), float(eight_bits.max)
    return jnp.clip(scales, *bounds).astype(jnp.float8_e4m3fn).astype(scales.dtype)


def _largest(dtype: Any, kind: str) -> float:
    """Return the code of the largest |W| of a tile; for integers half a step above the largest integer."""
    if kind == "nf4":
        return 1.0
    return 2 ** (_bits(dtype, kind) - 1) - 0.5 if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)


def _bits(dtype: Any, kind: str) -> int:
    """Return the number of bits of integer codes, which may be stored in a wider dtype."""
    return int(kind[3:]) if kind.startswith("int") else jnp.iinfo(dtype).bits


def _rounded(q: jax.Array, dtype: Any, kind: str) -> jax.Array:
    """Round scaled numbers to codes."""
    if kind == "nf4":
        return jnp.searchsorted((CODE[:-1] + CODE[1:]) / 2, q).astype(dtype)
    if not jnp.issubdtype(dtype, jnp.integer):
        largest = float(jnp.finfo(dtype).max)
        return jnp.clip(q, -largest, largest).astype(dtype)
    half = 2 ** (_bits(dtype, kind) - 1)
    return jnp.clip(jnp.round(q), -half, half - 1).astype(dtype)


def _not_tiny(scales: jax.Array) -> jax.Array:
    """Replace scales by 1 where a division by them could overflow."""
    return jnp.where(scales < math.sqrt(jnp.finfo(scales.dtype).tiny), 1.0, scales)
