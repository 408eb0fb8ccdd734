"""What of a function's arguments is no array: flags, strings and None, which are a part of the program."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.tree_util import PyTreeDef

from lora_jax.core.errors import LoraError
from lora_jax.core.paths import is_array


@dataclass(frozen=True)
class Static:
    """The arguments without their arrays. A trace is valid for equal ones and equal shapes."""

    trees: tuple[PyTreeDef, PyTreeDef]  # of the parameters, and of the rest
    key: tuple[Any, ...]  # of each leaf; None stands for an array
    leaves: tuple[Any, ...] = field(compare=False)

    @classmethod
    def of(cls, leaves: Sequence[Any], trees: tuple[PyTreeDef, PyTreeDef]) -> "Static":
        return cls(trees, tuple(map(_key, leaves)), tuple(None if is_array(leaf) else leaf for leaf in leaves))

    def fill(self, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if key is None else leaf for key, leaf in zip(self.key, self.leaves, strict=True)]
        params, others = self.trees
        n = params.num_leaves
        return params.unflatten(filled[:n]), *others.unflatten(filled[n:])


def _key(leaf: Any) -> Any:
    """Return a key that is equal for the same leaf only: 1, 1.0 and True differ, so do 0.0 and -0.0; NaN equals NaN."""
    if is_array(leaf):
        return None
    if isinstance(leaf, float | complex):
        return type(leaf), repr(leaf)
    try:
        hash(leaf)
    except TypeError:
        raise LoraError(
            f"an argument holds a {type(leaf).__name__}, which is neither an array nor hashable: "
            "pass it as a jax.Array, or bind it with functools.partial before lora_apply."
        ) from None
    return type(leaf), leaf
