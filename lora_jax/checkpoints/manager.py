"""The checkpoints of a training run that may end at any moment, and continuing it from the newest of them.

Here is when a checkpoint is written, which one is restored, and what is refused. What a checkpoint holds is in
`state_codec`, which of them stay in `retention`, and how they get to disk in `orbax_manager`.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints import orbax_manager
from lora_jax.checkpoints.failures import damaged_step, first_line
from lora_jax.checkpoints.fingerprint import checksums, differences, fingerprint, plain_data
from lora_jax.checkpoints.preemption import Notice
from lora_jax.checkpoints.retention import Retention, is_best
from lora_jax.checkpoints.schedule import Schedule
from lora_jax.checkpoints.state_codec import (
    decode_description,
    decode_position,
    describe_adapters,
    encode_state,
    fits,
    is_scalar,
    place_like,
    state_arrays,
)
from lora_jax.core.argument_checks import check_folder, check_is
from lora_jax.core.arrays import describe
from lora_jax.core.errors import LoraError
from lora_jax.core.targets import Plan
from lora_jax.core.text import listed

CALL = "Checkpoints(folder, params, plan)"
State = TypeVar("State")


class Checkpoints:
    """The checkpoints in one folder, for the `with` block around a training loop.

        with lora.Checkpoints("run", params, plan, every=100) as checkpoints:
            state, position = checkpoints.restore(state)
            if position is not None:
                batches.set_state(position)
            for batch in batches:
                state, metrics = step(state, params, *batch)
                if checkpoints.save(state, metrics, position=batches.get_state):
                    break                                  # the process was told to end, and all is on disk

    Leaving the block waits until all is on disk. Where there are several processes, each makes the same calls. While
    this run is alive, another one may read the folder, and saves nothing there. Files of others are never removed.

    Args:
        folder: of the checkpoints; made if missing.
        params: the frozen base: a checkpoint is only restored beside the base that it was trained on.
        plan: as of `lora.plan`; its rules are noted beside the adapters.
        every: steps between two checkpoints.
        keep: how many of the newest checkpoints stay.
        best: `(metric, "max")` or `(metric, "min")`: the best by this metric stays too.
        keep_every: those at multiples of this step stay too.

    Raises:
        LoraError: an argument is none of these; the folder holds something else, or cannot be made.

    >>> import tempfile, jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=1)})
    >>> state = lora.TrainState.create(lora.init(jax.random.key(0), params, plan), lora.freeze_base(optax.sgd(0.1)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with lora.Checkpoints(f"{folder}/run", params, plan) as checkpoints:
    ...         state, position = checkpoints.restore(state)  # the one that was given, as there is none yet
    ...         _ = checkpoints.save(state, {"loss": 1.0}, position={"next": 7}, force=True)
    ...         checkpoints.wait()
    ...         checkpoints.steps, checkpoints.restore(state)[1]
    ([0], {'next': 7})
    """

    def __init__(
        self,
        folder: str | Path,
        params: Any,
        plan: Mapping[str, Any],
        *,
        every: int = 100,
        keep: int = 3,
        best: tuple[str, Literal["max", "min"]] | None = None,
        keep_every: int | None = None,
    ) -> None:
        check_folder(CALL, folder)
        if plan != {}:
            check_is(CALL, "plan", plan, Plan, "a plan: lora.plan(fn, params, *args, rules={...})")
        for name, value in [("every", every), ("keep", keep), ("keep_every", keep_every)]:
            optional = name == "keep_every" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise LoraError(f"Checkpoints({name}={value!r}): expected a whole number of at least 1.")
        if best is not None and not is_best(best):
            raise LoraError(f'Checkpoints(best={best!r}): expected a metric and a direction, as ("accuracy", "max").')
        self.folder = orbax_manager.check_folder(folder)
        self._schedule, self._retention = Schedule(every), Retention(keep, keep_every, best)
        self._base = fingerprint(params)
        self._rules = {path: str(target.rule) for path, target in plan.items()}
        self._notice = Notice()
        self._problem: LoraError | None = None
        self._lock = orbax_manager.lock(self.folder)
        self._manager = self._open()
        if best:
            self._note_scores()
        self._may_save = not self.steps  # false until one of the checkpoints that are there is restored
        self._described = False  # whether the adapters of a state were found to be of known kinds
        self._newest: int | None = None  # step that this run saved or restored
        self._previous: int | None = None  # the one before, which is the newest again if that cannot be written

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, including one that is being written, in ascending order."""
        return sorted(self._manager.all_steps())

    @property
    def _is_ours(self) -> bool:
        """Whether no other run that is alive has the folder."""
        return self._lock is None or self._lock.held

    # Restoring --------------------------------------------------------------------------------------------------------

    def restore(
        self,
        state: State,
        step: int | Literal["best"] | None = None,
        *,
        allow_other_base: bool = False,
        allow_other_rules: bool = False,
    ) -> tuple[State, Any]:
        """Restore the state of a checkpoint, and the position that was saved with it.

        Each array is placed as that of the given state, on any mesh and on any number of hosts. The run continues from
        there: checkpoints of later steps are removed once it has saved one of its own.

        Args:
            state: a new one, such as `lora.TrainState.create` returns.
            step: of the checkpoint; None for the newest, "best" for the one with the best metric.
            allow_other_base: whether the base may differ from the one that was trained on.
            allow_other_rules: whether adapters and optimizer may differ; what has the path, shape and dtype of
                something that was saved is then restored, and the rest stays as in the given state.

        Returns:
            The state and the position; the given state and None if there is no checkpoint.

        Raises:
            LoraError: no such step; another base, or other adapters (each difference is listed); the checkpoint is
                damaged, or of a newer version of the library.
        """
        leaves = state_arrays(state)
        if not self.steps and step is None:
            return state, None
        self.wait()
        step = self._find(step)
        facts = self._description(step)
        self._refuse_other_base(step, facts, allow_other_base)
        self._refuse_other_rules(step, facts, state, allow_other_rules)
        saved = {path: facts["arrays"][path] for path, leaf in leaves.items() if path in facts["arrays"]}
        wanted = {path: leaves[path] for path, text in saved.items() if fits(text, leaves[path])}
        restored = leaves | self._arrays(step, wanted)
        if damaged := differences({path: saved[path] for path in wanted}, checksums({p: restored[p] for p in wanted})):
            raise self._damaged(step, damaged[0])
        self._newest = self._previous = step
        self._may_save = True
        self._schedule.restart()
        self._notice.restart()
        state = jax.tree.unflatten(jax.tree.structure(state), list(restored.values()))
        return state, decode_position(facts["position"])

    def _find(self, step: int | Literal["best"] | None) -> int:
        """Return the step of the checkpoint that is meant."""
        known = ", ".join(map(str, self.steps)) or "none"
        if step == "best":
            best = self._retention.best_of(self.steps)
            if best is None:
                raise LoraError(
                    f"{self.folder} has no best checkpoint: none was saved with the metric of Checkpoints(best=...), "
                    f"which is {self._retention.best!r}. There are the steps {known}."
                )
            return best
        if step is not None and step not in self.steps:
            raise LoraError(f"{self.folder} has no checkpoint of step {step!r}; there are the steps {known}.")
        return self.steps[-1] if step is None else step

    def _description(self, step: int) -> dict[str, Any]:
        """Read the description of a checkpoint, and check that it is whole and of this format."""
        try:
            found = orbax_manager.read_description(self._manager, step)
            return decode_description(found, f"{self.folder}, step {step}")
        except LoraError:
            raise
        except Exception as error:  # damaged files raise errors of many types
            raise self._damaged(step, error) from error

    def _refuse_other_base(self, step: int, facts: dict[str, Any], allowed: bool) -> None:
        """Raise if the base is not the one that a checkpoint was trained on, unless that is allowed."""
        if not allowed and (lines := differences(facts["base"], self._base)):
            raise LoraError(
                f"{self.folder}, step {step} was trained on another base:\n{listed(lines)}\nGive the parameters that "
                "it was trained on, or restore(state, allow_other_base=True)."
            )

    def _refuse_other_rules(self, step: int, facts: dict[str, Any], state: Any, allowed: bool) -> None:
        """Raise if a checkpoint has other adapters or other arrays than the state, unless that is allowed."""
        if allowed:
            return
        before, now = facts["adapters"], describe_adapters(state, self._rules)
        lines = [
            f"{path}: saved with {name} {before[path].get(name)}, {now[path].get(name)} now"
            for path in before
            for name in dict.fromkeys([*before[path], *now.get(path, {})])
            if path in now and name != "rule" and before[path].get(name) != now[path].get(name)
        ]
        lines += differences(facts["arrays"], {path: describe(leaf) for path, leaf in state_arrays(state).items()})
        if lines:
            rules = ", ".join(sorted({facts["rule"] for facts in before.values() if facts["rule"]}))
            raise LoraError(
                f"{self.folder}, step {step} holds another state:\n{listed(lines)}\nGive the rules, the optimizer and "
                f"the model state that it was trained with ({rules or 'no rules were noted'}), or take what fits: "
                "restore(state, allow_other_rules=True)."
            )

    def _arrays(self, step: int, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Read the arrays with these paths, and place them as these are."""
        like = {path: leaf for path, leaf in like.items() if leaf.size}  # empty ones were not written
        try:
            data = {path: plain_data(leaf) for path, leaf in like.items()}
            found = orbax_manager.read_arrays(self._manager, step, data)
            return {path: place_like(found[path], leaf) for path, leaf in like.items()}
        except Exception as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, why: Any) -> LoraError:
        """Return the error that a checkpoint is damaged, which names the one to restore instead."""
        return damaged_step(self.folder, step, self.steps, why, "restore(state, step={})")

    # Saving -----------------------------------------------------------------------------------------------------------

    def save(
        self, state: Any, metrics: Mapping[str, Any] | None = None, *, position: Any = None, force: bool = False
    ) -> bool:
        """Save the state if a checkpoint is due; it is written in the background while training continues.

        Call it once after every step. It waits for the device only where a checkpoint is due, and for the disk only if
        the one before is still being written, or if the process was told to end (SIGTERM, or the preemption of a host).

        Args:
            state: after the step.
            metrics: `{name: scalar}`; the numbers are noted. That of `best` has to be there; None if not measured.
            position: of the data, for `restore` to return: JSON or bytes, such as `get_state()` of an iterator of grain
                returns, or a function that returns it, which is called if a checkpoint is due.
            force: save at this step, due or not.

        Returns:
            Whether the process was told to end. Then this state is on disk: leave the loop.

        Raises:
            LoraError: another run has the folder; it holds checkpoints and none was restored; the state, the metrics or
                the position cannot be saved; this checkpoint or the one before was not written. The earlier ones are
                untouched, and after a full disk has room again the next call writes again.
        """
        self._check(state, metrics)
        ending = self._notice.came(state)
        step = self._schedule.due(state, self._newest, now=force or ending)
        if step is not None:
            self._write(step, state, metrics or {}, position() if callable(position) else position)
        if ending:
            self._finish()
        self._raise_problem()
        self._notice.passed_on(ending)
        return ending

    def wait(self) -> None:
        """Wait until all is on disk.

        Raises:
            LoraError: the newest checkpoint was not written.
        """
        self._finish()
        self._raise_problem()

    def _check(self, state: Any, metrics: Mapping[str, Any] | None) -> None:
        """Raise at the first call, and not only when a checkpoint is due, if something could not be saved."""
        if not self._is_ours:
            raise LoraError(
                f"{self.folder} has the checkpoints of a run that is alive, in another process; each of the two would "
                "remove those of the other. End it and begin again, or train in another folder."
            )
        if not self._may_save:
            raise LoraError(
                f"{self.folder} holds checkpoints up to step {self.steps[-1]} and none was restored: they would be "
                "replaced. Call restore(state) first, or train in another folder."
            )
        step: Any = getattr(state, "step", None)
        if np.shape(step) != () or not jnp.issubdtype(getattr(step, "dtype", type(step)), jnp.integer):
            found = "none" if step is None else describe(step)
            raise LoraError(f"the state's step is {found}, expected a scalar integer, as lora.TrainState has.")
        best = self._retention.best
        if best and best[0] not in (metrics or {}):
            have = ", ".join(metrics or {}) or "none"
            raise LoraError(
                f"save(metrics=...) lacks {best[0]!r}, which Checkpoints(best={best!r}) needs; there are: {have}. Give "
                "None where it was not measured."
            )
        if best and not is_scalar((metrics or {})[best[0]]):
            found = type((metrics or {})[best[0]]).__name__
            raise LoraError(f"save(metrics=...): {best[0]!r} is a {found}, expected a number, or None if not measured.")
        if not self._described:
            describe_adapters(state, self._rules)  # refuses what it cannot describe
            self._described = True

    def _write(self, step: int, state: Any, metrics: Mapping[str, Any], position: Any) -> None:
        """Begin to write a checkpoint, once the one before is on disk."""
        arrays, description = encode_state(state, step, metrics, position, self._rules, self._base)
        self._schedule.saved(step)
        self._finish()
        before, self._newest = self._newest, step
        self._retention.note(step, description["facts"]["metrics"])
        try:
            orbax_manager.remove_deleted(self.folder)
            if step in self.steps:  # of a run that this one does not continue
                if others := orbax_manager.foreign(self.folder, step):
                    raise LoraError(f"step_{step} is there already, and also holds {others[0]!r}: move that away")
                self._manager.delete(step)
            orbax_manager.start_saving(self._manager, step, arrays, description)
        except Exception as error:
            self._failed(step, before, error)
        self._previous = before

    def _finish(self) -> None:
        """Wait for what is being written. An error is kept, for the caller to raise when all else is done."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            assert self._newest is not None  # something was being written
            self._failed(self._newest, self._previous, error)

    def _failed(self, step: int, before: int | None, error: Exception) -> None:
        """Forget a checkpoint that was not written, and open the folder anew, which removes what of it is on disk."""
        self._newest = before
        self._retention.forget(step)
        self._problem = LoraError(
            f"the checkpoint of step {step} was not written to {self.folder}: {first_line(error)}. The earlier ones "
            "are untouched; with room on the disk and the right to write there, the next save writes again."
        )
        self._problem.__cause__ = error
        with contextlib.suppress(Exception):  # orbax raises the same error again
            self._manager.close()
        self._manager = self._open()

    def _raise_problem(self) -> None:
        """Raise the error of a checkpoint that was not written, once."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _open(self) -> Any:
        """Return orbax's manager of the folder, which asks `Retention` which checkpoints stay."""
        return orbax_manager.open_manager(
            self.folder, lambda steps: self._retention.kept(steps, self._newest), self._is_ours
        )

    def _note_scores(self) -> None:
        """Note the scores of the checkpoints that are in the folder already."""
        for step in self.steps:
            with contextlib.suppress(LoraError):  # of a damaged one, which `restore` reports
                self._retention.note(step, self._description(step)["metrics"])

    # The block around the training ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._notice.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except LoraError as ours:
            if error is None:
                raise
            error.add_note(str(ours))
        finally:
            self._manager.close()
            if self._is_ours:
                orbax_manager.remove_unfinished(self.folder)  # of a save that failed, whose threads went on
                orbax_manager.remove_deleted(self.folder)
            if self._lock is not None:
                self._lock.release()
            self._notice.end()
        if error is None:
            self._notice.raise_again()
