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
    part: Callable[..., Any], batch: Sequence[Any], key: jax.Array | None, model_state: Any, n: int, axes: Sequence[str]
) -> tuple[Any, Any]:
    """Return the sums over n microbatches, computed one after the other by a scan, and the last model state.

    Args:
        part: `part(batch, key, model_state)` -> what is summed, and the model state for the next part.
        batch: that is cut.
        key: of which each part gets another one.
        model_state: for the first part.
        n: number of parts.
        axes: of a `shard_map` around, over whose devices all results may differ.

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

    def one(model_state: Any, i: jax.Array, cut: Sequence[jax.Array]) -> tuple[Any, Any]:
        rest = iter(cut)
        here = [next(rest) if cuts else leaf for cuts, leaf in zip(rows, leaves, strict=True)]
        own = None if key is None else jax.random.fold_in(key, i)
        return part(unwrapped(jax.tree.unflatten(tree, here)), own, model_state)

    def add(total: jax.Array, array: jax.Array) -> jax.Array:
        return vary(total + array.astype(total.dtype), axes)

    def step(carry: tuple[Any, Any], xs: Any) -> tuple[Any, None]:
        more, model_state = one(carry[1], *xs)
        return (jax.tree.map(add, carry[0], more), jax.tree.map(lambda leaf: vary(leaf, axes), model_state)), None

    try:
        shapes, _ = jax.eval_shape(lambda: one(model_state, jnp.zeros((), jnp.int32), [c[0] for c in cut]))
    except Exception as error:
        error.add_note(
            f"With microbatches={n} the loss gets parts of the batch, of shapes {[list(c.shape[1:]) for c in cut]}. "
            "Mark what is no batch, as in lora.Unbatched(class_weights); what a model carries from step to step goes "
            "into lora.TrainState.create(..., model_state=state)."
        )
        raise
    zeros = jax.tree.map(lambda s: vary(jnp.zeros(s.shape, accumulator(s.dtype)), axes), shapes)
    return lax.scan(step, (zeros, model_state), (jnp.arange(n), cut))[0]
