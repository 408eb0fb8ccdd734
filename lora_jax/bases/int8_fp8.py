"""8 bits a number, integers or floats, with one scale for each output of a matrix: W = q * scale.

The scale is the largest |W| over the largest q: 127, or 448 for floats with 3 bits of a mantissa (e4m3; Micikevicius et
al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lora_jax.bases.format import Format
from lora_jax.bases.in_parts import can_split, in_parts, part, parts_of
from lora_jax.core.deferred import Deferred, Size
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed
from lora_jax.core.serialization import register_node


@dataclass(frozen=True)
class Int8(Format):
    """Integers of 8 bits, with one fp32 scale for each output of a matrix.

    Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339, also
    has scales for rows of activations; here these keep their dtype.

    Args:
        stack, dtype: as of every `Format`.
        inputs: how many of a matrix's axes, the first ones, are inputs; by default all but the last. With 1, a kernel
            [d, heads, head_dim] has a scale for each entry of each head.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lora.bases.quantize({"w": jnp.ones((64, 4))}, {"w": lora.bases.Int8()})
    {'w': EightBits(64x4: q 64x4 int8, scales 4)}
    """

    inputs: int | None = None

    def pack(self, w: jax.Array, stack: int, dtype: Any) -> "EightBits":
        return _pack(w, stack, self.inputs, dtype, jnp.int8, 127.0)


@dataclass(frozen=True)
class Fp8(Format):
    """Floats of 8 bits (e4m3), with one fp32 scale for each output of a matrix; arguments as of `Int8`.

    Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lora.bases.quantize({"w": jnp.ones((64, 4))}, {"w": lora.bases.Fp8()})
    {'w': EightBits(64x4: q 64x4 float8_e4m3fn, scales 4)}
    """

    inputs: int | None = None

    def pack(self, w: jax.Array, stack: int, dtype: Any) -> "EightBits":
        return _pack(w, stack, self.inputs, dtype, jnp.float8_e4m3fn, 448.0)


@register_node("lora_jax.EightBits")
@dataclass(frozen=True)
class EightBits(Packed):
    """A weight of `Int8` or `Fp8`.

    Attributes:
        q: the codes, int8 or float8_e4m3fn [*s, *inputs, *outputs].
        scales: fp32 [*s, *outputs].
        inner: the shape of one matrix as it was packed.
        value_dtype: the dtype that dequantized values are rounded to.
        deferred: what is done to each matrix after that.
        compute_sharding: of one matrix, as it was packed, while something is multiplied by it; None for none.
    """

    q: jax.Array  # int8 or float8_e4m3fn [*s, *inputs, *outputs]
    scales: jax.Array  # fp32 [*s, *outputs]
    inner: tuple[int, ...] = field(metadata={"static": True})
    value_dtype: Any = field(metadata={"static": True})
    deferred: Deferred = field(default=(), metadata={"static": True})
    compute_sharding: NamedSharding | None = field(default=None, metadata={"static": True})

    parts = ("q", "scales")

    @property
    def array_ndim(self) -> int:
        return len(self.inner)

    @property
    def inputs(self) -> int:
        """Return how many axes of a matrix share one scale."""
        return self.q.ndim - self.scales.ndim

    def dequantize(self) -> jax.Array:
        n = len(self.stack)
        return self.q.astype(jnp.float32) * jnp.expand_dims(self.scales, range(n, n + self.inputs))

    def blocks(self, w: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        n = len(self.stack)
        return w, tuple(range(n, n + self.inputs))

    def repack(self, w: jax.Array) -> "EightBits":
        format = Int8 if self.q.dtype == jnp.int8 else Fp8
        return format(inputs=self.inputs).pack(w, len(self.stack), self.value_dtype)

    def array_specs(self, spec: Sequence[Any], size: Size) -> dict[str, tuple[Any, ...]]:
        return {"q": tuple(spec), "scales": tuple(spec[self.inputs :])}


def _pack(w: jax.Array, stack: int, inputs: int | None, dtype: Any, to: Any, largest: float) -> EightBits:
    """Pack a weight as numbers of the dtype `to`, of which `largest` is the largest."""
    n = w.ndim - stack - 1 if inputs is None else inputs
    if not 0 < n < w.ndim - stack:
        raise LoraError(
            f"a matrix of shape {list(w.shape[stack:])} has no {n} axes of inputs beside one of outputs: give another "
            "number for `inputs`, or for `stack`."
        )
    axes = tuple(range(stack, stack + n))
    axis, parts = parts_of(w.shape, axes) if can_split(w) else (0, 1)
    scales = in_parts(functools.partial(_scales, w, axes, largest, axis), axis, w.shape[axis], parts)
    q, scales = _rounded(w, scales, to, largest), scales.squeeze(axes)
    return EightBits(q, scales, w.shape[stack:], dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 5))
def _scales(w: jax.Array, inputs: tuple[int, ...], largest: float, axis: int, start: Any, size: int) -> jax.Array:
    """Return the scales that the axes `inputs` share, which stay with size 1, of a part along `axis`."""
    w = part(w, start, size, axis).astype(jnp.float32)
    return jnp.max(jnp.abs(w), axis=inputs, keepdims=True) / largest


@functools.partial(jax.jit, static_argnums=(2, 3))
def _rounded(w: jax.Array, scales: jax.Array, to: Any, largest: float) -> jax.Array:
    """Return q of a weight; scales have its axes."""
    q = jnp.clip(w.astype(jnp.float32) / jnp.where(scales == 0, 1.0, scales), -largest, largest)
    return (jnp.round(q) if jnp.issubdtype(to, jnp.integer) else q).astype(to)
