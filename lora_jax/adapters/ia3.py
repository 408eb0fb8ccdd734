"""(IA)^3: W' = W diag(g), a trained factor for each output.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv 2205.05638: for keys, values and the inner activations of MLPs. Where these are gated,
f(x @ W_gate) * (x @ W_up), a factor on them is a factor on the outputs of W_up.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.arguments import check_dtype
from lora_jax.adapters.low_rank import LowRank
from lora_jax.adapters.output_scaled import OutputScaled, along_outputs
from lora_jax.adapters.stacked_rule import StackedRule
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class Ia3(StackedRule):
    """W' = W diag(g), with g starting at one.

    Args:
        dtype: of g.
        stack: as of `Lora`.

    Raises:
        LoraError: a dtype that is not a floating one.
    """

    dtype: Any = jnp.float32

    shares = MappingProxyType({"inputs": "g"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dtype("Ia3", self.dtype)

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> "Ia3Adapter":
        stack, inputs, outputs = axes.sizes(w.shape)
        return Ia3Adapter(jnp.ones((*stack, *outputs), self.dtype), axes, inputs)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        return rows[1] * axes.fans(shape)[2]


@register_kind("ia3")
@dataclass(frozen=True)
class Ia3Adapter(Adapter):
    """The factors on the outputs of one weight. In a program it is an `OutputScaled` LoRA of rank 0."""

    gain: jax.Array  # [*stack, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    inputs: tuple[int, ...] = field(metadata={"static": True})  # their sizes

    layout = MappingProxyType({"gain": ("stack", "outputs")})

    def merge(self, w: jax.Array) -> jax.Array:
        return w * along_outputs(self.gain.astype(w.dtype), self.axes)

    def lower(self, w: Any) -> OutputScaled:
        n = len(self.axes.stack)
        a = jnp.zeros((*self.gain.shape[:n], *self.inputs, 0), self.gain.dtype)
        b = jnp.zeros((*self.gain.shape[:n], 0, *self.gain.shape[n:]), self.gain.dtype)
        return OutputScaled(LowRank(a, b, self.axes), self.gain, self.axes)

    def kernel_shape(self) -> tuple[int, ...]:
        sizes = (*self.gain.shape, *self.inputs)
        order = (*self.axes.stack, *self.axes.outputs, *self.axes.inputs)
        return tuple(size for _, size in sorted(zip(order, sizes, strict=True)))
