"""Take the thin products of weights that read the same x together: x @ [A1 | A2 | ...], such as those of q, k and v.

Each column of the joined product is the dot product that it was, so no sum changes. The derivative by x then is one
thin product in the place of several that are written out and added, and the gradients of all A come of one pass over x.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core._compat import JaxprEqn, Literal, Var, varying_axes
from lora_jax.core.axes import KernelAxes
from lora_jax.core.products import Matmul, product_dtype
from lora_jax.core.remade import Remade, thin_product
from lora_jax.core.slots import ChosenFactor, chosen_product
from lora_jax.transform.adapted_weight import AdaptedWeight
from lora_jax.transform.primitives.contractions import cast, contracted_axes, factor_precision
from lora_jax.transform.primitives.dot_orders import Order, orders, transposed

Factor = jax.Array | ChosenFactor


class Reading(NamedTuple):
    """How a product reads x. Products that do it alike can be taken together."""

    order: Order  # that its axes are brought into
    inputs: int  # how many of them are contracted
    dtype: Any
    precision: Any
    factor: tuple[Any, ...]  # the dtype of A, how it is sharded, and how it is chosen of a bank


class Together:
    """The matrix products of one jaxpr, by the x that they read.

    Where a program comes to the first product of an x, h = x @ A is taken for all later ones too of which the weight is
    there by then. Weights that come into a program as its inputs are; one that is cast or cut between two products is
    not, and has a thin product of its own.

    Inside a `jax.checkpoint` the interpreter joins nothing. There the compiler for a TPU v5e has 0.4% fewer cycles of
    it, for 1.24 of the temporary memory (the decoder of tests/compiled, all of each layer made again).
    """

    def __init__(self, eqns: Sequence[JaxprEqn]) -> None:
        self.products = {i: eqn for i, eqn in enumerate(eqns) if eqn.primitive.name == "dot_general"}
        self.readers: dict[Var, list[int]] = {}
        self.made: dict[int, jax.Array] = {}
        for i, eqn in self.products.items():
            for v in dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)):
                self.readers.setdefault(v, []).append(i)

    def given(self, i: int, values: list[Any], env: Mapping[Var, Any]) -> list[Any]:
        """Return the operands of an equation, the weight with its h if that was taken with others.

        An eager call takes each product by itself, as nothing is gained and each concatenation would be one more call.
        """
        weights = [isinstance(value, AdaptedWeight) for value in values]
        if i in self.products and i not in self.made and sum(weights) == 1:
            at, other = weights.index(True), weights.index(False)
            x, v = values[at].x or Remade(values[other]), self.products[i].invars[other]
            if not isinstance(v, Literal) and len(self.readers[v]) > 1:
                self._take(i, x, v, env)
        h = self.made.pop(i, None)
        if h is None:
            return values
        return [dataclasses.replace(v, h=h) if is_weight else v for v, is_weight in zip(values, weights, strict=True)]

    def _take(self, i: int, x: Remade, v: Var, env: Mapping[Var, Any]) -> None:
        """Take x @ A for product i and for later ones that read x in the same way."""
        found = {j: _first_factor(self.products[j], v, x.value, env) for j in self.readers[v] if j >= i}
        alike = {j: one for j, one in found.items() if one is not None and found[i] and one[0] == found[i][0]}  # type: ignore[index]
        factors = [a for _, a in alike.values()]
        if len(factors) > 1 and any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((x.value, factors))):
            reading, _ = alike[i]
            self.made |= zip(alike, _thin(reading, x, *factors), strict=True)


def _first_factor(eqn: JaxprEqn, v: Var, x: Any, env: Mapping[Var, Any]) -> tuple[Reading, Factor] | None:
    """Return A of the weight in a product with x, and how that reads x; None if there is no such A, or not yet."""
    on_left = eqn.invars[1] is v
    w = eqn.invars[0 if on_left else 1]
    weight = None if isinstance(w, Literal) else env.get(w)
    if not isinstance(weight, AdaptedWeight):
        return None
    contract, batch = eqn.params["dimension_numbers"]
    side = 0 if on_left else 1
    axes = contracted_axes(weight, contract[side], batch[side])
    operand = None if axes.stack else weight.operand.used_as(axes, eqn)
    a = None if operand is None or operand.axes != axes else operand.first_factor()
    if a is None or a.shape[-1] == 0:
        return None
    order, *_ = orders(eqn.params["dimension_numbers"], axes, x.ndim, on_left)
    precision = factor_precision(eqn.params["precision"], on_left)
    array = a.a if isinstance(a, ChosenFactor) else a
    of_bank = (a.selection, a.arranged, array.shape[0]) if isinstance(a, ChosenFactor) else ()
    factor = (array.dtype, jax.typeof(array).sharding, varying_axes(array), of_bank)
    return Reading(order, len(axes.inputs), product_dtype(x.dtype, weight.value.dtype), precision, factor), a


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _thin(reading: Reading, x: Remade, *factors: Factor) -> Sequence[jax.Array]:
    """Return x @ A for each factor [*inputs, r] of x [*T, *inputs]. Of y, which is not there, only the mesh counts."""
    rows = x if reading.order is None else x.map(lambda x: transposed(x, reading.order))
    rows = cast(rows, reading.dtype)
    axes = KernelAxes((), tuple(range(reading.inputs)), (reading.inputs,))
    product = Matmul(axes, rows.value, rows.value, reading.precision, origin=rows.origin())
    chosen = [factor for factor in factors if isinstance(factor, ChosenFactor)]
    arrays = [factor for factor in factors if not isinstance(factor, ChosenFactor)]
    h = chosen_product(product, chosen) if chosen else thin_product(product, jnp.concatenate(arrays, axis=-1))
    return lax.split(h, [a.shape[-1] for a in factors], axis=h.ndim - 1)
