"""How much packing changes a weight, and each block of it."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.bases.format import Format
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
    """

    weight: float
    block: float


def change(w: jax.Array, packed: Packed) -> Change | None:
    """Return how much an array was changed by being packed; None where it is traced."""
    if isinstance(w, jax.core.Tracer):
        return None
    weight, block = _change(w, packed)
    return Change(float(weight), float(block))


@jax.jit
def _change(w: jax.Array, packed: Packed) -> tuple[jax.Array, jax.Array]:
    wide = accumulator(w.dtype)
    before, after = (packed.blocks(array.astype(wide)) for array in (w, packed.dense()))
    # Squares of numbers of a block's own size neither overflow nor vanish.
    largest = jnp.abs(before).max(-1)
    sizes, peak = jnp.where(largest == 0, 1, largest), largest.max()
    errors = jnp.square((after - before) / sizes[..., None]).sum(-1)
    norms = jnp.square(before / sizes[..., None]).sum(-1)
    shares = jnp.square(sizes / jnp.where(peak == 0, 1, peak))
    whole = jnp.sqrt(_over((shares * errors).sum(), (shares * norms).sum()))
    return whole, jnp.sqrt(_over(errors, norms).max())


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
