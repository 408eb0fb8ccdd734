"""Rows brought into another order: a gather whose derivative is a gather as well.

JAX derives a gather by a scatter. That first writes zeros, then adds the rows one after another, and cannot be fused
with what comes before or after it. Where each row goes to one place at most, the way back is known, and is a gather.

Axes: T rows, P places.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from lora_jax.core._compat import Primitive, vary, varying_axes


def moved(x: jax.Array, source: jax.Array, place: jax.Array) -> jax.Array:
    """Return the rows of x [T, ...] in their places [P, ...], zeros where a place has no row.

    Args:
        x: the rows.
        source: i32 [P], the row in each place; T where there is none.
        place: i32 [T], the place of each row, P where it has none: the inverse of `source`.

    >>> moved(jnp.array([5, 6, 7]), jnp.array([2, 3, 0, 3]), jnp.array([2, 4, 0])).tolist()
    [7, 0, 5, 0]
    """
    axes = sorted(frozenset().union(*map(varying_axes, (x, source, place))))
    found: jax.Array = moved_p.bind(*(vary(array, axes) for array in (x, source, place)))
    return found


def _moved(x: Any, source: Any, place: Any) -> Any:
    return jnp.asarray(x).at[source].get(mode="fill", fill_value=0)


def _tangent(dx: Any, x: Any, source: Any, place: Any) -> jax.Array:
    return moved(dx, source, place)


def _transpose(ct: Any, x: Any, source: Any, place: Any) -> list[Any]:
    return [ad.Zero(x.aval) if type(ct) is ad.Zero else moved(ct, place, source), None, None]


def _batch(args: Any, axes: Any) -> tuple[jax.Array, int]:
    """Move the rows of all members: as longer rows where the order is the same for all, or else side by side."""
    x, source, place = args
    if axes[1] is None and axes[2] is None:
        return moved(jnp.moveaxis(x, axes[0], 1), source, place), 1
    n = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    x, source, place = (
        jnp.broadcast_to(arg[None], (n, *arg.shape)) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args, axes, strict=True)
    )
    found = moved(x.reshape(-1, *x.shape[2:]), _of_all(source, x.shape[1]), _of_all(place, source.shape[1]))
    return found.reshape(*source.shape, *x.shape[2:]), 0


def _of_all(index: jax.Array, size: int) -> jax.Array:
    """Return indices [n, ...] into n arrays of a size as ones into all of them; those beyond are beyond all."""
    n = index.shape[0]
    starts = jnp.arange(n, dtype=index.dtype)[:, None] * size
    return jnp.where(index < size, starts + index, n * size).reshape(-1)


moved_p = Primitive("lora_moved")
moved_p.def_impl(_moved)
moved_p.def_abstract_eval(lambda *avals: jax.make_jaxpr(_moved)(*avals).out_avals[0])
mlir.register_lowering(moved_p, mlir.lower_fun(_moved, multiple_results=False))
ad.defjvp(moved_p, _tangent, None, None)
ad.primitive_transposes[moved_p] = _transpose
batching.primitive_batchers[moved_p] = _batch
