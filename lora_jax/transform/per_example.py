"""A batch each of whose examples has an adapter of its own: the function, mapped over batches of one example.

A product knows rows and not examples, and a program may put the two together as it likes. So nobody asks a product
whose rows it has: `jax.vmap` follows the examples through the program, and is exact. A product of x with a frozen
weight stays one product for all examples under it, and so does all else that `jax.vmap` knows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import is_key, is_on_one_device
from lora_jax.core.blocks import Order, block_size, order
from lora_jax.core.errors import LoraError
from lora_jax.core.moved import moved
from lora_jax.core.paths import is_array
from lora_jax.core.picked import slots_of
from lora_jax.core.selected import Axes, SelectedAdapter

_SHARED = "shared"  # in the place of None, which is no leaf of a tree


def has_examples(adapters: Mapping[str, Adapter]) -> bool:
    """Return whether adapters are chosen for each example of a batch."""
    return any(_is_of_examples(node) for node in _nodes(adapters))


def _nodes(adapters: Mapping[str, Adapter]) -> list[Any]:
    return jax.tree.leaves(adapters, is_leaf=_is_of_examples)


def _is_of_examples(node: Any) -> bool:
    return isinstance(node, SelectedAdapter) and jnp.ndim(node.slot) == 1


def over_examples(
    apply: Callable[..., Any], params: Any, adapters: Mapping[str, Adapter], args: Sequence[Any], kwargs: Any
) -> Any:
    """Return `apply` for each example with its own adapters, as batches of one, put together again.

    Random keys of the adapters, those of dropout, are other ones for each example.

    Raises:
        LoraError: an argument has not as many examples along its axis as there are ids; a result has not one example
            along its axis; the adapters are of several selections.
    """
    nodes, tree = jax.tree.flatten(adapters, is_leaf=_is_of_examples)
    chosen = [node for node in nodes if _is_of_examples(node)]
    first, count = chosen[0], chosen[0].slot.shape[0]
    for node in chosen:
        if (node.slot.shape[0], node.in_axes, node.out_axes) != (count, first.in_axes, first.out_axes):
            raise LoraError("adapters of one call come from several calls of lora.select, which are of other examples.")
    leaves, arguments = jax.tree.flatten((tuple(args), kwargs))
    axes = _axes_of(args, kwargs, first.in_axes)
    _check_examples(args, kwargs, axes, count)
    moving = [leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]
    moving_axes = [axis for axis in axes if axis is not None]
    slots = list({id(node.slot): node.slot for node in chosen}.values())  # one, unless select was called several times
    numbers = {id(slot): i for i, slot in enumerate(slots)}
    examples, found = jnp.arange(count), _order(chosen, moving)
    if found is not None:
        slots, examples = [slot[found.source] for slot in slots], found.source
        moving = [_moved(leaf, axis, found) for leaf, axis in zip(moving, moving_axes, strict=True)]

    def one(example: jax.Array, slots: list[jax.Array], moving: list[Any]) -> Any:
        rest = iter(moving)
        given = [
            leaf if axis is None else jnp.expand_dims(next(rest), axis) for leaf, axis in zip(leaves, axes, strict=True)
        ]
        own = [_of_example(node, example, slots, numbers, found is not None) for node in nodes]
        args, kwargs = jax.tree.unflatten(arguments, given)
        return _without_example(apply(params, jax.tree.unflatten(tree, own), *args, **kwargs), first.out_axes)

    in_axes = (0, [0] * len(slots), moving_axes)
    out = jax.vmap(one, in_axes=in_axes, out_axes=first.out_axes)(examples, slots, moving)
    if found is None:
        return out
    leaves, tree = jax.tree.flatten(out)
    axes, back = _for_each_leaf(first.out_axes, out, "out_axes"), Order(found.place, found.source)
    return jax.tree.unflatten(tree, [_moved(leaf, axis, back) for leaf, axis in zip(leaves, axes, strict=True)])


def _order(chosen: Sequence[SelectedAdapter], moving: Sequence[Any]) -> Order | None:
    """Return the order of blocks, if products are better off with examples in it: short ones, many of each slot.

    Then rows are copied once on the way in and once on the way out, in the place of in and out of each product. That
    does not pay for examples with more rows than half the rank, whose factors are gathered (core/slots.py), nor for
    such as come with something larger than their rows, as a cache is.
    """
    count, slots = chosen[0].slot.shape[0], slots_of(chosen[0].inner)
    size = block_size(count, slots)
    is_one_bank = all(node.slot is chosen[0].slot and slots_of(node.inner) == slots for node in chosen)
    if size == 1 or count % size or not is_one_bank or not is_on_one_device(*moving):
        return None
    rank, inputs = max(map(_rank, chosen)), max(map(_inputs, chosen))
    if any(2 * _rows(leaf, count, inputs) > rank for leaf in moving):
        return None
    return order(chosen[0].slot, slots, size)


def _rank(node: SelectedAdapter) -> int:
    """Return the rank of the factors in a bank; 0 for a kind that has none."""
    bank = node.inner
    return max((array.shape[-1] for name, array in bank.arrays().items() if bank.layout[name][-1] == "rank"), default=0)


def _inputs(node: SelectedAdapter) -> int:
    return math.prod(node.axes.sizes(node.kernel_shape())[1])


def _rows(leaf: Any, count: int, inputs: int) -> float:
    """Return of how many rows an example of an array is: each whole number, a token, may become one."""
    numbers = math.prod(leaf.shape) / count
    return numbers / inputs if jnp.issubdtype(leaf.dtype, jnp.inexact) else numbers


def _moved(leaf: Any, axis: int | None, to: Order) -> Any:
    """Return an array with its examples in another order."""
    if axis is None:
        return leaf
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.take(leaf, to.source, axis=axis)
    return jnp.moveaxis(moved(jnp.moveaxis(leaf, axis, 0), *to), 0, axis)


def _of_example(
    node: Any, example: jax.Array, slots: Sequence[jax.Array], numbers: Mapping[int, int], arranged: bool
) -> Any:
    """Return a part of the adapters as one example has it."""
    if _is_of_examples(node):
        number = numbers[id(node.slot)]
        return dataclasses.replace(node, slot=slots[number], selection=number, arranged=arranged)
    if not is_key(node):
        return node
    fold = jax.random.fold_in
    for _ in range(node.ndim):
        fold = jax.vmap(fold, in_axes=(0, None))
    return fold(node, example)


def _axes_of(args: Sequence[Any], kwargs: Mapping[str, Any], in_axes: Axes) -> list[int | None]:
    """Return the axis of examples of each leaf of the arguments; None for what all examples share."""
    if isinstance(in_axes, tuple) and len(in_axes) != len(args):
        raise LoraError(
            f"lora.select(in_axes={in_axes}) has {len(in_axes)} entries, expected one for each argument that follows "
            f"the adapters, found {len(args)}. Keywords have their examples along axis 0."
        )
    of_kwargs = 0 if isinstance(in_axes, tuple) else in_axes
    axes = [*_for_each_leaf(in_axes, tuple(args), "in_axes"), *_for_each_leaf(of_kwargs, kwargs, "in_axes")]
    leaves = jax.tree.leaves((tuple(args), kwargs))
    return [axis if is_array(leaf) and jnp.ndim(leaf) else None for leaf, axis in zip(leaves, axes, strict=True)]


def _for_each_leaf(axes: Axes, tree: Any, name: str) -> list[int | None]:
    """Return an axis for each leaf of a tree, of which `axes` may be the upper part alone."""
    marked = jax.tree.map(lambda axis: _SHARED if axis is None else axis, axes, is_leaf=lambda axis: axis is None)
    try:
        found = jax.tree.leaves(jax.tree.broadcast(marked, tree))
    except ValueError as error:
        raise LoraError(f"lora.select({name}={axes}) is no upper part of what it is for: {error}") from None
    return [None if axis == _SHARED else axis for axis in found]


def _check_examples(args: Any, kwargs: Any, axes: list[int | None], count: int) -> None:
    named, _ = jax.tree_util.tree_flatten_with_path((tuple(args), kwargs))
    for (path, leaf), axis in zip(named, axes, strict=True):
        if axis is None:
            continue
        shape = tuple(leaf.shape)
        if not -len(shape) <= axis < len(shape) or shape[axis] != count:
            of_args = path[0] == jax.tree_util.SequenceKey(0)
            which = f"argument {path[1].idx} after the adapters" if of_args else f"argument {path[1].key!r}"
            where = jax.tree_util.keystr(path[2:])
            raise LoraError(
                f"{which}{where and f', {where},'} has the shape {list(shape)}, expected {count} examples along axis "
                f"{axis}, one for each of the ids. Say where they are, and what all examples share: "
                "lora.select(bank, ids, in_axes=(0, 1, None)) for three arguments after the adapters."
            )


def _without_example(out: Any, out_axes: Axes) -> Any:
    """Return the results of one example without their axes of one example."""
    leaves, tree = jax.tree.flatten(out)
    axes = _for_each_leaf(out_axes, out, "out_axes")
    squeezed = [leaf if axis is None else _squeezed(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)]
    return jax.tree.unflatten(tree, squeezed)


def _squeezed(leaf: Any, axis: int) -> jax.Array:
    shape = jnp.shape(leaf)
    if not -len(shape) <= axis < len(shape) or shape[axis] != 1:
        raise LoraError(
            f"a result of one example has the shape {list(shape)}, and no axis {axis} of that one example: with "
            "lora.select each example is a batch of its own. Say where a result has its examples, and None for one "
            "that is the same for all: lora.select(bank, ids, out_axes=(0, 1, None)). A mean over the batch is a "
            "number for each example: return it as mean[None], and take the mean of all outside of the function."
        )
    return jnp.squeeze(leaf, axis)
