"""Primitive -> rule: what each operation does to a kernel. The only file that knows dimension numbers.

Structural operations carry a kernel along. Products reduce to y = x @ W, [*s, T, d] @ [*s, d, k], and hand that to
the kernel. Anything that has no rule asks the kernel for a plain array, which an adapted kernel refuses.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._compat import JaxprEqn, bind, convert_element_type_p, copy_p, dot_general_p, transpose_p
from lora_jax.axes import KernelAxes
from lora_jax.kernel import Kernel, Product, describe
from lora_jax.lowrank import accumulator


def no_rule(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """Any other operation: run as it stands, on plain arrays."""
    why = f"{describe(eqn)} is not an operation that a weight in factored form can pass"
    return bind(eqn, [a.dense(why) if isinstance(a, Kernel) else a for a in args])


def convert_element_type(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """A cast moves the frozen value; the factors follow the product's dtype when they are used."""
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return bind(eqn, [kernel.dense(f"{describe(eqn)} casts it to {jnp.dtype(dtype).name}, which rounds W' itself")])
    return [kernel.astype(dtype)]


def copy(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    return [kernel]


def transpose(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    return [kernel.transpose(eqn.params["permutation"])]


def dot_general(eqn: JaxprEqn, lhs: Any, rhs: Any) -> list[Any]:
    """A product with the kernel on either side, over any of its axes.

    XLA orders the result as [batch, free of lhs, free of rhs]. Each axis of it gets a label, ("w", axis of the
    weight) or ("x", axis of x), and the canonical order is stated in the same labels.
    """
    if isinstance(lhs, Kernel) and isinstance(rhs, Kernel):
        lhs = lhs.dense(f"{describe(eqn)} multiplies it by another adapted weight, {rhs.path!r}")
    contract, batch = eqn.params["dimension_numbers"]
    on_left = isinstance(lhs, Kernel)
    kernel, x = (lhs, rhs) if on_left else (rhs, lhs)
    (k_contract, x_contract), (k_batch, x_batch) = (contract, batch) if on_left else (contract[::-1], batch[::-1])
    k_free = [i for i in range(kernel.value.ndim) if i not in (*k_contract, *k_batch)]
    x_free = [i for i in range(x.ndim) if i not in (*x_contract, *x_batch)]

    def by_weight_axis(k_axes: Any, x_axes: Any) -> list[tuple[int, int]]:
        return sorted((kernel.origin[k], x) for k, x in zip(k_axes, x_axes, strict=True))

    stack, inputs = by_weight_axis(k_batch, x_batch), by_weight_axis(k_contract, x_contract)
    outputs = sorted(kernel.origin[i] for i in k_free)
    axes = KernelAxes(
        stack=tuple(sorted([*kernel.scanned, *(w for w, _ in stack)])),
        inputs=tuple(w for w, _ in inputs),
        outputs=tuple(outputs),
    )

    k_labels, x_labels = [("w", kernel.origin[i]) for i in k_free], [("x", i) for i in x_free]
    batch_labels = [("w", kernel.origin[i]) for i in k_batch]
    result = batch_labels + (k_labels + x_labels if on_left else x_labels + k_labels)
    canonical = [("w", w) for w, _ in stack] + x_labels + [("w", w) for w in outputs]

    [y] = bind(eqn, [kernel.value, x] if on_left else [x, kernel.value])
    y = y.transpose([result.index(label) for label in canonical])
    x = x.transpose([i for _, i in stack] + x_free + [i for _, i in inputs])
    product = Product(
        axes=axes,
        x=_as_matrices(x, len(stack), len(x_free)).astype(_product_dtype(x.dtype, kernel.value.dtype)),
        y=_as_matrices(y, len(stack), len(x_free)),
        precision=_precision(eqn.params["precision"], on_left),
        eqn=eqn,
    )
    adapted = kernel.multiply(product).reshape(y.shape)
    return [adapted.transpose([canonical.index(label) for label in result])]


def _as_matrices(x: jax.Array, stack: int, rows: int) -> jax.Array:
    """[*s, *rows, *columns] -> [*s, T, d]: 2-D products are far faster on XLA's CPU backend, and equal elsewhere."""
    shape, first_column = x.shape, stack + rows
    return x.reshape(*shape[:stack], math.prod(shape[stack:first_column]), math.prod(shape[first_column:]))


def _product_dtype(x: Any, w: Any) -> Any:
    """The dtype that x @ W is computed in: both operands' own, or where they differ one that holds both."""
    return x if x == w and jnp.dtype(x).itemsize > 1 else accumulator(x, w)


def _precision(precision: Any, on_left: bool) -> Any:
    """The precision of x and of W in that order. An algorithm preset names the base's dtypes: not for the factors."""
    if precision is None or isinstance(precision, lax.Precision):
        return precision
    if isinstance(precision, tuple):
        return precision[::-1] if on_left else precision
    return None


RULES: dict[Any, Callable[..., list[Any]]] = {
    convert_element_type_p: convert_element_type,
    copy_p: copy,
    dot_general_p: dot_general,
    transpose_p: transpose,
}
