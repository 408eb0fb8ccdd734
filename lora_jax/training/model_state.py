"""The state that a model carries from step to step beside its parameters: batch statistics, counts of random numbers.

A loss that is given one returns a pair, what it returns without one and the next state.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.arrays import accumulator, describe, is_key
from lora_jax.core.errors import LoraError
from lora_jax.core.text import listed

FORM = "`return loss, model_state`, or `return (loss, {name: array}), model_state` to report more"


def split_returned(out: Any, old: Any) -> tuple[Any, Any]:
    """Return the two parts of what a loss with a model state returned: what it returns without one, and the next state.

    The next state gets the containers of the old one, so that it may come back in others, such as a dict for Flax's
    `FrozenDict`.

    Args:
        out: what the loss returned.
        old: the state that it was given.

    Raises:
        LoraError: it is no pair, or the next state has other paths, shapes or dtypes than the old one.
    """
    if not isinstance(out, tuple) or len(out) != 2:
        found = f"a tuple of {len(out)}" if isinstance(out, tuple) else describe(out)
        raise LoraError(
            f"a loss that is given a `model_state` returns the next one beside the loss: {FORM}; found {found}."
        )
    before, after = _by_path(old), _by_path(out[1])
    if before.keys() != after.keys() or any(_differ(before[path], after[path]) for path in before):
        lines = [
            f"model_state{path}: {_said(before, path)} in the state, {_said(after, path)} returned"
            for path in before | after
            if path not in before or path not in after or _differ(before[path], after[path])
        ]
        raise LoraError(
            f"the loss returns a model state that is not like the one it was given:\n{listed(lines)}\nIt returns the "
            f"next one beside the loss, with the same paths, shapes and dtypes: {FORM}."
        )
    return out[0], jax.tree.unflatten(jax.tree.structure(old), [jnp.asarray(after[path]) for path in before])


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _differ(before: Any, after: Any) -> bool:
    """Return whether two leaves have different shapes or dtypes, or the second is no array or number."""
    try:
        kinds = [jax.typeof(leaf) for leaf in (before, after)]
    except TypeError:
        return True
    return (kinds[0].shape, kinds[0].dtype) != (kinds[1].shape, kinds[1].dtype)


def _said(leaves: dict[str, Any], path: str) -> str:
    return describe(leaves[path]) if path in leaves else "nothing"


# Over devices ---------------------------------------------------------------------------------------------------------


def state_to_sum(state: Any, axes: Sequence[str]) -> Any:
    """Return what each device adds to a sum over these axes, from which `state_from_sum` makes one state for all."""
    is_first = lax.axis_index(tuple(axes)) == 0

    def part(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf.astype(accumulator(leaf.dtype))
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        own = jnp.where(is_first, leaf, jnp.zeros_like(leaf))
        return own.astype(jnp.int32) if own.dtype == jnp.bool_ else own

    return jax.tree.map(part, state)


def state_from_sum(total: Any, state: Any, axes: Sequence[str]) -> Any:
    """Return the state of all devices: the means of floats, and of all else, such as counts and keys, the first's."""
    n = lax.psum(1, tuple(axes))

    def whole(total: jax.Array, leaf: jax.Array) -> jax.Array:
        if is_key(leaf):
            return jax.random.wrap_key_data(total, impl=jax.random.key_impl(leaf))
        return (total / n if jnp.issubdtype(leaf.dtype, jnp.inexact) else total).astype(leaf.dtype)

    return jax.tree.map(whole, total, state)
