"""A weight on its way through a program: cast, transposed, sliced by a scan, and at last multiplied."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import jax

from lora_jax.core._compat import JaxprEqn, describe
from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import accumulator
from lora_jax.core.packed import is_packed, unpacked
from lora_jax.transform.no_adapter import Frozen

Fallback = Callable[["Kernel", str], None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kernel:
    """A frozen array and its adapter, standing for W' until they are multiplied.

    Both are kept as the program has them at this point: what it does to the array is done to the adapter too, so that
    `adapter.merge(value)` always is what the program would hold. So no rule ever compares shapes to find an axis.
    """

    value: Any  # an array, or a packed weight
    adapter: Adapter
    paths: tuple[str, ...] = field(metadata={"static": True})  # of the weights that it is made of
    fallback: Fallback = field(metadata={"static": True})  # asked before W' is formed; refuses by raising
    factor: jax.Array | None = None  # a scalar that the program multiplied all of it by: left for the product

    @classmethod
    def of(cls, w: Any, adapter: Adapter | None, path: str, fallback: Fallback) -> Any:
        """What stands for W' where W comes into a program. What has no adapter and is not packed stands for itself."""
        if adapter is None:
            return cls(w, Frozen(), (path,), _may_be_formed) if is_packed(w) else w
        entered = adapter.enter(unpacked(w) if adapter.reads_weight else w)
        return cls(w, entered, (path,), fallback) if isinstance(entered, Adapter) else entered

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def replace(self, value: Any, adapter: Adapter | None = None) -> Self:
        return dataclasses.replace(self, value=value, adapter=self.adapter if adapter is None else adapter)

    def merged(self) -> jax.Array:
        """W' as a plain array: for what is thin, such as the rows of an embedding."""
        kernel = self.scaled()
        w = unpacked(kernel.value)
        return kernel.adapter.merge(w.astype(accumulator(w.dtype))).astype(w.dtype)

    def scaled(self) -> Self:
        """The same with the factor in both parts."""
        if self.factor is None:
            return self
        value, adapter = unpacked(self.value), self.adapter.scale_by(self.factor)
        value = value * self.factor.astype(value.dtype)
        return dataclasses.replace(self, value=value, adapter=adapter, factor=None)

    def dense(self, why: str) -> jax.Array:
        """W' as a plain array, where the program cannot use a factored one. Refused unless it was asked for."""
        self.fallback(self, why)
        return self.merged()


def _may_be_formed(kernel: Kernel, why: str) -> None:
    """A packed weight without an adapter is an array wherever it has to be one."""


def plain(value: Any, why: str, eqn: JaxprEqn | None = None) -> Any:
    """What may be a kernel, as an array: because of `why`, which an equation does to it."""
    if not isinstance(value, Kernel):
        return value
    return value.dense(why if eqn is None else f"{describe(eqn)} {why}")
