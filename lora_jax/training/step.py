"""One training step as a pure function, and the same under `jax.jit`, `jax.pmap` and `jax.shard_map`."""

import functools
import re
from collections.abc import Callable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import optax
from jax import P
from jax.sharding import Mesh, NamedSharding

from lora_jax.core.argument_checks import check_is
from lora_jax.core.errors import LoraError
from lora_jax.core.partition import names_of, quoted_names
from lora_jax.core.recent import Recent
from lora_jax.sharding.batches import combined_sharding
from lora_jax.sharding.devices import check_together, on_mesh
from lora_jax.sharding.unbatched import is_unbatched
from lora_jax.training.argument_checks import check_replicated, check_state, check_step, check_taken
from lora_jax.training.masks import map_frozen
from lora_jax.training.microbatches import check_rows, has_rows
from lora_jax.training.state import TrainState
from lora_jax.training.value_and_grad import Loss, value_and_grad

Step = Callable[..., tuple["TrainState", dict[str, jax.Array]]]

CALL = "step(state, params, *batch)"  # of the functions that are made here
KEPT_STEPS = 16  # jitted steps that `jit_step` keeps, one for each way in which state and batch are placed


class JitStep(Protocol):
    """A compiled step."""

    def __call__(self, state: TrainState, params: Any, *batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """Take a step, and return the next state and the metrics."""

    def lower(self, state: TrainState, params: Any, *batch: Any) -> jax.stages.Lowered:
        """Lower the step for arguments like these, as `jax.jit(...).lower` does."""


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    params: Any,
    *batch: Any,
    microbatches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
    batch_sharding: NamedSharding | None = None,
    shardings: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step, and return the next state and the metrics.

    The gradient is taken with respect to `state.trainable` alone: nothing of the base's size is formed. If it is not
    finite, the step is counted in `skipped` and changes nothing else. Arrays that an adapter never trains stay as they
    are, whatever the optimizer does.

    Args:
        loss: `loss(trainable, params, *batch)` -> a scalar, `(scalar, {name: array})` to report more, or
            `(scalar, {name: array}, weight)`, as for `value_and_grad`. If the state has a random key, the loss is
            called with a keyword `key`, a new one for each step. If it has a model state, the loss is called with a
            keyword `model_state`, and returns a pair of what it returns otherwise and the next model state.
        optimizer: any optax transformation; `lora.freeze_base` where adapters hold frozen arrays. To clip, chain
            `optax.clip_by_global_norm` before it: it gets the gradient of the whole batch.
        state: as `TrainState.create` makes it.
        params: the frozen base.
        batch: further arguments of the loss, pytrees of arrays `[rows, ...]`; what has no rows is marked, as in
            `lora.Unbatched(class_weights)`.
        microbatches, axis_name, batch_sharding, shardings: as for `value_and_grad`.

    Returns:
        The next state, and the metrics `loss`, `grad_norm`, `skipped`, with a loss scale `loss_scale`, and those that
        the loss reports.

    Raises:
        LoraError: as `value_and_grad`; the state was made with another optimizer.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> def loss(trainable, params, x, model_state):
    ...     mean = 0.9 * model_state["mean"] + 0.1 * x.mean()  # as in BatchNorm
    ...     return jnp.mean((trainable["gain"] * x - mean) ** 2), {"mean": mean}
    >>> optimizer = optax.sgd(0.1)
    >>> state = lora.TrainState.create({"gain": jnp.ones(())}, optimizer, model_state={"mean": jnp.zeros(())})
    >>> state, metrics = train_step(loss, optimizer, state, {}, jnp.arange(4.0))
    >>> round(float(state.model_state["mean"]), 3)
    0.15
    """
    call = "train_step(loss, optimizer, state, params, *batch)"
    check_step(call, loss, optimizer, microbatches)
    check_state(call, state, TrainState)
    _check_optimizer(optimizer, state)
    gradient = value_and_grad(
        loss, microbatches=microbatches, axis_name=axis_name, batch_sharding=batch_sharding, shardings=shardings
    )
    key = None if state.key is None else jax.random.fold_in(state.key, state.step)
    scale = 1.0 if state.loss_scale is None else state.loss_scale.value
    found = gradient(state.trainable, params, *batch, scale=scale, key=key, model_state=state.model_state)
    ((value, metrics), grads), model_state = (found, None) if state.model_state is None else found
    with jax.numpy_dtype_promotion("standard"):  # optax counts on it: its Adam raises a float to an integer
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)

    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(value)
    trainable, opt_state, model_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (trainable, opt_state, model_state),
        (state.trainable, state.opt_state, state.model_state),
    )
    trainable = map_frozen(lambda new, old: old, trainable, state.trainable)
    skipped = state.skipped + (~good).astype(jnp.int32)
    loss_scale = state.loss_scale and state.loss_scale.update(good)
    metrics = {"loss": value, "grad_norm": norm, "skipped": skipped, **metrics}
    if state.loss_scale is not None:
        metrics["loss_scale"] = state.loss_scale.value
    return TrainState(state.step + 1, trainable, opt_state, skipped, state.key, loss_scale, model_state), metrics


def _check_optimizer(optimizer: optax.GradientTransformation, state: TrainState) -> None:
    """Check that a state is one of this optimizer, which takes no time once a step is compiled.

    Raises:
        LoraError: its own state would be of another structure.
    """
    try:
        with jax.numpy_dtype_promotion("standard"):
            expected: Any = jax.tree.structure(jax.eval_shape(optimizer.init, state.trainable))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return  # it looks at the numbers, so that its state is not known from shapes
    found: Any = jax.tree.structure(state.opt_state)
    if found != expected:
        here, there = (
            ", ".join(dict.fromkeys(re.findall(r"namedtuple\[(\w+)", str(tree)))) for tree in (found, expected)
        )
        raise LoraError(
            "the state's `opt_state` is not one of this optimizer for these arrays: it is made of "
            f"{here or 'other parts'}, expected {there or 'none'}. Make the state with the optimizer of the step: "
            "lora.TrainState.create(trainable, optimizer)."
        )


def jit_step(loss: Loss, optimizer: optax.GradientTransformation, *, microbatches: int = 1) -> JitStep:
    """Return `step(state, params, *batch)`: `train_step` under `jax.jit`, on one device or over a mesh.

    The shardings of the arguments decide how it runs: the base is used where its arrays are, the next state is where
    the state was, and the adapters' gradients are summed once over the mesh axes that split the batch. The state's
    buffers are donated, never the base's: use the returned state, not the one that was given.

    `step.lower(state, params, *batch)` lowers the jitted function.

    Args:
        loss, optimizer: as for `train_step`.
        microbatches: as for `value_and_grad`; what is no batch is marked, as in `lora.Unbatched(class_weights)`.

    Returns:
        `step(state, params, *batch)` -> the next state and the metrics, as `train_step` returns them.

    Raises:
        LoraError: an argument is of another kind, such as an optimizer that is none; (when called) as `train_step`.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> params, x, y = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4)), jnp.zeros((2, 3))
    >>> def model(params, x):
    ...     return x @ params["w"]
    >>> apply, optimizer = lora.lora_apply(model), lora.freeze_base(optax.sgd(0.1))
    >>> step = lora.jit_step(lambda adapters, params, x, y: jnp.mean((apply(params, adapters, x) - y) ** 2), optimizer)
    >>> plan = lora.plan(model, params, x, rules={"w": lora.Lora(rank=1)})
    >>> state = lora.TrainState.create(lora.init(jax.random.key(0), params, plan), optimizer)
    >>> state, metrics = step(state, params, x, y)
    >>> int(state.step), float(metrics["loss"])
    (1, 16.0)
    """
    check_step("jit_step(loss, optimizer)", loss, optimizer, microbatches)
    steps = Recent[Any](KEPT_STEPS)  # jitted steps, by the shardings of the batch and the state
    recent: list[tuple[Any, Any, Any]] = []  # the shardings of all arrays, the tree if it matters, and the jitted step

    def placed(state: TrainState, params: Any, batch: Any) -> Any:
        shardings: list[Any] = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(state.trainable)]
        if NamedSharding not in map(type, shardings):
            shardings, tree = [], None  # on no mesh, and jax.jit sees to the rest
        else:
            leaves, tree = jax.tree.flatten((state, batch))
            shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
        for known, known_tree, step in recent:  # nearly always the first: lists of the same objects compare fast
            if known == shardings and (known_tree is None or known_tree == tree):
                return step
        found, is_on_mesh = looked_up(state, params, batch)
        recent.insert(0, (shardings, tree if is_on_mesh else None, found))
        del recent[KEPT_STEPS:]
        return found

    def looked_up(state: TrainState, params: Any, batch: Any) -> tuple[Any, bool]:
        places = on_mesh(state.trainable) and jax.tree.map(lambda leaf: leaf.sharding, state)
        where = places and combined_sharding(batch), tuple(jax.tree.leaves(places)), jax.tree.structure(places)

        def made() -> Any:
            check_together(state.trainable, params)
            return compiled(where[0], places)

        return steps.get(where, made), places is not None

    def compiled(batch_sharding: NamedSharding | None, places: Any) -> Any:
        step = functools.partial(
            train_step,
            loss,
            optimizer,
            microbatches=microbatches,
            batch_sharding=batch_sharding,
            shardings=places and places.trainable,
        )
        if places is None:
            return jax.jit(step, donate_argnums=0)
        return jax.jit(step, donate_argnums=0, out_shardings=(places, NamedSharding(places.step.mesh, P())))

    def step(state: TrainState, params: Any, *batch: Any) -> Any:
        check_state(CALL, state, TrainState)
        try:
            return placed(state, params, batch)(state, params, *batch)
        except (RuntimeError, ValueError):  # the state may have been taken, or the base moved since the first step
            check_taken(CALL, state)
            check_together(state.trainable, params)
            raise

    def lower(state: TrainState, params: Any, *batch: Any) -> Any:
        check_state(CALL, state, TrainState)
        return placed(state, params, batch).lower(state, params, *batch)

    step.lower = lower  # type: ignore[attr-defined]
    return cast(JitStep, step)


def pmap_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    axis_name: str = "batch",
    *,
    microbatches: int = 1,
    replicated: bool = True,
) -> Step:
    """Return `step(state, params, *batch)`: `train_step` under `jax.pmap`, for a batch of `[devices, rows, ...]`.

    What is marked as `lora.Unbatched(...)` has no axis of devices: each gets all of it.

    Args:
        loss, optimizer: as for `train_step`.
        axis_name: the name of the axis of devices, should the loss need it.
        microbatches: for each device.
        replicated: whether state, parameters and the returned state and metrics have a leading axis of devices, as
            `flax.jax_utils.replicate` makes it; then the state is donated.

    Returns:
        `step(state, params, *batch)` -> the next state and the metrics, as `train_step` returns them.

    Raises:
        LoraError: an argument is of another kind, such as an optimizer that is none; (when called) as `train_step`; the
            state or the parameters have no axis of devices where `replicated` says so, or have one where it does not.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> def loss(adapters, params, x):
    ...     return jnp.mean(lora.lora_apply(lambda p, x: x @ p["w"])(params, adapters, x) ** 2)
    >>> step = lora.pmap_step(loss, lora.freeze_base(optax.sgd(0.1)), replicated=False)
    >>> rows = jnp.ones((jax.local_device_count(), 2, 4))  # `step(state, params, rows)`: two rows a device
    """
    check_step("pmap_step(loss, optimizer)", loss, optimizer, microbatches)
    axis = 0 if replicated else None

    def step(state: TrainState, params: Any, batch: tuple[Any, ...]) -> Any:
        return train_step(loss, optimizer, state, params, *batch, microbatches=microbatches, axis_name=axis_name)

    @functools.lru_cache(maxsize=128)
    def mapped(tree: Any, batched: tuple[bool, ...]) -> Any:
        axes = tree.unflatten([0 if is_batched else None for is_batched in batched])
        donated = 0 if replicated else ()
        return jax.pmap(step, axis_name, in_axes=(axis, axis, axes), out_axes=axis, donate_argnums=donated)

    def run(state: TrainState, params: Any, *batch: Any) -> Any:
        check_state(CALL, state, TrainState, replicated)
        nodes, tree = jax.tree.flatten(batch, is_leaf=is_unbatched)
        try:
            return mapped(tree, tuple(not is_unbatched(node) for node in nodes))(state, params, batch)
        except (ValueError, RuntimeError):
            check_taken(CALL, state)
            if replicated:
                check_replicated(CALL, state.step, params)
            raise

    return run


def shard_map_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    batch: P,
    *,
    microbatches: int = 1,
) -> Step:
    """Return `step(state, params, *batch)`: `train_step` under `jax.shard_map` over the axes that split the batch.

    Each device computes on its own rows, as under `pmap`, and one `psum` sums gradients, loss and metrics. The other
    axes of the mesh are left to the compiler, as under `jax.jit`. State and parameters must not be split over the
    batch's axes (fsdp): use `jit_step` for that. The state is donated.

    Args:
        loss, optimizer: as for `train_step`.
        mesh: the devices.
        batch: the spec of the batch's arrays, such as `P("data")`. Scalars, and what is marked as
            `lora.Unbatched(...)`, are on every device.
        microbatches: for each device.

    Returns:
        `step(state, params, *batch)` -> the next state and the metrics, as `train_step` returns them.

    Raises:
        LoraError: the spec names an axis that the mesh lacks, or splits the batch over no axis; (when called) arrays
            have different numbers of rows.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> def loss(adapters, params, x):
    ...     return jnp.mean(lora.lora_apply(lambda p, x: x @ p["w"])(params, adapters, x) ** 2)
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> step = lora.shard_map_step(loss, lora.freeze_base(optax.sgd(0.1)), mesh, jax.P("data"))
    """
    call = "shard_map_step(loss, optimizer, mesh, batch)"
    check_step(call, loss, optimizer, microbatches)
    check_is(call, "mesh", mesh, Mesh, 'a mesh of devices: jax.make_mesh((8,), ("data",))')
    check_is(call, "batch", batch, P, 'the spec of the batch, such as P("data")')
    names = tuple(name for entry in batch for name in names_of(entry))
    if missing := [name for name in names if name not in mesh.shape]:
        raise LoraError(
            f"the batch is split over {missing[0]!r}, an axis that the mesh lacks: it has {dict(mesh.shape)}."
        )
    if not names:
        raise LoraError(
            f"the batch is split over no axis of the mesh: give its spec, such as P({mesh.axis_names[0]!r})."
        )

    def local(state: TrainState, params: Any, rows: tuple[Any, ...]) -> Any:
        return train_step(loss, optimizer, state, params, *rows, microbatches=microbatches, axis_name=names)

    def step(state: TrainState, params: Any, *rows: Any) -> Any:
        if batch[0] is not None:
            check_rows(rows, f"the mesh, over {quoted_names(batch[0])},")
        specs = jax.tree.map(lambda node: batch if has_rows(node) else P(), rows, is_leaf=is_unbatched)
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), specs), out_specs=P(), axis_names=set(names))
        return mapped(state, params, rows)

    return jax.jit(step, donate_argnums=0)
