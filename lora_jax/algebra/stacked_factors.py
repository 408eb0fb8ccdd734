"""The factors of several adapters of one weight as matrices of NumPy, and merged ones as an adapter again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.sums import like
from lora_jax.algebra.sparsify import Array, Majority
from lora_jax.algebra.truncation import Limit, Truncation
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError

Terms = Sequence[tuple[Adapter, float]]  # adapters of one weight, and their weights in the sum
Merged = tuple[Adapter, Truncation | None]


class Options(NamedTuple):
    """How adapters of one weight are merged.

    Args:
        density, majority: as of `compose`.
        key: of this weight, or None.
        to: how small the result becomes, or None where it is what it is.
    """

    density: float | None
    majority: Majority
    key: jax.Array | None
    to: Limit | None

    def key_of(self, number: int) -> jax.Array | None:
        """Return the key of one of several stacked matrices."""
        return None if self.key is None else jax.random.fold_in(self.key, number)


class Factors(NamedTuple):
    """The factors of n stacked matrices, in fp64: A [n, d, r] and B [n, r, k]."""

    a: Array
    b: Array
    scale: float

    def change(self, i: int) -> Array:
        """Return the change of one of the matrices, [d, k]."""
        return np.asarray(self.scale * (self.a[i] @ self.b[i]))


def factors_of_terms(path: str, terms: Terms) -> tuple[LoraAdapter, list[Factors]]:
    """Return the first adapter, and the factors of each along its axes.

    Raises:
        LoraError: an adapter has none; two are for different weights.
    """
    adapters = [adapter for adapter, _ in terms if isinstance(adapter, LoraAdapter)]
    if len(adapters) < len(terms):
        raise LoraError(f"{path!r} has adapters of several kinds, which only method='sum' adds up.")
    first = adapters[0]
    turned = [like(path, first, adapter) for adapter in adapters]
    n, d, k = first.axes.fans(first.kernel_shape())
    return first, [
        Factors(wide(one.a).reshape(n, d, -1), wide(one.b).reshape(n, -1, k), float(one.scale)) for one in turned
    ]


def wide(array: Any) -> Array:
    """Return an array in fp64 on this host."""
    return np.asarray(array).astype(np.float64)


def as_adapter(first: LoraAdapter, a: Array, b: Array) -> LoraAdapter:
    """Return A [n, d, r] and B [n, r, k] as an adapter like another one, in fp32 and with a scale of 1."""
    n, rank = len(first.axes.stack), a.shape[-1]
    a = a.reshape(*first.a.shape[:-1], rank).astype(np.float32)
    b = b.reshape(*first.b.shape[:n], rank, *first.b.shape[n + 1 :]).astype(np.float32)
    return LoraAdapter(jnp.asarray(a), jnp.asarray(b), first.axes, 1.0)
