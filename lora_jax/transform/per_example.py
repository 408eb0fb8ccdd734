"""A batch each of whose examples has an adapter of its own: the function, mapped over batches of one example.

A product knows rows and not examples, and a program may put the two together as it likes. So nobody asks a product
whose rows it has: `jax.vmap` follows the examples through the program, and is exact. A product of x with a frozen
weight stays one product for all examples under it, and so does all else that `jax.vmap` knows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import is_key
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import is_array
from lora_jax.core.selected import Axes, SelectedAdapter


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
    first = next(node for node in nodes if _is_of_examples(node))
    count = first.slot.shape[0]
    for node in nodes:
        if _is_of_examples(node) and (node.slot.shape[0], node.in_axes, node.out_axes) != (
            count,
            first.in_axes,
            first.out_axes,
        ):
            raise LoraError("adapters of one call come from several calls of lora.select, which are of other examples.")
    slots = [node.slot for node in nodes if _is_of_examples(node)]
    leaves, arguments = jax.tree.flatten((tuple(args), kwargs))
    axes = _axes_of(args, kwargs, first.in_axes)
    _check_examples(args, kwargs, axes, count)
    moving = [leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]
    moving_axes = [axis for axis in axes if axis is not None]

    def one(example: jax.Array, slots: list[jax.Array], moving: list[Any]) -> Any:
        rest, chosen = iter(moving), iter(slots)
        given = [
            leaf if axis is None else jnp.expand_dims(next(rest), axis) for leaf, axis in zip(leaves, axes, strict=True)
        ]
        own = [_of_example(node, example, chosen) for node in nodes]
        args, kwargs = jax.tree.unflatten(arguments, given)
        return _without_example(apply(params, jax.tree.unflatten(tree, own), *args, **kwargs), first.out_axes)

    in_axes = (0, [0] * len(slots), moving_axes)
    out_axes = jax.tree.map(lambda axis: 0 if axis is None else axis, first.out_axes, is_leaf=lambda axis: axis is None)
    return jax.vmap(one, in_axes=in_axes, out_axes=out_axes)(jnp.arange(count), slots, moving)


def _of_example(node: Any, example: jax.Array, slots: Any) -> Any:
    """Return a part of the adapters as one example has it."""
    if _is_of_examples(node):
        return dataclasses.replace(node, slot=next(slots), mapped=True)
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
            f"lora.select(in_axes={in_axes}) has {len(in_axes)} axes, expected one for each argument that follows the "
            f"adapters, found {len(args)}. Keywords have their examples along axis 0."
        )
    of_args = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
    of_kwargs = 0 if isinstance(in_axes, tuple) else in_axes
    pairs = [(arg, axis) for arg, axis in zip(args, of_args, strict=True)]
    pairs += [(kwargs[name], of_kwargs) for name in sorted(kwargs)]  # the order of a dict's leaves
    return [axis if _has_examples(leaf) else None for arg, axis in pairs for leaf in jax.tree.leaves(arg)]


def _has_examples(leaf: Any) -> bool:
    return is_array(leaf) and jnp.ndim(leaf) > 0


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
                f"{which}{where and f', {where},'} has the shape {list(shape)}, expected {count} examples along axis {axis}, one for each "
                "of the ids. Say where they are, and what all examples share: lora.select(bank, ids, "
                "in_axes=(0, 1, None)) for three arguments after the adapters."
            )


def _without_example(out: Any, out_axes: Axes) -> Any:
    """Return the results of one example without their axes of one example."""
    if isinstance(out_axes, tuple):
        if not isinstance(out, tuple | list) or len(out) != len(out_axes):
            raise LoraError(
                f"lora.select(out_axes={out_axes}) is of {len(out_axes)} results, but the function returns "
                f"{len(out) if isinstance(out, tuple | list) else 'one'}."
            )
        return tuple(_without_example(one, axis) for one, axis in zip(out, out_axes, strict=True))
    return out if out_axes is None else jax.tree.map(lambda leaf: _squeezed(leaf, out_axes), out)


def _squeezed(leaf: Any, axis: int) -> jax.Array:
    shape = jnp.shape(leaf)
    if not -len(shape) <= axis < len(shape) or shape[axis] != 1:
        raise LoraError(
            f"a result of one example has the shape {list(shape)}, and no axis {axis} of that one example: with "
            "lora.select each example is a batch of its own. A mean over the batch is one number for each example: "
            "lora.select(bank, ids, out_axes=None) returns them stacked; out_axes=(0, None) for the second result alone."
        )
    return jnp.squeeze(leaf, axis)
