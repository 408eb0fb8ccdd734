"""Convolutions by an adapted weight, and products of ragged groups, reduced to y = x @ W as matrix products are."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core._compat import JaxprEqn, Operation, bind
from lora_jax.core.axes import KernelAxes
from lora_jax.core.convolutions import BackwardConv, Conv, Ragged, channels_last
from lora_jax.core.products import as_matrices, product_dtype
from lora_jax.core.ragged import RAGGED_PRODUCT, ragged_product
from lora_jax.core.remade import Remade
from lora_jax.transform.adapted_weight import AdaptedWeight
from lora_jax.transform.primitives.contractions import cast, contracted_axes, factor_precision, frozen_product, multiply
from lora_jax.transform.primitives.registry import FROZEN, no_rule, rule


@rule("conv_general_dilated")
def conv_general_dilated(eqn: JaxprEqn, x: Any, weight: Any) -> list[Any]:
    """Convolve with the weight as the window; or compute the derivative of that, where the adapter says so."""
    if isinstance(x, AdaptedWeight) or eqn.params["batch_group_count"] != 1:
        return no_rule(eqn, x, weight)
    out, channels, *window = eqn.params["dimension_numbers"].rhs_spec
    forward = KernelAxes((), tuple(sorted([*window, channels])), (out,))
    backward = KernelAxes((), (channels,), tuple(sorted([*window, out])))
    fits = weight.operand.used_as
    if eqn.params["feature_group_count"] == 1 and fits(forward, eqn) is None and fits(backward, eqn) is not None:
        return multiply(eqn, (x, weight), weight, backward, _conv, x)
    return multiply(eqn, (x, weight), weight, forward, _conv, x)


def _conv(conv: Operation, axes: KernelAxes, w: Any, x: Remade) -> Any:
    dims, groups = conv.params["dimension_numbers"], conv.params["feature_group_count"]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    settings = tuple((name, conv.params[name]) for name in names)
    value = x.value
    y = frozen_product(lambda w: conv.bind(value, w)[0], w)
    x = cast(x, product_dtype(value.dtype, w.dtype))
    of = (
        axes,
        x.value,
        channels_last(y, dims),
        factor_precision(conv.params["precision"]),
        dims,
    )
    is_forward = axes.outputs == (dims.rhs_spec[0],)
    channels = dims.out_spec[1]
    shape = [n for i, n in enumerate(y.shape) if i != channels]

    def restore(adapted: jax.Array) -> jax.Array:
        return jnp.moveaxis(adapted.reshape(*shape, y.shape[channels]), -1, channels)

    origin = x.origin()
    product = Conv(*of, groups, settings, origin=origin) if is_forward else BackwardConv(*of, settings, origin=origin)
    return product, restore


@rule("ragged_dot_general")
def ragged_dot_general(eqn: JaxprEqn, x: Any, weight: Any, group_sizes: Any) -> list[Any]:
    """Multiply each group of rows of x by its own expert's matrix."""
    args = (x, weight, group_sizes)
    axes = None if isinstance(x, AdaptedWeight) else _axes_of_groups(eqn, x, weight)
    if axes is None:
        return no_rule(eqn, *args, why="is not a product of ragged rows with a stack of matrices")
    return multiply(eqn, args, weight, axes, _ragged_dot, x, group_sizes)


@rule("ragged_dot_general", table=FROZEN)
def frozen_ragged_dot_general(eqn: JaxprEqn, x: Any, w: Any, group_sizes: Any) -> list[Any]:
    """Multiply by frozen experts in a way that `vmap` over adapters takes."""
    axes = _axes_of_groups(eqn, x, w)
    if axes is None:
        return bind(eqn, (x, w, group_sizes))
    product, restore = _ragged_dot(Operation.of(eqn), axes, w, Remade(x), group_sizes)
    return [restore(product.y)]


def _axes_of_groups(eqn: JaxprEqn, x: Any, w: Any) -> KernelAxes | None:
    """Return the axes of the matrices, if this is a product of rows of x with a stack of them."""
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, _) = ragged.dot_dimension_numbers
    groups, rows = tuple(ragged.rhs_group_dimensions), [i for i in range(x.ndim) if i not in x_contract]
    if x_batch or len(groups) != 1 or rows != list(ragged.lhs_ragged_dimensions):
        return None
    outputs = tuple(i for i in range(w.ndim) if i not in (*w_contract, *groups))
    return KernelAxes(groups, tuple(sorted(w_contract)), outputs)


def _ragged_dot(ragged: Operation, axes: KernelAxes, w: Any, x: Remade, group_sizes: jax.Array) -> Any:
    """Multiply matrices [E, d, k] by rows [T, d], which `vmap` over adapters makes more of."""
    dims = ragged.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), _ = dims.dot_dimension_numbers
    inputs = [i for _, i in sorted(zip(w_contract, x_contract, strict=True))]
    value, order, outputs = x.value, [*dims.lhs_ragged_dimensions, *inputs], [w.shape[i] for i in axes.outputs]
    rows = x.map(lambda x: as_matrices(x.transpose(order), 0, 1))
    how = {"precision": ragged.params["precision"], "wide": ragged.params["preferred_element_type"]}

    def product(w: jax.Array) -> jax.Array:
        matrices = w.transpose((*axes.stack, *axes.inputs, *axes.outputs))
        return ragged_product(rows.value, matrices.reshape(len(matrices), rows.value.shape[1], -1), group_sizes, **how)

    y = frozen_product(product, w)  # [T, k]
    rows = cast(rows, product_dtype(value.dtype, w.dtype))
    adapted = Ragged(axes, rows.value, y, how["precision"], group_sizes, origin=rows.origin())
    return adapted, lambda y: y.reshape(len(y), *outputs)


@rule(RAGGED_PRODUCT)
def ragged_product_by_groups(eqn: JaxprEqn, x: Any, weight: Any, group_sizes: Any) -> list[Any]:
    """Multiply as `ragged_dot_general` does: where `lora_apply` is applied to what it made."""
    if isinstance(x, AdaptedWeight):
        return no_rule(eqn, x, weight, group_sizes, why="is not a product of ragged rows with a stack of matrices")
    axes = contracted_axes(weight, (eqn.params["contract"],), (0,))
    return multiply(eqn, (x, weight, group_sizes), weight, axes, _ragged_product, x, group_sizes)


def _ragged_product(ragged: Operation, axes: KernelAxes, w: Any, x: Remade, group_sizes: jax.Array) -> Any:
    value = x.value
    y = frozen_product(lambda w: ragged.bind(value, w, group_sizes)[0], w)
    rows = cast(x, product_dtype(value.dtype, w.dtype))
    return Ragged(axes, rows.value, y, ragged.params["precision"], group_sizes, origin=rows.origin()), lambda y: y
