"""How much packing changes a weight, and each block of it."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.bases.format import Format
from lora_jax.bases.in_parts import can_split, in_parts, part, parts_of
from lora_jax.core.arrays import accumulator
from lora_jax.core.errors import LoraWarning
from lora_jax.core.packed import Packed
from lora_jax.core.text import listed

MUCH = 0.5  # NF4 with exact scales changes no block by more than 0.35


class Change(NamedTuple):
    """The relative error |Q - W| / |W| of a packed weight Q, of Frobenius norms.

    Args:
        weight: of the whole weight.
        block: of the block that changes most; a block are the numbers that share one scale. Infinity for a block of
            zeros that is none in Q.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> found = {}
    >>> _ = lora.bases.quantize({"w": jnp.ones((64, 4))}, {"w": lora.bases.Int8()}, report=found.__setitem__)
    >>> found["w"].weight < 1e-6
    True
    """

    weight: float
    block: float


def change(w: jax.Array, packed: Packed) -> Change | None:
    """Return how much an array was changed by being packed; None where it is traced."""
    if isinstance(w, jax.core.Tracer):
        return None
    dense = _dense(packed)
    shape, axes = _shape_in_blocks(packed, w)
    axis, parts = parts_of(shape, axes) if can_split(w) else (0, 1)

    def of_part(start: Any, size: int) -> tuple[jax.Array, ...]:
        return _of_blocks(w, dense, packed, start, size, axis)

    weight, block = _errors(*in_parts(of_part, axis, shape[axis], parts))
    return Change(float(weight), float(block))


@jax.jit
def _dense(packed: Packed) -> jax.Array:
    return packed.dense()


def _shape_in_blocks(packed: Packed, w: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of a weight once its blocks have axes of their own, and these axes."""
    axes: list[int] = []

    def blocks(packed: Packed, w: jax.Array) -> jax.Array:
        found, own = packed.blocks(w)
        axes.extend(own)
        return found

    return jax.eval_shape(blocks, packed, w).shape, tuple(axes)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _of_blocks(
    w: jax.Array, dense: jax.Array, packed: Packed, start: Any, size: int, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return of each block its largest |W|, its size, and the squares of errors and of W in units of that size.

    Args:
        start, size, axis: of the part of the weight, in blocks, that this is of.
    """
    wide = accumulator(w.dtype)
    (before, axes), (after, _) = (packed.blocks(array) for array in (w, dense))
    before, after = (part(array, start, size, axis).astype(wide) for array in (before, after))
    # Squares of numbers of a block's own size neither overflow nor vanish.
    largest = jnp.abs(before).max(axes, keepdims=True)
    sizes = jnp.where(largest == 0, 1, largest)
    errors, norms = (jnp.square(x / sizes).sum(axes, keepdims=True) for x in (after - before, before))
    return largest, sizes, errors, norms


@jax.jit
def _errors(largest: jax.Array, sizes: jax.Array, errors: jax.Array, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the relative error of the whole, and that of the block with the largest one."""
    peak = largest.max()
    shares = jnp.square(sizes / jnp.where(peak == 0, 1, peak))
    whole = jnp.sqrt(_over(_weighted(shares, errors), _weighted(shares, norms)))
    return whole, jnp.sqrt(_over(errors, norms).max())


def _weighted(shares: jax.Array, x: jax.Array) -> jax.Array:
    """Return the sum of shares x; a share may be infinite where x is 0, as of blocks of zeros."""
    return jnp.where(x == 0, 0, shares * x).sum()


def _over(errors: jax.Array, norms: jax.Array) -> jax.Array:
    """Return errors / norms, and 0 for 0 / 0."""
    return jnp.where(errors == 0, 0, errors / norms)


def warn_of_large(changes: Mapping[str, Change], formats: Mapping[str, Format], stacklevel: int) -> None:
    """Warn of the weights in which a block changed by more than half."""
    found = sorted((path for path in changes if not changes[path].block <= MUCH), key=lambda p: -changes[p].block)
    if found:
        lines = [
            f"{path!r}: a block by {changes[path].block:.2f} of its norm, the whole by {changes[path].weight:.2f}; "
            f"pack it in {formats[path].finer()}"
            for path in found
        ]
        warnings.warn(
            f"packing changes blocks of {len(found)} weight(s) by more than half, such as small ones whose scales are "
            f"rounded beside those of large ones:\n{listed(lines)}",
            LoraWarning,
            stacklevel=stacklevel + 1,
        )
