"""What every kind of adapter can do.

A kind is two classes in one file: a rule, which is what the user writes (`Lora(rank=8)`), and an adapter, which
holds the arrays of one weight. The adapter's `merge` is its definition; every other method is an optimisation that
must equal it.

Axes: s stacked matrices, T rows of x, d inputs and k outputs of one matrix, r rank.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax

from lora_jax.axes import KernelAxes


class Rule(abc.ABC):
    """What to do with the weights that a pattern matches. Checked when made, before any work."""

    rank: int

    @abc.abstractmethod
    def init(self, key: jax.Array, shape: tuple[int, ...], axes: KernelAxes) -> "Adapter":
        """A fresh adapter for a weight of this shape."""

    @abc.abstractmethod
    def flops(self, shape: tuple[int, ...], axes: KernelAxes, tokens: int) -> int:
        """FLOPs that the adapter adds to one product with `tokens` rows of x (for each stacked matrix)."""


class Adapter(abc.ABC):
    """A small change of one frozen weight W, as a pytree of its own beside W.

    Every array of an adapter begins with W's stack axes, so that `scan` and `vmap` slice it along with W.
    """

    axes: KernelAxes
    frozen: ClassVar[tuple[str, ...]] = ()  # fields that are never trained

    @abc.abstractmethod
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the weight that this adapter fits."""

    @abc.abstractmethod
    def merge(self, w: jax.Array) -> jax.Array:
        """W -> W', both in fp32 or better and with W's own axes."""

    @abc.abstractmethod
    def apply(self, x: jax.Array, y: jax.Array, precision: Any = None) -> jax.Array:
        """x [*s, T, d] and y = x @ W [*s, T, k] -> x @ W' [*s, T, k], in y's dtype, without forming W'."""

    @abc.abstractmethod
    def transpose(self) -> "Adapter":
        """The adapter of W with inputs and outputs exchanged, for programs that also compute y @ W^T."""

    def trainable(self) -> "Adapter":
        """The same tree with True at what is trained and False at what is frozen."""
        names = field_names(self, static=False)
        return dataclasses.replace(self, **{name: name not in self.frozen for name in names})  # type: ignore[type-var]


def field_names(adapter: Any, static: bool) -> list[str]:
    """The fields of an adapter, or of its class, that are arrays; or those that are static facts about them."""
    return [f.name for f in dataclasses.fields(adapter) if bool(f.metadata.get("static")) == static]


def is_adapter(node: Any) -> bool:
    """Whether a node of a tree is an adapter: the `is_leaf` of every walk over adapters."""
    return isinstance(node, Adapter)
