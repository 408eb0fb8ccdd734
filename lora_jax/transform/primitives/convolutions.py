"""Convolutions by an adapted weight, and products of ragged groups, reduced to y = x @ W as matrix products are."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core._compat import JaxprEqn, Operation
from lora_jax.core.axes import KernelAxes
from lora_jax.core.convolutions import BackwardConv, Conv, Ragged, channels_last
from lora_jax.core.products import as_matrices, product_dtype
from lora_jax.core.remade import Remade
from lora_jax.transform.adapted_weight import AdaptedWeight
from lora_jax.transform.primitives.contractions import cast, contracted_axes, factor_precision, frozen_product, multiply
from lora_jax.transform.primitives.registry import no_rule, rule


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
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, _) = ragged.dot_dimension_numbers
    groups, args = tuple(ragged.rhs_group_dimensions), (x, weight, group_sizes)
    rows = [i for i in range(x.ndim) if i not in x_contract]
    if isinstance(x, AdaptedWeight) or x_batch or len(groups) != 1 or rows != list(ragged.lhs_ragged_dimensions):
        return no_rule(eqn, *args, why="is not a product of ragged rows with a stack of matrices")
    return multiply(eqn, args, weight, contracted_axes(weight, w_contract, groups), _ragged_dot, x, group_sizes)


def _ragged_dot(ragged: Operation, axes: KernelAxes, w: Any, x: Remade, group_sizes: jax.Array) -> Any:
    dims = ragged.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), _ = dims.dot_dimension_numbers
    inputs = [i for _, i in sorted(zip(w_contract, x_contract, strict=True))]
    value, order = x.value, [*dims.lhs_ragged_dimensions, *inputs]
    y = frozen_product(lambda w: ragged.bind(value, w, group_sizes)[0], w)  # [T, *outputs]
    rows = cast(x.map(lambda x: as_matrices(x.transpose(order), 0, 1)), product_dtype(value.dtype, w.dtype))
    y_rows, precision = as_matrices(y, 0, 1), ragged.params["precision"]
    product = Ragged(axes, rows.value, y_rows, precision, group_sizes, origin=rows.origin())
    return product, lambda adapted: adapted.reshape(y.shape)
