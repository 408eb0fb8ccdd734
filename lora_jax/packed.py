"""A frozen weight in fewer bits than an array's: a pytree node in the place of the array.

The formats are in `bases/`. Axes: s stacked matrices, each packed by itself, so that a scan slices the packed arrays.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax

View = tuple[str, Any]  # ("transpose", permutation), ("reshape", shape) or ("cast", dtype), done to each matrix


class Packed(abc.ABC):
    """A frozen weight, as arrays that begin with its stack axes.

    `view` is what a program did to each matrix on its way to a product: that is done when it is unpacked.
    """

    inner: tuple[int, ...]  # the shape of one matrix as it was packed
    unpacked: Any  # the dtype of its values
    view: tuple[View, ...]
    parts: ClassVar[tuple[str, ...]]  # the names of the packed arrays

    @abc.abstractmethod
    def unpack(self) -> jax.Array:
        """[*s, *inner] in fp32."""

    @property
    def stack(self) -> tuple[int, ...]:
        return getattr(self, self.parts[0]).shape[: -self.own_axes]

    own_axes: ClassVar[int] = 1  # of the first packed array, beside the stack

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stack, *self._viewed()[0])

    @property
    def dtype(self) -> Any:
        return self._viewed()[1]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def sharding(self) -> Any:
        """Where the weight is: along its stack as the packed arrays are, each matrix whole."""
        own = getattr(self, self.parts[0]).sharding
        if not isinstance(own, jax.sharding.NamedSharding):
            return own
        return jax.sharding.NamedSharding(own.mesh, jax.P(*own.spec[: len(self.stack)]))

    def arrays(self) -> dict[str, jax.Array]:
        """The packed arrays by name."""
        found = {name: getattr(self, name) for name in self.parts}
        return {name: array for name, array in found.items() if array is not None}

    def _viewed(self) -> tuple[tuple[int, ...], Any]:
        shape, dtype = self.inner, self.unpacked
        for name, how in self.view:
            if name == "cast":
                dtype = how
            else:
                shape = tuple(shape[axis] for axis in how) if name == "transpose" else how
        return shape, dtype

    def dense(self) -> jax.Array:
        """The weight as an array."""
        w = self.unpack().astype(self.unpacked)
        n = len(self.stack)
        for name, how in self.view:
            if name == "cast":
                w = w.astype(how)
            elif name == "transpose":
                w = w.transpose(*range(n), *(n + axis for axis in how))
            else:
                w = w.reshape(*w.shape[:n], *how)
        return w

    def seen(self, name: str, how: Any) -> Self:
        """The same weight, each matrix transposed, reshaped or cast."""
        return dataclasses.replace(self, view=(*self.view, (name, how)))  # type: ignore[type-var]

    def on_stack(self, fn: Callable[[jax.Array], Any]) -> Self:
        """The same function of every packed array, which does something to the stack axes."""
        return jax.tree.map(fn, self)


def is_packed(leaf: Any) -> bool:
    """Whether a node of a tree of parameters is a packed weight."""
    return isinstance(leaf, Packed)


def unpacked(leaf: Any) -> Any:
    """What may be packed, as an array."""
    return leaf.dense() if is_packed(leaf) else leaf
