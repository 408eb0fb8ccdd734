"""AdaLoRA: W' = W + (alpha / r) A diag(e) B, from which the entries of e that matter least can be taken.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.factored import Factored
from lora_jax.adapters.lora import Lora, LoraAdapter
from lora_jax.adapters.scaled import OF_RATIO, Scaled
from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import matmul_highest
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class AdaLora(Lora):
    """W' = W + (alpha / rank) A diag(e) B, with A and B of nearly orthogonal columns and rows; errors as of `Lora`.

    A and B start with a standard deviation of 0.02, e at zero; `init_a` has no meaning here. The rank is what training
    starts with. `lora.orthogonality` is what the loss has to hold down beside.

    Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

    Arguments are those of `Lora`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.AdaLora(rank=2)})
    >>> lora.init(jax.random.key(0), params, plan)["w"]
    AdaLoraAdapter(a 6x2, e 2, b 2x4)
    """

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> Adapter:
        one, two = jax.random.split(key)
        (stack, inputs, outputs), r = axes.sizes(w.shape), int(self.rank)  # type: ignore[arg-type]
        a = 0.02 * jax.random.normal(one, (*stack, *inputs, r), self.dtype)
        b = 0.02 * jax.random.normal(two, (*stack, r, *outputs), self.dtype)
        return AdaLoraAdapter(a, jnp.zeros((*stack, r), self.dtype), b, axes, self.scale)


@register_kind("adalora")
@dataclass(frozen=True)
class AdaLoraAdapter(Scaled, Factored):
    """The factors of one weight's change, scale * A diag(e) B.

    Attributes:
        a: A, fp32 [*stack, *inputs, r].
        e: the diagonal, fp32 [*stack, r].
        b: B, fp32 [*stack, r, *outputs].
        axes: which axes of W are stacked, inputs and outputs.
        ratio: the scale. A number is kept as two of which the quotient counts, fp32 [2]; None is 1. Not trained.
    """

    a: jax.Array  # [*stack, *inputs, r]
    e: jax.Array  # [*stack, r]
    b: jax.Array  # [*stack, r, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    ratio: Any  # f32 [2]

    layout = MappingProxyType(
        {"a": ("stack", "inputs", "rank"), "e": ("stack", "rank"), "b": ("stack", "rank", "outputs"), "ratio": OF_RATIO}
    )

    def to_lora(self) -> LoraAdapter:
        e = self.e.reshape(*self.e.shape, *[1] * len(self.axes.outputs))
        return LoraAdapter(self.a, e * self.b, self.axes, self.ratio)


def orthogonality(adapters: Mapping[str, Adapter]) -> jax.Array:
    """Return the mean of |A^T A - I| and |B B^T - I| over all A and B (Frobenius norms): AdaLoRA's term of the loss.

    The paper's R of all matrices, as HF PEFT weighs it: add 0.5 of it to the loss. Columns and rows of zeros, as
    `lora.stack` pads with them, are no part of it.

    Zhang et al. 2023, arXiv 2303.10512.

    Args:
        adapters: `{path: adapter}`, any that are not of AdaLoRA among them.

    Returns:
        An fp32 scalar.

    Raises:
        LoraError: there is no AdaLoRA adapter.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapter = lora.AdaLoraAdapter(jnp.eye(4, 2), jnp.ones(2), 2 * jnp.eye(2, 3), axes, None)
    >>> round(float(lora.orthogonality({"w": adapter})), 3)  # 0 of A, and 3 sqrt(2) of B
    2.121
    """
    norms = []
    for adapter in adapters.values():
        if isinstance(adapter, AdaLoraAdapter):
            n, r = len(adapter.axes.stack), adapter.e.shape[-1]
            a = adapter.a.reshape(math.prod(adapter.a.shape[:n]), -1, r)
            b = adapter.b.reshape(math.prod(adapter.b.shape[:n]), r, -1)
            norms += [_distance(a.swapaxes(1, 2)), _distance(b)]
    if not norms:
        raise LoraError("orthogonality is of adapters of the rule lora.AdaLora, and there is none among these.")
    return jnp.mean(jnp.concatenate(norms))


def _distance(rows: jax.Array) -> jax.Array:
    """Return |M M^T - I| of each M [s, r, n]."""
    gram = matmul_highest(rows, rows.swapaxes(1, 2))
    expected = jnp.any(rows != 0, axis=2)[..., None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
    return jnp.linalg.norm(gram - expected, axis=(1, 2))
