"""What every format of packed weights can do.

A format is two classes in one file: what the user writes in rules (`Nf4()`), and the node, which holds the packed
arrays of one weight. The node's `unpack` is its definition. Nothing trains a packed weight; adapters train beside it.
"""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, is_packed, unpacked
from lora_jax.core.paths import flatten_with_names, is_array


@dataclass(frozen=True)
class Format(abc.ABC):
    """How to pack the weights that a pattern matches.

    Args:
        stack: how many leading axes are stacked matrices, as of scanned layers or experts; all but the last two, where
            it is not given.
        dtype: of the values once they are unpacked; W's own, where it is not given.
    """

    stack: int | None = None
    dtype: Any = None

    @abc.abstractmethod
    def pack(self, w: jax.Array, stack: int, dtype: Any) -> "Packed":
        """A finite weight in this format."""


def dense(params: Any) -> Any:
    """The same tree with every packed weight as an array."""
    _, leaves, treedef = flatten_with_names(params)
    return treedef.unflatten(map(unpacked, leaves))


def check_weight(path: str, w: Any, stack: int | None) -> int:
    """The number of its stack axes.

    Raises:
        LoraError: it is no array of floats of at least two axes, or has too few of them.
    """
    if is_packed(w):
        raise LoraError(f"{path!r} is packed already: give it None, or unpack it first with lora.bases.dense.")
    if not is_array(w) or not jnp.issubdtype(w.dtype, jnp.floating) or w.ndim < 2:
        found = f"{w.dtype}{list(w.shape)}" if hasattr(w, "shape") else type(w).__name__
        raise LoraError(f"{path!r} is {found}, expected an array of floats of at least two axes: narrow the pattern.")
    if 0 in w.shape:
        raise LoraError(
            f"{path!r} of shape {list(w.shape)} is empty, and there is nothing to pack: narrow the pattern."
        )
    n = w.ndim - 2 if stack is None else stack
    if not 0 <= n < w.ndim:
        raise LoraError(f"{path!r} of shape {list(w.shape)} has no {n} stack axes beside those of a matrix.")
    return n
