"""What is given to each part of a batch as a whole."""

from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.core.serialization import register_node


@register_node("lora_jax.Unbatched")
@dataclass(frozen=True)
class Unbatched:
    """An argument of a step, or a part of one, that is no batch: class weights, a teacher's outputs, a model's state.

    It is not cut into microbatches, nor split over devices: each part of the batch gets all of it. The loss gets what
    is inside.

    Args:
        value: a pytree of arrays of any shapes. On a mesh they are on every device.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> def loss(trainable, params, rows, weights):
    ...     return jnp.mean(rows @ weights) * trainable["gain"]
    >>> step = lora.jit_step(loss, optimizer := optax.sgd(0.1), microbatches=2)
    >>> state = lora.TrainState.create({"gain": jnp.ones(())}, optimizer)
    >>> state, metrics = step(state, {}, jnp.ones((4, 3)), lora.Unbatched(jnp.arange(3.0)))
    >>> float(metrics["loss"])
    3.0
    """

    value: Any


def is_unbatched(node: Any) -> bool:
    """Return whether a node of a batch is marked to be no batch."""
    return isinstance(node, Unbatched)


def unwrapped(batch: Any) -> Any:
    """Return the batch as the loss gets it, without marks."""
    return jax.tree.map(lambda node: node.value if is_unbatched(node) else node, batch, is_leaf=is_unbatched)
