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
    """`Lora` with a frozen A; arguments and errors are those of `Lora`.

    Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
    arXiv 2308.03303. Its optimizer is `lora.lora_fa`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.LoraFa(rank=2)})
    >>> adapter = lora.init(jax.random.key(0), params, plan)["w"]
    >>> adapter, adapter.trainable().b, adapter.trainable().a
    (LoraFaAdapter(a 6x2, b 2x4), True, False)
    """

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> "LoraFaAdapter":
        factors = self.factors(key, w.shape, axes)
        return LoraFaAdapter(factors.a, factors.b, axes, factors.ratio)


@register_kind("lora_fa")
@dataclass(frozen=True)
class LoraFaAdapter(LoraAdapter):
    """The factors of one weight's change, of which B alone is trained.

    Attributes:
        a: A, fp32 [*stack, *inputs, r], which is not trained.
        b: B, fp32 [*stack, r, *outputs].
        axes: which axes of W are stacked, inputs and outputs.
        ratio: the scale. A number is kept as two of which the quotient counts, fp32 [2]; None is 1. Not trained.
    """

    frozen = ("a", "ratio")

    def lower(self, w: Any) -> LowRank:
        return LowRank(jax.lax.stop_gradient(self.a), self.scaled(self.b, w), self.axes)

    def merge(self, w: jax.Array) -> jax.Array:
        return self.lower(w).merge(w)
