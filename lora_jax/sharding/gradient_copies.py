"""Copies of an adapter, one for each part of the batch, so that gradients are summed over devices once a step.

Over a mesh that splits the batch, the gradient of A is a sum over devices. Left to the compiler, that sum is taken
wherever the product is: in every layer of a scan and for every microbatch. With a copy of A for each part of the
batch, the gradients of the copies stay apart until they are added up at the end: one all-reduce.

All copies are equal, so it makes no difference to the result which rows meet which copy.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

from lora_jax.core.adapter import Adapter, AdapterWrapper, is_adapter, stand_ins
from lora_jax.core.axes import KernelAxes
from lora_jax.core.operand import Operand, Wrapper
from lora_jax.core.partition import names_of
from lora_jax.core.products import Product

Splits = tuple[tuple[int, int], ...]  # (axis of the batch, into how many parts), for the axes that are split


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerShardCopies(AdapterWrapper):
    """Equal copies of one adapter: every array of `inner` begins with an axis of copies for each split."""

    inner: Adapter
    original: Adapter  # for products whose rows are not in the batch's parts
    axes: KernelAxes = field(metadata={"static": True})
    splits: Splits = field(metadata={"static": True})

    @property
    def asked(self) -> Adapter:
        return self.original

    def trainable(self) -> "PerShardCopies":
        return dataclasses.replace(self, inner=self.inner.trainable(), original=self.original.trainable())

    def lower(self, w: Any) -> Operand | jax.Array:
        """Lower every copy, and the original."""
        n, k = len(self.axes.stack), len(self.splits)
        lower: Any = jax.lax.stop_gradient(self.original).lowering(w)
        whole = lower(self.original)
        if not isinstance(whole, Operand):
            return whole
        for _ in self.splits:
            lower = jax.vmap(lower)
        inner = lower(self.inner).with_axes(
            _with_copies(self.axes, k), lambda array, _: jnp.moveaxis(array, range(k), range(n, n + k))
        )
        return CopiesOperand(inner, whole, self.axes, self.splits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CopiesOperand(Wrapper):
    """The operand of `PerShardCopies`.

    The copies are stacked axes of `inner`, the last ones: it is the operand of a weight [*W, *copies].
    """

    inner: Operand
    whole: Operand  # of the original
    axes: KernelAxes = field(metadata={"static": True})
    splits: Splits = field(metadata={"static": True})

    layout = MappingProxyType({})

    def both(self, change: Callable[[Operand], Operand]) -> "CopiesOperand":
        whole = change(self.whole)
        return dataclasses.replace(self, inner=change(self.inner), whole=whole, axes=whole.axes)

    def transpose(self) -> Operand:
        return self.both(lambda operand: operand.transpose())

    def scale_by(self, factor: jax.Array) -> Operand:
        return self.both(lambda operand: operand.scale_by(factor))

    def to_lora(self) -> Operand:
        return self.both(lambda operand: operand.to_lora())

    def merge(self, w: jax.Array) -> jax.Array:
        return self.whole.merge(w)

    def apply(self, product: Product) -> jax.Array:
        """Multiply each part of the rows by its own copy; all of them by the original if the rows have no such parts.

        Convolutions have none: with a kernel for each part they would be convolutions of groups of channels.
        """
        rows = product.token_axes()
        fits = [i < len(rows) and rows[i] % n == 0 for i, n in self.splits]
        if not any(fits):
            return self.whole.apply(product)
        inner = self._without([i for i, fit in enumerate(fits) if not fit])
        parts = {i: n for (i, n), fit in zip(self.splits, fits, strict=True) if fit}
        counts = [parts.get(i, 1) for i in range(len(rows))]
        return product.join(inner.apply(product.split(counts, inner.axes)), counts)

    def _without(self, which: Sequence[int]) -> Operand:
        """Return the operand inside with the first copy alone along these of its axes of copies."""
        inner, ndim = self.inner, sum(map(len, self.axes))
        for i in sorted(which, reverse=True):
            inner = inner.replace_axes(ndim + i, 1, 0, _first_along)
        return inner

    def concatenate(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> Operand | None:
        if any(p is not None and (not isinstance(p, CopiesOperand) or p.splits != self.splits) for p in parts):
            return None
        inner = self.inner.concatenate([p and p.inner for p in parts], sizes, axis)
        whole = self.whole.concatenate([p and p.whole for p in parts], sizes, axis)
        if inner is None or whole is None:
            return None
        return dataclasses.replace(self, inner=inner, whole=whole, axes=whole.axes)

    def kernel_shape(self) -> tuple[int, ...]:
        return self.whole.kernel_shape()

    def permute(self, permutation: tuple[int, ...]) -> Operand:
        ndim = len(permutation)
        inner = self.inner.permute((*permutation, *range(ndim, ndim + len(self.splits))))
        whole = self.whole.permute(permutation)
        return dataclasses.replace(self, inner=inner, whole=whole, axes=whole.axes)

    def specs(self, spec: jax.P) -> Operand:
        ndim = sum(map(len, self.axes))
        every = (*spec, *[None] * (ndim - len(spec) + len(self.splits)))
        return dataclasses.replace(self, inner=self.inner.specs(P(*every)), whole=self.whole.specs(spec))

    def rows(self, axis: int, n: int, fn: Callable[..., Any], stack: Sequence[int] = ()) -> Operand:
        """Return rows of the original: rows that are looked up are few and thin."""
        return self.whole.rows(axis, n, fn, stack)


def make_copies(tree: Any, batch: NamedSharding, shardings: Any = None) -> Any:
    """Return the tree with copies of each adapter in it, one for each part that a batch of this sharding comes in.

    `shardings` are those of the tree's arrays, if they are known. Matrices that are on the devices of some parts alone,
    as experts are, have no copies: no other device computes with them, and each would get all of them.

    The i-th entry of the sharding's spec splits the i-th axis of the batch, and is taken to split the i-th axis, among
    those that are not multiplied away, of whatever an adapted weight is multiplied with. Where that is not so the
    numbers are the same, and the communication is more.
    """
    splits = _splits(batch)
    if not splits or jax.sharding.AxisType.Explicit in batch.mesh.axis_types:
        return tree  # explicit axes leave the compiler nothing to decide
    counts, entries = [n for _, n in splits], [batch.spec[i] for i, _ in splits]
    names = [name for entry in entries for name in names_of(entry)]

    def copied(array: jax.Array) -> jax.Array:
        sharding = NamedSharding(batch.mesh, P(*entries, *[P.UNCONSTRAINED] * array.ndim))
        return jax.lax.with_sharding_constraint(jnp.broadcast_to(array, (*counts, *array.shape)), sharding)

    def stack_is_split(node: Adapter) -> bool:
        specs = [sharding.spec[: len(node.axes.stack)] for sharding in jax.tree.leaves(node)]
        return any(name in names for spec in specs for entry in spec for name in names_of(entry))

    def copy(node: Any, places: Any = None) -> Any:
        if not is_adapter(node) or node.forms_weight or isinstance(node, PerShardCopies):
            return node
        if places is not None and stack_is_split(places):
            return node
        return PerShardCopies(jax.tree.map(copied, node), node, node.axes, splits)

    return jax.tree.map(copy, tree, *([] if shardings is None else [shardings]), is_leaf=is_adapter)


def copies_alone(tree: Any, batch: NamedSharding, shardings: Any = None) -> list[PerShardCopies | None]:
    """Return what `make_copies` copies, for each adapter and each other array: None where it copies none."""
    nodes = jax.tree.leaves(make_copies(tree, batch, shardings), is_leaf=is_adapter)
    return [node if isinstance(node, PerShardCopies) else None for node in nodes]


def in_the_place_of(tree: Any, copies: Sequence[PerShardCopies | None]) -> contextlib.AbstractContextManager[None]:
    """Apply the copies, inside, wherever a program applies the adapters of this tree.

    The program goes on seeing the adapters themselves: whatever else it does with them, penalties and ensembles among
    that, means the same as without copies.
    """
    pairs = zip(jax.tree.leaves(tree, is_leaf=is_adapter), copies, strict=True)
    return stand_ins([(node, other) for node, other in pairs if other is not None])


def add_to(grads: Any, others: Sequence[Any]) -> Any:
    """Return the gradients of a tree, with those of its copies added where there are copies."""
    nodes, treedef = jax.tree.flatten(grads, is_leaf=is_adapter)
    sums = [
        node if other is None else jax.tree.map(jnp.add, node, other) for node, other in zip(nodes, others, strict=True)
    ]
    return jax.tree.unflatten(treedef, sums)


def add_up(grads: Any, batch: NamedSharding) -> Any:
    """Return the gradient of a tree, from that of its copies for this batch: one reduction over all devices."""
    names = tuple(name for i, _ in _splits(batch) for name in names_of(batch.spec[i]))

    def total(array: jax.Array, copies: int) -> jax.Array:
        array = array.reshape(-1, *array.shape[copies:])
        sharding = NamedSharding(batch.mesh, P(names, *[P.UNCONSTRAINED] * (array.ndim - 1)))
        return jax.lax.with_sharding_constraint(array, sharding).sum(0)

    def add(node: Any) -> Any:
        if not isinstance(node, PerShardCopies):
            return node
        copies = jax.tree.map(lambda array: total(array, len(node.splits)), node.inner)
        return jax.tree.map(jnp.add, copies, node.original)

    return jax.tree.map(add, grads, is_leaf=is_adapter)


def _splits(batch: NamedSharding) -> Splits:
    """Return which axes of a batch are split, and into how many parts. Mesh axes of size 1 split nothing."""
    sizes = [math.prod(batch.mesh.shape[name] for name in names_of(entry)) for entry in batch.spec]
    return tuple((i, n) for i, n in enumerate(sizes) if n > 1)


def _with_copies(axes: KernelAxes, n: int) -> KernelAxes:
    ndim = sum(map(len, axes))
    return axes._replace(stack=(*axes.stack, *range(ndim, ndim + n)))


def _first_along(array: jax.Array, axis: int) -> jax.Array:
    return jax.lax.index_in_dim(array, 0, axis, keepdims=False)
