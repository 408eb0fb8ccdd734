"""The lines of a training run where others look at them as well: in TensorBoard, and at Weights & Biases.

Both are told what `log.jsonl` is told, under the same names. A run that was broken off takes some of its steps again.
TensorBoard is told to forget what it had of them, which its files have an entry for. Weights & Biases forgets nothing,
so it is told no line that the log had before.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.core.errors import LoraError
from lora_jax.recipes.records import Log

TENSORBOARD, WANDB_ID = "tensorboard", "wandb_id.txt"  # in the folder of the run


class Tracker(Protocol):
    """One place that is told of a run."""

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line of the log."""

    def close(self, failed: bool) -> None:
        """Take the end of the run, or of this part of it."""


class Trackers:
    """Those of a run, for the `with` block around it.

    Args:
        names: of the trackers.
        folder: of the run.
        log: of the run, before a line is added: which steps are taken again.
        settings: of the run, by their names.

    Raises:
        LoraError: Weights & Biases does not take the run.
    """

    def __init__(self, names: Sequence[str], folder: Path, log: Log, settings: Mapping[str, Any]) -> None:
        make: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(folder, log),
            "wandb": lambda: WandB(folder, log, settings),
        }
        self._trackers = [make[name]() for name in names]

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End all."""
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def add(self, line: Mapping[str, Any]) -> None:
        """Tell all a line of the log."""
        for tracker in self._trackers:
            tracker.add(line)


class TensorBoard:
    """Event files in `tensorboard/`, each line of which is on disk before the next step.

    A file begins with the step from which on the ones before are to be forgotten.
    """

    def __init__(self, folder: Path, log: Log) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        place = folder / TENSORBOARD
        place.mkdir(exist_ok=True)
        # By the second of their names alone, a run that goes on at once would write over the file before.
        number = sum(1 for _ in place.iterdir())
        self._file = EventsWriter(str(place / "events"), f".{number}")
        if number:
            begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._file.write_event(event_pb2.Event(wall_time=time.time(), step=log.first, session_log=begun))

    def add(self, line: Mapping[str, Any]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _numbers(line)]
        event = self._event(wall_time=time.time(), step=line["step"], summary=self._summary(value=values))
        self._file.write_event(event)
        self._file.flush()

    def close(self, failed: bool) -> None:
        del failed
        self._file.close()


class WandB:
    """A run of Weights & Biases, which --resume goes on with: `wandb_id.txt` in the folder has its id.

    Project, entity and mode are those of its own environment variables: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE.
    """

    def __init__(self, folder: Path, log: Log, settings: Mapping[str, Any]) -> None:
        import wandb

        known = folder / WANDB_ID
        before = known.read_text(encoding="utf-8").strip() if known.exists() else None
        self._told = {_place(line) for line in log.again} if before else set()
        try:
            self._run = wandb.init(
                dir=str(folder),
                id=before,
                name=folder.absolute().name,
                resume="allow",
                config=dict(settings),
                settings=wandb.Settings(console="off"),  # which would send the progress bar
            )
        except wandb.Error as error:
            raise LoraError(
                f"Weights & Biases does not take the run: {error} Log in by `wandb login`, or set WANDB_MODE=offline "
                "and send it later by `wandb sync`."
            ) from error
        if before is None:
            with written_file(known) as new:
                new.write_text(f"{self._run.id}\n", encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        if _place(line) not in self._told:
            self._run.log(dict(_numbers(line)), step=line["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _place(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what tells a line of the log from the others: its step, and what it has of it."""
    return str(line["step"]), *line


def _numbers(line: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Return what was measured, by its names, without the step."""
    return ((name, value) for name, value in line.items() if name != "step" and value is not None)
