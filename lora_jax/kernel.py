"""A weight on its way through a program: cast, transposed, sliced by a scan, and at last multiplied."""

import abc
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

import jax

from lora_jax._compat import JaxprEqn, source_line
from lora_jax.axes import KernelAxes

STATIC = {"static": True}


@dataclass(frozen=True)
class Product:
    """One use of a weight W, reduced to y = x @ W. s stacked matrices, T rows, d inputs, k outputs."""

    axes: KernelAxes  # in W's own numbering
    x: jax.Array  # [*s, T, d]
    y: jax.Array  # [*s, T, k]
    precision: Any
    eqn: JaxprEqn

    @property
    def tokens(self) -> int:
        return self.x.shape[-2]


@dataclass(frozen=True)
class Kernel(abc.ABC):
    """A matched weight, or what the program has made of it so far, identified by its path and by data flow.

    `origin[i]` is the axis of the weight, as the user stores it, that the value's axis i is. Transposing permutes
    it, a scan over stacked layers removes its first entry. So no rule ever compares shapes to find an axis.
    """

    value: jax.Array
    path: str = field(metadata=STATIC)
    origin: tuple[int, ...] = field(metadata=STATIC)
    scanned: tuple[int, ...] = field(metadata=STATIC)  # axes that scans around this point run over
    times: int = field(metadata=STATIC)  # how often scans around this point use it whole

    @abc.abstractmethod
    def multiply(self, product: Product) -> jax.Array:
        """y = x @ W -> x @ W', both [*s, T, k]."""

    @abc.abstractmethod
    def dense(self, why: str) -> jax.Array:
        """A plain array in the kernel's place, where the program cannot use a factored one."""

    def astype(self, dtype: Any) -> Self:
        return dataclasses.replace(self, value=self.value.astype(dtype))

    def transpose(self, permutation: tuple[int, ...]) -> Self:
        origin = tuple(self.origin[i] for i in permutation)
        return dataclasses.replace(self, value=self.value.transpose(permutation), origin=origin)

    def scan_slices(self) -> Self:
        """The kernel inside the body of a scan over its leading axis, its arrays not yet sliced."""
        return dataclasses.replace(self, origin=self.origin[1:], scanned=(*self.scanned, self.origin[0]))

    def can_scan(self) -> bool:
        """Whether the leading axis holds one matrix for each index."""
        return True


def describe(eqn: JaxprEqn) -> str:
    """`dot_general at model.py:12:4 (attention)`"""
    return f"`{eqn.primitive.name}` at {source_line(eqn)}"
