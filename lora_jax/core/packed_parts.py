"""Products with a packed weight that is dequantized part by part along its outputs, never as a whole."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lora_jax.core._compat import vary, varying_axes
from lora_jax.core.arrays import accumulator
from lora_jax.core.deferred import Size, spec_before
from lora_jax.core.errors import LoraError
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
        """Multiply x [*T, d] by W, which is dequantized again for the derivative by x. There is none by W."""
        how = How(inputs[0], self.dot_dtype, precision)
        return _product(how, x, self.whole.with_whole_scales())


@dataclass(frozen=True)
class How:
    """How a product is computed."""

    inputs: int  # the axis of W that is contracted
    dtype: Any  # of the result
    precision: Any

    def dot(self, x: jax.Array, part: Packed, axis: int, dtype: Any) -> jax.Array:
        """Contract the last axis of x with an axis of a part of W."""
        dims = ((x.ndim - 1,), (axis,)), ((), ())
        return lax.dot_general(x, part.dense(), dims, precision=self.precision, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: How, x: jax.Array, w: Packed) -> jax.Array:
    """Return x [*T, d] @ W [*T, k]."""
    axis, w = 1 - how.inputs, _after(x, w)

    def put(y: jax.Array, start: Any, part: Packed) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(y, how.dot(x, part, how.inputs, how.dtype), start, x.ndim - 1)

    return _over_parts(put, _zeros((*x.shape[:-1], w.shape[axis]), how.dtype, (x, w)), w, axis)


def _forward(how: How, x: Any, w: Any) -> tuple[jax.Array, Any]:
    if any(leaf.perturbed for leaf in jax.tree.leaves(w)):
        raise LoraError(
            "something differentiates with respect to a packed weight, of which only arrays are capable: differentiate "
            "with respect to what multiplies it, or unpack it with lora.bases.dense."
        )
    w = jax.tree.map(lambda leaf: leaf.value, w)
    return _product(how, x.value, w), (w, jnp.zeros((0,), x.value.dtype))


def _backward(how: How, kept: Any, dy: Any) -> tuple[Any, None]:
    """Return dx = dy @ W^T, summed over the parts in fp32."""
    (w, like), axis = kept, 1 - how.inputs
    if isinstance(dy, SymbolicZero):
        return None, None

    w = _after(dy, w)

    def add(dx: jax.Array, start: Any, part: Packed) -> jax.Array:
        of_part = lax.dynamic_slice_in_dim(dy, start, part.shape[axis], dy.ndim - 1)
        return dx + how.dot(of_part, part, axis, dx.dtype)

    dx = _zeros((*dy.shape[:-1], w.shape[how.inputs]), accumulator(dy.dtype), (dy, w))
    return _over_parts(add, dx, w, axis).astype(like.dtype), None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_parts(fn: Callable[[jax.Array, Any, Packed], jax.Array], carry: jax.Array, w: Packed, axis: int) -> jax.Array:
    """Return fn(... fn(fn(carry, 0, part 0), start of part 1, part 1) ...), one part after the other."""
    size, n = part_size(w, axis), w.shape[axis]
    if size == n:
        return fn(carry, 0, w)

    def step(carry: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return fn(carry, i * size, part_of(w, axis, i * size, size)), None

    carry, _ = lax.scan(step, carry, jnp.arange(n // size))
    return fn(carry, n - n % size, part_of(w, axis, n - n % size, n % size)) if n % size else carry


def _after(x: jax.Array, w: Packed) -> Packed:
    """Return W as something that is there after x: else JAX dequantizes all of it before a loop over blocks of x."""
    _, w = lax.optimization_barrier((x, w))
    return w


def _zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.Array:
    axes = sorted({axis for array in jax.tree.leaves(like) for axis in varying_axes(array)})
    return vary(jnp.zeros(shape, dtype), axes)


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
