"""Copies of an adapter, one for each part of the batch, so that their gradients meet once a step.

Over a mesh that splits the batch, the gradient of A is a sum over devices. Left to the compiler, that sum is taken
wherever the product is: in every layer of a scan and for every microbatch. With a copy of A for each part of the batch
no device's gradient has to do with another's, until the copies are added up at the end: one all-reduce.

All copies are equal, so it makes no difference to the result which rows meet which copy.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

from lora_jax.core.adapter import Adapter, Layout, is_adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.partition import names_of
from lora_jax.core.products import Product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spread(Adapter):
    """Copies of one adapter, in `counts[i]` parts along the i-th token axis of what the weight is multiplied with.

    The copies are stacked axes of `inner`, the last ones: it is the adapter of a weight [*W, *counts].
    """

    inner: Adapter
    axes: KernelAxes = field(metadata={"static": True})
    counts: tuple[int, ...] = field(metadata={"static": True})

    def one(self) -> Adapter:
        """One of the copies."""
        return _without_copies(self.inner, range(len(self.counts)), sum(map(len, self.axes)))

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        return self.inner.reads_weight

    def merge(self, w: jax.Array) -> jax.Array:
        return self.one().merge(w)

    def enter(self, w: jax.Array) -> Adapter | jax.Array:
        """Each copy as it enters; an array has one copy only."""
        n, k = len(self.axes.stack), len(self.counts)
        whole = self.one().enter(w)
        if not isinstance(whole, Adapter):
            return whole

        def change(adapter: Adapter) -> Any:
            return adapter.enter(w)

        for _ in range(k):
            change = jax.vmap(change, in_axes=n, out_axes=n)
        entered = change(self.inner.rebuild(self.axes, lambda array, _: array, stack_only=True))
        inner = entered.rebuild(_with_copies(self.axes, k), lambda array, _: array, stack_only=True)
        return dataclasses.replace(self, inner=inner)

    def apply(self, product: Product) -> jax.Array:
        """Each part of the rows by its own copy; where the rows have no such parts, all of them by one."""
        rows = product.token_axes()
        fits = [i < len(rows) and rows[i] % n == 0 for i, n in enumerate(self.counts)]
        inner = _without_copies(self.inner, [i for i, fit in enumerate(fits) if not fit], sum(map(len, self.axes)))
        if not any(fits):
            return inner.apply(product)
        counts = [n if fit else 1 for n, fit in zip(self.counts, fits, strict=True)]
        return product.join(inner.apply(product.split(counts, inner.axes)), counts)

    def explicit(self) -> "Spread":
        return dataclasses.replace(self, inner=self.inner.explicit())

    def transpose(self) -> "Spread":
        return dataclasses.replace(self, inner=self.inner.transpose(), axes=self.axes.transpose())

    def scale_by(self, factor: jax.Array) -> "Spread":
        return dataclasses.replace(self, inner=self.inner.scale_by(factor))

    def concatenate(self, parts: Sequence[Adapter | None], sizes: Sequence[int], axis: int) -> Adapter | None:
        if any(p is not None and (not isinstance(p, Spread) or p.counts != self.counts) for p in parts):
            return None
        inner = self.inner.concatenate([p and p.inner for p in parts], sizes, axis)  # type: ignore[attr-defined]
        return inner and dataclasses.replace(self, inner=inner)

    def rebuild(
        self, axes: KernelAxes, change: Callable[[jax.Array, Layout], Any], stack_only: bool = False
    ) -> "Spread":
        def with_copies(array: jax.Array, layout: Layout) -> Any:
            return change(array, ("stack", *["copies"] * len(self.counts), *layout[1:]))

        inner = self.inner.rebuild(_with_copies(axes, len(self.counts)), with_copies, stack_only)
        return dataclasses.replace(self, inner=inner, axes=axes)

    def rows(self, axis: int, n: int, fn: Callable[..., Any], stack: Sequence[int] = ()) -> Adapter:
        """Rows that are looked up are few and thin: those of one copy."""
        return self.one().rows(axis, n, fn, stack)

    def kernel_shape(self) -> tuple[int, ...]:
        return self.inner.kernel_shape()[: -len(self.counts)]

    def trainable(self) -> "Spread":
        return dataclasses.replace(self, inner=self.inner.trainable())


def spread(tree: Any, batch: NamedSharding) -> Any:
    """The tree with copies of each adapter in it, one for each part that a batch of this sharding comes in.

    The i-th entry of the sharding's spec splits the i-th axis of the batch, and is taken to split the i-th axis, among
    those that are not multiplied away, of whatever an adapted weight is multiplied with. Where that is not so the
    numbers are the same, and the communication is more.
    """
    sizes = [math.prod(batch.mesh.shape[name] for name in names_of(entry)) for entry in batch.spec]
    if math.prod(sizes) == 1 or jax.sharding.AxisType.Explicit in batch.mesh.axis_types:
        return tree  # explicit axes leave the compiler nothing to decide

    def copies(array: jax.Array, _: Layout, n: int) -> jax.Array:
        shape = (*array.shape[:n], *sizes, *array.shape[n:])
        free = P.UNCONSTRAINED
        spec = P(*[free] * n, *batch.spec, *[free] * (array.ndim - n))
        copied = jnp.broadcast_to(jnp.expand_dims(array, range(n, n + len(sizes))), shape)
        return jax.lax.with_sharding_constraint(copied, NamedSharding(batch.mesh, spec))

    def spread_one(node: Any) -> Any:
        if not is_adapter(node):
            return node
        axes, n = node.axes, len(node.axes.stack)
        inner = node.rebuild(_with_copies(axes, len(sizes)), functools.partial(copies, n=n), stack_only=True)
        return Spread(inner, axes, tuple(sizes))

    return jax.tree.map(spread_one, tree, is_leaf=is_adapter)


def add_up(grads: Any, batch: NamedSharding) -> Any:
    """The gradient of a tree, from that of its copies for a batch of this sharding: one reduction over all devices."""
    names = tuple(name for entry in batch.spec for name in names_of(entry))

    def total(array: jax.Array, _: Layout, n: int, copies: int) -> jax.Array:
        array = array.reshape(*array.shape[:n], -1, *array.shape[n + copies :])
        free = P.UNCONSTRAINED
        spec = P(*[free] * n, names, *[free] * (array.ndim - n - 1))
        return jax.lax.with_sharding_constraint(array, NamedSharding(batch.mesh, spec)).sum(n)

    def add_one(node: Any) -> Any:
        if not isinstance(node, Spread):
            return node
        n = len(node.axes.stack)
        return node.inner.rebuild(node.axes, functools.partial(total, n=n, copies=len(node.counts)), stack_only=True)

    return jax.tree.map(add_one, grads, is_leaf=is_adapter)


def _with_copies(axes: KernelAxes, n: int) -> KernelAxes:
    ndim = sum(map(len, axes))
    return axes._replace(stack=(*axes.stack, *range(ndim, ndim + n)))


def _without_copies(inner: Adapter, which: Sequence[int], ndim: int) -> Adapter:
    for i in sorted(which, reverse=True):
        inner = inner.replace_axes(ndim + i, 1, 0, lambda array, at: jax.lax.index_in_dim(array, 0, at, keepdims=False))
    return inner
