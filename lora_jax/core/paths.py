"""Names ("paths") for the leaves of any pytree: `layers_0/query/kernel`.

Rules, adapters, messages and files use the same names. Flax's NNX keeps each array one level down, under `value`; that
level is left out, so that a model has the same names in Linen and in NNX.
"""

import difflib
import heapq
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import GetAttrKey, PyTreeDef, keystr, tree_flatten_with_path

from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, is_packed
from lora_jax.core.text import printable

COMPARED = 1000  # names that are compared with one that is not there; each takes up to a millisecond
COMPARED_CHARACTERS = 200


class Reader(NamedTuple):
    """Reads the packed weights of another library."""

    knows: Callable[[Any], bool]  # whether a node of a tree is one
    read: Callable[[Any], Packed]


READERS: list[Reader] = []  # filled by the formats in `bases`


def flatten_with_names(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any], PyTreeDef]:
    """Return the names and the leaves of a pytree, and its treedef.

    A packed weight is one leaf; one of another library is converted to this library's.

    >>> flatten_with_names({"b": 1, "a": [2, 3]})[:2]
    (['a/0', 'a/1', 'b'], [2, 3, 1])

    Raises:
        LoraError: two leaves have the same name, as in `{"a/b": x, "a": {"b": y}}`; a packed weight of another library
            cannot be read.
    """
    keyed, treedef = tree_flatten_with_path(
        tree, is_leaf=lambda node: is_packed(node) or _reader(node) is not None or bool(is_leaf and is_leaf(node))
    )
    below: dict[tuple[Any, ...], int] = {}  # the number of leaves below each node
    for path, _ in keyed:
        for depth in range(len(path)):
            below[path[:depth]] = below.get(path[:depth], 0) + 1
    names = [_name(path, below) for path, _ in keyed]
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    if repeated := [name for name, count in seen.items() if count > 1]:
        raise LoraError(
            f"two parameters have the same path {repeated[0]!r}: rename one of them, paths join keys by '/'."
        )
    return names, [_own(name, leaf) for name, (_, leaf) in zip(names, keyed, strict=True)], treedef


def _reader(node: Any) -> Callable[[Any], Packed] | None:
    """Return the function that reads a packed weight of another library; None for all else."""
    return next((reader.read for reader in READERS if reader.knows(node)), None)


def _own(name: str, leaf: Any) -> Any:
    """Return a leaf, converted if it is a packed weight of another library."""
    read = _reader(leaf)
    if read is None:
        return leaf
    try:
        return read(leaf)
    except LoraError as error:
        raise LoraError(f"{name!r} {error}") from None


def nearest(name: str, candidates: Iterable[str], n: int = 5) -> list[str]:
    """Return the n candidates that are most like a path or a pattern, best first, as error messages show them.

    Of very many candidates, those with most words of the name are compared.

    >>> nearest(".*/qeury/kernel", ["a/query/kernel", "a/query/bias", "norm/scale"], n=1)
    ['a/query/kernel']
    """
    plain = re.sub(r"[\\^$.*+?()\[\]{}|]+", "", name).strip("/")[:COMPARED_CHARACTERS]
    some = [*candidates]
    if len(some) > COMPARED:
        words = dict.fromkeys(re.findall(r"\w+", name))
        shared = {one: -sum(word in words for word in re.findall(r"\w+", one)) for one in some}
        some = heapq.nsmallest(COMPARED, shared, key=shared.__getitem__)
    ratios = {one: -difflib.SequenceMatcher(None, plain, one[:COMPARED_CHARACTERS]).ratio() for one in some}
    return [printable(one) for one in heapq.nsmallest(n, ratios, key=ratios.__getitem__)]


def is_array(leaf: Any) -> bool:
    """Return whether a leaf is an array or the shape of one, which is traced, unlike a flag or a string."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Packed)


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Return the random key of a path: the same on every host, whatever other paths there are."""
    return jax.random.fold_in(key, path_hash(path))


def path_hash(path: str) -> int:
    """Return 32 bits of a path, which `path_key` folds into a key."""
    return zlib.crc32(path.encode())


def _name(path: tuple[Any, ...], below: dict[tuple[Any, ...], int]) -> str:
    if len(path) > 1 and path[-1] == GetAttrKey("value") and below[path[:-1]] == 1:
        path = path[:-1]  # NNX's own level; a field that a user calls value has others beside it
    return keystr(path, simple=True, separator="/")
