"""Kinds whose change of W is of low rank, and is used as LoRA's is: as A and B made of fewer, or other, numbers."""

import abc
from collections.abc import Sequence

import jax

from lora_jax.adapters.base import Adapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.products import Product


class Factored(Adapter):
    """An adapter that says which LoRA it is. It becomes that where its weight comes into a program."""

    @abc.abstractmethod
    def factors(self) -> LoraAdapter:
        """The adapter as A and B."""

    def enter(self, w: jax.Array) -> Adapter:
        return self.factors()

    def explicit(self) -> Adapter:
        return self.factors()

    def merge(self, w: jax.Array) -> jax.Array:
        return self.factors().merge(w)

    def apply(self, product: Product) -> jax.Array:
        return self.factors().apply(product)

    def transpose(self) -> Adapter:
        return self.factors().transpose()

    def scale_by(self, factor: jax.Array) -> Adapter:
        return self.factors().scale_by(factor)

    def concatenate(self, parts: Sequence[Adapter | None], sizes: Sequence[int], axis: int) -> Adapter | None:
        return self.factors().concatenate([p and p.explicit() for p in parts], sizes, axis)
