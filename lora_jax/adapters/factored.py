"""Kinds whose change of W is of low rank, and is used as LoRA's is: as A and B made of fewer, or other, numbers."""

import abc

import jax

from lora_jax.adapters.base import Adapter, Entering
from lora_jax.adapters.lora import LoraAdapter


class Factored(Entering):
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
