"""LoHa: W' = W + (alpha / r) (A1 B1) * (A2 B2), a product entry by entry of two low-rank products: of rank up to r^2.

Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
arXiv 2108.06098. (A1 B1) * (A2 B2) = A B, where A [d, r^2] has the products of each column of A1 with each of A2, and B
[r^2, k] those of the rows: so x @ W' is computed as for LoRA of rank r^2.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.factored import Factored
from lora_jax.adapters.lora import Lora, LoraAdapter
from lora_jax.adapters.scaled import OF_RATIO, Scaled
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class Loha(Lora):
    """W' = W + (alpha / rank) (A1 B1) * (A2 B2); arguments and errors are those of `Lora`.

    A1, A2 and B1 start as `init_a` says, B2 at zero.

    Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
    arXiv 2108.06098.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Loha(rank=2)})
    >>> lora.init(jax.random.key(0), params, plan)["w"]
    LohaAdapter(a1 6x2, b1 2x4, a2 6x2, b2 2x4)
    """

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        one, two, three = jax.random.split(key, 3)
        first, second = (self.factors(k, w.shape, axes) for k in (one, two))
        stack, _, outputs = axes.sizes(w.shape)
        turned = self.init_a(three, (*stack, *outputs, self.rank), self.rank, self.dtype)
        return LohaAdapter(first.a, jnp.moveaxis(turned, -1, len(stack)), second.a, second.b, axes, first.ratio)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        return int(self.rank) * super().flops(shape, axes, rows)  # type: ignore[arg-type]


@register_kind("loha")
@dataclass(frozen=True)
class LohaAdapter(Scaled, Factored):
    """The factors of one weight's change, scale * (A1 B1) * (A2 B2).

    Attributes:
        a1: A1, fp32 [*stack, *inputs, r].
        b1: B1, fp32 [*stack, r, *outputs].
        a2: A2, as A1.
        b2: B2, as B1.
        axes: which axes of W are stacked, inputs and outputs.
        ratio: the scale. A number is kept as two of which the quotient counts, fp32 [2]; None is 1. Not trained.
    """

    a1: jax.Array  # [*stack, *inputs, r]
    b1: jax.Array  # [*stack, r, *outputs]
    a2: jax.Array
    b2: jax.Array
    axes: KernelAxes = field(metadata={"static": True})
    ratio: Any  # f32 [2]

    layout = MappingProxyType(
        {
            "a1": ("stack", "inputs", "rank"),
            "b1": ("stack", "rank", "outputs"),
            "a2": ("stack", "inputs", "rank"),
            "b2": ("stack", "rank", "outputs"),
            "ratio": OF_RATIO,
        }
    )

    def to_lora(self) -> LoraAdapter:
        n = len(self.axes.stack)
        a = self.a1[..., :, None] * self.a2[..., None, :]
        b = jnp.expand_dims(self.b1, n + 1) * jnp.expand_dims(self.b2, n)
        return LoraAdapter(
            a.reshape(*a.shape[:-2], -1), b.reshape(*b.shape[:n], -1, *b.shape[n + 2 :]), self.axes, self.ratio
        )
