"""The rows of a batch, cut into microbatches that run one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core._compat import vary
from lora_jax.core.arrays import accumulator
from lora_jax.core.errors import LoraError
from lora_jax.sharding.unbatched import is_unbatched, unwrapped


def check_rows(batch: Sequence[Any], what: str) -> None:
    """Check that all arrays of a batch have as many rows, but for those that are marked to be no batch.

    Args:
        batch: the arguments of the loss after the parameters.
        what: what cuts them, for the message.

    Raises:
        LoraError: arrays have different numbers of rows.
    """
    found: dict[int, str] = {}  # the first array of each number of rows
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch, is_leaf=is_unbatched):
        if has_rows(leaf):
            found.setdefault(len(leaf), f"batch{jax.tree_util.keystr(path)} of shape {list(leaf.shape)}")
    if len(found) > 1:
        raise LoraError(
            f"{what} cuts the arrays of a batch along their first axis, the rows, and they have different numbers of "
            f"them: {', '.join(found.values())}. Mark what is no batch, so that each part gets all of it: "
            "step(state, params, rows, lora.Unbatched(class_weights))."
        )


def has_rows(node: Any) -> bool:
    """Return whether a leaf of a batch is cut: scalars, single random keys and what is marked go to each part."""
    return not is_unbatched(node) and node.ndim > 0


def accumulate(
    part: Callable[..., Any], batch: Sequence[Any], key: jax.Array | None, n: int, axes: Sequence[str]
) -> Any:
    """Return the sum of `part(batch, key)` over n microbatches, computed one after the other by a scan.

    Raises:
        LoraError: arrays have different numbers of rows, or n does not divide them.
    """
    check_rows(batch, f"microbatches={n}")
    leaves, tree = jax.tree.flatten(batch, is_leaf=is_unbatched)
    rows = [has_rows(leaf) for leaf in leaves]
    for leaf, cuts in zip(leaves, rows, strict=True):
        if cuts and len(leaf) % n:
            raise LoraError(f"a batch of shape {list(leaf.shape)} cannot be cut into {n} microbatches of equal size.")
    # Every n-th row, so that on a mesh that splits the rows each device keeps its own.
    cut = [leaf.reshape(-1, n, *leaf.shape[1:]).swapaxes(0, 1) for leaf, cuts in zip(leaves, rows, strict=True) if cuts]

    def one(i: jax.Array, cut: Sequence[jax.Array]) -> Any:
        rest = iter(cut)
        here = [next(rest) if cuts else leaf for cuts, leaf in zip(rows, leaves, strict=True)]
        return part(unwrapped(jax.tree.unflatten(tree, here)), None if key is None else jax.random.fold_in(key, i))

    def add(total: jax.Array, array: jax.Array) -> jax.Array:
        return vary(total + array.astype(total.dtype), axes)

    def step(sums: Any, xs: Any) -> tuple[Any, None]:
        return jax.tree.map(add, sums, one(*xs)), None

    shapes = jax.eval_shape(lambda: one(jnp.zeros((), jnp.int32), [c[0] for c in cut]))
    zeros = jax.tree.map(lambda s: vary(jnp.zeros(s.shape, accumulator(s.dtype)), axes), shapes)
    return lax.scan(step, zeros, (jnp.arange(n), cut))[0]
