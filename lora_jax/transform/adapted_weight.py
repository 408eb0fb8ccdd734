"""An adapted weight on its way through a program: cast, transposed, sliced by a scan, and at last multiplied."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import jax

from lora_jax.core._compat import JaxprEqn, describe
from lora_jax.core.adapter import Adapter, lower
from lora_jax.core.arrays import accumulator
from lora_jax.core.operand import Operand
from lora_jax.core.packed import is_packed, unpacked
from lora_jax.core.remade import Remade
from lora_jax.transform.no_adapter import NoAdapter

Fallback = Callable[["AdaptedWeight", str], None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedWeight:
    """A frozen array and the operand of its adapter, in the place of W' until they are multiplied.

    Both are kept as the program has them at this point: what it does to the array is done to the operand too, so that
    `operand.merge(value)` is always what the program would hold. So no rule ever compares shapes to find an axis.
    """

    value: Any  # an array, or a packed weight
    operand: Operand
    paths: tuple[str, ...] = field(metadata={"static": True})  # of the weights that it is made of
    fallback: Fallback = field(metadata={"static": True})  # asked before W' is formed; refuses by raising
    factor: jax.Array | None = None  # of all of it, which waits for the product: a scalar, or what is left of one
    x: Remade | None = None  # what the next operation multiplies it by, if a derivative can make that again
    h: jax.Array | None = None  # x @ A of that operation, if it was taken with those of other weights

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def replace(self, value: Any, operand: Operand | None = None) -> Self:
        """Return the same with another value, and another operand if one is given."""
        return dataclasses.replace(self, value=value, operand=self.operand if operand is None else operand)

    def merged(self) -> jax.Array:
        """Return W' as a plain array: for what is thin, such as the rows of an embedding."""
        weight = self.scaled()
        w = unpacked(weight.value)
        return weight.operand.merge(w.astype(accumulator(w.dtype))).astype(w.dtype)

    def scaled(self) -> Self:
        """Return the same with the factor multiplied into the value and into the operand."""
        if self.factor is None:
            return self
        value, operand = unpacked(self.value), self.operand.scale_by(self.factor)
        value = value * self.factor.astype(value.dtype)
        return dataclasses.replace(self, value=value, operand=operand, factor=None)

    def dense(self, why: str) -> jax.Array:
        """Return W' as a plain array, where the program cannot use a factored one. Refused unless it was asked for."""
        self.fallback(self, why)
        return self.merged()


def adapted(w: Any, adapter: Adapter | None, path: str, fallback: Fallback) -> Any:
    """Put a weight and its adapter together where the weight enters a program.

    An array without adapter stays as it is, and so does what an adapter itself turns into an array.
    """
    if adapter is None:
        return AdaptedWeight(w, NoAdapter(), (path,), _allow) if is_packed(w) else w
    operand = lower(adapter, unpacked(w) if adapter.reads_weight else w)
    return AdaptedWeight(w, operand, (path,), fallback) if isinstance(operand, Operand) else operand


def _allow(weight: AdaptedWeight, why: str) -> None:
    """Allow a packed weight without an adapter to be an array wherever it has to be one."""


def plain(value: Any, why: str, eqn: JaxprEqn | None = None) -> Any:
    """Return what may be an adapted weight as an array; `why` says what an equation does to it that needs one."""
    if not isinstance(value, AdaptedWeight):
        return value
    return value.dense(why if eqn is None else f"{describe(eqn)} {why}")
