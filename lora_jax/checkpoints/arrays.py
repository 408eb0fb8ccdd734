"""A folder that holds nested dicts of arrays, written with orbax, and their description as JSON.

    folder/arrays          the arrays
    folder/<description>   what they are; of another name in each kind of folder, so that none replaces another kind

A folder is written under a hidden name and renamed when complete, so a process that is killed leaves the one that was
there before: under its own name or, killed between two renames, under the name that `interrupted` says.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.atomic_dir import hidden, replace
from lora_jax.core.arrays import describe
from lora_jax.core.errors import LoraError


def holds(folder: Path, what: str) -> bool:
    """Whether a folder was written by `write`, with a description of this name."""
    return (folder / "arrays").is_dir() and (folder / what).is_dir()


def refuse_other_things(folder: Path, what: str, called: str) -> None:
    """Raise if a folder holds anything but what `write` would replace, which the message calls `called`."""
    if folder.exists() and not holds(folder, what) and any(folder.iterdir()):
        raise LoraError(f"{folder} exists and holds no saved {called}; it is left as it is. Save to another folder.")


def interrupted(folder: Path, what: str) -> str:
    """Return what to do about a folder whose writing was killed between its renames; an empty string otherwise."""
    old = hidden(folder, "old")
    return f" A save was interrupted: rename {old} to {folder}." if holds(old, what) else ""


def write(folder: Path, arrays: Any, what: str, description: Any) -> None:
    """Write arrays and their description as one folder, which replaces the one that is there.

    Args:
        folder: to write.
        arrays: nested dicts, as `check_arrays` accepts them.
        what: the name of the description.
        description: for JSON; its "format" is that of the folder.
    """
    import orbax.checkpoint as ocp  # takes half a second, which only programs that save or load pay

    new = hidden(folder, "new")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(folder.parent.iterdir()):
        if leftover.name.startswith(new.name):  # orbax's own temporary folder has a longer name
            shutil.rmtree(leftover)
    if jax.process_count() > 1:
        arrays = jax.device_get(arrays)
    with _checkpointer() as checkpointer:
        parts = {"arrays": ocp.args.StandardSave(arrays), what: ocp.args.JsonSave(description)}
        checkpointer.save(new, ocp.args.Composite(**parts))
    replace(folder)


def read_description(folder: Path, what: str, version: int) -> Any:
    """Read the description of a folder.

    Raises:
        LoraError: its format is not this version's.
    """
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        description = checkpointer.restore(folder, ocp.args.Composite(**{what: ocp.args.JsonRestore()}))[what]
    if description.get("format") != version:
        found = description.get("format")
        raise LoraError(f"{folder} has format {found}, this version reads {version}: update lora_jax.")
    return description


def read_arrays(folder: Path, shapes: Any) -> Any:
    """Read the arrays of a folder, as NumPy's.

    Args:
        folder: as `write` wrote it.
        shapes: a tree like that of the arrays, with shape and dtype of each as `describe` returns them.

    Raises:
        LoraError: an array has another shape or dtype.
    """
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        args = ocp.args.StandardRestore(jax.tree.map(_empty, shapes))
        restored = checkpointer.restore(folder, ocp.args.Composite(arrays=args)).arrays
    for found, expected in zip(*map(jax.tree.leaves, (restored, shapes)), strict=True):
        if describe(found) != expected:
            raise LoraError(f"{folder} is damaged: it has {describe(found)} where it says {expected}.")
    return restored


def _checkpointer() -> Any:
    """Return a checkpointer of this process alone, so that one of several may save or load without the others."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    i = jax.process_index()
    only = ocp.options.MultiprocessingOptions(primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"only_{i}")
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=only))
    return ocp.Checkpointer(handler, multiprocessing_options=only)


def check_arrays(node: Any, path: str, beside: str = "") -> None:
    """Raise unless a tree comes back as it was written: nested dicts, with strings for keys, of arrays with entries.

    Args:
        node: the tree.
        path: of the tree, for messages.
        beside: what else is saved, for messages.
    """
    if isinstance(node, Mapping):
        for key, child in node.items():
            if not isinstance(key, str):
                raise LoraError(f"{path}: the key {key!r} is a {type(key).__name__}, expected a string.")
            check_arrays(child, f"{path}/{key}" if path else key, beside)
    elif not isinstance(node, jax.Array | np.ndarray) or jnp.issubdtype(node.dtype, jax.dtypes.extended):
        found = node.dtype if isinstance(node, jax.Array) else type(node).__name__
        raise LoraError(f"{path} is a {found}: only dicts of arrays of numbers are saved{beside}.")
    elif node.size == 0:
        raise LoraError(f"{path} of shape {list(node.shape)} is empty, and cannot be saved.")


def _empty(text: str) -> np.ndarray[Any, Any]:
    """Return an array of the shape and dtype that `describe` wrote, for orbax to restore one like it."""
    dtype, _, dims = text.rstrip("]").partition("[")
    return np.empty([int(n) for n in dims.split(",") if n.strip()], jnp.dtype(dtype))
