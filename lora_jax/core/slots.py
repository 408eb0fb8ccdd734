"""Products of which each example has factors of its own, out of a bank of slots.

A bank is an operand or an adapter all of whose arrays have a leading axis of slots. An example names its slot by a
number; one that names none, -1 or whatever is no slot, has factors of zeros: the base alone.

Inside `over_examples` (transform/per_example.py) each product is written for one example and mapped over all of them.
So there the number of examples, of rows of each, and of slots are known from shapes, and one of three ways is taken.
All give the same numbers, up to the order of sums:

- blocks (core/blocks.py): examples of one slot lie side by side, for many short examples of few slots;
- a loop over the examples, which reads each factor where it lies: for few rows of each, on CPUs;
- gathered: the factors of each example are copied out of the bank, and all examples are one batched product.

Axes: E examples, T rows of each, S slots, d inputs, k outputs, r rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from lora_jax.core.arrays import accumulator, is_on_one_device
from lora_jax.core.blocks import How, block_size, blocks_of, in_blocks
from lora_jax.core.factor_products import dot, in_turn, matmul
from lora_jax.core.picked import is_used, picked, picked_each
from lora_jax.core.products import Matmul, Product, add_lowrank
from lora_jax.core.remade import thin_product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChosenFactor:
    """The first factors of a bank, and the slot that is chosen of them."""

    a: jax.Array  # [S, *inputs, r]
    slot: jax.Array  # i32 []
    selection: int = field(metadata={"static": True})  # the number of the `lora.select` that it is of
    arranged: bool = field(metadata={"static": True})  # whether examples come in the `order` of blocks

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one of them."""
        return self.a.shape[1:]


def chosen_product(product: Product, factors: Sequence[ChosenFactor]) -> jax.Array:
    """Return h = x @ [A1 | A2 | ...] of factors of one selection, by the name `lora_h`.

    As `add_chosen`, call it under a `jax.vmap` over slots that is inside of any derivative.
    """
    first = factors[0]
    h: jax.Array = _THIN[first.arranged](product, *(factor.a for factor in factors), first.slot)
    return h


def add_chosen(product: Product, a: jax.Array, b: jax.Array, slot: jax.Array, arranged: bool = False) -> jax.Array:
    """Return y + x @ A @ B in y's dtype, with the factors of a slot; a [S, *stack, *inputs, r], b alike.

    Call it under a `jax.vmap` over slots that is inside of any derivative. `arranged` says that examples come in the
    `order` of blocks.
    """
    added: jax.Array = _ADDED[arranged](product, a, b, slot)
    return added


def _of_each(one: Callable[..., jax.Array], of_all: Callable[..., jax.Array], arranged: bool) -> Any:
    """Return `one(product, a, ..., slot)` for one example, which under `jax.vmap` is `of_all` where that can be."""
    chosen = custom_vmap(one)

    @chosen.def_vmap
    def _(examples: int, batched: Any, *args: Any) -> tuple[jax.Array, bool]:
        product, a, *_, slot = args
        is_plain = isinstance(product, Matmul) and not product.axes.stack and a.shape[-1] > 0
        if is_plain and product.origin is not None and _way(arranged, product, a, slot) != "gathered":
            product, of_product = (dataclasses.replace(p, origin=None) for p in (product, batched[0]))  # x is kept
            args, batched = (product, *args[1:]), [of_product, *batched[1:]]
        flags = jax.tree.leaves(batched)
        of_examples = [*[True] * len(jax.tree.leaves(product)), *[False] * (len(args) - 2), True]
        if is_plain and product.origin is None and flags == of_examples:
            return of_all(arranged, *args), True
        leaves, tree = jax.tree.flatten(args)
        in_axes = tuple(0 if flag else None for flag in flags)
        return jax.vmap(lambda *leaves: one(*jax.tree.unflatten(tree, leaves)), in_axes=in_axes)(*leaves), True

    return chosen


def _is_flat(product: Any) -> bool:
    """Return whether the axes of rows, of inputs and of outputs are flattened to one each."""
    return is_on_one_device(product.x, product.y)


def _way(arranged: bool, product: Any, a: jax.Array, slot: jax.Array) -> str:
    """Return the way of a product of all examples.

    On a mesh that the compiler partitions for, factors are gathered, and each device has the examples that are there.
    """
    rows = math.prod(product.x.shape[1:]) // math.prod(a.shape[1:-1])
    return way_of(slot.shape[0], rows, a.shape[0], a.shape[-1], arranged) if _is_flat(product) else "gathered"


def _thin(product: Product, *args: jax.Array) -> jax.Array:
    *banks, slot = args
    return thin_product(product, jnp.concatenate([picked(a, slot) for a in banks], axis=-1))


def _thin_of_all(arranged: bool, product: Any, *args: jax.Array) -> jax.Array:
    """Return h = x @ [A1 | A2 | ...] of all examples.

    Banks are joined where that copies less than reading x for each of them: S r columns, and E T rows.
    """
    *banks, slot = args
    rows = math.prod(product.x.shape) // math.prod(banks[0].shape[1:-1])
    if len(banks[0]) * sum(a.shape[-1] for a in banks) <= rows:
        banks = [jnp.concatenate(banks, axis=-1)]
    found = [_thin_of_bank(arranged, product, a, slot) for a in banks]
    return checkpoint_name(jnp.concatenate(found, axis=-1).astype(product.x.dtype), "lora_h")


def _thin_of_bank(arranged: bool, product: Any, a: jax.Array, slot: jax.Array) -> jax.Array:
    """Return x @ A of all examples, in the way that copies least."""
    examples, slots, rank, x = slot.shape[0], a.shape[0], a.shape[-1], product.x
    way, inputs = _way(arranged, product, a, slot), a.ndim - 2
    if _is_flat(product):
        width, inputs = math.prod(a.shape[1:-1]), 1
        a, x = a.reshape(slots, width, rank), x if way == "blocks" else x.reshape(examples, -1, width)
    if way == "blocks":
        # A is picked as [r, d], which `contract` reads faster too; its gradient is h^T x, a thin array on the left.
        columns = lax.optimization_barrier(jnp.swapaxes(a, 1, 2))
        how = How(product.precision, 2, (examples, math.prod(x.shape[1:]) // width, rank))
        return in_blocks(how, x, columns, blocks_of(slot, slots, arranged))
    return (_one_by_one if way == "loop" else _gathered)(product.precision, inputs, x, a, slot)


def _add(product: Product, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    return add_lowrank(product, picked(a, slot), picked(b, slot))


def _add_to_all(arranged: bool, product: Any, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    """Return all examples' y + h @ B. On a mesh that the compiler partitions for, axes stay as they are."""
    y, precision, way = product.y, product.precision, _way(arranged, product, a, slot)
    y, h = in_turn(y, _thin_of_all(arranged, product, a, slot) if product.h is None else product.h)
    b = b.reshape(*b.shape[:2], -1) if _is_flat(product) else b
    if way == "blocks":
        change = in_blocks(How(precision, 1, y.shape), h, b, blocks_of(slot, b.shape[0], arranged))
    else:
        change = (_one_by_one if way == "loop" else _gathered)(precision, 1, h, b, slot)
    wide = accumulator(y.dtype, change.dtype)
    return (y.astype(wide) + change.reshape(y.shape).astype(wide)).astype(y.dtype)


_THIN, _ADDED = (
    {arranged: _of_each(one, of_all, arranged) for arranged in (False, True)}
    for one, of_all in ((_thin, _thin_of_all), (_add, _add_to_all))
)


def way_of(examples: int, rows: int, slots: int, rank: int, arranged: bool = False) -> str:
    """Return "blocks", "loop" or "gathered", whichever copies least.

    Gathering copies r (d + k) numbers for each example. Blocks copy as many for each block, and the T (d + k) numbers
    of x and y of each example that is left over, there and back; of all examples, where they are not `arranged`. A loop
    copies nothing, but its steps come one after another, which only pays where a factor is larger than what it is
    multiplied with. Blocks copy in more steps, and so have to copy half as much as gathering or less.

    >>> way_of(examples=8, rows=128, slots=8, rank=16), way_of(64, 1, 64, 16), way_of(1024, 1, 8, 16)
    ('gathered', 'loop', 'blocks')
    """
    size = block_size(examples, slots)
    moved = slots * size + (0 if arranged else examples)
    if size > 1 and 2 * (examples // size * rank + 2 * moved * rows) < examples * rank:
        return "blocks"
    return "loop" if rows < rank else "gathered"


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
