"""What the members of a population train, as one tree: adapters stacked with padded ranks, and other arrays beside."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import NamedSharding

from lora_jax.adapters.stack import pad, rank_of, stack, unpad, zero_padding
from lora_jax.core.adapter import is_adapter
from lora_jax.core.argument_checks import check_is
from lora_jax.core.arrays import describe, is_key
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.training.argument_checks import check_taken


def stack_trees(call: str, members: Sequence[Any], rank: int | None = None) -> Any:
    """Return trees that hold adapters as one, as `stack` does it, other arrays one beside the other."""
    check_is(call, "members", members, (list, tuple), "a list of what each member trains, [adapters, others]")
    if not members:
        raise LoraError(f"{call}: there are no members, expected the adapters of one at least.")
    check_taken(call, list(members))
    named = [flatten_with_names(member, is_leaf=is_adapter) for member in members]
    first, _, tree = named[0]
    for i, (names, _, other) in enumerate(named):
        if names != first or other != tree:
            missing = [name for name in first if name not in names] or [name for name in names if name not in first]
            at = f" at {missing[0]!r}" if missing else ""
            raise LoraError(f"{call}: member {i} is another tree than member 0{at}: all train the same paths.")
    adapters = [
        {name: leaf for name, leaf in zip(names, leaves, strict=True) if is_adapter(leaf)} for names, leaves, _ in named
    ]
    stacked: dict[str, Any] = dict(stack(adapters, rank)) if adapters[0] else {}
    for j, name in enumerate(first):
        if name not in stacked:
            arrays = [jnp.asarray(leaves[j]) for _, leaves, _ in named]
            if len({(array.shape, array.dtype) for array in arrays}) > 1:
                found = ", ".join(map(describe, arrays))
                raise LoraError(f"{call}: {name!r} is {found} in the members, expected arrays of one shape and dtype.")
            stacked[name] = jnp.stack(arrays)
    return jax.tree.unflatten(tree, [stacked[name] for name in first])


def keep_padding(tree: Any) -> Any:
    """Return a member's tree with zeros where its adapters are padded, whatever an optimizer did there."""
    return _map_adapters(zero_padding, tree)


def unpadded(tree: Any) -> Any:
    return _map_adapters(lambda adapter: unpad("member", adapter), tree)


def _map_adapters(change: Callable[[Any], Any], tree: Any) -> Any:
    return jax.tree.map(lambda node: change(node) if is_adapter(node) else node, tree, is_leaf=is_adapter)


def padded_like(stacked: Any, tree: Any) -> Any:
    """Return the tree of a new member, with the ranks that those of the population are padded to."""
    names, nodes, _ = flatten_with_names(stacked, is_leaf=is_adapter)
    ranks = {name: rank_of(node) for name, node in zip(names, nodes, strict=True) if is_adapter(node)}
    names, nodes, treedef = flatten_with_names(tree, is_leaf=is_adapter)
    for name, node in zip(names, nodes, strict=True):
        if name in ranks and rank_of(node) > ranks[name]:
            raise LoraError(
                f"Population.replace: {name!r} has rank {rank_of(node)}, and the population is padded to "
                f"{ranks[name]}: make it with Population.create(..., rank={rank_of(node)})."
            )
    padded = {name: pad(node, ranks[name]) for name, node in zip(names, nodes, strict=True) if name in ranks}
    return jax.tree.unflatten(treedef, [padded.get(name, node) for name, node in zip(names, nodes, strict=True)])


def put(array: jax.Array, place: NamedSharding) -> jax.Array:
    """Return an array in its place on a mesh, whose devices may be those of several hosts: each has the whole array."""
    if not array.is_fully_addressable or place.is_fully_addressable:
        return jax.device_put(array, place)
    if is_key(array):
        return jax.random.wrap_key_data(put(jax.random.key_data(array), place), impl=jax.random.key_impl(array))
    own = np.asarray(array)
    return jax.make_array_from_callback(own.shape, place, lambda index: own[index])


def whole(tree: Any) -> Any:
    """Return a tree whose arrays each host has whole. Where several hosts have parts of one, all of them call it."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, P()))  # type: ignore[attr-defined]

    return jax.tree.map(one, tree)


def rank_text(tree: Any) -> str:
    """Return the rank of a member's adapters, or the least and the greatest."""
    nodes = [node for node in jax.tree.leaves(tree, is_leaf=is_adapter) if is_adapter(node)]
    ranks = sorted({rank_of(node) for node in nodes})
    return "-".join(map(str, dict.fromkeys([ranks[0], ranks[-1]]))) if ranks else ""
