"""(IA)^3: W' = W diag(g), a trained factor for each output.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv 2205.05638: for keys, values and the inner activations of MLPs. Where these are gated,
f(x @ W_gate) * (x @ W_up), a factor on them is a factor on the outputs of W_up. Where they are not, it is one on the
inputs of the next weight, which files of HF PEFT have and `Ia3InputsAdapter` is for.
"""

from collections.abc import Sequence
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
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class Ia3(StackedRule):
    """W' = W diag(g), with g starting at one.

    Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    arXiv 2205.05638.

    Args:
        dtype: of g.
        stack: as of `Lora`.

    Raises:
        LoraError: a dtype that is not a floating one.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Ia3()})
    >>> lora.init(jax.random.key(0), params, plan)["w"]
    Ia3Adapter(gain 4, inputs (6,))
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


class Gains(Adapter):
    """Factors on one side of a weight."""


@register_kind("ia3")
@dataclass(frozen=True)
class Ia3Adapter(Gains):
    """The factors on the outputs of one weight. In a program it is an `OutputScaled` LoRA of rank 0.

    A vector that is added to the outputs, as a bias is, has its own: all of its axes are outputs, and W' is formed.

    Attributes:
        gain: g, fp32 [*stack, *outputs].
        axes: which axes of W are stacked, inputs and outputs.
        inputs: the sizes of W's axes of inputs.
    """

    gain: jax.Array  # [*stack, *outputs]
    axes: KernelAxes = field(metadata={"static": True})
    inputs: tuple[int, ...] = field(metadata={"static": True})  # their sizes

    layout = MappingProxyType({"gain": ("stack", "outputs")})

    @property
    def forms_weight(self) -> bool:  # type: ignore[override]
        """Return whether W' itself is formed: for a vector, all of whose axes are outputs."""
        return not self.axes.inputs

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """Return whether the numbers in W are needed: where W' is formed."""
        return not self.axes.inputs

    def merge(self, w: jax.Array) -> jax.Array:
        return w * along_outputs(self.gain.astype(w.dtype), self.axes)

    def lower(self, w: Any) -> OutputScaled | jax.Array:
        if self.forms_weight:
            return self.merge(w.astype(accumulator(w.dtype))).astype(w.dtype)
        n = len(self.axes.stack)
        a = jnp.zeros((*self.gain.shape[:n], *self.inputs, 0), self.gain.dtype)
        b = jnp.zeros((*self.gain.shape[:n], 0, *self.gain.shape[n:]), self.gain.dtype)
        return OutputScaled(LowRank(a, b, self.axes), self.gain, self.axes)

    def kernel_shape(self) -> tuple[int, ...]:
        return _in_order((*self.axes.stack, *self.axes.outputs, *self.axes.inputs), (*self.gain.shape, *self.inputs))


@register_kind("ia3_inputs")
@dataclass(frozen=True)
class Ia3InputsAdapter(Gains):
    """The factors on the inputs of one weight, W' = diag(g) W, as files of HF PEFT have them; no rule makes one.

    x @ W' is a product of other activations than the program has, so programs that multiply by W form W', where
    `lora_apply(materialize=...)` allows it: merge the adapter, or put its factors on the outputs of the weight before,
    where nothing stands between the two but products with other activations.

    Attributes:
        input_gain: g, fp32 [*stack, *inputs].
        axes: which axes of W are stacked, inputs and outputs.
        outputs: the sizes of W's axes of outputs.
    """

    input_gain: jax.Array  # [*stack, *inputs]
    axes: KernelAxes = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})  # their sizes

    layout = MappingProxyType({"input_gain": ("stack", "inputs")})

    def merge(self, w: jax.Array) -> jax.Array:
        return w * along_outputs(self.input_gain.astype(w.dtype), self.axes.transpose())

    def lower(self, w: Any) -> OutputScaled:
        turned = Ia3Adapter(self.input_gain, self.axes.transpose(), self.outputs).lower(w)
        assert isinstance(turned, OutputScaled)
        return turned.transpose()

    def kernel_shape(self) -> tuple[int, ...]:
        order = (*self.axes.stack, *self.axes.inputs, *self.axes.outputs)
        return _in_order(order, (*self.input_gain.shape, *self.outputs))


def _in_order(axes: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of a weight's axes in the weight's order."""
    return tuple(size for _, size in sorted(zip(axes, sizes, strict=True)))
