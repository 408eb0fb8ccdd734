"""A matrix product by matrices of which the program knows fewer to be stacked than their adapter does.

`einsum("td,edf->tef")` has the experts e as an output of one matrix, `einsum("tef,efd->td")` as an input. An adapter
with factors for each expert is applied without forming W' all the same: along outputs the experts share x, and x @ A is
taken for all of them side by side; along inputs each has an x of its own, and h @ B is summed over them.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax.core.axes import KernelAxes
from lora_jax.core.products import STATIC, Matmul, Product


def along(product: Product, axes: KernelAxes) -> Product:
    """Return a product for an operand with these axes, which may stack more of them than the product does."""
    if not isinstance(product, Matmul) or not set(axes.stack) - set(product.axes.stack):
        return product
    return Restacked(axes, product.x, product.y, product.precision, product.axes, origin=product.origin)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Restacked(Product):
    """The product y = x @ W as the program has it, for factors along `axes`, which stack more.

    Below, s are the stacked axes of the program's product; i and o are those that are stacked beside them, and are
    inputs or outputs of the program's product.
    """

    program: KernelAxes = field(metadata=STATIC)  # x is [*s, *T, *inputs] of these, and y [*s, *T, *outputs]

    def contract(self, a: jax.Array) -> jax.Array:
        """Return h [*s, *i, *o, *T, n]."""
        s, i, o = self._stacks()
        inputs, tokens = self.axes.inputs, self._tokens()
        x = _arranged(self.x, [*s, *tokens, *self.program.inputs], [*s, *i, *tokens, *inputs])
        a = _arranged(a, [*self.axes.stack, *inputs, "n"], [*s, *i, *inputs, *o, "n"])
        rows, columns = a.shape[: -1 - len(o)], a.shape[-1 - len(o) :]
        each = Matmul(KernelAxes((*s, *i), inputs, ()), x, self.y, self.precision)
        h = each.contract(a.reshape(*rows, math.prod(columns)))  # [*s, *i, *T, o n]
        first = len(s) + len(i)
        h = h.reshape(*h.shape[:-1], *columns)
        return jnp.moveaxis(h, range(h.ndim - 1 - len(o), h.ndim - 1), range(first, first + len(o)))

    def expand(self, h: jax.Array, b: jax.Array) -> jax.Array:
        s, i, o = self._stacks()
        outputs, tokens = self.axes.outputs, self._tokens()
        b = _arranged(b, [*self.axes.stack, "n", *outputs], [*s, *o, *i, "n", *outputs])
        n, last = len(s) + len(o), len(s) + len(o) + len(i) + 1
        b = b.reshape(*b.shape[:n], math.prod(b.shape[n:last]), *b.shape[last:])  # [*s, *o, i n, *outputs]
        rows = [f"row {j}" for j in range(h.ndim - last)]  # of h, whose tokens may be flattened
        h = _arranged(h, [*s, *i, *o, *rows, "n"], [*s, *o, *rows, *i, "n"])
        h = h.reshape(*h.shape[: n + len(rows)], b.shape[n])
        y = _arranged(self.y, [*s, *tokens, *self.program.outputs], [*s, *o, *tokens, *outputs])
        y = Matmul(KernelAxes((*s, *o), (), outputs), self.x, y, self.precision).expand(h, b)
        return _arranged(y, [*s, *o, *tokens, *outputs], [*s, *tokens, *self.program.outputs])

    def rows(self) -> tuple[int, int]:
        s, i, o = self._stacks()
        of_x = dict(zip(self.program.inputs, self.x.shape[len(s) + len(self._tokens()) :], strict=True))
        of_y = dict(zip(self.program.outputs, self.y.shape[len(s) + len(self._tokens()) :], strict=True))
        more = math.prod([of_x[axis] for axis in i] + [of_y[axis] for axis in o])
        return (self._product().rows()[0] * more,) * 2

    def for_each_output(self, gain: jax.Array) -> jax.Array:
        """Return gain [*stack, *outputs] with y's shape, where the program sums over no axis of the stack."""
        gain = _arranged(gain, [*self.axes.stack, *self.axes.outputs], [*self.program.stack, *self.program.outputs])
        return self._product().for_each_output(gain)

    def keep(self, keys: jax.Array, probability: Any) -> Self:
        """Keep each entry of x with a probability: matrices that share an x share what is kept of it."""
        first = tuple(slice(None) if axis in self.program.stack else 0 for axis in self.axes.stack)
        of_first = probability[first] if isinstance(probability, jax.Array) else probability
        kept = self._product().keep(keys[first], of_first)
        return dataclasses.replace(self, x=kept.x, origin=kept.origin)

    def token_axes(self) -> tuple[int, ...]:
        return self._product().token_axes()

    def split(self, counts: Sequence[int], axes: KernelAxes) -> Self:
        parts = tuple(axis for axis in axes.stack if axis not in self.axes.stack)
        program = self.program._replace(stack=(*self.program.stack, *parts))
        found = self._product().split(counts, program)
        return dataclasses.replace(self, axes=axes, x=found.x, y=found.y, program=program, origin=found.origin)

    def join(self, y: jax.Array, counts: Sequence[int]) -> jax.Array:
        return self._product().join(y, counts)

    def _product(self) -> Matmul:
        return Matmul(self.program, self.x, self.y, self.precision, origin=self.origin)

    def _stacks(self) -> tuple[tuple[int, ...], ...]:
        """Return s, i and o."""
        own = self.axes.stack
        i, o = (tuple(a for a in group if a in own) for group in (self.program.inputs, self.program.outputs))
        return self.program.stack, i, o

    def _tokens(self) -> list[str]:
        return [f"token {j}" for j in range(len(self.token_axes()))]


def _arranged(array: jax.Array, have: Sequence[Any], want: Sequence[Any]) -> jax.Array:
    """Return an array whose axes have these labels with the labels in another order."""
    order = [have.index(label) for label in want]
    return array if order == sorted(order) else array.transpose(order)
