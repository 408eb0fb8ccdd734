"""The order of a layer's backward pass: an adapter's part of it waits until the layer was made again.

Inside a `jax.checkpoint` the gradient of y = x W + h B is there before x and h = x A are made again. The gradient of h,
and h's part of that of x, need nothing else. A compiler that looks for work beside a collective takes them at once, and
then keeps an array of x's shape until the layer's own backward pass is due. For the inputs of down, which are the
widest of a layer, that is the largest array that adapters add.
"""

from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from lora_jax.core._compat import Primitive


@jax.custom_jvp
def awaited(h: jax.Array) -> jax.Array:
    """Return h. What is made of its gradient waits for h, which the gradient of B reads as well."""
    return h


def _tangent(primals: tuple[jax.Array], tangents: tuple[Any]) -> tuple[jax.Array, Any]:
    (h,), (dh,) = primals, tangents
    return h, dh if isinstance(dh, SymbolicZero) else awaits_p.bind(dh, h)


awaited.defjvp(_tangent, symbolic_zeros=True)


def _run(dh: jax.Array, _: jax.Array) -> jax.Array:
    return dh


awaits_p = Primitive("lora_awaits")  # (dh, h) -> dh, linear in dh
awaits_p.def_impl(_run)
awaits_p.def_abstract_eval(_run)
mlir.register_lowering(awaits_p, mlir.lower_fun(_run, multiple_results=False))


def _jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    (dh, h), (ddh, _) = primals, tangents
    return awaits_p.bind(dh, h), ddh if type(ddh) is ad.Zero else awaits_p.bind(ddh, h)


def _transpose(ct: Any, dh: Any, h: jax.Array) -> list[Any]:
    if type(ct) is ad.Zero:
        return [ad.Zero(dh.aval), None]
    return [lax.optimization_barrier((ct, h))[0], None]


def _batch(args: Any, axes: Any) -> tuple[jax.Array, Any]:
    return awaits_p.bind(*args), axes[0]


ad.primitive_jvps[awaits_p] = _jvp
ad.primitive_transposes[awaits_p] = _transpose
batching.primitive_batchers[awaits_p] = _batch
