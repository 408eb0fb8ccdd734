"""Products of which each example has factors of its own, with examples of one slot side by side.

In this order, first come the whole blocks: so many examples of one slot each. What is left over of each slot, fewer
examples than a block has, follows slot by slot; last come those without a slot. Factors are then read once for a block,
and rows are copied of what is left over alone, into one more block for each slot. Each of these products is of one
slot, and nothing of a slot is ever multiplied with what belongs to another one, not by zero either: a slot of NaN stays
by itself.

Axes: E examples, P places of an order, T rows of each example, S slots, N blocks of m examples, d inputs, n outputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.factor_products import as_derivative, dot
from lora_jax.core.moved import moved
from lora_jax.core.picked import picked_each
from lora_jax.core.remade import are_there, linear_in_last


def block_size(examples: int, slots: int) -> int:
    """Return how many examples a block has: a power of two, about half of what each slot has of an even mix.

    Larger blocks leave more examples over, smaller ones read factors more often.

    >>> block_size(examples=1024, slots=8), block_size(64, 64)
    (64, 1)
    """
    most = examples // (2 * min(examples, slots))
    return 1 << max(most.bit_length() - 1, 0)


class Order(NamedTuple):
    """Where each example lies. One is the inverse of the other."""

    source: jax.Array  # i32 [P], the example in each place, E where there is none
    place: jax.Array  # i32 [E], the place of each example


def order(slot: jax.Array, slots: int, size: int) -> Order:
    """Return the order for blocks of a size, of examples with these slots; P is E, rounded up to whole blocks.

    Examples of a slot keep their order among themselves.

    >>> order(jnp.array([2, 0, 2, -1, 2]), slots=3, size=2).source.tolist()
    [0, 2, 1, 4, 3, 5]
    """
    examples = slot.shape[0]
    found, of_slot = _counts(slot, slots, size), _of_slot(slot, slots)
    nth = jnp.cumsum(of_slot, axis=0) - 1  # of the examples of its slot
    start = jnp.where(nth < found.whole[None], jnp.cumsum(found.whole)[None], found.left_from[None])
    place = jnp.sum(jnp.where(of_slot, start - found.whole[None] + nth, 0), axis=1)
    without = ~jnp.any(of_slot, axis=1)
    place = jnp.where(without, jnp.sum(found.whole + found.left) + jnp.cumsum(without) - 1, place)
    places = -(-examples // size) * size
    source = jnp.full(places, examples).at[place].set(jnp.arange(examples), unique_indices=True)
    return Order(source, place)


class _Counts(NamedTuple):
    """Examples of each slot, i32 [S]."""

    whole: jax.Array  # in whole blocks
    left: jax.Array  # that are left over
    left_from: jax.Array  # the place of the first of these


def _counts(slot: jax.Array, slots: int, size: int) -> _Counts:
    counts = jnp.sum(_of_slot(slot, slots), axis=0)
    left = counts % size
    whole = counts - left
    return _Counts(whole, left, jnp.sum(whole) + jnp.cumsum(left) - left)


def _of_slot(slot: jax.Array, slots: int) -> jax.Array:
    """Return whether each example is of each slot, [E, S]."""
    return slot[:, None] == jnp.arange(slots)[None]


class Blocks(NamedTuple):
    """Which examples are multiplied together. All products of a program with the same slots share these numbers."""

    order: Order | None  # that examples are brought into for the product; None if they lie in it
    of_block: jax.Array  # i32 [N], the slot of each block; S where it is not of one slot
    source: jax.Array  # i32 [S m], the place of each example that is left over, slot by slot; P where there is none
    place: jax.Array  # i32 [P], the inverse of it; S m where there is none


def blocks_of(slot: jax.Array, slots: int, arranged: bool) -> Blocks:
    """Return the blocks of examples with these slots, i32 [E], which lie in their order if they are `arranged`."""
    size, to = block_size(slot.shape[0], slots), None
    if not arranged:
        to = order(slot, slots, size)
        slot = slot.at[to.source].get(mode="fill", fill_value=slots)
    places = slot.shape[0]
    found, at, nth = _counts(slot, slots, size), jnp.arange(places), jnp.arange(size)[None]
    of_block = jnp.where(at < jnp.sum(found.whole), slot, slots)[::size]
    source = jnp.where(nth < found.left[:, None], found.left_from[:, None] + nth, places).reshape(-1)
    known = jnp.clip(slot, 0, slots - 1)
    is_left = (known == slot) & (at >= found.left_from[known])
    return Blocks(to, of_block, source, jnp.where(is_left, known * size + at - found.left_from[known], slots * size))


class How(NamedTuple):
    """A product of rows with the matrices of a bank."""

    precision: Any
    axis: int  # of W [S, d, n], or [S, n, d], that x is contracted with
    shape: tuple[int, ...]  # of the result, [E, ..., n]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def in_blocks(how: How, x: jax.Array, w: jax.Array, blocks: Blocks) -> jax.Array:
    """Return x @ W of `how.shape` with the matrix of each example's slot, in x's dtype and accumulated in fp32.

    Args:
        how: the product.
        x: [E, ...], the rows of each example.
        w: [S, d, n] or [S, n, d].
        blocks: of the examples.
    """
    return _product(how, x, w, blocks)


@in_blocks.defjvp
def _tangent(how: How, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Derive by x and by W, so that no matrix that was picked for a block is kept for the derivative."""
    x, w, blocks = primals
    dx, dw, _ = tangents
    numbers, tree = jax.tree.flatten(blocks)

    def along_x(w: jax.Array, *others: jax.Array) -> jax.Array:
        *numbers, dx = others
        return _product(how, dx, w, jax.tree.unflatten(tree, numbers))

    def along_w(x: jax.Array, *others: jax.Array) -> jax.Array:
        *numbers, dw = others
        with as_derivative():
            return _product(how, x, dw, jax.tree.unflatten(tree, numbers))

    def wait(sources: list[jax.Array], dy: jax.Array) -> list[jax.Array]:
        other, *numbers = sources
        return [other, *jax.tree.leaves(_after(dy, jax.tree.unflatten(tree, numbers)))]

    y = in_blocks(how, x, w, blocks)
    dy = linear_in_last(along_x, w, *numbers, dx, wait=wait)
    return y, dy + linear_in_last(along_w, x, *numbers, dw, wait=wait).astype(dy.dtype)


def _after(dy: jax.Array, blocks: Blocks) -> Blocks:
    """Return the blocks, such that nothing can be picked or moved for them before dy is there.

    XLA's compiler for CPUs takes barriers away. It also fuses what dy is made of into each of its readers, once for the
    base and once more for the blocks. So there a branch reads dy: an array that goes into one is written out. Its
    number decides about the blocks, by `are_there`.
    """
    if not jnp.issubdtype(dy.dtype, jnp.floating) or 0 in dy.shape:
        return blocks

    def on_cpu(dy: jax.Array, of_block: jax.Array, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, last = (functools.partial(_entry, at=at) for at in (0, -1))
        number = lax.cond(of_block.ravel()[0] >= 0, first, last, dy)
        there = are_there(number)
        return jnp.where(there, of_block, -1), jnp.where(there, source, blocks.place.shape[-1])

    def elsewhere(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, of_block, source = lax.optimization_barrier(arrays)
        return of_block, source

    of_block, source = lax.platform_dependent(dy, blocks.of_block, blocks.source, cpu=on_cpu, default=elsewhere)
    return blocks._replace(of_block=of_block, source=source)


def _entry(x: jax.Array, at: int) -> jax.Array:
    return x[(at,) * x.ndim]


def _product(how: How, x: jax.Array, w: jax.Array, blocks: Blocks) -> jax.Array:
    if blocks.order is not None:
        x = moved(x, *blocks.order)
    places, slots, d, n = x.shape[0], w.shape[0], w.shape[how.axis], w.shape[3 - how.axis]
    dims = (2,), (how.axis,)
    whole = dot(x.reshape(len(blocks.of_block), -1, d), picked_each(w, blocks.of_block), dims, how.precision, 1)
    left = dot(moved(x, blocks.source, blocks.place).reshape(slots, -1, d), w, dims, how.precision, 1)
    left = moved(left.reshape(len(blocks.source), -1, n), blocks.place, blocks.source)
    y = whole.reshape(places, -1, n) + left
    if blocks.order is not None:
        y = moved(y, blocks.order.place, blocks.order.source)
    return y.reshape(how.shape)
