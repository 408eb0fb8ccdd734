"""The state of a training run: what is trained, its optimizer's state, and all else that a step changes."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P
from jax.sharding import NamedSharding

from lora_jax.core.argument_checks import check_key, check_tree
from lora_jax.core.arrays import concrete
from lora_jax.core.errors import LoraError
from lora_jax.core.serialization import register_node
from lora_jax.sharding.devices import on_mesh
from lora_jax.training.argument_checks import check_optimizer, check_taken
from lora_jax.training.hyperparameters import check_positive

State = TypeVar("State")
LARGEST_SCALE = 2.0**24  # that a loss scale grows to


@register_node("lora_jax.LossScale")
@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for fp16: the loss is multiplied by a scale, and its gradient divided by it.

    The scale is halved after a gradient that is not finite, and doubled after `interval` finite ones in a row, up to
    2^24: beyond that it would run into fp32's infinity where no gradient ever overflows, and not come back.
    Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740.

    Attributes:
        value: the scale, f32.
        finite: finite gradients since the scale last changed, i32.
        interval: after how many of these it is doubled.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> scale = lora.LossScale.create(1024)
    >>> float(scale.update(jnp.array(False)).value)
    512.0
    """

    value: jax.Array  # f32, the scale
    finite: jax.Array  # i32, finite gradients since the scale last changed
    interval: int = field(default=2000, metadata={"static": True})

    @classmethod
    def create(cls, value: float = 2.0**15, interval: int = 2000) -> "LossScale":
        """Return the scale before the first step.

        Args:
            value: the scale, above 0.
            interval: after how many finite gradients in a row it is doubled.

        Raises:
            LoraError: the value is not a finite number above 0, or the interval no whole number above 0.
        """
        if not isinstance(value, jax.Array):  # which may be traced
            check_positive("LossScale.create", "value", value, 2.0**15)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise LoraError(f"LossScale.create(interval={interval!r}): expected a whole number of at least 1.")
        return cls(jnp.float32(value), jnp.zeros((), jnp.int32), interval)

    def update(self, is_finite: jax.Array) -> "LossScale":
        """Return the scale after a gradient that was or was not finite.

        Args:
            is_finite: bool, a scalar.
        """
        grows = self.finite + 1 >= self.interval
        larger = jnp.where(self.value * 2 <= LARGEST_SCALE, self.value * 2, self.value)
        value = jnp.where(is_finite, jnp.where(grows, larger, self.value), jnp.maximum(self.value / 2, 1.0))
        return LossScale(value, jnp.where(is_finite & ~grows, self.finite + 1, 0), self.interval)


@register_node("lora_jax.TrainState")
@dataclass(frozen=True)
class TrainState:
    """All that a training step changes. A step takes the state and returns the next one.

    `flax.serialization` writes it, and programs of `jax.export` take it as an argument once optax's own states are
    registered, for each kind in it, as
    `jax.export.register_namedtuple_serialization(optax.ScaleByAdamState, serialized_name="optax.ScaleByAdamState")`.

    Attributes:
        step: steps taken, i32.
        trainable: adapters, or a tree that holds them beside whatever else is trained.
        opt_state: the optimizer's.
        skipped: the number of steps taken whose gradient was not finite, which changed nothing, i32.
        key: a random key, from which the loss gets a new one at each step; or None.
        loss_scale: for fp16; or None.
        model_state: what the model carries from step to step, such as batch statistics: any pytree, or None.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=1)})
    >>> state = lora.TrainState.create(lora.init(jax.random.key(0), params, plan), lora.freeze_base(optax.adam(1e-3)))
    >>> int(state.step), state.trainable
    (0, {'w': LoraAdapter(a 4x1, b 1x3)})
    """

    step: jax.Array  # i32, steps taken
    trainable: Any  # adapters, or a tree that holds them beside whatever else is trained
    opt_state: Any
    skipped: jax.Array  # i32, the number of steps taken whose gradient was not finite, which changed nothing
    key: jax.Array | None = None  # random key, from which the loss gets a new one at each step
    loss_scale: LossScale | None = None  # for fp16
    model_state: Any = None  # what the model carries from step to step, such as batch statistics: any pytree

    @classmethod
    def create(
        cls,
        trainable: Any,
        optimizer: optax.GradientTransformation,
        key: jax.Array | None = None,
        loss_scale: LossScale | None = None,
        model_state: Any = None,
    ) -> "TrainState":
        """Return the state before the first step, on the mesh of the trainable arrays.

        The arrays given are copied, as steps reuse the memory of the state: they stay as they are.

        Args:
            trainable: adapters, or a tree that holds them.
            optimizer: any optax transformation.
            key: a random key, if the loss takes one.
            loss_scale: `LossScale.create()`, to train in fp16.
            model_state: what the model carries from step to step beside its parameters, if the loss takes it: batch
                statistics, counts of random numbers; any pytree of arrays.

        Raises:
            LoraError: an argument is none of these; a step has taken an array of `trainable`.
        """
        call = "TrainState.create(trainable, optimizer, key=None)"
        check_tree(call, "trainable", trainable)
        check_optimizer(call, optimizer)
        check_taken(call, trainable)
        if key is not None:
            check_key(call, key)
        zero, given = jnp.zeros((), jnp.int32), (trainable, key, loss_scale, model_state)
        with jax.numpy_dtype_promotion("standard"):  # as in a step
            opt_state = optimizer.init(trainable)
        state = cls(zero, trainable, opt_state, zero.copy(), key, loss_scale, model_state)
        state = with_own_memory(state, given)
        mesh = on_mesh(trainable)
        if mesh is None:
            return state
        whole = NamedSharding(mesh, P())
        return jax.tree.map(lambda leaf: leaf if on_mesh(leaf) else jax.device_put(leaf, whole), state)


def with_own_memory(state: State, given: Any) -> State:
    """Return a state with copies of the arrays that it shares with what was given, or has more than once.

    An optimizer may hold the trained arrays too. Traced arrays and mere shapes stay as they are.
    """
    taken = set(map(id, jax.tree.leaves(given)))

    def own(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
            return jnp.array(leaf, jnp.result_type(leaf))
        if not concrete(leaf):
            return leaf
        copy = leaf.copy() if id(leaf) in taken else leaf
        taken.add(id(leaf))
        return copy

    found: State = jax.tree.map(own, state)
    return found
