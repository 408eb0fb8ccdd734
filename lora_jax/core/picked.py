"""What is in the slots of a bank: an operand or an adapter all of whose arrays have a leading axis of slots."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Bank = TypeVar("Bank")


def slots_of(bank: Any) -> int:
    """Return the number of slots."""
    return int(jax.tree.leaves(bank)[0].shape[0])


def is_used(bank: Any, slot: jax.Array) -> jax.Array:
    """Return whether a number is a slot of a bank; the others stand for the base alone."""
    return (slot >= 0) & (slot < slots_of(bank))


def picked(bank: Bank, slot: jax.Array) -> Bank:
    """Return what is in a slot, or zeros where there is no such slot; the derivative adds to that slot alone."""
    slots = slots_of(bank)
    index = jnp.where(is_used(bank, slot), slot, slots)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[index].get(mode="fill", fill_value=0), bank)


def picked_each(bank: jax.Array, slots: jax.Array) -> jax.Array:
    """Return the arrays of several slots, [N, ...] of [S, ...]."""
    return jax.vmap(picked, in_axes=(None, 0))(bank, slots)
