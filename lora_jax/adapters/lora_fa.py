"""LoRA-FA: W' = W + (alpha / r) A B, with A frozen as it was drawn. The backward pass keeps x A, r wide, and no x.

Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
arXiv 2308.03303. Its optimizer is `lora.lora_fa`.
"""

from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.adapters.lora import Lora, LoraAdapter
from lora_jax.adapters.low_rank import LowRank
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class LoraFa(Lora):
    """`Lora` with a frozen A; arguments and errors are those of `Lora`."""

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> "LoraFaAdapter":
        factors = self.factors(key, w.shape, axes)
        return LoraFaAdapter(factors.a, factors.b, axes, factors.ratio)


@register_kind("lora_fa")
@dataclass(frozen=True)
class LoraFaAdapter(LoraAdapter):
    """The factors of one weight's change, of which B alone is trained."""

    frozen = ("a", "ratio")

    def lower(self, w: Any) -> LowRank:
        return LowRank(jax.lax.stop_gradient(self.a), self.scaled(self.b, w), self.axes)

    def merge(self, w: jax.Array) -> jax.Array:
        return self.lower(w).merge(w)
