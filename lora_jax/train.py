"""One training step, pure; and the same jitted, its state donated."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

Loss = Callable[..., jax.Array | tuple[jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training moves: hand it to the step, and go on with the one that comes back."""

    step: jax.Array  # i32, steps taken
    trainable: Any  # adapters, or a tree that holds them beside whatever else is trained
    opt_state: Any

    @classmethod
    def create(cls, trainable: Any, optimizer: optax.GradientTransformation) -> "TrainState":
        return cls(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    params: Any,
    *batch: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state, and metrics: the loss, the norm of its gradient, and what the loss reports.

    The gradient is that of `state.trainable` alone: its tree is theirs, and nothing of the base's size is formed.

    Args:
        loss: `loss(trainable, params, *batch)` -> a scalar, or `(scalar, {name: array})` to report more.
        optimizer: any optax transformation; `lora.freeze_base` where adapters hold frozen arrays.
        state: as `TrainState.create` makes it.
        params: the frozen base.
    """

    def with_metrics(trainable: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = loss(trainable, params, *batch)
        return out if isinstance(out, tuple) else (out, {})

    (value, metrics), grads = jax.value_and_grad(with_metrics, has_aux=True)(state.trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), **metrics}
    return TrainState(state.step + 1, trainable, opt_state), metrics


def jit_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, params, *batch)`: `train_step` under `jax.jit`, the state's buffers donated, never the base's.

    What the state was made from is donated with it: go on with `state.trainable`, not with the first adapters.
    """
    return jax.jit(functools.partial(train_step, loss, optimizer), donate_argnums=0)
