"""Reduce matrix products with an adapted weight to y = x @ W, and let its operand add what is missing.

Convolutions and products of ragged groups are in `convolutions.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.core._compat import JaxprEqn, Operation
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.operand import Operand
from lora_jax.core.packed import is_packed
from lora_jax.core.products import Matmul, Product, product_dtype
from lora_jax.core.remade import Remade
from lora_jax.core.restacked import along
from lora_jax.transform.adapted_weight import AdaptedWeight, plain
from lora_jax.transform.primitives.dot_orders import orders, transposed
from lora_jax.transform.primitives.registry import no_rule, rule

# (operation, axes, w, x, *others) -> the frozen product, and what brings its adapted y into the program's order of axes
Reduce = Callable[..., tuple[Product, Callable[[jax.Array], jax.Array]]]


def multiply(
    eqn: JaxprEqn, args: Sequence[Any], weight: AdaptedWeight, axes: KernelAxes, reduce: Reduce, x: Any, *others: Any
) -> Any:
    """Return [x @ W'], where the adapter was made for these axes; else ask for W' as a plain array.

    Equal products with equal operands share a trace. In an eager call the frozen product is the program's own
    operation, and what the operand adds to it is one compiled program and not some fifteen operations.
    """
    operand = weight.operand.used_as(axes, eqn)
    if operand is None:
        own = weight.operand.axes
        made = f"its adapter was made for {own}" if any(own) else "these are not inputs and outputs of a matrix"
        return no_rule(eqn, *args, why=f"uses it with {axes}, but {made}")
    operation, arrays = Operation.of(eqn), (weight.x or Remade(x), *others)
    if not operand.shares_traces:
        y = _product(reduce, operation, axes, operand, weight.value, weight.h, *arrays)
    elif any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((operand, weight.value, weight.h, arrays))):
        y = _traced_product(reduce, operation, axes, operand, weight.value, weight.h, *arrays)
    else:
        product, restore = reduce(operation, axes, weight.value, *arrays)
        y = restore(_compiled_apply(operand, product))
    if weight.factor is None:
        return [y]
    wide = accumulator(y.dtype, weight.factor.dtype)
    return [(y.astype(wide) * weight.factor.astype(wide)).astype(y.dtype)]


def frozen_product(product: Callable[[jax.Array], jax.Array], w: Any) -> jax.Array:
    """Return product(w). A packed weight is unpacked for it and again for its derivative: it is kept packed."""
    if is_packed(w):  # from the host it comes once where both are computed, as a remat does
        return jax.checkpoint(lambda w: product(w.gathered().dense()), prevent_cse=not w.on_host)(w)
    return product(w)


def _product(
    reduce: Reduce, operation: Operation, axes: KernelAxes, operand: Operand, w: Any, h: Any, *arrays: Any
) -> jax.Array:
    product, restore = reduce(operation, axes, w, *arrays)
    product = product if h is None else dataclasses.replace(product, h=h)
    return restore(operand.apply(along(product, operand.axes)))


_traced_product = jax.jit(_product, static_argnums=(0, 1, 2), inline=True)


@jax.jit
def _compiled_apply(operand: Operand, product: Product) -> jax.Array:
    return operand.apply(along(product, operand.axes))


@rule("dot_general")
def dot_general(eqn: JaxprEqn, lhs: Any, rhs: Any) -> list[Any]:
    """Multiply by the weight from either side, over any of its axes."""
    if isinstance(lhs, AdaptedWeight) and isinstance(rhs, AdaptedWeight):
        names = ", ".join(map(repr, rhs.paths))
        lhs = plain(lhs, f"multiplies it by another adapted weight, {names}", eqn)
    contract, batch = eqn.params["dimension_numbers"]
    if isinstance(lhs, AdaptedWeight):
        return multiply(eqn, (lhs, rhs), lhs, contracted_axes(lhs, contract[0], batch[0]), _dot_on_left, rhs)
    return multiply(eqn, (lhs, rhs), rhs, contracted_axes(rhs, contract[1], batch[1]), _dot_on_right, lhs)


def contracted_axes(weight: AdaptedWeight, contract: Sequence[int], batch: Sequence[int]) -> KernelAxes:
    """Return the axes of a product that contracts these axes of the weight and runs in parallel over those."""
    outputs = tuple(i for i in range(weight.ndim) if i not in (*contract, *batch))
    return KernelAxes(tuple(sorted(batch)), tuple(sorted(contract)), outputs)


def _dot_on_left(dot: Operation, axes: KernelAxes, w: Any, x: Remade) -> Any:
    return _dot(dot, axes, w, x, on_left=True)


def _dot_on_right(dot: Operation, axes: KernelAxes, w: Any, x: Remade) -> Any:
    return _dot(dot, axes, w, x, on_left=False)


def _dot(dot: Operation, axes: KernelAxes, w: Any, x: Remade, on_left: bool) -> Any:
    """Bring a product into the order [*stack, *tokens, *outputs].

    XLA orders the result as [batch, free of lhs, free of rhs]. Each axis of it gets a label, ("w", axis of the weight)
    or ("x", axis of x), and the canonical order is stated in the same labels.
    """
    of_x, to_canonical, to_result, inputs = orders(dot.params["dimension_numbers"], axes, x.value.ndim, on_left)
    rows, value = x if of_x is None else x.map(lambda x: transposed(x, of_x)), x.value
    y = _packed_dot(dot, w, rows.value, inputs) if is_packed(w) and not axes.stack else None
    if y is None:
        y = frozen_product(lambda w: dot.bind(w, value)[0] if on_left else dot.bind(value, w)[0], w)
        y = transposed(y, to_canonical)
    rows = cast(rows, product_dtype(value.dtype, w.dtype))
    product = Matmul(axes, rows.value, y, factor_precision(dot.params["precision"], on_left), origin=rows.origin())
    return product, lambda y: transposed(y, to_result)


def cast(x: Remade, dtype: Any) -> Remade:  # no operation where it has the dtype
    return x if x.value.dtype == dtype else x.map(lambda x: x.astype(dtype))


def _packed_dot(dot: Operation, w: Any, rows: jax.Array, inputs: tuple[int, ...]) -> jax.Array | None:
    """Return the product that the packed format computes by itself; None where it leaves that to unpacking."""
    precision, wide = dot.params["precision"], dot.params["preferred_element_type"]
    if isinstance(precision, tuple) and precision[0] == precision[1]:
        precision = precision[0]
    if (
        not isinstance(precision, lax.Precision | None)
        or wide not in (None, rows.dtype, w.dot_dtype)
        or dot.params["out_sharding"]
    ):
        return None
    return w.dot(rows, inputs, precision)


def factor_precision(precision: Any, on_left: bool = False) -> Any:
    """Return the precision of x and of W in that order, for the products with the factors.

    An algorithm preset names the dtypes of the base, which are not those of the factors: it is left out.
    """
    if precision is None or isinstance(precision, lax.Precision):
        return precision
    if isinstance(precision, tuple):
        return precision[::-1] if on_left else precision
    return None
