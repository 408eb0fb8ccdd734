"""One step of all members of a population: `train_step` under `jax.vmap`, over one copy of the base."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import Mesh

from lora_jax.core.argument_checks import check_function, check_is
from lora_jax.core.errors import LoraError
from lora_jax.core.partition import names_of
from lora_jax.core.serialization import register_node
from lora_jax.sharding.unbatched import is_unbatched
from lora_jax.training.argument_checks import check_microbatches, check_taken
from lora_jax.training.member_trees import keep_padding
from lora_jax.training.microbatches import has_rows
from lora_jax.training.population import Optimizer, Population, optimizer_of, taken_names
from lora_jax.training.state import TrainState
from lora_jax.training.step import train_step
from lora_jax.training.value_and_grad import Loss

CALL = "step(population, params, *batch)"  # of the function that is made here


@register_node("lora_jax.PerMember")
@dataclass(frozen=True)
class PerMember:
    """An argument of a population's step, or a part of one, of which each member has its own.

    Args:
        value: a pytree of arrays `[members, ...]`: rows `[members, rows, ...]`, numbers `[members]`. The loss gets the
            member's own.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> lora.PerMember(jnp.array([0.1, 0.2])).value.shape
    (2,)
    """

    value: Any


class PopulationStep(Protocol):
    """A compiled step of a population."""

    def __call__(self, population: Population, params: Any, *batch: Any) -> tuple[Population, dict[str, jax.Array]]:
        """Take a step, and return the next population and the metrics, `[members]` each."""

    def lower(self, population: Population, params: Any, *batch: Any) -> jax.stages.Lowered:
        """Lower the step for arguments like these, as `jax.jit(...).lower` does."""


def population_step(
    loss: Loss,
    optimizer: Optimizer,
    *,
    microbatches: int = 1,
    mesh: Mesh | None = None,
    members: str | None = None,
    data: str | tuple[str, ...] = (),
) -> PopulationStep:
    """Return `step(population, params, *batch)`: `train_step` of each member, jitted, with one product by each weight.

    Each member goes where it would go alone, up to rounding: with its own learning rate, rank, alpha, random key and
    data. A member that is not active is computed and stays as it is. The population's buffers are donated, never the
    base's: use the one that is returned.

    Args:
        loss: as for `train_step`. It is called with those hyperparameters of the member that it takes by name.
        optimizer: as for `Population.create`.
        microbatches: as for `value_and_grad`.
        mesh: to run on, if not where the arrays are; then on each device are some of the members, and for each of
            these a part of the batch; parameters are whole along the axes named here, and may be split along others.
        members: the axis of the mesh that the members are split over.
        data: the axes that the rows of the batch are split over.

    Returns:
        The step. Its batch is the same for all members, but for what is marked as `lora.PerMember(...)`, which has a
        leading axis of members; `lora.Unbatched(...)` may be inside of it. Metrics are those of `train_step`, with
        that axis.

    Raises:
        LoraError: an argument is none of these; the mesh lacks an axis. When called: as `train_step`; what is for each
            member has another number of members.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((5, 4))
    >>> model = lambda p, x: x @ p["w"]
    >>> def member(rank):
    ...     return lora.init(jax.random.key(0), params, lora.plan(model, params, x, rules={"w": lora.Lora(rank)}))
    >>> def loss(adapters, params, x):
    ...     return jnp.mean(lora.lora_apply(model)(params, adapters, x) ** 2)
    >>> rates = {"learning_rate": [1e-3, 1e-2, 1e-1]}
    >>> population = lora.Population.create([member(1), member(2), member(2)], optax.adam, rates)
    >>> step = lora.population_step(loss, optax.adam)
    >>> for _ in range(5):
    ...     population, metrics = step(population, params, x)
    >>> metrics["loss"].shape, population.member(0)["w"].a.shape
    ((3,), (4, 1))
    """
    call = "population_step(loss, optimizer)"
    check_function(call, "loss", loss)
    check_microbatches(microbatches)
    axes = (data,) if isinstance(data, str) else tuple(data)
    if mesh is not None:
        check_is(call, "mesh", mesh, Mesh, 'a mesh of devices: jax.make_mesh((4, 2), ("members", "data"))')
        if missing := [name for name in (members, *axes) if name not in mesh.shape]:
            raise LoraError(f"{call}: the mesh lacks the axis {missing[0]!r}: it has {dict(mesh.shape)}.")
    elif members is not None or axes:
        raise LoraError(f"{call}: `members` and `data` are axes of a `mesh`, which is missing.")
    one = functools.partial(_member_step, loss, optimizer, microbatches, axes)

    def all_members(population: Population, params: Any, batch: tuple[Any, ...]) -> Any:
        in_axes = jax.tree.map(lambda node: 0 if _is_own(node) else None, batch, is_leaf=_is_own)
        state, given = population.states(), (population.hyperparameters, population.active)
        mapped = jax.vmap(one, in_axes=(0, 0, 0, None, in_axes))
        new, metrics = mapped(state, *given, params, batch)
        return _with_states(population, new), metrics

    def on_mesh(population: Population, params: Any, batch: tuple[Any, ...]) -> Any:
        assert mesh is not None
        own = P(members)
        where = jax.tree.map(lambda leaf: own if leaf.ndim else P(), population)
        specs = jax.tree.map(lambda node: _spec(node, own, axes), batch, is_leaf=_is_leaf_of_batch)
        names = {name for entry in (members, *axes) for name in names_of(entry)}
        mapped = jax.shard_map(
            all_members, mesh=mesh, in_specs=(where, P(), specs), out_specs=(where, own), axis_names=names
        )
        return mapped(population, params, batch)

    jitted = jax.jit(all_members if mesh is None else on_mesh, donate_argnums=0)

    def step(population: Population, params: Any, *batch: Any) -> Any:
        _check(population, batch)
        try:
            return jitted(population, params, batch)
        except (RuntimeError, ValueError):
            check_taken(CALL, population)
            raise

    def lower(population: Population, params: Any, *batch: Any) -> Any:
        _check(population, batch)
        return jitted.lower(population, params, batch)

    step.lower = lower  # type: ignore[attr-defined]
    return step  # type: ignore[return-value]


def _member_step(
    loss: Loss,
    optimizer: Optimizer,
    microbatches: int,
    axes: tuple[str, ...],
    state: TrainState,
    numbers: Mapping[str, jax.Array],
    active: jax.Array,
    params: Any,
    batch: tuple[Any, ...],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take the step of one member."""
    made = optimizer_of("population_step(loss, optimizer)", optimizer, numbers)(numbers)
    own = {name: numbers[name] for name in taken_names(loss, numbers)}
    loss = functools.partial(loss, **own) if own else loss
    new, metrics = train_step(
        loss, made, state, params, *_unmarked(batch), microbatches=microbatches, axis_name=axes or None
    )
    kept: TrainState = jax.tree.map(
        lambda now, before: now if now is before else jnp.where(active, now, before), new, state
    )
    tree = {"step": kept.step, "trainable": keep_padding(kept.trainable), "skipped": kept.skipped}
    metrics = metrics | {"skipped": kept.skipped}
    return TrainState(**tree, opt_state=kept.opt_state, key=state.key, model_state=kept.model_state), metrics


def _with_states(population: Population, new: TrainState) -> Population:
    return Population(
        step=population.step + 1,
        trainable=new.trainable,
        opt_state=new.opt_state,
        steps=new.step,
        skipped=new.skipped,
        active=population.active,
        hyperparameters=population.hyperparameters,
        key=new.key,
        model_state=new.model_state,
    )


# What each member has of its own --------------------------------------------------------------------------------------


def _is_own(node: Any) -> bool:
    return isinstance(node, PerMember)


def _is_leaf_of_batch(node: Any) -> bool:
    return _is_own(node) or is_unbatched(node)


def _unmarked(batch: Any) -> Any:
    return jax.tree.map(lambda node: node.value if _is_own(node) else node, batch, is_leaf=_is_own)


def _spec(node: Any, own: P, axes: tuple[str, ...]) -> Any:
    """Return the specs of a part of the batch: of members over their axis, and of rows over those of the data."""
    rows = (axes,) if axes else ()
    if not _is_own(node):
        return P(*rows) if has_rows(node) else P()

    def of_one(leaf: Any) -> P:
        return P(*own, *rows) if not is_unbatched(leaf) and leaf.ndim > 1 else own

    return jax.tree.map(of_one, node, is_leaf=is_unbatched)


def _check(population: Any, batch: tuple[Any, ...]) -> None:
    """Raise unless this is a population, and what is for each member is for as many as there are."""
    made = "a Population: lora.Population.create([adapters, others], optimizer)"
    check_is(CALL, "population", population, Population, made)
    for node in jax.tree.leaves(batch, is_leaf=_is_own):
        for path, leaf in jax.tree_util.tree_leaves_with_path(node.value if _is_own(node) else ()):
            if leaf.shape[:1] != population.active.shape:
                raise LoraError(
                    f"{CALL}: PerMember(...){jax.tree_util.keystr(path)} is {list(leaf.shape)}, expected a leading "
                    f"axis of {len(population)} members."
                )
