"""The orders of the axes of a matrix product: the program's, and x @ W's own."""

import functools
from typing import Any

import jax

from lora_jax.core.axes import KernelAxes

Order = tuple[int, ...] | None  # a permutation; None for the one that changes nothing


@functools.lru_cache(maxsize=4096)
def orders(dimensions: Any, axes: KernelAxes, x_ndim: int, on_left: bool) -> tuple[Order, Order, Order, Any]:
    """Return the permutations of x, of the result to the canonical order and back, and the weight's contracted axes."""
    contract, batch = dimensions
    (w_contract, x_contract), (w_batch, x_batch) = (contract, batch) if on_left else (contract[::-1], batch[::-1])
    x_free = [i for i in range(x_ndim) if i not in (*x_contract, *x_batch)]
    stack, inputs = sorted(zip(w_batch, x_batch, strict=True)), sorted(zip(w_contract, x_contract, strict=True))
    w_labels, x_labels = [("w", i) for i in axes.outputs], [("x", i) for i in x_free]
    result = [("w", i) for i in w_batch] + (w_labels + x_labels if on_left else x_labels + w_labels)
    canonical = [("w", w) for w, _ in stack] + x_labels + w_labels
    orders = (
        [i for _, i in stack] + x_free + [i for _, i in inputs],
        [result.index(label) for label in canonical],
        [canonical.index(label) for label in result],
    )
    of_x, to_canonical, to_result = (None if order == sorted(order) else tuple(order) for order in orders)
    return of_x, to_canonical, to_result, tuple(i for i, _ in inputs)


def transposed(array: jax.Array, order: Order) -> jax.Array:
    """Return an array with its axes in an order."""
    return array if order is None else array.transpose(order)
