"""NF4: 4 bits a number, the quantiles of a normal distribution, in blocks of 64 with a scale each.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314. With double quantisation the
scales are of 8 bits, in blocks of 256: 4 + 8/64 + 32/(64*256) = 4.127 bits a number. Bytes and values are those of
bitsandbytes, for a weight of the same order of axes.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bases.base import Format
from lora_jax.packed import Packed, View

BLOCK, SCALES = 64, 256  # numbers with one scale, and scales with one scale of their own

CODE = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip


@dataclass(frozen=True)
class Nf4(Format):
    """4 bits a number: W = code[q] * scale, the nearest of 16 codes to W / scale, which is a block's largest |W|.

    Args:
        double: whether the scales are packed too: 0.516 bytes a number instead of 0.5625.
    """

    double: bool = True

    def pack(self, w: jax.Array, stack: int, dtype: Any) -> "Nf4Weight":
        lead, inner = w.shape[:stack], w.shape[stack:]
        codes, scales = _pack(w.reshape(*lead, math.prod(inner)))
        if not self.double:
            return Nf4Weight(codes, scales, None, None, inner, dtype)
        small, outer, mean = _pack_scales(scales)
        return Nf4Weight(codes, small, outer, mean, inner, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4Weight(Packed):
    """A weight of NF4: two codes a byte, the first in the high half, and what the scales are made of."""

    codes: jax.Array  # uint8 [*s, n / 2], n padded to whole blocks
    scales: jax.Array  # fp32 [*s, n / 64]; uint8, where they are packed too
    outer: jax.Array | None  # fp32 [*s, n / 64 / 256], the scales of scales
    mean: jax.Array | None  # fp32 [*s], which was taken off them
    inner: tuple[int, ...] = field(metadata={"static": True})
    unpacked: Any = field(metadata={"static": True})
    view: tuple[View, ...] = field(default=(), metadata={"static": True})

    parts = ("codes", "scales", "outer", "mean")

    def unpack(self) -> jax.Array:
        high, low = self.codes >> 4, self.codes & 15
        values = jnp.asarray(CODE)[jnp.stack([high, low], axis=-1)]
        values = values.reshape(*self.stack, -1, BLOCK) * self._scales()[..., None]
        n = math.prod(self.inner)
        return values.reshape(*self.stack, -1)[..., :n].reshape(*self.stack, *self.inner)

    def _scales(self) -> jax.Array:
        if self.outer is None or self.mean is None:
            return self.scales
        n = self.scales.shape[-1]
        outer = jnp.repeat(self.outer, SCALES, axis=-1)[..., :n]
        return jnp.asarray(scale_code())[self.scales] * outer + self.mean[..., None]


@jax.jit
def _pack(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[*s, n] -> codes [*s, n / 2], scales [*s, n / 64]"""
    blocks = _blocks(w.astype(jnp.float32), BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    parts = blocks * (1 / jnp.where(scales == 0, 1.0, scales))[..., None]
    bounds = ((CODE[:-1] + CODE[1:]) / 2).astype(np.float32)
    q = functools.reduce(
        lambda q, bound: q + (parts > bound).astype(jnp.uint8), bounds, jnp.zeros(parts.shape, jnp.uint8)
    )
    q = q.reshape(*w.shape[:-1], -1, 2)
    return (q[..., 0] << 4) | q[..., 1], scales


def _pack_scales(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[*s, m] -> uint8 [*s, m], their scales [*s, m / 256], and the mean [*s] that was taken off."""
    exact = np.asarray(scales)
    mean = exact.astype(np.float64).mean(-1).astype(np.float32)
    blocks = np.asarray(_blocks(exact - mean[..., None], SCALES))
    outer = np.abs(blocks).max(-1)
    parts = blocks / np.where(outer == 0, np.float32(1), outer)[..., None]
    code = scale_code()
    q = np.searchsorted((code[:-1] + code[1:]) / 2, parts).astype(np.uint8)
    q = q.reshape(*exact.shape[:-1], -1)[..., : exact.shape[-1]]
    return jnp.asarray(q), jnp.asarray(outer), jnp.asarray(mean)


def _blocks(x: Any, size: int) -> Any:
    """[*s, n] -> [*s, blocks, size], padded with zeros."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return jnp.pad(x, padding).reshape(*x.shape[:-1], -1, size)


@functools.cache
def scale_code() -> np.ndarray:
    """The 256 numbers of 8 bits that scales are kept as: seven decades, with twice as many in each as in the last.

    The middles of 2^i intervals of [0.1, 1], times 10^(i - 6), for i from 0 to 6, with both signs; 0 and 1. Dettmers et
    al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861. In fp32, rounded as torch does.
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
