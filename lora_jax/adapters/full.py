"""Full: W' = W + D, with D of W's own shape: biases, norms, heads or whole weights, trained beside adapters."""

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.arguments import check_dtype
from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class Full(Rule):
    """W' = W + D, for arrays of any shape that are used in any way.

    D starts at zero, so that weight decay draws W' to W and not to zero. Its gradient is what the program's own
    operations give for W': over a bf16 base, numbers of bf16.

    Args:
        dtype: of D. fp32 by default, also on a bf16 base, where it keeps what is too small for W's own dtype.

    Raises:
        LoraError: a dtype that is not a floating one.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4)), "bias": jnp.zeros(4)}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"] + p["bias"][None], params, x, rules={"bias": lora.Full()})
    >>> lora.init(jax.random.key(0), params, plan)["bias"]
    FullAdapter(delta 4)
    """

    dtype: Any = jnp.float32

    whole = True

    def __post_init__(self) -> None:
        check_dtype("Full", self.dtype)

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> "FullAdapter":
        return FullAdapter(jnp.zeros(w.shape, self.dtype), axes)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        return math.prod(shape)


@register_kind("full")
@dataclass(frozen=True)
class FullAdapter(Adapter):
    """The change of an array, entry by entry.

    Attributes:
        delta: D, of W's shape; fp32 by default.
        axes: of W, all of which are outputs.
    """

    delta: jax.Array  # W's shape
    axes: KernelAxes = field(metadata={"static": True})  # all of W's are outputs

    reads_weight = True
    forms_weight = True
    layout = MappingProxyType({"delta": ("stack", "outputs")})

    def merge(self, w: jax.Array) -> jax.Array:
        return w + self.delta.astype(w.dtype)

    def lower(self, w: jax.Array) -> jax.Array:
        return self.merge(w.astype(accumulator(w.dtype))).astype(w.dtype)
