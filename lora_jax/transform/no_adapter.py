"""The operand of a packed weight that has no adapter, so that it goes through a program packed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax

from lora_jax.core._compat import JaxprEqn
from lora_jax.core.axes import KernelAxes
from lora_jax.core.operand import Leaf, Operand
from lora_jax.core.products import Product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoAdapter(Leaf):
    """W' = W, whatever is done to W and whichever axes a product has."""

    axes: KernelAxes = field(default=KernelAxes((), (), ()), metadata={"static": True})

    layout = MappingProxyType({})

    def merge(self, w: jax.Array) -> jax.Array:
        return w

    def apply(self, product: Product) -> jax.Array:
        return product.y

    def transpose(self) -> "NoAdapter":
        return self

    def scale_by(self, factor: jax.Array) -> "NoAdapter":
        return self

    def concatenate(self, parts: Sequence[Operand | None], sizes: Sequence[int], axis: int) -> None:
        """Return None: what is joined is unpacked, and has nothing to join."""

    def permute(self, permutation: tuple[int, ...]) -> "NoAdapter":
        return self

    def insert_axis(self, axis: int, name: str = "stack") -> "NoAdapter":
        return self

    def used_as(self, axes: KernelAxes, eqn: JaxprEqn) -> "NoAdapter":
        return self

    def group(self, axis: int) -> str:
        return "unknown"

    def _replace(self, method: str, args: Any, first: int, count: int, n: int, fn: Callable[..., Any]) -> "NoAdapter":
        return self
