"""The scale of a kind's change, alpha / r: data of the adapter, and never trained.

One compiled program then serves adapters of any alpha, and adapters of several can be stacked.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import accumulator
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout
from lora_jax.core.short_repr import repr_of_arrays

OF_RATIO: Layout = ("ratio",)


class Scaled(Adapter):
    """An adapter whose change is a product of its arrays times `scale`.

    The scale is kept as two numbers of which only the quotient counts: weight decay as AdamW has it, which shrinks all
    that is optimized by one factor, leaves it as it is even where no mask does. Gradients of penalties and noise on
    every array do not: these need `lora.freeze_base`, or labels. Of zeros, as trees are initialized with, the quotient
    is zero: they change nothing.

    Of an adapter whose rank is padded with zeros, as `lora.stack` does it, a third number is its own rank, in the same
    unit: divided by the second one.
    """

    ratio: Any  # f32 [2], such as alpha and r, or [3]; when an adapter is made by hand, the scale itself
    frozen: ClassVar[tuple[str, ...]] = ("ratio",)

    def __post_init__(self) -> None:
        is_number = isinstance(self.ratio, int | float | np.generic | jax.Array) and np.ndim(self.ratio) == 0
        if is_number and self._has_arrays():
            object.__setattr__(self, "ratio", as_ratio(self.ratio))

    def _has_arrays(self) -> bool:
        """Return whether this is an adapter, and no tree of its form that holds masks, labels or norms."""
        others = (getattr(self, name) for name in self.layout if name != "ratio")
        return all(array is None or getattr(array, "ndim", 0) > 0 for array in others)

    def __repr__(self) -> str:
        return repr_of_arrays(self, without=("axes", "ratio"))

    @property
    def scale(self) -> Any:
        """Return the scale, an fp32 scalar."""
        return quotient(self.ratio)

    def kernel_shape(self) -> tuple[int, ...]:
        shape = super().kernel_shape()
        if self.ratio is not None and tuple(self.ratio.shape) not in ((2,), (3,)):
            raise LoraError(f"has a ratio of shape {list(self.ratio.shape)}, expected [2], or a number: its scale.")
        return shape

    def scaled(self, array: jax.Array, w: Any) -> jax.Array:
        """Return scale * array, in fp32 or wider, as W is: the smallest factor takes the scale.

        Args:
            array: a factor of the change.
            w: W, or its shape and dtype.
        """
        if self.ratio is None or (isinstance(self.ratio, np.ndarray) and self.scale == 1):
            return array
        return times_ratio(array.astype(accumulator(array.dtype, getattr(w, "dtype", array.dtype))), self.ratio)


def as_ratio(scale: Any) -> Any:
    """Return a scale as its adapter keeps it."""
    wide = jax.dtypes.canonicalize_dtype(float)  # fp32, unless JAX computes in fp64
    if isinstance(scale, jax.Array):
        return jnp.stack([scale, jnp.ones_like(scale)], -1).astype(wide)
    return np.array([scale, 1], wide)


@functools.partial(jax.jit, inline=True)  # one operation of an eager call, and none of its own in a trace
def times_ratio(array: jax.Array, ratio: Any) -> jax.Array:
    """Return an array times ratio[0] / ratio[1], in fp32 or wider. No gradient reaches the ratio."""
    ratio = lax.stop_gradient(jnp.asarray(ratio, accumulator(array.dtype)))
    return array.astype(ratio.dtype) * quotient(ratio)


def with_own_rank(ratio: Any, rank: int) -> Any:
    """Return the ratio of an adapter that is padded with zeros, and has this rank without them."""
    xp = np if isinstance(ratio, np.ndarray) else jnp
    return xp.concatenate([ratio, rank * _unit(ratio)[..., None]], -1)


def own_columns(ratio: Any) -> Any:
    """Return the rank that a padded adapter has without its zeros, as an i32 array [...]; None if it has no zeros."""
    xp = np if isinstance(ratio, np.ndarray) else jnp
    return xp.rint(ratio[..., 2] / _unit(ratio)).astype(xp.int32) if ratio.shape[-1] == 3 else None


def quotient(ratio: Any) -> Any:
    """Return the scale that a ratio [..., 2 or 3] stands for, in numpy where that is."""
    return ratio[..., 0] / _unit(ratio)


def _unit(ratio: Any) -> Any:
    """Return what the other numbers of a ratio are divided by."""
    xp = np if isinstance(ratio, np.ndarray) else jnp
    return xp.where(ratio[..., 1] == 0, xp.ones_like(ratio[..., 1]), ratio[..., 1])
