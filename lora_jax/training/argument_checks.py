"""Checks of what training is given: optimizers, learning rates, masks, and states that are replicated or are not."""

from typing import Any

import jax
import numpy as np

from lora_jax.core.argument_checks import TAKEN_BY_A_STEP, check_function, check_is, check_kept, is_optimizer, refuse
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names, is_array


def check_optimizer(call: str, optimizer: Any) -> None:
    """Raise unless this is an optax transformation."""
    if is_optimizer(optimizer):
        return
    is_rate = isinstance(optimizer, int | float) and not isinstance(optimizer, bool)
    made = f"optax.adamw({optimizer if is_rate else '1e-3'})"
    called = f": call it with a learning rate, as in {made}" if callable(optimizer) else f", such as {made}"
    refuse(call, "optimizer", optimizer, f"an optax transformation{called}")


def check_learning_rate(call: str, rate: Any) -> None:
    """Raise unless this is a number, which may be traced, or a schedule."""
    if not (callable(rate) or is_array(rate) or isinstance(rate, int | float | np.number)) or isinstance(rate, bool):
        refuse(call, "learning_rate", rate, "a number, such as 1e-4, or a schedule of optax")


def check_microbatches(n: Any) -> None:
    """Raise unless this is a whole number of at least 1."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise LoraError(f"microbatches is {n!r}, expected a whole number of at least 1.")


def check_step(call: str, loss: Any, optimizer: Any, microbatches: Any) -> None:
    """Raise unless a step can be made of these."""
    check_function(call, "loss", loss)
    check_optimizer(call, optimizer)
    check_microbatches(microbatches)


def check_mask(call: str, mask: Any, tree: Any) -> None:
    """Raise unless a mask holds booleans, and is one of this tree: one of them may stand for a whole part."""
    for leaf in jax.tree.leaves(mask):
        if not (isinstance(leaf, int | np.generic) or (is_array(leaf) and leaf.ndim == 0)):
            made = "a tree of booleans, such as lora.trainable_mask makes of what is trained"
            refuse(call, "mask", leaf, made, "is" if leaf is mask else "holds")
    try:
        jax.tree.map(lambda *_: None, mask, tree)
    except ValueError:
        ours, theirs = (flatten_with_names(one)[0] for one in (mask, tree))
        raise LoraError(
            f"{call}: `mask` is of another tree than what is trained: it has {_some(ours)}, expected {_some(theirs)}, "
            "or parts of these. Make it of that tree, or give the function that makes it: lora.trainable_mask."
        ) from None


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:4])) + ", ..." * (len(names) > 4) if names else "nothing"


def check_state(call: str, state: Any, kind: type, replicated: bool = False) -> None:
    """Raise unless a state is one, of the class `TrainState`, with an axis of devices or without it."""
    check_is(call, "state", state, kind, "a TrainState: lora.TrainState.create(trainable, optimizer)")
    ndim = getattr(state.step, "ndim", 0)
    if replicated and not ndim:
        raise LoraError(
            f"{call}: `state` has no leading axis of devices, which pmap cuts: flax.jax_utils.replicate(state), the "
            "same of the parameters, or lora.pmap_step(loss, optimizer, replicated=False)."
        )
    if ndim and not replicated:
        raise LoraError(
            f"{call}: `state` has a leading axis of {state.step.shape[0]}, as pmap takes it, expected one state: "
            "flax.jax_utils.unreplicate(state), or lora.pmap_step; and jax.vmap(step) for several states."
        )


def check_replicated(call: str, step: Any, params: Any) -> None:
    """Raise unless the base has a leading axis of devices, as a state has; `step` is the state's count of steps."""
    names, leaves, _ = flatten_with_names(params)
    for name, leaf in zip(names, leaves, strict=True):
        if is_array(leaf) and leaf.shape[:1] != step.shape:
            raise LoraError(
                f"{call}: the parameter {name!r} is {list(leaf.shape)}, expected a leading axis of {step.shape[0]} "
                "devices, as the state has: flax.jax_utils.replicate(params)."
            )


def check_taken(call: str, state: Any) -> None:
    """Raise if a step has taken the arrays of a state."""
    names, leaves, _ = flatten_with_names(state)
    check_kept(zip(names, leaves, strict=True), TAKEN_BY_A_STEP, f"{call}: ")
