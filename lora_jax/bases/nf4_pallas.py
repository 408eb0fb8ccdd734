"""Pallas kernels for products with an NF4 matrix, which dequantize it tile by tile: W is never written to memory.

    y = x @ W      x [T, d], W [d, k]        and for the derivative       x = y @ W^T

A byte holds the codes of two neighbours along k. Dequantized, the first and the second of each byte are two matrices
[d, k / 2]: y's even and odd columns are two products, and no tile has to be interleaved.

The kernels are for TPU (Mosaic) and GPU (Triton); elsewhere they are interpreted, for tests. They run on one device:
the partitioner of a program over a mesh cannot split them.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Tile = tuple[int, int, int]  # rows of x, rows of W, columns of W
HALF = 32  # bytes of codes in a block of 64 numbers


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def times(x: Any, codes: Any, scales: Any, code: Any, dtypes: Any, precision: Any, platform: str) -> jax.Array:
    """Return x @ W [T, k].

    Args:
        x: [T, d].
        codes: uint8 [d, k / 2].
        scales: fp32 [d, k / 64].
        code: the sixteen numbers that codes stand for.
        dtypes: to which W's values are rounded, one after the other.
        precision: of the product.
        platform: "tpu" or "gpu", or "interpreted tpu" and "interpreted gpu".
    """
    even, odd = _call(_forward, [x], codes, scales, code, dtypes, precision, platform)
    return jnp.stack([even, odd], axis=-1).reshape(len(x), -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def times_transposed(
    y: Any, codes: Any, scales: Any, code: Any, dtypes: Any, precision: Any, platform: str
) -> jax.Array:
    """Return y @ W^T [T, d], for y [T, k]; other arguments as of `times`."""
    pairs = y.reshape(len(y), -1, 2)
    [x] = _call(_backward, [pairs[..., 0], pairs[..., 1]], codes, scales, code, dtypes, precision, platform)
    return x


def _derivatives(product: Any, transposed: Any) -> None:
    """Define the reverse-mode derivative of a product by the other product. The residual is the packed matrix."""

    def forward(x: Any, codes: Any, scales: Any, *how: Any) -> tuple[jax.Array, Any]:
        return product(x, codes, scales, *how), (codes, scales)

    def backward(*args: Any) -> tuple[jax.Array, None, None]:
        *how, packed, ct = args
        return transposed(ct, *packed, *how), None, None

    product.defvjp(forward, backward)


_derivatives(times, times_transposed)
_derivatives(times_transposed, times)


# One tile -------------------------------------------------------------------------------------------------------------


def _unpack(codes: jax.Array, scales: jax.Array, code: Any, dtypes: Any) -> list[jax.Array]:
    """Dequantize codes uint8 [d, n] with scales fp32 [d, n] to the first and the second numbers of each byte [d, n]."""
    wide = codes.astype(jnp.int32)
    values = [_look_up(q, code) * scales for q in (wide >> 4, wide & 15)]
    return [functools.reduce(lambda w, dtype: w.astype(dtype), dtypes, w) for w in values]


def _look_up(q: jax.Array, code: Any) -> Any:
    """Return code[q] by selections on each bit of q, from the highest: kernels have no gather."""
    if len(code) == 1:
        return jnp.float32(code[0])
    half = len(code) // 2
    return jnp.where((q & half) > 0, _look_up(q, code[half:]), _look_up(q, code[:half]))


def _dot(x: jax.Array, w: jax.Array, precision: Any, transposed: bool) -> jax.Array:
    """Return x @ w, or x @ w^T, in fp32."""
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, w.astype(x.dtype), dims, precision=precision, preferred_element_type=jnp.float32)


def _forward(xs: Any, codes: Any, scales: Any, code: Any, dtypes: Any, precision: Any) -> list[jax.Array]:
    return [_dot(xs[0], w, precision, False) for w in _unpack(codes, scales, code, dtypes)]


def _backward(ys: Any, codes: Any, scales: Any, code: Any, dtypes: Any, precision: Any) -> list[jax.Array]:
    return [sum(_dot(y, w, precision, True) for y, w in zip(ys, _unpack(codes, scales, code, dtypes), strict=True))]  # type: ignore[list-item]


# All of them ----------------------------------------------------------------------------------------------------------


def tile(rows: int, d: int, k: int, platform: str) -> Tile | None:
    """Return the size of a tile; None if the matrix cannot be divided evenly into tiles that fit."""
    for_tpu = "tpu" in platform
    sizes, columns, most = ((512, 256, 128), (512, 256), 1024) if for_tpu else ((64, 32, 16), (128, 64), 0)
    bd = next((n for n in sizes if d % n == 0), d if d <= most else 0)
    bk = next((n for n in columns if k % n == 0), k if k <= most else 0)
    bt = min(row_tile(platform), max(16, 1 << (rows - 1).bit_length()))
    return (bt, bd, bk) if 0 < bd * bk <= 2**18 else None


def row_tile(platform: str) -> int:
    """Return the largest number of rows of a tile."""
    return 256 if "tpu" in platform else 64


def _call(
    of_tile: Callable[..., Any], xs: Any, codes: Any, scales: Any, code: Any, dtypes: Any, precision: Any, platform: str
) -> Any:
    """Run a kernel on every tile, with the rows of x padded to whole tiles."""
    rows, (d, half) = len(xs[0]), codes.shape
    sizes = tile(rows, d, 2 * half, platform)
    assert sizes is not None, "callers ask `tile` first"
    xs = [jnp.pad(x, ((0, -rows % sizes[0]), (0, 0))) for x in xs]
    on_tile = functools.partial(of_tile, code=code, dtypes=dtypes, precision=precision)
    run = _on_tpu if "tpu" in platform else _on_gpu
    outs = run(on_tile, xs, codes, scales, sizes, of_tile is _backward, "interpreted" in platform)
    return [out[:rows] for out in outs]


def _sides(sizes: Tile, codes: Any, transposed: bool) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Return the widths (x, result) of a tile and in total, and the number of results: even and odd columns are two."""
    (_, bd, bk), (d, half) = sizes, codes.shape
    return ((bk // 2, bd), (half, d), 1) if transposed else ((bd, bk // 2), (d, half), 2)


def _on_tpu(
    on_tile: Any, xs: Any, codes: Any, scales: Any, sizes: Tile, transposed: bool, interpret: bool
) -> list[jax.Array]:
    """Run a kernel whose grid has the contracted axis last, with sums over its steps in fp32."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (bt, bd, bk), rows = sizes, len(xs[0])
    blocks = bk // (2 * HALF)
    at = (lambda i, j, n: (j, n)) if transposed else (lambda i, j, n: (n, j))  # the tile of W

    def kernel(*refs: Any) -> None:
        *x_refs, codes_ref, scales_ref = refs[: len(xs) + 2]
        out_refs, sums = refs[len(xs) + 2 : -n_out], refs[-n_out:]

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            for total in sums:
                total[...] = jnp.zeros_like(total)

        spread = lax.broadcasted_iota(jnp.int32, (blocks, blocks * HALF), 1) // HALF
        spread = (spread == lax.broadcasted_iota(jnp.int32, spread.shape, 0)).astype(jnp.float32)
        wide = lax.dot_general(scales_ref[:, 0, :], spread, (((0,), (0,)), ((), ())), precision="highest")
        for total, part in zip(sums, on_tile([x[...] for x in x_refs], codes_ref[...], wide), strict=True):
            total[...] += part

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            for out, total in zip(out_refs, sums, strict=True):
                out[...] = total[...].astype(out.dtype)

    (wide_in, wide_out), (total_in, total_out), n_out = _sides(sizes, codes, transposed)
    out_spec = pl.BlockSpec((bt, wide_out), lambda i, j, n: (i, j))
    return pl.pallas_call(
        kernel,
        grid=(rows // bt, total_out // wide_out, total_in // wide_in),
        in_specs=[
            *[pl.BlockSpec((bt, wide_in), lambda i, j, n: (i, n)) for _ in xs],
            pl.BlockSpec((bd, bk // 2), at),
            pl.BlockSpec((blocks, 1, bd), lambda i, j, n: (at(i, j, n)[1], 0, at(i, j, n)[0])),
        ],
        out_specs=[out_spec] * n_out,
        out_shape=[jax.ShapeDtypeStruct((rows, total_out), xs[0].dtype)] * n_out,
        scratch_shapes=[pltpu.VMEM((bt, wide_out), jnp.float32)] * n_out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="nf4_product",
    )(*xs, codes, scales.T[:, None])


def _on_gpu(
    on_tile: Any, xs: Any, codes: Any, scales: Any, sizes: Tile, transposed: bool, interpret: bool
) -> list[jax.Array]:
    """Run a kernel with one program for each tile of the result, which loops over the contracted axis."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (bt, bd, bk), rows, (d, half) = sizes, len(xs[0]), codes.shape
    blocks = bk // (2 * HALF)
    (wide_in, wide_out), (total_in, total_out), n_out = _sides(sizes, codes, transposed)

    def kernel(*refs: Any) -> None:
        x_refs, codes_ref, scales_ref, out_refs = refs[: len(xs)], *refs[len(xs) : len(xs) + 2], refs[len(xs) + 2 :]

        def step(n: jax.Array, sums: Any) -> Any:
            at, along = pl.ds(n * wide_in, wide_in), pl.ds(n * blocks, blocks)
            q = codes_ref[:, at] if transposed else codes_ref[at, :]
            scale = scales_ref[:, along] if transposed else scales_ref[at, :]
            wide = jnp.broadcast_to(scale[:, :, None], (bd, blocks, HALF)).reshape(bd, bk // 2)
            parts = on_tile([x[:, at] for x in x_refs], q, wide)
            return [total + part for total, part in zip(sums, parts, strict=True)]

        zeros = [jnp.zeros((bt, wide_out), jnp.float32)] * n_out
        for out, total in zip(out_refs, lax.fori_loop(0, total_in // wide_in, step, zeros), strict=True):
            out[...] = total.astype(out.dtype)

    tile_of_w = ((bd, half), (bd, scales.shape[1])) if transposed else ((d, bk // 2), (d, blocks))
    along_w = (lambda i, j: (j, 0)) if transposed else (lambda i, j: (0, j))
    return pl.pallas_call(
        kernel,
        grid=(rows // bt, total_out // wide_out),
        in_specs=[
            *[pl.BlockSpec((bt, total_in), lambda i, j: (i, 0)) for _ in xs],
            *[pl.BlockSpec(shape, along_w) for shape in tile_of_w],
        ],
        out_specs=[pl.BlockSpec((bt, wide_out), lambda i, j: (i, j))] * n_out,
        out_shape=[jax.ShapeDtypeStruct((rows, total_out), xs[0].dtype)] * n_out,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="nf4_product",
    )(*xs, codes, scales)


# Whether to use them --------------------------------------------------------------------------------------------------


PRECISIONS = (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST)


def platform_for(kernel: bool | None, rows: int, d: int, k: int, dtype: Any, precision: Any) -> str | None:
    """Return the platform to run a kernel on; None if the plain product is to be used.

    Args:
        kernel: True for the kernel wherever there is one, False for the plain product. None for the kernel on a single
            accelerator, if a trial shows that it works and x has so few rows that each tile of W is dequantized once.
        rows, d, k: of x [rows, d] and W [d, k].
        dtype: of x.
        precision: of the product.
    """
    backend = jax.default_backend()
    on_accelerator = backend in ("tpu", "gpu")
    if kernel is False or (kernel is None and (not on_accelerator or jax.device_count() > 1)):
        return None
    platform = backend if on_accelerator else "interpreted tpu"
    known = dtype in (jnp.float32, jnp.bfloat16) and precision in PRECISIONS
    if not known or not rows or (sizes := tile(rows, d, k, platform)) is None:
        return None
    if kernel is None and (rows > row_tile(platform) or not works(platform, jnp.dtype(dtype), precision, sizes)):
        return None
    return platform


@functools.cache
def works(platform: str, dtype: Any, precision: Any, sizes: Tile) -> bool:
    """Return whether the kernels compile for this tile and agree with the plain product. Tried once in a process."""
    rng = np.random.default_rng(0)
    rows, d, k = sizes
    x, y = (rng.standard_normal((rows, n)).astype(dtype) for n in (d, k))
    codes, scales = rng.integers(0, 256, (d, k // 2), np.uint8), rng.random((d, k // (2 * HALF)), np.float32)
    code = tuple(np.linspace(-1, 1, 16).tolist())
    pairs = np.stack([codes >> 4, codes & 15], axis=-1).reshape(d, k)
    w = np.asarray(code, np.float32)[pairs] * np.repeat(scales, 2 * HALF, axis=1)
    try:
        with jax.transfer_guard("allow"), jax.disable_jit(False):
            for product, given, dense in ((times, x, w), (times_transposed, y, w.T)):
                run = jax.jit(lambda *args, product=product: product(*args, code, (dtype,), precision, platform))
                found = np.asarray(run.lower(given, codes, scales).compile()(given, codes, scales), np.float32)
                expected = np.asarray(given, np.float32) @ dense
                off = np.abs(found - expected).max() / np.abs(expected).max()
                if not off < 0.03:
                    raise ValueError(f"a product is off by {off:.3f} of its largest number")
    except Exception as error:  # a compiler may raise anything; the plain product works everywhere
        warnings.warn(f"NF4 products are computed without kernels on this {platform}: {error}", stacklevel=2)
        return False
    return True
