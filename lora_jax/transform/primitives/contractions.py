"""Products with a kernel, reduced to y = x @ W, which is all that an adapter sees.

Each is a function of an operation, an adapter and arrays, so that equal ones are traced once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core._compat import JaxprEqn, Operation
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.packed import is_packed
from lora_jax.core.products import (
    BackwardConv,
    Conv,
    Matmul,
    Ragged,
    as_matrices,
    channels_last,
    product_dtype,
)
from lora_jax.transform.adapted_weight import Kernel, plain
from lora_jax.transform.primitives.registry import no_rule, rule


def _multiply(eqn: JaxprEqn, args: Sequence[Any], kernel: Kernel, axes: KernelAxes, product: Any, *arrays: Any) -> Any:
    """The product with W', where the adapter was made for these axes."""
    adapter = kernel.adapter.used_as(axes, eqn)
    if adapter is None:
        own = kernel.adapter.axes
        made = f"its adapter was made for {own}" if any(own) else "these are not inputs and outputs of a matrix"
        return no_rule(eqn, *args, why=f"uses it with {axes}, but {made}")
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((adapter, kernel.value, arrays)))
    run = _traced_once(product) if traced and adapter.traced_once else product
    y = run(Operation.of(eqn), axes, adapter, kernel.value, *arrays)
    return [y if kernel.factor is None else y * kernel.factor.astype(y.dtype)]


def _times(product: Callable[[jax.Array], jax.Array], w: Any) -> jax.Array:
    """The frozen product. A packed weight is unpacked for it, and again for its derivative: what is kept is packed."""
    return jax.checkpoint(lambda w: product(w.gathered().dense()))(w) if is_packed(w) else product(w)


@functools.cache
def _traced_once(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(product, static_argnums=(0, 1), inline=True)


@rule("dot_general")
def dot_general(eqn: JaxprEqn, lhs: Any, rhs: Any) -> list[Any]:
    """A product with the kernel on either side, over any of its axes."""
    if isinstance(lhs, Kernel) and isinstance(rhs, Kernel):
        lhs = plain(lhs, f"multiplies it by another adapted weight, {_names(rhs)}", eqn)
    contract, batch = eqn.params["dimension_numbers"]
    if isinstance(lhs, Kernel):
        axes = _axes(lhs, contract[0], batch[0])
        return _multiply(eqn, (lhs, rhs), lhs, axes, _dot_on_left, rhs)
    axes = _axes(rhs, contract[1], batch[1])
    return _multiply(eqn, (lhs, rhs), rhs, axes, _dot_on_right, lhs)


def _axes(kernel: Kernel, contract: Sequence[int], batch: Sequence[int]) -> KernelAxes:
    outputs = tuple(i for i in range(kernel.ndim) if i not in (*contract, *batch))
    return KernelAxes(tuple(sorted(batch)), tuple(sorted(contract)), outputs)


def _dot_on_left(dot: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array) -> jax.Array:
    return _dot(dot, axes, adapter, w, x, on_left=True)


def _dot_on_right(dot: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array) -> jax.Array:
    return _dot(dot, axes, adapter, w, x, on_left=False)


def _dot(dot: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array, on_left: bool) -> jax.Array:
    """XLA orders the result as [batch, free of lhs, free of rhs]. Each axis of it gets a label, ("w", axis of the
    weight) or ("x", axis of x), and the canonical order is stated in the same labels.
    """
    contract, batch = dot.params["dimension_numbers"]
    (w_contract, x_contract), (w_batch, x_batch) = (contract, batch) if on_left else (contract[::-1], batch[::-1])
    x_free = [i for i in range(x.ndim) if i not in (*x_contract, *x_batch)]
    stack, inputs = sorted(zip(w_batch, x_batch, strict=True)), sorted(zip(w_contract, x_contract, strict=True))
    w_labels, x_labels = [("w", i) for i in axes.outputs], [("x", i) for i in x_free]
    result = [("w", i) for i in w_batch] + (w_labels + x_labels if on_left else x_labels + w_labels)
    canonical = [("w", w) for w, _ in stack] + x_labels + w_labels

    rows = x.transpose([i for _, i in stack] + x_free + [i for _, i in inputs])
    y = _packed_dot(dot, w, rows, tuple(i for i, _ in inputs)) if is_packed(w) and not stack else None
    if y is None:
        y = _times(lambda w: dot.bind(w, x)[0] if on_left else dot.bind(x, w)[0], w)
        y = y.transpose([result.index(label) for label in canonical])
    rows = rows.astype(product_dtype(x.dtype, w.dtype))
    product = Matmul(axes, rows, y, _precision(dot.params["precision"], on_left))
    return adapter.apply(product).transpose([canonical.index(label) for label in result])


def _packed_dot(dot: Operation, w: Any, rows: jax.Array, inputs: tuple[int, ...]) -> jax.Array | None:
    """What the format itself makes of a product; None where it leaves that to unpacking."""
    precision, wide = dot.params["precision"], dot.params["preferred_element_type"]
    if isinstance(precision, tuple) and precision[0] == precision[1]:
        precision = precision[0]
    if not isinstance(precision, lax.Precision | None) or wide not in (None, rows.dtype) or dot.params["out_sharding"]:
        return None
    return w.dot(rows, inputs, precision)


@rule("conv_general_dilated")
def conv_general_dilated(eqn: JaxprEqn, x: Any, kernel: Any) -> list[Any]:
    """A convolution with the kernel as its window; or the one that is its derivative, where the adapter says so."""
    if isinstance(x, Kernel) or eqn.params["batch_group_count"] != 1:
        return no_rule(eqn, x, kernel)
    out, channels, *window = eqn.params["dimension_numbers"].rhs_spec
    forward = KernelAxes((), tuple(sorted([*window, channels])), (out,))
    backward = KernelAxes((), (channels,), tuple(sorted([*window, out])))
    fits = kernel.adapter.used_as
    if eqn.params["feature_group_count"] == 1 and fits(forward, eqn) is None and fits(backward, eqn) is not None:
        return _multiply(eqn, (x, kernel), kernel, backward, _conv, x)
    return _multiply(eqn, (x, kernel), kernel, forward, _conv, x)


def _conv(conv: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array) -> jax.Array:
    dims, groups = conv.params["dimension_numbers"], conv.params["feature_group_count"]
    settings = {name: conv.params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    y = _times(lambda w: conv.bind(x, w)[0], w)
    of = (
        axes,
        x.astype(product_dtype(x.dtype, w.dtype)),
        channels_last(y, dims),
        _precision(conv.params["precision"], on_left=False),
        dims,
    )
    is_forward = axes.outputs == (dims.rhs_spec[0],)
    adapted = adapter.apply(Conv(*of, groups, settings) if is_forward else BackwardConv(*of, settings))
    channels = dims.out_spec[1]
    shape = [n for i, n in enumerate(y.shape) if i != channels]
    return jnp.moveaxis(adapted.reshape(*shape, -1), -1, channels)


@rule("ragged_dot_general")
def ragged_dot_general(eqn: JaxprEqn, x: Any, kernel: Any, group_sizes: Any) -> list[Any]:
    """Each group of rows of x by its own expert's matrix."""
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, _) = ragged.dot_dimension_numbers
    groups, args = tuple(ragged.rhs_group_dimensions), (x, kernel, group_sizes)
    rows = [i for i in range(x.ndim) if i not in x_contract]
    if isinstance(x, Kernel) or x_batch or len(groups) != 1 or rows != list(ragged.lhs_ragged_dimensions):
        return no_rule(eqn, *args, why="is not a product of ragged rows with a stack of matrices")
    return _multiply(eqn, args, kernel, _axes(kernel, w_contract, groups), _ragged_dot, x, group_sizes)


def _ragged_dot(
    ragged: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    dims = ragged.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), _ = dims.dot_dimension_numbers
    inputs = [i for _, i in sorted(zip(w_contract, x_contract, strict=True))]
    y = _times(lambda w: ragged.bind(x, w, group_sizes)[0], w)  # [T, *outputs]
    rows = as_matrices(x.transpose([*dims.lhs_ragged_dimensions, *inputs]), 0, 1)
    rows = rows.astype(product_dtype(x.dtype, w.dtype))
    return adapter.apply(Ragged(axes, rows, as_matrices(y, 0, 1), ragged.params["precision"], group_sizes)).reshape(
        y.shape
    )


def _precision(precision: Any, on_left: bool) -> Any:
    """The precision of x and of W in that order. An algorithm preset names the base's dtypes: not for the factors."""
    if precision is None or isinstance(precision, lax.Precision):
        return precision
    if isinstance(precision, tuple):
        return precision[::-1] if on_left else precision
    return None


def _names(kernel: Kernel) -> str:
    return ", ".join(map(repr, kernel.paths))
