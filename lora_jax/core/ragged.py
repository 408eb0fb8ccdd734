"""Products of ragged groups that JAX can `vmap` also where only some operands have the new axis.

`jax.lax.ragged_dot` is vmapped by JAX only with an axis in all three operands. Many sets of adapters over one base have
it in x and not in W: there it is put into the rows, so that W is read once and never copied. Where the groups are the
same for all, row t of each member lies in the same group; else the rows of all members are sorted by group.

Axes: T rows, E groups, d inputs, k outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from lora_jax.core._compat import Primitive, vary, varying_axes

RAGGED_PRODUCT = "lora_ragged_product"  # by this name the interpreter knows it


def ragged_product(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, contract: int = 1, precision: Any = None, wide: Any = None
) -> jax.Array:
    """Return rows of x [T, d], each multiplied by the matrix of its group: [T, k].

    Args:
        x: its first group_sizes[0] rows are in the first group, and so on; rows of no group give zeros.
        w: [E, d, k], or [E, k, d] where `contract` is 2.
        group_sizes: i32 [E].
        contract: the axis of w that is contracted.
        precision: of the product, as of `jax.lax.ragged_dot`.
        wide: the dtype of the result; None for that of x and w.
    """
    return _bind(product_p, x, w, group_sizes, contract=contract, precision=precision, wide=wide)


def _bind(primitive: Any, *args: jax.Array, **how: Any) -> Any:
    axes = sorted(frozenset().union(*map(varying_axes, args)))
    return primitive.bind(*(vary(array, axes) for array in args), **how)


def _product(x: Any, w: Any, group_sizes: Any, *, contract: int, precision: Any, wide: Any) -> Any:
    dims = lax.RaggedDotDimensionNumbers((((1,), (contract,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(x, w, group_sizes, dims, precision=precision, preferred_element_type=wide)


def _gram(x: Any, y: Any, group_sizes: Any, *, precision: Any, wide: Any) -> Any:
    """Return x^T y [E, d, k] of the rows in each group: the derivative by w."""
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return lax.ragged_dot_general(x, y, group_sizes, dims, precision=precision, preferred_element_type=wide)


# Derivatives: both are linear in their first two operands, and are each other's transposes ----------------------------


def _jvp(primitive: Any, primals: Any, tangents: Any, **how: Any) -> tuple[Any, Any]:
    (x, w, sizes), (dx, dw, _) = primals, tangents
    parts = [] if type(dx) is ad.Zero else [_bind(primitive, dx, w, sizes, **how)]
    parts += [] if type(dw) is ad.Zero else [_bind(primitive, x, dw, sizes, **how)]
    return _bind(primitive, x, w, sizes, **how), functools.reduce(jnp.add, parts)


def _product_transpose(ct: Any, x: Any, w: Any, sizes: Any, *, contract: int, precision: Any, wide: Any) -> Any:
    if type(ct) is ad.Zero:
        return [ad.Zero(arg.aval) if ad.is_undefined_primal(arg) else None for arg in (x, w, sizes)]
    if ad.is_undefined_primal(x):
        turned = _bind(product_p, ct, w, sizes, contract=3 - contract, precision=precision, wide=wide)
        return [turned.astype(x.aval.dtype), None, None]
    pair = (x, ct) if contract == 1 else (ct, x)
    return [None, _bind(gram_p, *pair, sizes, precision=precision, wide=wide).astype(w.aval.dtype), None]


def _gram_transpose(ct: Any, x: Any, y: Any, sizes: Any, *, precision: Any, wide: Any) -> Any:
    if type(ct) is ad.Zero:
        return [ad.Zero(arg.aval) if ad.is_undefined_primal(arg) else None for arg in (x, y, sizes)]
    is_x = ad.is_undefined_primal(x)
    given, unknown = (y, x) if is_x else (x, y)
    found = _bind(product_p, given, ct, sizes, contract=2 if is_x else 1, precision=precision, wide=wide)
    found = found.astype(unknown.aval.dtype)
    return [found, None, None] if is_x else [None, found, None]


# vmap -----------------------------------------------------------------------------------------------------------------


def _product_batch(args: Any, axes: Any, **how: Any) -> tuple[Any, int]:
    x, w, sizes = args
    if axes[1] is not None:
        return _batch_all(_product, args, axes, **how)
    if axes[2] is None:  # the rows of all members that have one place lie side by side
        x = jnp.moveaxis(x, axes[0], 1)  # [T, members, d]
        y = _bind(product_p, x.reshape(-1, x.shape[2]), w, sizes * x.shape[1], **how)
        return y.reshape(*x.shape[:2], y.shape[1]), 1
    x, _, sizes = _all_batched((x, w, sizes), axes, but=1)
    n, t, d = x.shape
    rows, order = x.reshape(-1, d), jnp.argsort(_groups(sizes, t).reshape(-1), stable=True)
    y = _bind(product_p, rows[order], w, jnp.sum(sizes, 0, dtype=sizes.dtype), **how)
    return y[jnp.argsort(order)].reshape(n, t, y.shape[1]), 0


def _groups(sizes: jax.Array, rows: int) -> jax.Array:
    """Return the group [members, rows] of each row; rows of no group come last."""
    ends = jnp.cumsum(sizes, axis=1)[:, None]  # [members, 1, E]
    at = jnp.arange(rows)[None, :, None]
    return jnp.sum(at >= ends, axis=2, dtype=jnp.int32)


def _all_batched(args: Any, axes: Any, but: int | None = None) -> Any:
    """Return operands with the new axis first, repeated for each member where they had none."""
    n = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    return [
        arg
        if i == but
        else (jnp.broadcast_to(arg[None], (n, *arg.shape)) if axis is None else jnp.moveaxis(arg, axis, 0))
        for i, (arg, axis) in enumerate(zip(args, axes, strict=True))
    ]


def _batch_all(plain: Any, args: Any, axes: Any, **how: Any) -> tuple[Any, int]:
    return jax.vmap(functools.partial(plain, **how))(*_all_batched(args, axes)), 0


# The primitives -------------------------------------------------------------------------------------------------------


def _result(plain: Any, *avals: Any, **how: Any) -> Any:
    return jax.make_jaxpr(functools.partial(plain, **how))(*avals).out_avals[0]


product_p, gram_p = Primitive(RAGGED_PRODUCT), Primitive("lora_ragged_gram")
for _primitive, _plain in ((product_p, _product), (gram_p, _gram)):
    _primitive.def_impl(_plain)
    _primitive.def_abstract_eval(functools.partial(_result, _plain))
    mlir.register_lowering(_primitive, mlir.lower_fun(_plain, multiple_results=False))
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive)
ad.primitive_transposes[product_p] = _product_transpose
ad.primitive_transposes[gram_p] = _gram_transpose
batching.primitive_batchers[product_p] = _product_batch
batching.primitive_batchers[gram_p] = functools.partial(_batch_all, _gram)
