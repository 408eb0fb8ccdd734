"""Products with an NF4 matrix by the kernels of `nf4_kernels`, where the machine that a program is lowered for has one.

What machine that is becomes known when a program is lowered, not when it is traced: one that is exported, or compiled
for a topology, is for another machine than the one at hand. So the product is a primitive of JAX with a lowering for
each platform. It is linear in x: its transpose is the product with W^T, another kernel, and its tangent is the product
with x's tangent. Both keep W as it is packed. `vmap` makes more rows of x.

A kernel runs on one device, since the partitioner of a program over a mesh cannot split it. In a `shard_map` it runs on
each device's shard.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from lora_jax.bases import nf4_kernels
from lora_jax.core._compat import Primitive, vary, varying_axes

Plain = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, codes, scales) -> y

PRECISIONS = (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST)
KERNELS = {"tpu": "tpu", "cuda": "gpu", "cpu": "interpreted tpu"}  # by JAX's platforms
TOO_OLD = ("TPU v2", "TPU v3", "5.", "6.", "7.")  # kinds of TPUs and compute capabilities of GPUs without them
WITHOUT_GATHERS = "TPU v4"  # along rows of a register


def product(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    plain: Plain,
    *,
    dtypes: tuple[Any, ...],
    precision: Any,
    kernel: bool | None,
    transposed: bool = False,
) -> jax.Array | None:
    """Multiply by an NF4 matrix W = code[codes] * scales, by a kernel on the platforms that have one.

    Args:
        x: [T, d] or, transposed, [T, k]; fp32 or bf16, as W.
        codes: uint4 [d, k].
        scales: fp32 [d / 64, k], one for each block of 64 numbers along d.
        plain: computes the same by dequantizing W, from (x, codes, scales). It is differentiable, and holds no arrays:
            two of them are taken for the same if dtypes, precision and transposed are.
        dtypes: to which W's values are rounded, one after the other.
        precision: of the product, as of `jax.lax.dot_general`.
        kernel: True for a kernel wherever there is one; on CPUs it is interpreted, for tests. False for none. None for
            a kernel on TPU and GPU, on one device or in a `shard_map`, for so few rows that each tile of W is
            dequantized once.
        transposed: whether x is multiplied by W^T.

    Returns:
        x @ W [T, k] or x @ W^T [T, d], of x's dtype. None if it is known already that no kernel would be used.

    Example:
        >>> codes, scales = jnp.full((64, 128), 15, jnp.uint4), jnp.full((1, 128), 2.0)  # code 15 is 1
        >>> plain = lambda x, codes, scales: x @ jnp.full((64, 128), 2.0)
        >>> how = dict(dtypes=(jnp.float32,), precision=None, kernel=True)
        >>> print(product(jnp.ones((1, 64)), codes, scales, plain, **how)[:, :3])
        [[128. 128. 128.]]

    Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
    """
    rows, dtype = len(x), jnp.dtype(x.dtype)
    precision = None if dtype == jnp.bfloat16 else precision  # products of bf16 numbers are exact in fp32
    how = _How(tuple(map(jnp.dtype, dtypes)), precision, kernel, transposed, plain)
    known = dtype in (jnp.float32, jnp.bfloat16) and dtype == how.dtypes[-1] and precision in PRECISIONS
    if kernel is False or not known or not any(how.kernel_on(platform, rows, *codes.shape) for platform in KERNELS):
        return None
    if _explicit(x, codes, scales) or (kernel is None and not _unsplit()):
        return None
    axes = sorted(varying_axes(x) | varying_axes(codes) | varying_axes(scales))
    return product_p.bind(*(vary(array, axes) for array in (x, codes, scales)), how=how)


@dataclass(frozen=True)
class _How:
    """What a product is besides its arrays."""

    dtypes: tuple[Any, ...]
    precision: Any
    kernel: bool | None
    transposed: bool
    plain: Plain = field(compare=False)
    plain_turned: Plain | None = field(default=None, compare=False)

    def turned(self, width: int) -> "_How":
        """Return the other product, whose results have this many columns: the first product's x."""

        def by_transposition(ct: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
            x = vary(jnp.zeros((len(ct), width), ct.dtype), sorted(varying_axes(ct)))
            [x] = jax.vjp(lambda x: self.plain(x, codes, scales), x)[1](ct)
            return x

        plain = self.plain_turned or by_transposition
        return replace(self, transposed=not self.transposed, plain=plain, plain_turned=self.plain)

    def kernel_on(self, platform: str, rows: int, d: int, k: int) -> str | None:
        """Return the kernel that multiplies this many rows by W [d, k] on a platform; None for the plain product."""
        kernel = KERNELS.get(platform)
        if not rows or kernel is None or nf4_kernels.tile(rows, d, k, kernel) is None:
            return None
        if platform == "cpu":
            return kernel if self.kernel else None
        return kernel if self.kernel or rows <= nf4_kernels.row_tile(kernel) else None


# What is known when a program is traced -------------------------------------------------------------------------------


def _explicit(*arrays: jax.Array) -> bool:
    """Return whether a mesh has explicit axes: then types say how arrays are split, and kernels are not split."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


def _unsplit() -> bool:
    """Return whether a program is for one device, or is what each device of a mesh does, as far as is known."""
    here = jax.sharding.get_abstract_mesh()
    if here.empty:
        return jax.device_count() == 1
    kinds = zip(here.axis_types, here.axis_sizes, strict=True)
    return all(kind == AxisType.Manual or size == 1 for kind, size in kinds)


# What is known when it is lowered -------------------------------------------------------------------------------------


def _lower(ctx: mlir.LoweringRuleContext, *args: Any, how: _How, platform: str) -> Any:
    """Lower the product to a kernel or to the plain product."""
    x, codes, _ = (aval.shape for aval in ctx.avals_in)  # type: ignore[attr-defined]
    kernel = how.kernel_on(platform, x[0], *codes)
    if not (_on_one_device(ctx) and _compiles(ctx, platform, how.kernel)):
        kernel = None
    elif kernel == "tpu" and _generation(platform).startswith(WITHOUT_GATHERS):
        kernel = "tpu v4"
    return mlir.lower_fun(functools.partial(_run, how=how, kernel=kernel), multiple_results=False)(ctx, *args)


def _run(x: jax.Array, codes: jax.Array, scales: jax.Array, *, how: _How, kernel: str | None) -> jax.Array:
    """Multiply by a kernel or plainly. Interpreted kernels know nothing of types that vary over a mesh."""
    if kernel is None or ("interpreted" in kernel and varying_axes(x)):
        return how.plain(x, codes, scales)
    options = {"dtypes": how.dtypes, "precision": how.precision, "transposed": how.transposed}
    return nf4_kernels.run(x, codes, scales, **options, platform=kernel)


def _on_one_device(ctx: mlir.LoweringRuleContext) -> bool:
    """Return whether a program is for one device, or is what each device of a mesh does."""
    around = ctx.module_context.axis_context
    if isinstance(around, mlir.ShardingContext):
        return around.num_devices == 1
    if isinstance(around, mlir.SPMDAxisContext):
        return {*around.manual_axes, *around.mesh.manual_axes} == {*around.mesh.axis_names} or around.mesh.size == 1
    return True  # in a `pmap`


def _compiles(ctx: mlir.LoweringRuleContext, platform: str, wanted: bool | None) -> bool:
    """Return whether Pallas lowers a kernel here: for a TPU or GPU, only if it knows which one.

    A GPU's kernels cannot be exported, unless JAX's check of what may be is turned off: then a user wants them.
    """
    if platform not in ("tpu", "cuda"):
        return True
    if platform == "cuda" and wanted is None and ctx.module_context.lowering_parameters.for_export:
        return False
    return _device().platform in (platform, KERNELS[platform]) and not _generation(platform).startswith(TOO_OLD)


def _device() -> Any:
    """Return the device of the mesh around, else the one at hand."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def _generation(platform: str) -> str:
    """Return the kind of a TPU, or the compute capability of a GPU."""
    device = _device()
    return device.device_kind if platform == "tpu" else getattr(device, "compute_capability", "")


# The primitive --------------------------------------------------------------------------------------------------------


def _shape(x: Any, codes: Any, scales: Any, *, how: _How) -> Any:
    d, k = codes.shape
    return x.update(shape=(x.shape[0], d if how.transposed else k), weak_type=False)


def _jvp(primals: Any, tangents: Any, *, how: _How) -> tuple[Any, Any]:
    """Derive by x with the product itself, and by the scales, which are seldom asked for, with the plain one."""
    (x, codes, scales), (x_dot, _, scales_dot) = primals, tangents
    dots = []
    if not isinstance(x_dot, ad.Zero):
        dots.append(product_p.bind(x_dot, codes, scales, how=how))
    if not isinstance(scales_dot, ad.Zero):
        dots.append(jax.jvp(lambda scales: how.plain(x, codes, scales), (scales,), (scales_dot,))[1])
    return product_p.bind(x, codes, scales, how=how), functools.reduce(jnp.add, dots)


def _transpose(ct: Any, x: Any, codes: Any, scales: Any, *, how: _How) -> list[Any]:
    if isinstance(ct, ad.Zero):
        return [ad.Zero(x.aval), None, None]
    return [product_p.bind(ct, codes, scales, how=how.turned(x.aval.shape[1])), None, None]


def _batch(args: Any, axes: Any, *, how: _How) -> tuple[Any, int]:
    """Fold a batch of x into its rows; a batch of matrices takes the plain product."""
    if axes[1:] != (None, None):
        return jax.vmap(how.plain, axes)(*args), 0
    x, *packed = args
    x = jnp.moveaxis(x, axes[0], 0)  # [batch, T, width]
    y = product_p.bind(x.reshape(-1, x.shape[2]), *packed, how=how)
    return y.reshape(*x.shape[:2], y.shape[1]), 0


product_p = Primitive("nf4_product")
product_p.def_impl(jax.jit(product_p.bind, static_argnames="how"))
product_p.def_abstract_eval(_shape)
ad.primitive_jvps[product_p] = _jvp
ad.primitive_transposes[product_p] = _transpose
batching.primitive_batchers[product_p] = _batch
mlir.register_lowering(product_p, functools.partial(_lower, platform="other"))
for _platform in KERNELS:
    mlir.register_lowering(product_p, functools.partial(_lower, platform=_platform), platform=_platform)
