"""A population: the states of N training runs over one base, as one tree with a leading axis of members.

What makes members differ is data: their adapters with rank and alpha, their hyperparameters, their random keys, and
whether they still train. So members are stopped, replaced and put in another order without another program.
`population_step` in `population_step.py` is the step.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P
from jax.sharding import Mesh, NamedSharding

from lora_jax.core.argument_checks import check_is, check_key, is_optimizer, refuse
from lora_jax.core.arrays import describe, is_key
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.serialization import register_node
from lora_jax.core.text import format_table
from lora_jax.training.argument_checks import check_optimizer
from lora_jax.training.member_trees import padded_like, put, rank_text, stack_trees, unpadded, whole
from lora_jax.training.state import TrainState, with_own_memory

CALL = "Population.create(members, optimizer, hyperparameters)"
# A transformation, or what makes one of hyperparameters that it takes by name, as optax.adamw does.
Optimizer: TypeAlias = optax.GradientTransformation | Callable[..., optax.GradientTransformation]


@register_node("lora_jax.Population")
@dataclass(frozen=True)
class Population:
    """All that a step of N members changes, and what makes them differ. Arrays are `[members, ...]`, but for `step`.

    `lora.Checkpoints` saves and restores it as it does a `TrainState`; `lora.checkpoint.load` reads the adapters of
    such a checkpoint as a stack, which `lora.unstack` takes apart.

    Attributes:
        step: steps that were taken with this population, i32.
        trainable: what `stack` makes of the members' adapters, or a tree that holds it.
        opt_state: the optimizer's, for all members.
        steps: those that each has taken, i32 [members].
        skipped: those whose gradient was not finite, i32 [members].
        active: bool [members]; the others stay as they are.
        hyperparameters: `{name: f32 [members]}`.
        key: random keys [members], or None.
        model_state: what the models carry from step to step, `[members, ...]`, or None.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> def members(rank):
    ...     plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=rank)})
    ...     return lora.init(jax.random.key(rank), params, plan)
    >>> optimizer = lora.freeze_base(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    >>> population = lora.Population.create([members(1), members(2)], optimizer, {"learning_rate": [0.1, 0.2]})
    >>> len(population), population.member(0)
    (2, {'w': LoraAdapter(a 4x1, b 1x3)})
    """

    step: jax.Array  # i32, steps that were taken with this population
    trainable: Any  # what `stack` makes of the members' adapters, or a tree that holds it
    opt_state: Any
    steps: jax.Array  # i32 [members], steps that each has taken
    skipped: jax.Array  # i32 [members], those whose gradient was not finite
    active: jax.Array  # bool [members]: the others stay as they are
    hyperparameters: dict[str, jax.Array]  # f32 [members]
    key: jax.Array | None = None  # random keys [members]
    model_state: Any = None

    @classmethod
    def create(
        cls,
        members: Sequence[Any],
        optimizer: Optimizer,
        hyperparameters: Mapping[str, Sequence[float]] | None = None,
        *,
        key: jax.Array | None = None,
        model_state: Any = None,
        rank: int | None = None,
    ) -> "Population":
        """Return the members before their first step. The arrays given are copied.

        Args:
            members: what each trains: adapters of any rank, alpha and seed, as `stack` takes them, or trees that hold
                them beside other arrays, such as a new head.
            optimizer: an optax transformation for all, or a function of some of the hyperparameters, by their names,
                that returns one: `optax.adamw` of "learning_rate" and "weight_decay".
            hyperparameters: `{name: a number for each member}`. The optimizer gets those that it takes, and so does the
                loss, by the same names.
            key: a random key, of which each member gets one of its own, or one for each `[members]`, if the loss takes
                a key.
            model_state: as for `TrainState.create`, for each member the same at first.
            rank: what ranks are padded to, if members of a higher one than the first are to come.

        Raises:
            LoraError: there are no members, or they do not fit one another; there are several optimizers; a
                hyperparameter is not a finite number for each member; an argument is none of these.
        """
        trainable, n = stack_trees(CALL, members, rank), len(members)
        numbers = check_hyperparameters(CALL, hyperparameters or {}, n)
        make = optimizer_of(CALL, optimizer, numbers)
        keys = None if key is None else _keys(key, n)
        with jax.numpy_dtype_promotion("standard"):  # as in a step
            opt_state = jax.vmap(lambda tree, numbers: make(numbers).init(tree))(trainable, numbers)
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * n), model_state)
        zeros, active = jnp.zeros(n, jnp.int32), jnp.ones(n, bool)
        zero = jnp.zeros((), jnp.int32)
        new = cls(zero, trainable, opt_state, zeros, zeros.copy(), active, numbers, keys, state)
        return with_own_memory(new, (members, key, model_state, hyperparameters))

    def __len__(self) -> int:
        return int(self.active.shape[0])

    def states(self) -> TrainState:
        """Return the members as one `TrainState` with a leading axis, for a `jax.vmap` of one's own."""
        return TrainState(self.steps, self.trainable, self.opt_state, self.skipped, self.key, None, self.model_state)

    def member(self, i: int) -> Any:
        """Return what a member trains, its adapters with their own rank, as they were given to `create`.

        Args:
            i: its index, at least 0.

        Raises:
            LoraError: there is no such member.
        """
        self._check_index("member", i)
        return unpadded(whole(jax.tree.map(lambda array: array[i], self.trainable)))

    # Which members train ----------------------------------------------------------------------------------------------

    def stop(self, which: Any) -> Self:
        """Return the population in which these members train no more; the step computes them, and changes nothing.

        Args:
            which: bool [members], such as `metrics["loss"] > limit`.

        Raises:
            LoraError: `which` is of another shape or dtype.
        """
        which = jnp.asarray(which)
        if which.shape != self.active.shape or which.dtype != bool:
            raise LoraError(f"Population.stop(which) is {describe(which)}, expected bool[{len(self)}].")
        return dataclasses.replace(self, active=self.active & ~which)

    def keep_best(self, scores: Any, count: int, largest: bool = False) -> Self:
        """Return the population in which only the best `count` of those that train go on: a halving of the members.

        Args:
            scores: f32 [members], such as held-out losses; what is not finite is worst.
            count: how many go on.
            largest: whether the largest scores are the best ones, as of accuracies.

        Raises:
            LoraError: `scores` are of another shape, or `count` is no whole number of at least 0.
        """
        scores = jnp.asarray(scores, jnp.float32)
        if scores.shape != self.active.shape or isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise LoraError(
                f"Population.keep_best(scores, count) has {describe(scores)} and {count!r}, expected "
                f"float32[{len(self)}] and a whole number."
            )
        order = jnp.where(jnp.isfinite(scores) & self.active, -scores if largest else scores, jnp.inf)
        place = jnp.argsort(jnp.argsort(order, stable=True), stable=True)  # of equal ones the first are better
        return dataclasses.replace(self, active=self.active & jnp.isfinite(order) & (place < count))

    def take(self, ids: Sequence[int]) -> Self:
        """Return the members with these indices, in this order, with all that they have; some may come twice.

        As many as there are run without another compilation: so the worst take the place of the best. Fewer take less
        time, after a compilation for their number.

        Args:
            ids: the indices, each at least 0.

        Raises:
            LoraError: there is no member of such an index.
        """
        for i in ids:
            self._check_index("take", i)
        return _taken(self, jnp.asarray(ids, jnp.int32))

    def replace(
        self,
        i: int,
        trainable: Any,
        optimizer: Optimizer,
        hyperparameters: Mapping[str, float] | None = None,
        *,
        key: jax.Array | None = None,
        model_state: Any = None,
    ) -> Self:
        """Return the population with a new member in the place of one, before its first step, that trains.

        Args:
            i: whose place it takes.
            trainable, optimizer, hyperparameters, key, model_state: as for `create`, of one member.

        Raises:
            LoraError: as `create`; its rank is above that of the population; it lacks a hyperparameter.
        """
        self._check_index("replace", i)
        call, given = "Population.replace(i, trainable, optimizer, hyperparameters)", dict(hyperparameters or {})
        if [*given] != [*self.hyperparameters]:
            if sorted(given) != sorted(self.hyperparameters):
                raise LoraError(f"{call}: found the hyperparameters {[*given]}, expected {[*self.hyperparameters]}.")
            given = {name: given[name] for name in self.hyperparameters}
        if (key is None) != (self.key is None):
            raise LoraError(f"{call}: `key` is {'missing' if key is None else 'given'}, unlike that of the population.")
        one = Population.create(
            [padded_like(self.trainable, trainable)],
            optimizer,
            {name: [value] for name, value in given.items()},
            key=None if key is None else _keys(key, 1),
            model_state=model_state,
        )
        problems = [
            f"{name} is {describe(new)}, expected {describe(old[:1])}"
            for name, new, old in _together(one, self)
            if new.shape[1:] != old.shape[1:] or new.dtype != old.dtype
        ]
        if problems:
            raise LoraError(f"{call}: the new member does not fit the others: {problems[0]}.")
        return _with_member(self, jnp.int32(i), one)

    # What they are ----------------------------------------------------------------------------------------------------

    def table(self, metrics: Mapping[str, Any] | None = None) -> str:
        """Return a table with a row for each member: its hyperparameters, rank, steps, and metrics `[members]`.

        Args:
            metrics: `{name: [members]}`, as a step returns them; what has another shape is left out.

        Raises:
            LoraError: as of `member`.
        """
        shown = {name: value for name, value in (metrics or {}).items() if np.shape(value) == (len(self),)}
        numbers = {name: np.asarray(value) for name, value in whole(self.hyperparameters | shown).items()}
        steps, active = (np.asarray(array) for array in whole((self.steps, self.active)))
        ranks = [rank_text(self.member(i)) for i in range(len(self))]
        columns = {
            "member": range(len(self)),
            "rank": ranks,
            "steps": steps,
            "trains": ["yes" if trains else "no" for trains in active],
            **{name: [f"{number:.4g}" for number in value] for name, value in numbers.items()},
        }
        return format_table([*columns], list(zip(*columns.values(), strict=True)), right=len(columns))

    def placed(self, mesh: Mesh, axis: str) -> Self:
        """Return the population with its members split over an axis of a mesh, as a step on it takes them.

        The mesh may be of several processes: each has made the same population, and makes the same calls.

        Args:
            mesh: the devices.
            axis: the name of the axis of the mesh, of a size that divides the number of members.

        Raises:
            LoraError: the mesh has no such axis, or it is of another size.
        """
        if axis not in mesh.shape or len(self) % mesh.shape[axis]:
            raise LoraError(
                f"Population.placed: {len(self)} members over the axis {axis!r} of the mesh {dict(mesh.shape)}: "
                "expected one of its axes, of a size that divides their number."
            )
        return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, P(axis) if leaf.ndim else P())), self)

    def _check_index(self, call: str, i: Any) -> None:
        if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < len(self):
            raise LoraError(f"Population.{call}: {i!r} is no member, expected 0 to {len(self) - 1}.")


def optimizer_of(call: str, optimizer: Optimizer, hyperparameters: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return what makes the optimizer of a member's hyperparameters.

    Raises:
        LoraError: this is neither an optimizer nor a function that makes one.
    """
    if isinstance(optimizer, list | tuple) and not is_optimizer(optimizer):
        one = "one for all members: a function of what differs, lambda learning_rate: optax.adam(learning_rate)"
        refuse(call, "optimizer", optimizer, one)
    if not callable(optimizer):
        check_optimizer(call, optimizer)
        return lambda numbers: optimizer
    names = taken_names(optimizer, hyperparameters)
    return lambda numbers: _made(call, optimizer, {name: numbers[name] for name in names})


def _made(call: str, optimizer: Any, numbers: Mapping[str, Any]) -> Any:
    made = optimizer(**numbers)
    check_optimizer(call, made)
    return made


def taken_names(fn: Callable[..., Any], names: Mapping[str, Any]) -> list[str]:
    """Return the names that a function takes as keywords."""
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return [*names]
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return [name for name in names if name in known]


def check_hyperparameters(call: str, given: Any, n: int) -> dict[str, jax.Array]:
    """Return hyperparameters as arrays f32 [n].

    Raises:
        LoraError: one is not a finite number for each member.
    """
    expected = f'numbers for each of the {n} members, {{"learning_rate": [1e-3, ...]}}'
    check_is(call, "hyperparameters", given, Mapping, expected)
    found = {}
    for name, values in given.items():
        numbers = np.asarray(values)
        is_real = np.issubdtype(numbers.dtype, np.floating) or np.issubdtype(numbers.dtype, np.integer)
        if numbers.shape != (n,) or not is_real or not np.isfinite(numbers).all():
            raise LoraError(f"{call}: hyperparameters[{name!r}] is {values!r}, expected {n} finite numbers.")
        found[str(name)] = jnp.asarray(numbers, jnp.float32)
    return found


def _keys(key: jax.Array, n: int) -> jax.Array:
    """Return a random key for each member, of one for all, or those that are given."""
    if isinstance(key, jax.Array) and is_key(key) and key.shape == (n,):
        return key.copy()
    check_key(CALL, key)
    return jax.random.split(key, n)


def _together(one: Any, many: Any) -> list[tuple[str, Any, Any]]:
    """Return the leaves of two populations with their names, but for the count of steps.

    Raises:
        LoraError: they are of different trees.
    """
    (names, ours, tree), (_, theirs, expected) = (flatten_with_names(p) for p in (one, many))
    if tree != expected:
        raise LoraError(
            "Population.replace: the new member is another tree than the others: give the optimizer, the adapters' "
            "kinds and paths, and a model state like theirs."
        )
    return [(n, a, b) for n, a, b in zip(names, ours, theirs, strict=True) if b.ndim]


@jax.jit
def _taken(population: Any, ids: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[ids] if leaf.ndim else leaf, population)


@jax.jit
def _with_member(population: Any, i: jax.Array, one: Any) -> Any:
    return jax.tree.map(lambda old, new: old.at[i].set(new[0]) if old.ndim else old, population, one)
