"""Which leaves an optimizer may move."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lora_jax.adapters.base import is_adapter


def trainable_mask(tree: Any) -> Any:
    """The same tree of booleans: True at the trained arrays of adapters, False at everything else.

    The one truth for optimizer masks and counts. Adapters may stand anywhere in the tree, also beside the base.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((4, 4))}
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((1, 4)), rules={"w": lora.Lora(rank=1)})
    >>> mask = trainable_mask({"adapters": lora.init(jax.random.key(0), params, plan), "params": params})
    >>> mask["adapters"]["w"].a, mask["adapters"]["w"].b, mask["params"]["w"]
    (True, True, False)
    """
    return jax.tree.map(lambda node: node.trainable() if is_adapter(node) else False, tree, is_leaf=is_adapter)


def freeze_base(
    optimizer: optax.GradientTransformation, mask: Any | Callable[[Any], Any] = trainable_mask
) -> optax.GradientTransformationExtraArgs:
    """The optimizer for what `mask` marks, and no update at all, nor any state, for the rest.

    `optax.masked` alone would hand the gradients of the rest through as updates.

    Args:
        optimizer: any optax transformation.
        mask: a tree of booleans, or a function that makes one from the optimized tree.
    """

    def labels(tree: Any) -> Any:
        marks = mask(tree) if callable(mask) else mask
        return jax.tree.map(lambda trained: "train" if trained else "freeze", marks)

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)
