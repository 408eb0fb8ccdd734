"""Products with a packed weight that is dequantized part by part along its outputs, never as a whole."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core._compat import vary, varying_axes
from lora_jax.core.deferred import Size, spec_before
from lora_jax.core.packed import Packed

NUMBERS = 2**23  # of a part, at most: 32 MiB in fp32
CUT = "cut"  # the axis that is cut, as an entry of a spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InParts(Packed):
    """A packed weight [inputs, outputs] or [outputs, inputs] that multiplies in parts, with results of a given dtype.

    A format that cannot be cut there, because a scale is for numbers of several parts, is one part.
    """

    whole: Packed
    dot_dtype: Any = field(metadata={"static": True})

    parts = ("whole",)
    deferred = ()
    compute_sharding = None

    @property
    def inner(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.whole.shape

    @property
    def value_dtype(self) -> Any:
        return self.whole.dtype

    @property
    def stack(self) -> tuple[int, ...]:
        return ()

    @property
    def array_ndim(self) -> int:
        return self.whole.ndim

    def dequantize(self) -> jax.Array:
        return self.whole.dense()

    def repack(self, w: jax.Array) -> Self:
        return dataclasses.replace(self, whole=self.whole.repack_like(w))

    def array_specs(self, spec: Sequence[Any], size: Size) -> dict[str, tuple[Any, ...]]:
        return self.whole.array_specs(spec, size)

    def dot(self, x: jax.Array, inputs: tuple[int, ...], precision: Any) -> jax.Array:
        """Multiply x [*T, d] by W. For the derivative each part is dequantized again, so that none is kept."""
        axis, w = 1 - inputs[0], self.whole.with_whole_scales()
        size, n = part_size(w, axis), w.shape[axis]

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def product(x: jax.Array, part: Packed) -> jax.Array:
            dims = ((x.ndim - 1,), inputs), ((), ())
            return lax.dot_general(x, part.dense(), dims, precision=precision, preferred_element_type=self.dot_dtype)

        def put(y: jax.Array, start: Any, size: int) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(y, product(x, part_of(w, axis, start, size)), start, x.ndim - 1)

        if size == n:
            return product(x, w)
        axes = sorted({axis for array in jax.tree.leaves((x, w)) for axis in varying_axes(array)})
        y = vary(jnp.zeros((*x.shape[:-1], n), self.dot_dtype), axes)
        y, _ = lax.scan(lambda y, i: (put(y, i * size, size), None), y, jnp.arange(n // size))
        return put(y, n - n % size, n % size) if n % size else y


def part_size(w: Packed, axis: int) -> int:
    """Return how many indices along an axis of a weight a part of it has."""
    n, cuts = w.shape[axis], cut_axes(w, axis)
    if cuts is None:
        return n
    whole = math.lcm(*(ratio.denominator for _, ratio in cuts.values()))  # of which no scale is for half
    return min(n, max(whole, NUMBERS // (w.size // n) // whole * whole))


def part_of(w: Packed, axis: int, start: Any, size: int) -> Packed:
    """Return the part of a weight from an index along an axis on, which may be traced. The weight has to have parts."""
    cuts = cut_axes(w, axis)
    assert cuts is not None
    arrays = {
        name: lax.dynamic_slice_in_dim(
            w.arrays()[name], start * ratio.numerator // ratio.denominator, int(size * ratio), at
        )
        for name, (at, ratio) in cuts.items()
    }
    inner = tuple(size if i == _inner_axis(w, axis) else n for i, n in enumerate(w.inner))
    return dataclasses.replace(w, **arrays, inner=inner, compute_sharding=None)  # type: ignore[type-var]


def cut_axes(w: Packed, axis: int) -> MappingProxyType[str, tuple[int, Fraction]] | None:
    """Return for each packed array that is cut along an axis of W: its own axis, and its entries for one index of W.

    None if W cannot be cut there. The arrays are cut as a mesh would split them.
    """
    inner = _inner_axis(w, axis)
    if w.stack or inner is None or any(name == "reshape" for name, _ in w.deferred):
        return None
    spec = tuple(CUT if i == inner else None for i in range(len(w.inner)))
    own = w.array_specs(spec, lambda _: 1)
    arrays = w.arrays()
    found = {
        name: (own[name].index(CUT), Fraction(array.shape[own[name].index(CUT)], w.inner[inner]))
        for name, array in arrays.items()
        if CUT in own[name]
    }
    return MappingProxyType(found) if w.parts[0] in found else None


def _inner_axis(w: Packed, axis: int) -> int | None:
    """Return which axis of the matrix as it was packed an axis of W is."""
    spec = spec_before([CUT if i == axis else None for i in range(w.ndim)], w.inner, w.deferred, lambda _: 1)
    return spec.index(CUT) if CUT in spec else None
