"""Pallas kernels for products with an NF4 matrix, which dequantize it tile by tile: W is never written to memory.

    y = x @ W      x [T, d], W [d, k]        and for the derivative       x = y @ W^T

W = code[codes] * scales: codes uint4 [d, k], scales fp32 [d / 64, k], one for each block of 64 numbers along d. So a
scale is for whole rows of a tile's columns, and goes to all of them without moving between lanes.

A kernel is for TPU (Mosaic), "tpu v4" being one without gathers, or for GPU (Triton). "interpreted tpu" and the others
alike run anywhere, for tests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core._compat import shape_like

Tile = tuple[int, int, int]  # rows of x, rows of W, columns of W
BLOCK = 64  # numbers in a block
SUBLANES = 8  # rows of a TPU's register, of numbers of 32 bits

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip


def tile(rows: int, d: int, k: int, platform: str) -> Tile | None:
    """Return the size of a tile; None if the matrix cannot be divided evenly into tiles that fit."""
    for_tpu = "tpu" in platform
    tall, wide, most = ((512, 256, 128), (512, 256, 128), 1024) if for_tpu else ((BLOCK,), (128, 64, 32), 0)
    bd = next((n for n in tall if d % n == 0), d if d <= most else 0)
    bk = next((n for n in wide if k % n == 0), k if k <= most and k % BLOCK == 0 else 0)
    most_rows = row_tile(platform)
    bt = _even_rows(rows, most_rows) if for_tpu else min(most_rows, max(16, 1 << (rows - 1).bit_length()))
    return (bt, bd, bk) if 0 < bd * bk <= 2**18 else None


def row_tile(platform: str) -> int:
    """Return the largest number of rows of a tile.

    The more, the less of a product's time is dequantization. All of a tile's products are written out one after the
    other, so that more than 1,024 rows make large programs.
    """
    return 1024 if "tpu" in platform else 64


def _even_rows(rows: int, most: int) -> int:
    """Return the rows of a tile, in sixteens, where as few tiles as can hold them share the rows evenly."""
    tiles = -(-rows // most)
    return -(-rows // (tiles * 16)) * 16


def run(
    x: jax.Array, codes: jax.Array, scales: jax.Array, *, dtypes: Any, precision: Any, transposed: bool, platform: str
) -> jax.Array:
    """Return x @ W [T, k], or, transposed, x @ W^T [T, d], with a kernel on every tile.

    Args:
        x: [T, d] or, transposed, [T, k].
        codes: uint4 [d, k].
        scales: fp32 [d / 64, k].
        dtypes: to which W's values are rounded, one after the other.
        precision: of the product.
        transposed: whether W is.
        platform: "tpu", "tpu v4" or "gpu", or one of them after "interpreted ".
    """
    rows, (d, k) = len(x), codes.shape
    sizes = tile(rows, d, k, platform)
    assert sizes is not None, "callers ask `tile` first"
    x = jnp.pad(x, ((0, -rows % sizes[0]), (0, 0)))
    on_tpu = functools.partial(_on_tpu, look_up=_selected if "v4" in platform else _gathered)
    on_platform = on_tpu if "tpu" in platform else _on_gpu
    dot = functools.partial(_dot, precision=precision, transposed=transposed)
    return on_platform(x, codes, scales, dtypes, dot, sizes, transposed, "interpreted" in platform)[:rows]


def _selected(q: jax.Array, code: Any = CODE) -> Any:
    """Return code[q] by selections on each bit of q, from the highest: 23 operations on each number."""
    if len(code) == 1:
        return jnp.float32(code[0])
    half = len(code) // 2
    return jnp.where((q & half) > 0, _selected(q, code[half:]), _selected(q, code[:half]))


def _gathered(q: jax.Array) -> jax.Array:
    """Return CODE[q] for q [bd, bk] by gathers along the 8 rows of a register: one for each half of the code.

    With what belongs to them they are 5 operations on each number.
    """
    rows = q.reshape(-1, SUBLANES, q.shape[1])
    low, high = (_along_rows(half, rows & (SUBLANES - 1)) for half in (CODE[:SUBLANES], CODE[SUBLANES:]))
    return jnp.where(rows < SUBLANES, low, high).reshape(q.shape)


def _along_rows(code: Any, at: jax.Array) -> jax.Array:
    """Return code[at] for 8 numbers and `at` [n, 8, bk]."""
    numbered = lax.broadcasted_iota(jnp.int32, (1, *at.shape[1:]), 1)
    table = _selected(numbered, code)  # [1, 8, bk]; a kernel holds no constant arrays
    dims = lax.GatherDimensionNumbers((), (1,), (1,), (0, 2), (0, 2))
    table = jnp.broadcast_to(table, at.shape)
    return lax.gather(table, at[..., None], dims, (1, 1, 1), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _rounded(w: jax.Array, dtypes: Any) -> jax.Array:
    return functools.reduce(lambda w, dtype: w.astype(dtype), dtypes, w)


def _dot(x: jax.Array, w: jax.Array, precision: Any, transposed: bool) -> jax.Array:
    """Return x @ w, or x @ w^T, in fp32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, w.astype(x.dtype), dims, precision=precision, preferred_element_type=jnp.float32)


def _on_tpu(
    x: Any, codes: Any, scales: Any, dtypes: Any, dot: Any, sizes: Tile, transposed: bool, interpret: bool, look_up: Any
) -> jax.Array:
    """Run a kernel whose grid has the contracted axis last, with sums over its steps in fp32.

    A tile of scales has all rows, or 8, the fewest that a TPU reads: those of 512 rows of W, of one or more tiles.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (bt, bd, bk), rows, (d, k) = sizes, len(x), codes.shape
    blocks, tall = bd // BLOCK, d // BLOCK if bd == d else 8
    several = tall // blocks
    (wide_in, wide_out), (total_in, total_out) = ((bk, bd), (k, d)) if transposed else ((bd, bk), (d, k))
    at = (lambda i, j, n: (j, n)) if transposed else (lambda i, j, n: (n, j))  # the tile of W

    def kernel(x_ref: Any, codes_ref: Any, scales_ref: Any, out_ref: Any, total: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        which = pl.program_id(1 if transposed else 2) % several
        parts = [scales_ref[m * blocks : (m + 1) * blocks, :] for m in range(several)]
        scale = functools.reduce(lambda low, m: jnp.where(which == m, parts[m], low), range(1, several), parts[0])
        values = look_up(codes_ref[...].astype(jnp.int32)).reshape(blocks, BLOCK, bk)
        w = (values * scale[:, None, :]).reshape(bd, bk)
        total[...] += dot(x_ref[...], _rounded(w, dtypes))

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            out_ref[...] = total[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(rows // bt, total_out // wide_out, total_in // wide_in),
        in_specs=[
            pl.BlockSpec((bt, wide_in), lambda i, j, n: (i, n)),
            pl.BlockSpec((bd, bk), at),
            pl.BlockSpec((tall, bk), lambda i, j, n: (at(i, j, n)[0] // several, at(i, j, n)[1])),
        ],
        out_specs=pl.BlockSpec((bt, wide_out), lambda i, j, n: (i, j)),
        out_shape=shape_like(x, (rows, total_out)),
        scratch_shapes=[pltpu.VMEM((bt, wide_out), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="nf4_product",
    )(x, codes, scales)


def _on_gpu(
    x: Any, codes: Any, scales: Any, dtypes: Any, dot: Any, sizes: Tile, transposed: bool, interpret: bool
) -> jax.Array:
    """Run a kernel with one program for each tile of the result, which loops over the contracted axis.

    Triton has no numbers of 4 bits: codes are read as bytes, of two neighbours along k each. Even and odd columns of W
    are two matrices [d, k / 2], and a last axis of size 2 of all that has columns tells them apart.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (bt, bd, bk), rows, (d, k) = sizes, len(x), codes.shape
    half, wide = k // 2, bk // 2
    codes = lax.bitcast_convert_type(codes.reshape(d, half, 2), jnp.uint8)  # the even column in the low bits
    scales = scales.reshape(d // BLOCK, half, 2)
    x = x.reshape(rows, half, 2) if transposed else x

    def values(q: jax.Array, scale: jax.Array, odd: int) -> jax.Array:
        return _rounded(_selected(q >> 4 if odd else q & 15) * scale[None, :], dtypes)  # [bd, bk / 2]

    def kernel(x_ref: Any, codes_ref: Any, scales_ref: Any, out_ref: Any) -> None:
        def down(n: jax.Array, sums: Any) -> Any:
            """Add what bd rows of W bring to both halves of bk columns."""
            here = pl.ds(n * bd, bd)
            q, given = codes_ref[here, :].astype(jnp.int32), x_ref[:, here]
            return [sums[odd] + dot(given, values(q, scales_ref[n, :, odd], odd)) for odd in (0, 1)]

        def across(n: jax.Array, total: Any) -> Any:
            """Add what both halves of bk columns of W bring to bd rows."""
            here = pl.ds(n * wide, wide)
            q = codes_ref[:, here].astype(jnp.int32)
            parts = [dot(x_ref[:, here, odd], values(q, scales_ref[0, here, odd], odd)) for odd in (0, 1)]
            return total + parts[0] + parts[1]

        if transposed:
            total = lax.fori_loop(0, half // wide, across, jnp.zeros((bt, bd), jnp.float32))
            out_ref[...] = total.astype(out_ref.dtype)
        else:
            sums = lax.fori_loop(0, d // bd, down, [jnp.zeros((bt, wide), jnp.float32)] * 2)
            for odd in (0, 1):
                out_ref[:, :, odd] = sums[odd].astype(out_ref.dtype)

    if transposed:  # each program has bt rows of x and bd rows of W, with all columns
        in_specs = [
            pl.BlockSpec((bt, half, 2), lambda i, j: (i, 0, 0)),
            pl.BlockSpec((bd, half), lambda i, j: (j, 0)),
            pl.BlockSpec((1, half, 2), lambda i, j: (j, 0, 0)),
        ]
        steps, out_spec, out_shape = d // bd, pl.BlockSpec((bt, bd), lambda i, j: (i, j)), shape_like(x, (rows, d))
    else:  # bt rows of x, and bk columns of W with all rows
        in_specs = [
            pl.BlockSpec((bt, d), lambda i, j: (i, 0)),
            pl.BlockSpec((d, wide), lambda i, j: (0, j)),
            pl.BlockSpec((d // BLOCK, wide, 2), lambda i, j: (0, j, 0)),
        ]
        out_spec = pl.BlockSpec((bt, wide, 2), lambda i, j: (i, j, 0))
        steps, out_shape = half // wide, shape_like(x, (rows, half, 2))
    out = pl.pallas_call(
        kernel,
        grid=(rows // bt, steps),
        in_specs=in_specs,
        out_specs=out_spec,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="nf4_product",
    )(x, codes, scales)
    return out.reshape(rows, -1)
