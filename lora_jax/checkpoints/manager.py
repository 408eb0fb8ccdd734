"""Checkpoints of a training run that may end at any moment, and its going on from the newest of them.

Arrays are written while the training goes on, with orbax, under a name that becomes a checkpoint's only when all of
it is on disk. Beside them lies a description: what the adapters and the base were, and a checksum of each array.

    folder/step_300/arrays        {path of the leaf: array}, without the classes of optax or of this library
    folder/step_300/description   JSON
"""

import base64
import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.adapters import describe_adapter
from lora_jax.checkpoints.fingerprint import checksums, differences, fingerprint, plain_data
from lora_jax.checkpoints.preemption import Notice
from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import describe
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names

FORMAT = 1
DELETED = ".lora_jax-deleted"

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

    The block ends when all is on disk. Where there are several processes, each makes the same calls.

    Args:
        folder: where; made if missing.
        params: the frozen base: a checkpoint is only restored beside the base that it was trained on.
        plan: as of `lora.plan`; its rules are noted beside the adapters.
        every: steps between two checkpoints.
        keep: how many of the newest stay.
        best: `(metric, "max")` or `(metric, "min")`: the best by this metric stays too.
        keep_every: those at multiples of this step stay too.

    Raises:
        LoraError: an argument is none of these; the folder holds something else, or cannot be made.
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
        for name, value in [("every", every), ("keep", keep), ("keep_every", keep_every)]:
            optional = name == "keep_every" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise LoraError(f"Checkpoints({name}={value!r}): expected a whole number of at least 1.")
        if best is not None and not _is_best(best):
            raise LoraError(f'Checkpoints(best={best!r}): expected a metric and a direction, as ("accuracy", "max").')
        self.folder = Path(folder).absolute()
        _refuse_other_things(self.folder)
        self._every, self._keep, self._best, self._keep_every = every, keep, best, keep_every
        self._base = fingerprint(params)
        self._rules = {path: str(target.rule) for path, target in plan.items()}
        self._notice = Notice()
        self._problem: LoraError | None = None
        self._manager = self._open()
        self._scores = {step: self._score_of(step) for step in self.steps} if best else {}
        self._at = self._before = None if self.steps else -1  # this run's newest step on disk; None: not restored
        self._start_counting()

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, one that is being written included, oldest first."""
        return sorted(self._manager.all_steps())

    # Restoring --------------------------------------------------------------------------------------------------------

    def restore(
        self,
        state: State,
        step: int | Literal["best"] | None = None,
        *,
        allow_other_base: bool = False,
        allow_other_rules: bool = False,
    ) -> tuple[State, Any]:
        """The state of a checkpoint, and the position that was saved with it. The state as given and None, if none is.

        Each array comes back where that of the given state is, on any mesh and on any number of hosts. The training
        goes on from there: checkpoints of later steps are removed once it has saved one of its own.

        Args:
            state: a new one, such as `lora.TrainState.create` makes.
            step: which; the newest if None, that with the best metric if "best".
            allow_other_base: the base may differ from the one that was trained on.
            allow_other_rules: adapters and optimizer may differ; what has the path, shape and dtype of something
                that was saved is restored, the rest stays as in the given state.

        Raises:
            LoraError: no such step; another base, or other adapters (each difference is listed); the checkpoint is
                damaged, or of a newer version of the library.
        """
        leaves = _leaves(state)
        if not self.steps and step is None:
            return state, None
        self.wait()
        step = self._find(step)
        facts = self._description(step)
        self._refuse_other_base(step, facts, allow_other_base)
        self._refuse_other_rules(step, facts, state, allow_other_rules)
        saved = {path: facts["arrays"][path] for path, leaf in leaves.items() if path in facts["arrays"]}
        wanted = {path: leaves[path] for path, text in saved.items() if not _differ(text, leaves[path])}
        restored = leaves | self._arrays(step, wanted)
        if damaged := differences({path: saved[path] for path in wanted}, checksums({p: restored[p] for p in wanted})):
            raise self._damaged(step, damaged[0])
        self._at = self._before = step
        self._start_counting()
        return jax.tree.unflatten(jax.tree.structure(state), list(restored.values())), _position(facts["position"])

    def _find(self, step: int | Literal["best"] | None) -> int:
        known = ", ".join(map(str, self.steps)) or "none"
        if step == "best":
            scored = {step: score for step, score in self._scores.items() if score is not None and step in self.steps}
            if not scored:
                raise LoraError(
                    f"{self.folder} has no best checkpoint: none was saved with the metric of Checkpoints(best=...), "
                    f"which is {self._best!r}. There are the steps {known}."
                )
            return max(scored, key=lambda step: (scored[step], -step))
        if step is not None and step not in self.steps:
            raise LoraError(f"{self.folder} has no checkpoint of step {step!r}; there are the steps {known}.")
        return self.steps[-1] if step is None else step

    def _description(self, step: int) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        try:
            args = ocp.args.Composite(description=ocp.args.JsonRestore())
            found = self._manager.restore(step, args=args).description
            facts, digest = found["facts"], found["sha256"]
        except Exception as error:  # whatever a damaged file makes of it
            raise self._damaged(step, error) from error
        if digest != _digest(facts):
            raise self._damaged(step, "its description was edited")
        if facts["format"] != FORMAT:
            raise LoraError(
                f"{self.folder}, step {step} has format {facts['format']} of lora_jax {facts['version']}, this version "
                f"reads {FORMAT}: update lora_jax."
            )
        return facts

    def _refuse_other_base(self, step: int, facts: dict[str, Any], allowed: bool) -> None:
        if not allowed and (lines := differences(facts["base"], self._base)):
            raise LoraError(
                f"{self.folder}, step {step} was trained on another base:\n{_listed(lines)}\nGive the parameters that "
                "it was trained on, or restore(state, allow_other_base=True)."
            )

    def _refuse_other_rules(self, step: int, facts: dict[str, Any], state: Any, allowed: bool) -> None:
        if allowed:
            return
        before, now = facts["adapters"], self._adapters(state)
        lines = [
            f"{path}: saved with {name} {before[path].get(name)}, {now[path].get(name)} now"
            for path in before
            for name in dict.fromkeys([*before[path], *now.get(path, {})])
            if path in now and name != "rule" and before[path].get(name) != now[path].get(name)
        ]
        lines += differences(facts["arrays"], {path: describe(leaf) for path, leaf in _leaves(state).items()})
        if lines:
            rules = {facts["rule"] for facts in before.values() if facts["rule"]}
            raise LoraError(
                f"{self.folder}, step {step} holds another state:\n{_listed(lines)}\nGive the rules and the optimizer "
                f"that it was trained with ({', '.join(sorted(rules)) or 'no rules were noted'}), or take what fits: "
                "restore(state, allow_other_rules=True)."
            )

    def _arrays(self, step: int, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The saved arrays with these paths, placed as these are."""
        import orbax.checkpoint as ocp

        like = {path: leaf for path, leaf in like.items() if leaf.size}  # there is nothing to read of the others
        data = {path: plain_data(leaf) for path, leaf in like.items()}
        how = {
            path: ocp.RestoreArgs(restore_type=np.ndarray)
            if not array.committed or (jax.process_count() > 1 and array.is_fully_addressable)
            else ocp.ArrayRestoreArgs(sharding=array.sharding, dtype=array.dtype)
            for path, array in data.items()
        }
        try:
            args = ocp.args.PyTreeRestore(item=data, restore_args=how, partial_restore=True)
            found = self._manager.restore(step, args=ocp.args.Composite(arrays=args)).arrays
            return {path: _as_it_was(found[path], leaf) for path, leaf in like.items()}
        except Exception as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, why: Any) -> LoraError:
        others = [other for other in self.steps if other != step]
        earlier = max((other for other in others if other < step), default=max(others, default=None))
        mend = "There is no other one: start again in another folder."
        if earlier is not None:
            mend = f"Go on from another one: restore(state, step={earlier}). There are {', '.join(map(str, others))}."
        return LoraError(f"{self.folder}, step {step} is damaged and cannot be restored: {_first_line(why)}. {mend}")

    # Saving -----------------------------------------------------------------------------------------------------------

    def save(
        self, state: Any, metrics: Mapping[str, Any] | None = None, *, position: Any = None, force: bool = False
    ) -> bool:
        """Save if a checkpoint is due, and go on at once: it is written while the training goes on.

        Call it once after every step. It waits for the device only where one is due, and for the disk only if the one
        before is still being written, or if the process was told to end (SIGTERM, or the preemption of a host).

        Args:
            state: what the step gave.
            metrics: `{name: scalar}`; the numbers are noted. That of `best` has to be there; None if not measured.
            position: where the data is, for `restore` to give back: JSON or bytes, such as `get_state()` of an
                iterator of grain gives, or a function that gives it, which is called if a checkpoint is due.
            force: save at this step, due or not.

        Returns:
            Whether the process was told to end. Then this state is on disk: leave the loop.

        Raises:
            LoraError: the folder holds checkpoints and none was restored; the state, the metrics or the position
                cannot be saved; this checkpoint or the one before was not written. The earlier ones are untouched, and
                after a full disk has room again the next call writes again.
        """
        self._check(state, metrics)
        self._count += 1
        ending = self._notice.came(state)
        step = self._due(state, now=force or ending)
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
        """Refuse at the first call, and not only when a checkpoint is due, what could not be saved."""
        if self._at is None:
            raise LoraError(
                f"{self.folder} holds checkpoints up to step {self.steps[-1]} and none was restored: they would be "
                "replaced. Call restore(state) first, or train in another folder."
            )
        step: Any = getattr(state, "step", None)
        if np.shape(step) != () or not jnp.issubdtype(getattr(step, "dtype", type(step)), jnp.integer):
            found = "none" if step is None else describe(step)
            raise LoraError(f"the state's step is {found}, expected a scalar integer, as lora.TrainState has.")
        if self._best and self._best[0] not in (metrics or {}):
            have = ", ".join(metrics or {}) or "none"
            raise LoraError(
                f"save(metrics=...) lacks {self._best[0]!r}, which Checkpoints(best={self._best!r}) needs; there are: "
                f"{have}. Give None where it was not measured."
            )

    def _start_counting(self) -> None:
        self._count, self._look_at, self._next_step = 0, 1, 0  # calls of save; the call to ask the device at
        self._notice.restart()

    def _due(self, state: Any, now: bool) -> int | None:
        """The step to save, if any.

        A step moves the counter by one at most, so the device need not be asked, and waited for, before it can be due.
        """
        if not now and self._count < self._look_at:
            return None
        step = int(np.asarray(state.step))
        if not self._next_step:
            self._plan_after(self._at if self._at is not None and self._at >= 0 else step - 1)
        self._look_at = self._count + max(1, self._next_step - step)
        return step if (now or step >= self._next_step) and step != self._at else None

    def _plan_after(self, step: int) -> None:
        self._next_step = (step // self._every + 1) * self._every

    def _write(self, step: int, state: Any, metrics: Mapping[str, Any], position: Any) -> None:
        import orbax.checkpoint as ocp

        leaves = _leaves(state)
        facts = {
            "format": FORMAT,
            "version": _version(),
            "step": step,
            "metrics": _numbers(metrics),
            "position": _as_json(position),
            "adapters": self._adapters(state),
            "base": self._base,
            "arrays": checksums(leaves),
        }
        args = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(_to_write(leaves)),
            description=ocp.args.JsonSave({"sha256": _digest(facts), "facts": facts}),
        )
        self._plan_after(step)
        self._look_at = self._count + self._next_step - step
        self._finish()  # the one before
        before, self._at = self._at, step
        self._scores[step] = _score(facts, self._best)
        try:
            self._remove_deleted()
            if step in self.steps:  # of a run that this one does not go on from
                self._manager.delete(step)
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            self._failed(step, before, error)
        self._before = before

    def _finish(self) -> None:
        """Wait for what is being written. An error is kept for the caller to raise when the rest is done."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            assert self._at is not None
            self._failed(self._at, self._before, error)

    def _failed(self, step: int, before: int | None, error: Exception) -> None:
        """Forget the checkpoint that was not written, and what of it is on disk; the next one is as the first."""
        self._at = before
        self._scores.pop(step, None)
        self._problem = LoraError(
            f"the checkpoint of step {step} was not written to {self.folder}: {_first_line(error)}. The earlier ones "
            "are untouched; with room on the disk and the right to write there, the next save writes again."
        )
        self._problem.__cause__ = error
        with contextlib.suppress(Exception):  # the same one again
            self._manager.close()
        self._manager = self._open()

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _adapters(self, state: Any) -> dict[str, dict[str, Any]]:
        """What each adapter is, by its path: kind, axes, scale, and the rule that made it."""

        def is_adapter(node: Any) -> bool:
            return isinstance(node, Adapter)

        nodes = jax.tree.leaves_with_path(getattr(state, "trainable", state), is_leaf=is_adapter)
        found = {}
        for keys, node in nodes:
            if is_adapter(node):
                path = jax.tree_util.keystr(keys, simple=True, separator="/")
                rule = self._rules.get(getattr(keys[-1], "key", path)) if keys else None
                found[path] = json.loads(json.dumps(describe_adapter(node))) | {"rule": rule}
        return found

    # The folder -------------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        # Adapters are many small arrays, and of each the time is in the book-keeping: where it was is not written, as
        # what is restored goes where the given state is.
        arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
        kinds = [(jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())]
        handler = ocp.PyTreeCheckpointHandler(
            use_compression=False, type_handler_registry=ocp.type_handlers.create_type_handler_registry(*kinds)
        )
        options = ocp.CheckpointManagerOptions(
            step_prefix="step",
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),  # a failure is seen at once
            preservation_policy=_Kept(self._kept),
            cleanup_tmp_directories=True,  # what a run that was killed had begun to write
            todelete_subdir=DELETED,  # a step that is removed is no checkpoint any more before its first file is gone
            lightweight_initialize=True,
            save_root_metadata=False,
        )
        items = {"arrays": handler, "description": ocp.JsonCheckpointHandler()}
        try:
            manager = ocp.CheckpointManager(self.folder, options=options, item_names=tuple(items), item_handlers=items)
            self._remove_deleted()
            return manager
        except OSError as error:
            raise LoraError(f"{self.folder} cannot be used for checkpoints: {_first_line(error)}.") from error

    def _remove_deleted(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Which of these stay, now that `self._at` is saved. Those of later steps are of a run that was left."""
        own = sorted(step for step in steps if self._at is None or step <= self._at)
        kept = set(own[-self._keep :])
        if self._keep_every:
            kept |= {step for step in own if step % self._keep_every == 0}
        scored = [(score, -step) for step in own if (score := self._scores.get(step)) is not None]
        if scored:
            kept.add(-max(scored)[1])
        return kept

    def _score_of(self, step: int) -> float | None:
        try:
            return _score(self._description(step), self._best)
        except LoraError:
            return None  # restoring it says why

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
            self._remove_deleted()
            self._notice.end()
        if error is None:
            self._notice.raise_again()


@dataclass(frozen=True)
class _Kept:
    """Which checkpoints stay, in orbax's words."""

    choose: Callable[[Sequence[int]], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        kept = self.choose([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


# Arrays, and numbers beside them --------------------------------------------------------------------------------------


def _leaves(state: Any) -> dict[str, jax.Array]:
    """The arrays of a state, by their paths."""
    names, leaves, _ = flatten_with_names(state)
    found = dict(zip(names, leaves, strict=True))
    for name, leaf in found.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise LoraError(
                f"{name} of the state is a {type(leaf).__name__}, expected an array: keep it outside of the state, or "
                "make it one with jnp.asarray."
            )
    return {name: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for name, leaf in found.items()}


def _to_write(leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Copies of the arrays on this host, which take orbax half the time; as they are where several hosts hold them."""
    arrays = {path: plain_data(leaf) for path, leaf in leaves.items() if leaf.size}
    return arrays | jax.device_get({path: array for path, array in arrays.items() if array.is_fully_addressable})


def _as_it_was(found: Any, leaf: jax.Array) -> jax.Array:
    """What came from disk, placed as the leaf is; tied to no device where the leaf is not."""
    if isinstance(found, np.ndarray):
        found = jnp.asarray(found)
    if _is_key(leaf):
        found = jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf))
    if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
        raise LoraError(f"it has {describe(found)} in the place of {describe(leaf)}")
    return jax.device_put(found, leaf.sharding) if leaf.committed else found


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _differ(saved: str, leaf: jax.Array) -> bool:
    return bool(differences({"": saved}, {"": describe(leaf)}))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    scalars = {name: value for name, value in metrics.items() if np.shape(value) == ()}
    return {name: None if value is None else float(value) for name, value in jax.device_get(scalars).items()}


def _score(facts: dict[str, Any], best: tuple[str, str] | None) -> float | None:
    """The higher the better; None where there is no number."""
    value = facts["metrics"].get(best[0]) if best else None
    if best is None or value is None or math.isnan(value):
        return None
    return value if best[1] == "max" else -value


def _is_best(best: Any) -> bool:
    return isinstance(best, tuple | list) and len(best) == 2 and isinstance(best[0], str) and best[1] in ("max", "min")


def _as_json(position: Any) -> dict[str, Any]:
    if isinstance(position, bytes):
        return {"base64": base64.b64encode(position).decode()}
    try:
        if json.loads(json.dumps(position)) == position:
            return {"json": position}
        problem = "JSON gives it back as something else"
    except (TypeError, ValueError) as error:
        problem = str(error)
    raise LoraError(
        f"the position {position!r} cannot be saved: {problem}. Give bytes, or dicts with strings for keys, lists, "
        "numbers and strings."
    )


def _position(saved: dict[str, Any]) -> Any:
    return base64.b64decode(saved["base64"]) if "base64" in saved else saved["json"]


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _version() -> str:
    from lora_jax import __version__  # which imports this file

    return __version__


# Folders and messages -------------------------------------------------------------------------------------------------


def _refuse_other_things(folder: Path) -> None:
    """A folder is for checkpoints if it is empty, or has some; and what is named like one has to be one."""
    if not folder.exists():
        return
    entries = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    named = [entry for entry in entries if re.fullmatch(r"step_\d+", entry.name)]
    others = [entry for entry in named if not any((entry / part).is_dir() for part in ("arrays", "description"))]
    unfinished = [entry for entry in entries if re.match(rf"step_\d+\.orbax-checkpoint-tmp|{DELETED}$", entry.name)]
    if others or (entries and not (named or unfinished)):
        raise LoraError(
            f"{folder} exists and holds {(others or entries)[0].name}, which is no checkpoint; all is left as it is. "
            "Train in another folder."
        )


def _listed(lines: list[str]) -> str:
    more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
    return "\n".join([*(f"  {line}" for line in lines[:8]), *more])


def _first_line(error: Any) -> str:
    """The first line of an error, cut where it is long."""
    line = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {line}" if isinstance(error, Exception) else line
