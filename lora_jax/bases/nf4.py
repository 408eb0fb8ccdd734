"""NF4: 4 bits a number, the quantiles of a normal distribution, in blocks of 64 with one scale each.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314. With double quantization the
scales have 8 bits, in blocks of 256: 4 + 8/64 + 32/(64*256) = 4.127 bits a number.

Codes are an array of dtype uint4, and a block runs along the first axis of a kernel [inputs, outputs]. TPUs multiply by
such an array without a copy of it in another order. A block is also what bitsandbytes makes of torch's weight
[outputs, inputs], and codes, scales and values are those of bitsandbytes for that weight.

Axes: s stacked matrices; d the first axes of a matrix, as few as hold whole blocks, as one; k its other axes, as one.
A matrix of which no first axes hold whole blocks is one column: all its numbers, with the first axis last as in torch,
padded to whole blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from lora_jax.bases import nf4_kernels, nf4_pallas
from lora_jax.bases.format import Format
from lora_jax.core.deferred import Deferred, Size, undo_deferred
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed
from lora_jax.core.serialization import register_node

BLOCK, SCALES = nf4_kernels.BLOCK, 256  # numbers in a block, and scales in a block of scales
CODE = np.array(nf4_kernels.CODE, np.float32)  # the numbers that codes stand for


@dataclass(frozen=True)
class Nf4(Format):
    """4 bits a number: W = code[q] * scale, the nearest of 16 codes to W / scale, which is a block's largest |W|.

    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.

    Args:
        stack, dtype: as of every `Format`.
        double: whether the scales are quantized too: 0.516 bytes a number instead of 0.5625.
        kernel: whether products dequantize W tile by tile, in a Pallas kernel for TPU or GPU. None: on one such device
            or in a `shard_map`, for few rows of x, as in generation.
        inputs: how many of a matrix's axes, the first ones, a block runs along; by default as few as hold whole blocks.
            bitsandbytes takes all inputs: 2 for a kernel [heads, head_dim, d] of 64 heads, where the default is 1.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lora.bases.quantize({"w": jnp.ones((64, 4))}, {"w": lora.bases.Nf4()})
    {'w': Nf4Weight(64x4: codes 64x4 uint4, scales 1x4 uint8, outer 1, mean scalar)}
    """

    double: bool = True
    kernel: bool | None = None
    inputs: int | None = None

    def pack(self, w: jax.Array, stack: int, dtype: Any) -> "Nf4Weight":
        inner, outer, mean = w.shape[stack:], None, None
        own = inner if self.inputs is None else self._with_one_input(inner)
        codes, scales = _pack(w.reshape(*w.shape[:stack], *own), stack)
        if self.double:
            scales, outer, mean = _pack_scales(scales, stack)
        packed = Nf4Weight(codes, scales, outer, mean, own, dtype, kernel=self.kernel)
        return packed if own == inner else packed.with_deferred("reshape", inner)

    def _with_one_input(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a matrix with its inputs as one axis."""
        if self.inputs is None or not 0 < self.inputs < len(inner):
            raise LoraError(
                f"a matrix of shape {list(inner)} has no {self.inputs} axes of inputs beside one of outputs: give "
                "another number for `inputs`, or for `stack`."
            )
        return (math.prod(inner[: self.inputs]), *inner[self.inputs :])

    def finer(self) -> str:
        return "lora.bases.Nf4(double=False), with scales in fp32" if self.double else super().finer()


def column_axes(inner: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which axes of a matrix are d, along which blocks run, and which are k, each in its order."""
    axes = tuple(range(len(inner)))
    for n in range(1, max(2, len(inner))):
        if math.prod(inner[:n]) % BLOCK == 0:
            return axes[:n], axes[n:]
    return (*axes[1:], 0), ()


@register_node("lora_jax.Nf4Weight")
@dataclass(frozen=True)
class Nf4Weight(Packed):
    """A weight in NF4: codes of 4 bits, and their scales.

    Attributes:
        codes: uint4 [*s, d, k], d padded to whole blocks.
        scales: fp32 [*s, d / 64, k], or with double quantization uint8.
        outer: the scales of scales, fp32 [*s, d / 64 * k / 256], those of one column after another; or None.
        mean: fp32 [*s], beside `outer`: the mean, which is subtracted from the scales; or None.
        inner: the shape of one matrix as it was packed.
        value_dtype: the dtype that dequantized values are rounded to.
        deferred: what is done to each matrix after that.
        compute_sharding: of one matrix, as it was packed, while something is multiplied by it; None for none.
        kernel: as of `Nf4`.
    """

    codes: jax.Array  # uint4 [*s, d, k], d padded to whole blocks
    scales: jax.Array  # fp32 [*s, d / 64, k], or with double quantization uint8
    outer: jax.Array | None  # fp32 [*s, d / 64 * k / 256]: the scales of scales, those of one column after another
    mean: jax.Array | None  # fp32 [*s], beside `outer`: the mean, which is subtracted from the scales
    inner: tuple[int, ...] = field(metadata={"static": True})
    value_dtype: Any = field(metadata={"static": True})
    deferred: Deferred = field(default=(), metadata={"static": True})
    compute_sharding: NamedSharding | None = field(default=None, metadata={"static": True})
    kernel: bool | None = field(default=None, metadata={"static": True})

    parts = ("codes", "scales", "outer", "mean")

    @property
    def array_ndim(self) -> int:
        return 2

    def dequantize(self) -> jax.Array:
        return _from_columns(_values(self.codes, self.fp32_scales()), self.inner)

    def fp32_scales(self) -> jax.Array:
        """Return the scales in fp32 [*s, d / 64, k]."""
        if self.outer is None or self.mean is None:
            return self.scales
        *stack, blocks, k = self.scales.shape
        outer = jnp.repeat(self.outer, SCALES, axis=-1)[..., : blocks * k].reshape(*stack, k, blocks)
        scales = _numbers(scale_code(), self.scales) * outer.mT + self.mean[..., None, None]
        return jax.lax.optimization_barrier(scales)  # else XLA:CPU computes each of them 64 times

    def with_whole_scales(self) -> "Nf4Weight":
        return dataclasses.replace(self, scales=self.fp32_scales(), outer=None, mean=None)

    def dot(self, x: jax.Array, inputs: tuple[int, ...], precision: Any) -> jax.Array | None:
        """Return the product of a kernel, if W as it is packed is one matrix [inputs, outputs] or [outputs, inputs]."""
        n, deferred, (d, k) = len(inputs), self.deferred, self.codes.shape[-2:]
        transposed = len(self.inner) == 2 and deferred[:1] == (("transpose", (1, 0)),)
        moved = any(name == "transpose" for name, _ in (deferred[1:] if transposed else deferred))
        first, last = inputs == tuple(range(n)), inputs == tuple(range(self.ndim - n, self.ndim))
        if moved or self.stack or self._is_split() or not (first or last) or x.dtype != self.dtype:
            return None
        axes = self.shape[:n] if first else self.shape[self.ndim - n :]
        free, outputs = x.shape[: x.ndim - n], self.shape[n:] if first else self.shape[: self.ndim - n]
        along_d = first != transposed
        if (math.prod(axes), math.prod(outputs)) != ((d, k) if along_d else (k, d)) or not column_axes(self.inner)[1]:
            return None
        y = _by_kernel(x.reshape(math.prod(free), -1), self, transposed=not along_d, precision=precision)
        return None if y is None else y.reshape(*free, *outputs)

    def _is_split(self) -> bool:
        """Return whether the compiler may split the weight over a mesh. In a `shard_map`, a device has what it has."""
        where, here = self.compute_sharding, jax.sharding.get_abstract_mesh()
        return where is not None and not {*where.mesh.axis_names} <= {*here.manual_axes}

    def blocks(self, w: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        w = undo_deferred(w, len(self.stack), self.inner, self.deferred)
        found = _in_blocks(_to_columns(w, len(self.stack)))  # [*s, d / 64, 64, k]
        return found, (found.ndim - 2,)

    def repack(self, w: jax.Array) -> "Nf4Weight":
        """Return other matrices [*s, *inner], packed in the same way.

        Raises:
            LoraError: as of `Nf4.pack`.
        """
        return Nf4(double=self.outer is not None, kernel=self.kernel).pack(w, len(self.stack), self.value_dtype)

    def array_specs(self, spec: Sequence[Any], size: Size) -> dict[str, tuple[Any, ...]]:
        """Return specs in which d and k, which hold several axes of W, are split as the first of these is split."""
        d, k = column_axes(self.inner)
        rows = math.prod(self.inner[axis] for axis in d)
        along_d, along_k = (
            spec[axes[0]] if axes and rows % BLOCK == 0 and self.inner[axes[0]] % size(spec[axes[0]]) == 0 else None
            for axes in (d, k)
        )
        of_blocks = along_d if rows % (BLOCK * size(along_d)) == 0 else None
        return {"codes": (along_d, along_k), "scales": (of_blocks, along_k), "outer": (), "mean": ()}

    def matrix_spec(self, own: Sequence[Any]) -> list[Any]:
        spec: list[Any] = [None] * len(self.inner)
        for axes, entry in zip(column_axes(self.inner), own, strict=True):
            if axes:
                spec[axes[0]] = entry
        return spec


def _by_kernel(x: jax.Array, w: Nf4Weight, *, transposed: bool, precision: Any) -> jax.Array | None:
    """Multiply x [T, d] by W [d, k] -> [T, k], or transposed x [T, k] by W^T -> [T, d]; None where no kernel would."""
    dtypes = (w.value_dtype, *(how for name, how in w.deferred if name == "cast"))
    how = {"dtypes": dtypes, "precision": precision, "transposed": transposed}
    plain = functools.partial(_plain, **how)

    def run(w: Nf4Weight) -> jax.Array | None:
        w = w.brought()
        return nf4_pallas.product(x, w.codes, w.fp32_scales(), plain, **how, kernel=w.kernel)

    return jax.checkpoint(run, prevent_cse=not w.on_host)(w)  # the residual is the packed weight, its scales too


def _plain(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, dtypes: tuple[Any, ...], precision: Any, transposed: bool
) -> jax.Array:
    """Multiply x [T, d] by W [d, k], or transposed x [T, k] by W^T, by dequantizing W."""
    w = functools.reduce(lambda w, dtype: w.astype(dtype), dtypes, _values(codes, scales))
    return jnp.matmul(x, w.T if transposed else w, precision=precision)


def _values(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Return W in fp32 [*s, d, k]."""
    values = _numbers(code_table(), codes.astype(jnp.uint8))  # on CPUs a look-up by 4 bits is slower
    return values * _for_each(scales, values)


def code_table() -> jax.Array:
    """Return CODE as something that the program computes, and every compiler folds.

    A constant would be an input of what `jax.checkpoint` computes again, and as such no compiler looks into it: XLA:TPU
    then takes twice as long to decode.
    """
    return jax.lax.concatenate([jax.lax.full((1,), number, jnp.float32) for number in nf4_kernels.CODE], 0)


def _numbers(table: Any, codes: jax.Array) -> jax.Array:
    """Return the numbers that codes stand for; on a mesh of explicit axes, sharded as the codes are."""
    where, table = jax.typeof(codes).sharding, jnp.asarray(table)
    return table[codes] if AxisType.Explicit not in where.mesh.axis_types else table.at[codes].get(out_sharding=where)


def _for_each(scales: jax.Array, values: jax.Array) -> jax.Array:
    """Repeat scales [*s, d / 64, k] for values [*s, d, k]; on a mesh of explicit axes, sharded as the values are."""
    *stack, blocks, k = scales.shape
    wide = jnp.broadcast_to(scales[..., None, :], (*stack, blocks, BLOCK, k)).reshape(*stack, blocks * BLOCK, k)
    where = jax.typeof(values).sharding
    return jax.sharding.reshard(wide, where) if AxisType.Explicit in where.mesh.axis_types else wide


def _to_columns(w: jax.Array, stack: int) -> jax.Array:
    """Reshape matrices [*s, *inner] to [*s, d, k], with d padded to whole blocks by zeros."""
    stacked, inner = w.shape[:stack], w.shape[stack:]
    d, k = column_axes(inner)
    n = math.prod(inner[axis] for axis in d)
    w = w.transpose(*range(stack), *(stack + axis for axis in (*d, *k))).reshape(*stacked, n, -1)
    return jnp.pad(w, [*[(0, 0)] * stack, (0, -n % BLOCK), (0, 0)])


def _from_columns(w: jax.Array, inner: tuple[int, ...]) -> jax.Array:
    """Invert `_to_columns`."""
    d, k = column_axes(inner)
    order, stack = (*d, *k), w.shape[:-2]
    w = w[..., : math.prod(inner[axis] for axis in d), :].reshape(*stack, *(inner[axis] for axis in order))
    return w.transpose(*range(len(stack)), *(len(stack) + order.index(axis) for axis in range(len(inner))))


def _in_blocks(columns: jax.Array) -> jax.Array:
    """Reshape [*s, d, k] to [*s, d / 64, 64, k]."""
    *stack, d, k = columns.shape
    return columns.reshape(*stack, d // BLOCK, BLOCK, k)


@functools.partial(jax.jit, static_argnums=1)
def _pack(w: jax.Array, stack: int) -> tuple[jax.Array, jax.Array]:
    """Quantize matrices [*s, *inner] to codes [*s, d, k] and scales [*s, d / 64, k]."""
    columns = _to_columns(w, stack)
    blocks = _in_blocks(columns.astype(jnp.float32))
    scales = jnp.max(jnp.abs(blocks), axis=-2)
    parts = blocks * (1 / jnp.where(scales == 0, 1.0, scales))[..., None, :]
    bounds = ((CODE[:-1] + CODE[1:]) / 2).astype(np.float32)
    q = functools.reduce(
        lambda q, bound: q + (parts > bound).astype(jnp.uint8), bounds, jnp.zeros(parts.shape, jnp.uint8)
    )
    return q.reshape(columns.shape).astype(jnp.uint4), scales


def _pack_scales(scales: jax.Array, stack: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantize scales [*s, d / 64, k] to uint8, with scales [*s, n / 256] and the mean [*s] that was subtracted.

    It is numpy that does it, whose rounding is bitsandbytes' own on every machine. Traced, it is the same in JAX.
    """
    is_traced = isinstance(scales, jax.core.Tracer)
    xp: Any = jnp if is_traced else np
    whole: Any = scales if is_traced else np.asarray(_everywhere(scales))
    exact = whole.mT  # [*s, k, d / 64], the order of torch's weight
    flat = exact.reshape(*exact.shape[:stack], -1)
    mean = _mean(flat) if is_traced else flat.astype(np.float64).mean(-1).astype(np.float32)
    blocks = _blocks(xp, flat - mean[..., None])
    outer = xp.abs(blocks).max(-1)
    parts = blocks / xp.where(outer == 0, np.float32(1), outer)[..., None]
    code = scale_code()
    q = xp.searchsorted((code[:-1] + code[1:]) / 2, parts).astype(np.uint8)
    q = q.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]].reshape(exact.shape)
    return jnp.asarray(q.mT), jnp.asarray(outer), jnp.asarray(mean)


def _mean(numbers: Any) -> Any:
    """Return the mean along the last axis, summed in float64, of traced numbers in fp32."""
    with jax.enable_x64(True):
        wide = jax.lax.convert_element_type(numbers, jnp.float64)
        return jax.lax.convert_element_type(jnp.mean(wide, axis=-1), jnp.float32)


def _everywhere(array: jax.Array) -> jax.Array:
    """Return an array that every process holds as a whole, from one that is spread over several processes."""
    if array.is_fully_addressable:
        return array
    whole = NamedSharding(array.sharding.mesh, jax.P())  # type: ignore[attr-defined]
    return jax.jit(lambda array: array, out_shardings=whole)(array)


def _blocks(xp: Any, scales: Any) -> Any:
    """Reshape scales [*s, n] to [*s, blocks, 256], padded with zeros, by numpy or JAX."""
    padding = [(0, 0)] * (scales.ndim - 1) + [(0, -scales.shape[-1] % SCALES)]
    return xp.pad(scales, padding).reshape(*scales.shape[:-1], -1, SCALES)


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
