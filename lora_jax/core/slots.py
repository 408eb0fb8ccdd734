"""Products of which each example has factors of its own, out of a bank of slots.

A bank is an operand or an adapter all of whose arrays have a leading axis of slots. An example names its slot by a
number; one that names none, -1 or whatever is no slot, has factors of zeros: the base alone.

Inside `over_examples` (transform/per_example.py) each product is written for one example and mapped over all of them.
So there the number of examples, of rows of each, and of slots are known from shapes, and one of three ways is taken.
All give the same numbers, up to the order of sums:

- blocks: examples are sorted by their slots and cut into blocks of one slot each, for many examples of few slots;
- a loop over the examples, which reads each factor where it lies: for few rows of each, on CPUs;
- gathered: the factors of each example are copied out of the bank, and all examples are one batched product.

Axes: E examples, T rows of each, S slots, d inputs, k outputs, r rank, N blocks of m examples.
"""

import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from lora_jax.core.arrays import accumulator
from lora_jax.core.factor_products import dot, in_turn, matmul
from lora_jax.core.moved import moved
from lora_jax.core.products import Matmul, Product, add_lowrank

Bank = TypeVar("Bank")

FULLEST = 4  # of blocks of examples, at most one in so many is padding of a slot's last block


def slots_of(bank: Any) -> int:
    """Return the number of slots."""
    return int(jax.tree.leaves(bank)[0].shape[0])


def is_used(bank: Any, slot: jax.Array) -> jax.Array:
    """Return whether a number is a slot of a bank; the others stand for the base alone."""
    return (slot >= 0) & (slot < slots_of(bank))


def picked(bank: Bank, slot: jax.Array) -> Bank:
    """Return what is in a slot, or zeros where there is no such slot; the derivative adds to that slot alone."""
    slots = slots_of(bank)
    index = jnp.where(is_used(bank, slot), slot, slots)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[index].get(mode="fill", fill_value=0), bank)


def add_chosen(product: Product, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    """Return y + x @ A @ B in y's dtype, with the factors of a slot; a [S, *stack, *inputs, r], b alike.

    Call it under a `jax.vmap` over slots that is inside of any derivative.
    """
    return _add_chosen(product, a, b, slot)


def _add_picked(product: Product, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    return add_lowrank(product, picked(a, slot), picked(b, slot))


_add_chosen = custom_vmap(_add_picked)


@_add_chosen.def_vmap
def _over_examples(
    examples: int, batched: Any, product: Product, a: jax.Array, b: jax.Array, slot: jax.Array
) -> tuple[jax.Array, bool]:
    """Add to the products of all examples at once."""
    flags = jax.tree.leaves(batched)
    plain = (
        isinstance(product, Matmul)
        and not product.axes.stack
        and product.origin is None
        and product.h is None
        and flags == [True, True, False, False, True]  # of x, y, a, b and slot
        and a.shape[-1] > 0
    )
    if plain:
        return _matrices(product, a, b, slot), True
    leaves, tree = jax.tree.flatten((product, a, b, slot))

    def one(*leaves: jax.Array) -> jax.Array:
        return _add_picked(*jax.tree.unflatten(tree, leaves))

    return jax.vmap(one, in_axes=tuple(0 if flag else None for flag in flags))(*leaves), True


def _matrices(product: Any, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    """Return all examples' y + x @ A @ B, in the way that copies least.

    On a mesh that the compiler partitions for, axes stay as they are, and each device has the examples that are there.
    """
    examples, slots, rank, inputs = slot.shape[0], a.shape[0], a.shape[-1], a.ndim - 2
    x, y, precision, way = product.x, product.y, product.precision, "gathered"
    if product.flat():
        width = math.prod(a.shape[1:-1])
        x, a, b, inputs = x.reshape(examples, -1, width), a.reshape(slots, width, rank), b.reshape(slots, rank, -1), 1
        way = way_of(examples, x.shape[1], slots, rank)
    if way == "blocks":
        change = _in_blocks(precision, x, a, b, slot)
    else:
        each = _one_by_one if way == "loop" else _gathered
        y, h = in_turn(y, checkpoint_name(each(precision, inputs, x, a, slot).astype(x.dtype), "lora_h"))
        change = each(precision, 1, h, b, slot)
    wide = accumulator(y.dtype, change.dtype)
    return (y.astype(wide) + change.reshape(y.shape).astype(wide)).astype(y.dtype)


def way_of(examples: int, rows: int, slots: int, rank: int) -> str:
    """Return "blocks", "loop" or "gathered", whichever copies least.

    Gathering copies r (d + k) numbers for each example. Blocks copy as many for each block, and the T (d + k) numbers
    of x and y of each example, there and back. A loop copies nothing, but its steps come one after another, which only
    pays where a factor is larger than what it is multiplied with.

    >>> way_of(examples=8, rows=128, slots=8, rank=16), way_of(64, 1, 64, 16), way_of(1024, 1, 8, 16)
    ('gathered', 'loop', 'blocks')
    """
    size = block_size(examples, slots)
    blocks = block_count(examples, slots, size)
    if size > 1 and blocks * (2 * size * rows + rank) < examples * rank:
        return "blocks"
    return "loop" if rows < rank else "gathered"


def block_size(examples: int, slots: int) -> int:
    """Return how many examples a block has: a power of two, such that few places are empty."""
    most = examples // (FULLEST * min(examples, slots))
    return 1 << max(most.bit_length() - 1, 0)


def block_count(examples: int, slots: int, size: int) -> int:
    """Return how many blocks are enough, however the examples are spread over the slots."""
    return (examples + (size - 1) * min(examples, slots)) // size


def _in_blocks(precision: Any, x: jax.Array, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    """Return x @ A @ B [E, T, k], examples of one slot together; x [E, T, d], a [S, d, r], b [S, r, k]."""
    examples, rows, inputs = x.shape
    slots = a.shape[0]
    size = block_size(examples, slots)
    blocks = block_count(examples, slots, size)
    place = places(slot, slots, size, blocks)  # [E]; an example without a slot has none
    source = jnp.full(blocks * size, examples).at[place].set(jnp.arange(examples), mode="drop")
    of_block = jnp.full(blocks, slots).at[place // size].set(slot, mode="drop")
    arranged = moved(x, source, place).reshape(blocks, size * rows, inputs)
    # A is picked as [r, d], which `contract` reads faster too; its gradient then is h^T x, a thin array on the left.
    columns = picked_each(lax.optimization_barrier(jnp.swapaxes(a, 1, 2)), of_block)
    h = dot(arranged, columns, ((2,), (2,)), precision, 1)
    h = checkpoint_name(h.astype(x.dtype), "lora_h")
    change = matmul(h, picked_each(b, of_block), precision, 1).reshape(blocks * size, rows, -1)
    return moved(change, place, source)


def picked_each(bank: jax.Array, slots: jax.Array) -> jax.Array:
    """Return the arrays of several slots, [N, ...] of [S, ...]."""
    return jax.vmap(picked, in_axes=(None, 0))(bank, slots)


def places(slot: jax.Array, slots: int, size: int, blocks: int) -> jax.Array:
    """Return where each example lies, blocks of `size` places after one another, each of examples of one slot.

    Examples of a slot keep their order. One without a slot lies beyond the last place.

    >>> places(jnp.array([2, 0, 2, -1, 2]), slots=3, size=2, blocks=4).tolist()
    [2, 0, 3, 8, 4]
    """
    member = slot[:, None] == jnp.arange(slots)[None]  # [E, S]
    counts = jnp.sum(member, axis=0)
    filled = -(-counts // size) * size
    starts = jnp.cumsum(filled) - filled
    before = jnp.cumsum(member, axis=0) - 1  # examples of the same slot before this one
    place = jnp.sum(jnp.where(member, starts[None] + before, 0), axis=1)
    return jnp.where(jnp.any(member, axis=1), place, blocks * size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _one_by_one(precision: Any, inputs: int, x: jax.Array, w: jax.Array, slot: jax.Array) -> jax.Array:
    """Return x @ W [E, T, n] in fp32 or wider, with x [E, T, d], w [S, d, n] and a slot for each example."""

    def loop(x: jax.Array, w: jax.Array, slot: jax.Array) -> jax.Array:
        index = jnp.clip(slot, 0, w.shape[0] - 1)

        def one(example: Any) -> jax.Array:
            x, i, used = example
            y = matmul(x, lax.dynamic_index_in_dim(w, i, keepdims=False), precision)
            return jnp.where(used, y, jnp.zeros_like(y))

        return lax.map(one, (x, index, is_used(w, slot)))

    return lax.platform_dependent(x, w, slot, cpu=loop, default=functools.partial(_gathered, precision, inputs))


def _gathered(precision: Any, inputs: int, x: jax.Array, w: jax.Array, slot: jax.Array) -> jax.Array:
    """Return x @ W in fp32 or wider, with x [E, *T, *inputs] and w [S, *inputs, ...], of so many axes of inputs."""
    axes = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(1, 1 + inputs))
    return dot(x, picked_each(w, slot), axes, precision, 1)


@_one_by_one.defjvp
def _along_gathered(precision: Any, inputs: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Derive by the gathered form, as that of a loop would add to the whole bank in each step."""
    x, w, slot = primals
    dx, dw, _ = tangents
    _, along = jax.jvp(lambda x, w: _gathered(precision, inputs, x, w, slot), (x, w), (dx, dw))
    return _one_by_one(precision, inputs, x, w, slot), along
