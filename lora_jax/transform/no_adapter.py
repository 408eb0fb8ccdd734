"""No adapter: what stands beside a packed weight that has none, so that it goes through a program packed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax

from lora_jax.core._compat import JaxprEqn
from lora_jax.core.adapter import Adapter, Layout
from lora_jax.core.axes import KernelAxes
from lora_jax.core.products import Product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frozen(Adapter):
    """W' = W, whatever is done to W and whichever axes a product has."""

    axes: KernelAxes = field(default=KernelAxes((), (), ()), metadata={"static": True})

    layout = MappingProxyType({})

    def merge(self, w: jax.Array) -> jax.Array:
        return w

    def apply(self, product: Product) -> jax.Array:
        return product.y

    def transpose(self) -> "Frozen":
        return self

    def scale_by(self, factor: jax.Array) -> "Frozen":
        return self

    def concatenate(self, parts: Sequence[Adapter | None], sizes: Sequence[int], axis: int) -> None:
        """What is joined is unpacked, and has no adapter to join."""

    def rebuild(
        self, axes: KernelAxes, change: Callable[[jax.Array, Layout], Any], stack_only: bool = False
    ) -> "Frozen":
        return self

    def permute(self, permutation: tuple[int, ...]) -> "Frozen":
        return self

    def replace_axes(self, first: int, count: int, n: int, fn: Callable[[jax.Array, int], jax.Array]) -> "Frozen":
        return self

    def insert_axis(self, axis: int, name: str = "stack") -> "Frozen":
        return self

    def used_as(self, axes: KernelAxes, eqn: JaxprEqn) -> "Frozen":
        return self

    def specs(self, spec: jax.P) -> "Frozen":
        return self

    def group(self, axis: int) -> str:
        return "unknown"
