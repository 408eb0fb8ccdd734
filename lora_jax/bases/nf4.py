"""NF4: 4 bits a number, the quantiles of a normal distribution, in blocks of 64 with one scale each.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314. With double quantization the
scales have 8 bits, in blocks of 256: 4 + 8/64 + 32/(64*256) = 4.127 bits a number. Bytes and values are those of
bitsandbytes, for a weight with the same order of axes.

Axes: s stacked matrices; w the first axes of a matrix, which no block crosses; m the product of its other axes.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from lora_jax.bases.format import Format
from lora_jax.core.deferred import Deferred, Size
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed
from lora_jax.core.serialization import register_node

BLOCK, SCALES = 64, 256  # numbers in a block, and scales in a block of scales

CODE = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip


@dataclass(frozen=True)
class Nf4(Format):
    """4 bits a number: W = code[q] * scale, the nearest of 16 codes to W / scale, which is a block's largest |W|.

    Args:
        stack, dtype: as of every `Format`.
        double: whether the scales are quantized too: 0.516 bytes a number instead of 0.5625.
        kernel: whether products dequantize W tile by tile, in a Pallas kernel for TPU or GPU. None: on one such device,
            for few rows of x, as in generation, if a trial shows that it works. The kernel has no forward-mode
            derivative.
    """

    double: bool = True
    kernel: bool | None = None

    def pack(self, w: jax.Array, stack: int, dtype: Any) -> "Nf4Weight":
        inner = w.shape[stack:]
        codes, scales = _pack(w, stack + _whole(inner))
        if not self.double:
            return Nf4Weight(codes, scales, None, None, inner, dtype, kernel=self.kernel)
        small, outer, mean = _pack_scales(scales, stack)
        return Nf4Weight(codes, small, outer, mean, inner, dtype, kernel=self.kernel)

    def finer(self) -> str:
        return "lora.bases.Nf4(double=False), with scales in fp32" if self.double else super().finer()


def _whole(inner: tuple[int, ...]) -> int:
    """Return how many of a matrix's first axes no block crosses; 0 if the matrix is flattened and padded."""
    return next((n for n in reversed(range(len(inner))) if math.prod(inner[n:]) % BLOCK == 0), 0)


@register_node("lora_jax.Nf4Weight")
@dataclass(frozen=True)
class Nf4Weight(Packed):
    """A weight in NF4: two codes a byte, the first in the high half, and their scales."""

    codes: jax.Array  # uint8 [*s, *w, m / 2], m padded to whole blocks
    scales: jax.Array  # fp32 [*s, *w, m / 64], or with double quantization uint8
    outer: jax.Array | None  # fp32 [*s, scales / 256], with double quantization: the scales of the scales
    mean: jax.Array | None  # fp32 [*s], with double quantization: the mean, which is subtracted from the scales
    inner: tuple[int, ...] = field(metadata={"static": True})
    value_dtype: Any = field(metadata={"static": True})
    deferred: Deferred = field(default=(), metadata={"static": True})
    compute_sharding: NamedSharding | None = field(default=None, metadata={"static": True})
    kernel: bool | None = field(default=None, metadata={"static": True})

    parts = ("codes", "scales", "outer", "mean")

    @property
    def array_ndim(self) -> int:
        return _whole(self.inner) + 1

    def dequantize(self) -> jax.Array:
        high, low = self.codes >> 4, self.codes & 15
        values = _numbers(CODE, jnp.stack([high, low], axis=-1)).reshape(*self.codes.shape[:-1], -1)
        values = values * _for_each(self.fp32_scales(), values)
        n = math.prod(self.inner[_whole(self.inner) :])
        return values[..., :n].reshape(*self.stack, *self.inner)

    def fp32_scales(self) -> jax.Array:
        """Return the scales in fp32 [*s, *w, m / 64]."""
        if self.outer is None or self.mean is None:
            return self.scales
        n, own = len(self.stack), self.scales.shape[len(self.stack) :]
        outer = jnp.repeat(self.outer, SCALES, axis=-1)[..., : math.prod(own)]
        scaled = _numbers(scale_code(), self.scales) * outer.reshape(self.scales.shape)
        return scaled + jnp.expand_dims(self.mean, range(n, n + len(own)))

    def dot(self, x: jax.Array, inputs: tuple[int, ...], precision: Any) -> jax.Array | None:
        return None

    def blocks(self, w: jax.Array) -> jax.Array:
        return _blocks(w.reshape(*w.shape[: len(self.stack) + _whole(self.inner)], -1), BLOCK)

    def repack(self, w: jax.Array) -> "Nf4Weight":
        return Nf4(double=self.outer is not None, kernel=self.kernel).pack(w, len(self.stack), self.value_dtype)

    def array_specs(self, spec: Sequence[Any], size: Size) -> dict[str, tuple[Any, ...]]:
        """Split the last axis of codes and scales, which holds several axes of W, as the first of these is split."""
        n = _whole(self.inner)
        last, *_ = spec[n:]
        parts, m = size(last), math.prod(self.inner[n:])
        splits = m % BLOCK == 0 and self.inner[n] % parts == 0 and m % (2 * parts) == 0
        codes = (*spec[:n], last if splits else None)
        scales = (*spec[:n], last if splits and m % (BLOCK * parts) == 0 else None)
        return {"codes": codes, "scales": scales, "outer": (), "mean": ()}


def _numbers(table: Any, codes: jax.Array) -> jax.Array:
    """Return the numbers that codes stand for; on a mesh of explicit axes, sharded as the codes are."""
    where, table = jax.typeof(codes).sharding, jnp.asarray(table)
    return table[codes] if AxisType.Explicit not in where.mesh.axis_types else table.at[codes].get(out_sharding=where)


def _for_each(scales: jax.Array, values: jax.Array) -> jax.Array:
    """Repeat scales [..., m / 64] for values [..., m]; on a mesh of explicit axes, sharded as the values are."""
    wide = jnp.broadcast_to(scales[..., None], (*scales.shape, BLOCK)).reshape(*scales.shape[:-1], -1)
    where = jax.typeof(values).sharding
    return jax.sharding.reshard(wide, where) if AxisType.Explicit in where.mesh.axis_types else wide


def from_flat(
    codes: jax.Array,
    scales: jax.Array,
    outer: jax.Array | None,
    mean: jax.Array | None,
    inner: tuple[int, ...],
    dtype: Any,
    deferred: Deferred = (),
) -> Nf4Weight:
    """Return a weight of codes [*s, n / 2] and scales [*s, n / 64], as in files, with n padded to whole blocks."""
    n, stack = _whole(inner), codes.shape[:-1]
    codes, scales = (array.reshape(*stack, *inner[:n], -1) for array in (codes, scales))
    return Nf4Weight(codes, scales, outer, mean, inner, dtype, deferred)


@functools.partial(jax.jit, static_argnums=1)
def _pack(w: jax.Array, axes: int) -> tuple[jax.Array, jax.Array]:
    """Quantize w [*axes, ...] to codes [*axes, m / 2] and scales [*axes, m / 64]."""
    w = w.reshape(*w.shape[:axes], -1)
    blocks = _blocks(w.astype(jnp.float32), BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    parts = blocks * (1 / jnp.where(scales == 0, 1.0, scales))[..., None]
    bounds = ((CODE[:-1] + CODE[1:]) / 2).astype(np.float32)
    q = functools.reduce(
        lambda q, bound: q + (parts > bound).astype(jnp.uint8), bounds, jnp.zeros(parts.shape, jnp.uint8)
    )
    q = q.reshape(*w.shape[:-1], -1, 2)
    return (q[..., 0] << 4) | q[..., 1], scales


def _pack_scales(scales: jax.Array, stack: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantize scales [*s, ...] to uint8 [*s, ...], with scales [*s, n / 256] and the mean [*s] that was subtracted."""
    if isinstance(scales, jax.core.Tracer):
        raise LoraError("Nf4() packs scales by looking at them: quantize outside jax.jit, or with Nf4(double=False).")
    exact = np.asarray(_everywhere(scales))
    flat = exact.reshape(*exact.shape[:stack], -1)
    mean = flat.astype(np.float64).mean(-1).astype(np.float32)
    blocks = np.asarray(_blocks(flat - mean[..., None], SCALES))
    outer = np.abs(blocks).max(-1)
    parts = blocks / np.where(outer == 0, np.float32(1), outer)[..., None]
    code = scale_code()
    q = np.searchsorted((code[:-1] + code[1:]) / 2, parts).astype(np.uint8)
    q = q.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]].reshape(exact.shape)
    return jnp.asarray(q), jnp.asarray(outer), jnp.asarray(mean)


def _everywhere(array: jax.Array) -> jax.Array:
    """Return an array that every process holds as a whole, from one that is spread over several processes."""
    if array.is_fully_addressable:
        return array
    whole = NamedSharding(array.sharding.mesh, jax.P())  # type: ignore[attr-defined]
    return jax.jit(lambda array: array, out_shardings=whole)(array)


def _blocks(x: Any, size: int) -> Any:
    """Reshape x [*s, n] to [*s, blocks, size], padded with zeros."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, padding).reshape(*x.shape[:-1], -1, size)


@functools.cache
def scale_code() -> np.ndarray:
    """Return the 256 values that 8-bit scales can have: seven decades, each with twice as many as the one below.

    They are the midpoints of 2^i intervals of [0.1, 1], times 10^(i - 6), for i from 0 to 6, with both signs; 0 and 1.
    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861. In fp32, rounded as torch
    does.
    """
    one, tenth = np.float32(1), np.float32(0.1)
    found = [0.0, 1.0]
    for i in range(7):
        n = 2**i
        step, at = np.float64((one - tenth) / np.float32(n)), np.arange(n + 1)
        up, down = (np.float64(tenth) + step * at).astype(np.float32), (1 - step * (n - at)).astype(np.float32)
        bounds = np.where(at < (n + 1) // 2, up, down)
        middles = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        found += [*middles.tolist(), *(-middles).tolist()]
    return np.sort(np.array(found, np.float32))
