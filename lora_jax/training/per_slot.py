"""An optimizer for each slot of a bank: a slot without rows in a batch is as if there had been no step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.core.errors import LoraError
from lora_jax.training.argument_checks import check_optimizer


def per_slot(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Apply an optimizer to each slot of a bank by itself, and only to slots that the batch used.

    All arrays of its state have a leading axis of slots: moments, counts of steps and so learning rates of schedules,
    norms that are clipped. A slot without rows does not move, its moments do not decay and its count stays.

    Wrap it around everything else: `lora.per_slot(lora.freeze_base(optax.adamw(1e-3)))`. When a slot gets another
    adapter its state begins anew: `jax.tree.map(lambda old, new: old.at[slot].set(new), state, fresh)`, with
    `fresh = optimizer.init(adapters)` of the optimizer that was wrapped.

    Args:
        optimizer: any optax transformation, of the adapters of one slot.

    Returns:
        The transformation of a bank, `{path: adapter}` with arrays [slots, ...]. Its `update` takes `used`, bool
        [slots]: which slots had rows. Without, those are that have a gradient other than zero. That is the same but
        for a slot all of whose rows are masked out in the loss, which then does not move either.

    Raises:
        LoraError: this is no optax transformation; (when applied) `used` is not of as many slots as the bank.

    >>> import jax.numpy as jnp, optax, lora_jax as lora
    >>> optimizer = lora.per_slot(optax.adam(0.1))
    >>> bank = {"w": jnp.ones((3, 2))}
    >>> updates, state = optimizer.update({"w": jnp.array([[1.0, 1], [0, 0], [2, 2]])}, optimizer.init(bank), bank)
    >>> state[0].count.tolist(), updates["w"][1].tolist()
    ([1, 0, 1], [0.0, 0.0])
    """
    check_optimizer("per_slot(optimizer)", optimizer)
    inner = optax.with_extra_args_support(optimizer)

    def update(
        gradients: Any, state: Any, bank: Any = None, *, used: jax.Array | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        slots = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(gradients)}
        if len(slots) != 1 or (used is not None and used.shape != (*slots,)):
            of_used = "" if used is None else f", and used of shape {list(used.shape)}"
            raise LoraError(f"per_slot: expected one number of slots in all arrays, found {sorted(slots)}{of_used}.")
        if used is None:
            used = _has_gradient(gradients)

        def one(gradients: Any, state: Any, adapters: Any) -> tuple[Any, Any]:
            updates, new = inner.update(gradients, state, adapters, **extra)
            return updates, new

        updates, new = jax.vmap(one)(gradients, state, bank)
        moved = jax.tree.map(lambda u: jnp.where(_along(used, u), u, jnp.zeros_like(u)), updates)
        return moved, jax.tree.map(lambda n, old: jnp.where(_along(used, n), n, old), new, state)

    return optax.GradientTransformationExtraArgs(jax.vmap(inner.init), update)


def _has_gradient(gradients: Any) -> jax.Array:
    """Return for each slot whether any number is not zero; NaN is none."""
    each = [jnp.any(g.reshape(g.shape[0], -1) != 0, axis=1) for g in jax.tree.leaves(gradients)]
    return jnp.any(jnp.stack(each), axis=0)


def _along(used: jax.Array, array: jax.Array) -> jax.Array:
    return used.reshape(-1, *(1,) * (array.ndim - 1))
