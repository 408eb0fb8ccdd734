"""Leaves of a tree that share memory, as tied weights do: what is made of them is made once, and none loses its array.

Arrays are told apart by where their numbers are, so that two arrays over the same memory are known too.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.core.arrays import concrete


def same(leaf: Any) -> Hashable:
    """Return a key that is equal for what consists of the very same arrays: leaves, packed weights, adapters."""
    arrays, tree = jax.tree.flatten(leaf)
    return tree, tuple(map(_key, arrays))


class Uses:
    """How often each piece of memory is still needed, by leaves of a tree that are changed one after the other.

    Args:
        names, leaves: of the tree.
        work: for the leaves that are changed, a key that is equal where the same is done to the same leaf, which
            happens once. All others are needed for good.
        others: what else is needed for good.
    """

    def __init__(self, names: Sequence[str], leaves: Sequence[Any], work: Mapping[str, Hashable], others: Any = None):
        once = {work.get(name, name): leaf for name, leaf in zip(names, leaves, strict=True)}
        self._left = Counter(place for tree in (*once.values(), others) for place in _places(tree))

    def last(self, leaf: Any) -> bool:
        """Note that a leaf is being changed, and return whether its memory is needed by nothing else."""
        places = _places(leaf)
        self._left.subtract(places)
        return not any(self._left[place] for place in places)


def _key(array: Any) -> Hashable:
    """Return a key that is equal for the same array, as long as that lives."""
    if not _readable(array):
        return id(array)
    return array.shape, array.dtype, array.sharding, _places(array)


def _places(tree: Any) -> tuple[Hashable, ...]:
    """Return where in memory the arrays of a leaf or tree are, each part of each array once."""
    parts = [shard for array in jax.tree.leaves(tree) if _readable(array) for shard in array.addressable_shards]
    return tuple(dict.fromkeys((part.device, _address(part.data)) for part in parts))


def _readable(array: Any) -> bool:
    return concrete(array) and not array.is_deleted()


def _address(array: jax.Array) -> int:
    try:
        return array.unsafe_buffer_pointer()
    except jax.errors.JaxRuntimeError:  # not every backend tells; then only one and the same object is known
        return id(array)
