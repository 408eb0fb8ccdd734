"""The folder of a run's checkpoints as orbax manages it.

    folder/step_300/arrays        {path of the leaf: array}, without the classes of optax or of this library
    folder/step_300/description   JSON

Orbax writes in the background, under a temporary name that it changes to `step_300` when all is on disk. A checkpoint
that is no longer needed is renamed before its first file is deleted, so that no half of one bears the name of a step.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.checkpoints import replaceable
from lora_jax.checkpoints.arrays import OF_ORBAX
from lora_jax.checkpoints.failures import first_line
from lora_jax.checkpoints.run_lock import RunLock
from lora_jax.core.errors import LoraError

DELETED = ".lora_jax-deleted"  # checkpoints are moved here to be deleted
ITEMS = ("arrays", "description")
_UNFINISHED = re.compile(r"step_\d+\.orbax-checkpoint-tmp")  # what the name of a half written one begins with


def lock(folder: Path) -> RunLock | None:
    """Make a folder, and lock it for this run; None in other processes of the run than the first.

    Raises:
        LoraError: the folder cannot be made or read.
    """
    if jax.process_index() != 0:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return RunLock(folder)
    except OSError as error:
        raise LoraError(f"{folder} cannot be used for checkpoints: {first_line(error)}.") from error


def open_manager(folder: Path, preserve: Callable[[Sequence[int]], set[int]], is_ours: bool) -> Any:
    """Return orbax's manager of a folder. What a killed run left half written is removed.

    Args:
        folder: of the checkpoints.
        preserve: which of the given steps stay; called after each save.
        is_ours: false if a run that is alive has the folder; then nothing is removed.

    Raises:
        LoraError: the folder cannot be made, read or written.
    """
    import orbax.checkpoint as ocp  # takes half a second, which only programs with checkpoints pay

    # Most of the time of writing many small arrays is book-keeping. Their shardings are not written, as each array is
    # restored with the sharding of the given state.
    arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
    kinds = [(jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())]
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, type_handler_registry=ocp.type_handlers.create_type_handler_registry(*kinds)
    )
    options = ocp.CheckpointManagerOptions(
        step_prefix="step",
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),  # `save` raises if it cannot
        preservation_policy=_Preservation(folder, preserve),
        cleanup_tmp_directories=False,  # it would go on in a thread after the manager is closed
        todelete_subdir=DELETED,
        lightweight_initialize=True,
        save_root_metadata=False,
    )
    items = {"arrays": handler, "description": ocp.JsonCheckpointHandler()}
    try:
        if is_ours:
            remove_unfinished(folder)
            remove_deleted(folder)
        return ocp.CheckpointManager(folder, options=options, item_names=tuple(items), item_handlers=items)
    except OSError as error:
        raise LoraError(f"{folder} cannot be used for checkpoints: {first_line(error)}.") from error


@dataclass(frozen=True)
class _Preservation:
    """Orbax's interface of a policy of which checkpoints stay."""

    folder: Path
    preserve: Callable[[Sequence[int]], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        kept = self.preserve([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept or bool(foreign(self.folder, checkpoint.step)) for checkpoint in checkpoints]


def foreign(folder: Path, step: int) -> list[str]:
    """Return what others wrote beside a checkpoint, for whose sake it stays: a table of results, say."""
    path = folder / f"step_{step}"
    return replaceable.foreign(path, (*ITEMS, *OF_ORBAX)) if path.is_dir() else []


def start_saving(manager: Any, step: int, arrays: Mapping[str, Any], description: Any) -> None:
    """Begin to write a checkpoint; `manager.wait_until_finished` waits for its end, and raises what went wrong."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), description=ocp.args.JsonSave(description))
    manager.save(step, args=args, force=True)


def read_description(manager: Any, step: int) -> Any:
    """Read the description of a checkpoint."""
    import orbax.checkpoint as ocp

    return manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore())).description


def read_arrays(manager: Any, step: int, like: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Read the arrays of a checkpoint at these paths.

    Args:
        manager: as `open_manager` returns it.
        step: of the checkpoint.
        like: `{path: array}`. What is restored for a committed array has its sharding and dtype; what is restored for
            another one, or for an array that each of several processes has for itself, is NumPy's.
    """
    import orbax.checkpoint as ocp

    how = {
        path: ocp.RestoreArgs(restore_type=np.ndarray)
        if not array.committed or (jax.process_count() > 1 and array.is_fully_addressable)
        else ocp.ArrayRestoreArgs(sharding=array.sharding, dtype=array.dtype)
        for path, array in like.items()
    }
    args = ocp.args.PyTreeRestore(item=dict(like), restore_args=how, partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(arrays=args)).arrays


def remove_unfinished(folder: Path) -> None:
    """Remove what killed and failed saves have left half written."""
    if jax.process_index() == 0:
        for entry in folder.glob("step_*"):  # of nothing, where something else has taken the folder's place
            if _UNFINISHED.match(entry.name):
                shutil.rmtree(entry, ignore_errors=True)


def remove_deleted(folder: Path) -> None:
    """Remove the checkpoints that were moved away to be deleted, as far as that is possible."""
    if jax.process_index() == 0:
        shutil.rmtree(folder / DELETED, ignore_errors=True)


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint in a folder, in ascending order; none if it cannot be read."""
    try:
        names = [entry.name for entry in folder.iterdir() if any((entry / part).is_dir() for part in ITEMS)]
    except (OSError, ValueError):
        return []
    return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))


def check_folder(folder: str | Path) -> Path:
    """Return a folder for checkpoints, behind all links.

    Raises:
        LoraError: it holds anything else and no checkpoint, or something that is named like one and is none, which the
            message names; or it cannot be read.
    """
    try:
        folder = Path(os.path.realpath(folder))
        entries = sorted(folder.iterdir()) if folder.is_dir() else [folder] * folder.exists()
    except (OSError, ValueError) as error:
        raise LoraError(f"{folder} cannot be used for checkpoints: {first_line(error)}.") from error
    named = [entry for entry in entries if re.fullmatch(r"step_\d+", entry.name)]
    others = [entry for entry in named if not any((entry / part).is_dir() for part in ITEMS)]
    unfinished = [entry for entry in entries if _UNFINISHED.match(entry.name) or entry.name == DELETED]
    if others or (entries and not (named or unfinished)):
        raise LoraError(
            f"{folder} exists and holds {(others or entries)[0].name}, which is no checkpoint; all is left as it is. "
            "Train in another folder."
        )
    return folder
