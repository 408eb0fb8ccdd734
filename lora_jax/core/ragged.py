"""Products of ragged groups that JAX can `vmap` also where only some operands have the new axis.

`jax.lax.ragged_dot` is vmapped by JAX only with an axis in all three operands. Many sets of adapters over one base have
it in x and not in W: there it is put into the rows, so that W is read once and never copied. Where the groups are the
same for all, row t of each member lies in the same group; else the rows of all members are sorted by group. Products
with factors have the axis in all operands, and keep it as one before the rows.

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
    """Multiply x [T, d] by w [E, d, k]; or with a leading axis of members in all three."""
    n = x.ndim - 2
    dims = lax.RaggedDotDimensionNumbers((((n + 1,), (n + contract,)), (_first(n), _first(n))), [n], [n])
    return lax.ragged_dot_general(x, w, group_sizes, dims, precision=precision, preferred_element_type=wide)


def _gram(x: Any, y: Any, group_sizes: Any, *, precision: Any, wide: Any) -> Any:
    """Return x^T y [E, d, k] of the rows in each group: the derivative by w."""
    n = x.ndim - 2
    dims = lax.RaggedDotDimensionNumbers((((n,), (n,)), (_first(n), _first(n))), [n], [])
    found = lax.ragged_dot_general(x, y, group_sizes, dims, precision=precision, preferred_element_type=wide)
    return jnp.moveaxis(found, 0, n)  # JAX puts the groups before the members


def _first(n: int) -> tuple[int, ...]:
    return tuple(range(n))


# Members as further groups: XLA's compiler for TPUs has no ragged product with an axis beside the rows ----------------


def _product_of_groups(x: Any, w: Any, group_sizes: Any, **how: Any) -> Any:
    if x.ndim == 2:
        return _product(x, w, group_sizes, **how)
    sizes, is_in_group = _filled(group_sizes, x.shape[1])
    y = _product(x.reshape(-1, x.shape[2]), w.reshape(-1, *w.shape[2:]), sizes, **how)
    return jnp.where(is_in_group, y.reshape(*x.shape[:2], -1), jnp.zeros((), y.dtype))


def _gram_of_groups(x: Any, y: Any, group_sizes: Any, **how: Any) -> Any:
    if x.ndim == 2:
        return _gram(x, y, group_sizes, **how)
    sizes, is_in_group = _filled(group_sizes, x.shape[1])
    x, y = (jnp.where(is_in_group, array, jnp.zeros((), array.dtype)) for array in (x, y))
    found = _gram(x.reshape(-1, x.shape[2]), y.reshape(-1, y.shape[2]), sizes, **how)
    return found.reshape(*group_sizes.shape, *found.shape[1:])


def _filled(group_sizes: Any, rows: int) -> tuple[Any, Any]:
    """Return the sizes of all members' groups, each member's last one with its rows of no group, and which are not."""
    used = jnp.sum(group_sizes, axis=1, dtype=group_sizes.dtype)
    sizes = group_sizes.at[:, -1].add(rows - used)
    return sizes.reshape(-1), (jnp.arange(rows)[None] < used[:, None])[..., None]


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
    if axes[1] is not None or w.ndim == 4:
        return _batch_all(product_p, args, axes, **how)
    if axes[2] is None:  # the rows of all members that have one place lie side by side
        x = jnp.moveaxis(x, axes[0], 1)  # [T, members, d]
        y = _bind(product_p, x.reshape(-1, x.shape[2]), w, sizes * x.shape[1], **how)
        return y.reshape(*x.shape[:2], y.shape[1]), 1
    x, sizes = _all_batched((x, sizes), (axes[0], axes[2]))
    n, t, d = x.shape
    rows, order = x.reshape(-1, d), jnp.argsort(_groups(sizes, t).reshape(-1), stable=True)
    y = _bind(product_p, rows[order], w, jnp.sum(sizes, 0, dtype=sizes.dtype), **how)
    return y[jnp.argsort(order)].reshape(n, t, y.shape[1]), 0


def _groups(sizes: jax.Array, rows: int) -> jax.Array:
    """Return the group [members, rows] of each row; rows of no group come last."""
    ends = jnp.cumsum(sizes, axis=1)[:, None]  # [members, 1, E]
    at = jnp.arange(rows)[None, :, None]
    return jnp.sum(at >= ends, axis=2, dtype=jnp.int32)


def _all_batched(args: Any, axes: Any) -> list[Any]:
    """Return operands with the new axis first, repeated for each member where they had none."""
    n = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    return [
        jnp.broadcast_to(arg[None], (n, *arg.shape)) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args, axes, strict=True)
    ]


def _batch_all(primitive: Any, args: Any, axes: Any, **how: Any) -> tuple[Any, int]:
    """Give all operands the axis of members; one that they have already is joined with it."""
    args = _all_batched(args, axes)
    if args[0].ndim == 3:
        return _bind(primitive, *args, **how), 0
    found = _bind(primitive, *(arg.reshape(-1, *arg.shape[2:]) for arg in args), **how)
    return found.reshape(*args[0].shape[:2], *found.shape[1:]), 0


# The primitives -------------------------------------------------------------------------------------------------------


def _result(plain: Any, *avals: Any, **how: Any) -> Any:
    return jax.make_jaxpr(functools.partial(plain, **how))(*avals).out_avals[0]


product_p, gram_p = Primitive(RAGGED_PRODUCT), Primitive("lora_ragged_gram")
for _primitive, _plain, _of_groups in (
    (product_p, _product, _product_of_groups),
    (gram_p, _gram, _gram_of_groups),
):
    _primitive.def_impl(_plain)
    _primitive.def_abstract_eval(functools.partial(_result, _plain))
    mlir.register_lowering(_primitive, mlir.lower_fun(_plain, multiple_results=False))
    mlir.register_lowering(_primitive, mlir.lower_fun(_of_groups, multiple_results=False), platform="tpu")
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive)
ad.primitive_transposes[product_p] = _product_transpose
ad.primitive_transposes[gram_p] = _gram_transpose
batching.primitive_batchers[product_p] = _product_batch
batching.primitive_batchers[gram_p] = functools.partial(_batch_all, gram_p)
