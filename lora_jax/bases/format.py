"""The interface of a format of packed weights.

A format is two classes in one file: a `Format`, which the user writes in rules (`Nf4()`), and a `Packed` node, which
holds the packed arrays of one weight. The node's `dequantize` defines the format. A packed weight is never trained;
adapters are trained beside it.
"""

import abc
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.aliases import same
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, is_packed, unpacked
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.core.short_repr import ShortRepr, repr_of_call


@dataclass(frozen=True)
class Format(ShortRepr, abc.ABC):
    """The format in which the weights that a pattern matches are packed.

    Args:
        stack: how many leading axes are stack axes, as of scanned layers or experts; by default all but the last two.
        dtype: of the dequantized values; by default that of the weight.

    >>> import lora_jax as lora
    >>> [isinstance(form, lora.bases.Format) for form in (lora.bases.Nf4(), lora.bases.Int8(), lora.bases.Fp8())]
    [True, True, True]
    """

    stack: int | None = None
    dtype: Any = None

    @abc.abstractmethod
    def pack(self, w: jax.Array, stack: int, dtype: Any) -> "Packed":
        """Return a weight, packed.

        Args:
            w: the weight, finite floats [*stack, *matrix].
            stack: how many of its axes are stack axes.
            dtype: of the dequantized values.

        Raises:
            LoraError: the weight does not fit the format.
        """

    def __repr__(self) -> str:
        return repr_of_call(self)

    def finer(self) -> str:
        """Return what to pack a weight in that this format changes too much, as messages name it."""
        return "a format of more bits, or None"


def dense(params: Any) -> Any:
    """Unpack all packed weights of a tree.

    Args:
        params: a tree of arrays and packed weights.

    Returns:
        The same tree with an array in the place of each packed weight; two that are one stay one array.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> base = lora.bases.quantize({"w": jnp.ones((64, 4))}, {"w": lora.bases.Int8()})
    >>> lora.bases.dense(base)["w"][0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    _, leaves, treedef = flatten_with_names(params)
    keys = list(map(same, leaves))
    found = {key: unpacked(leaf) for key, leaf in dict(zip(keys, leaves, strict=True)).items()}
    return treedef.unflatten([found[key] for key in keys])


def check_weight(path: str, w: Any, stack: int | None) -> int:
    """Check that a weight can be packed, and return the number of its stack axes.

    Raises:
        LoraError: it is packed already, empty, no array of floats of at least two axes, or has too few axes for
            `stack`.
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
