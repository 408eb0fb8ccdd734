"""Nested dicts of arrays as one folder, with orbax, and beside them a description as JSON.

    folder/arrays        the arrays
    folder/<what>        what they are: another name for each kind of folder, so that none takes another's place

A folder is written under a hidden name and renamed when complete, so a run that is killed leaves the one that was there
before: under its own name or, killed between two renames, where `missing` says.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.atomic_dir import hidden, replace
from lora_jax.core.arrays import describe_shape
from lora_jax.core.errors import LoraError


def holds(folder: Path, what: str) -> bool:
    """Whether this was written here."""
    return (folder / "arrays").is_dir() and (folder / what).is_dir()


def refuse_other_things(folder: Path, what: str, called: str) -> None:
    """Raise if there is anything but what `write` would replace."""
    if folder.exists() and not holds(folder, what) and any(folder.iterdir()):
        raise LoraError(f"{folder} exists and holds no saved {called}; it is left as it is. Save to another folder.")


def missing(folder: Path, what: str) -> str:
    """What to do where a save was killed between its renames; nothing to say otherwise."""
    old = hidden(folder, "old")
    return f" A save was interrupted: rename {old} to {folder}." if holds(old, what) else ""


def write(folder: Path, arrays: Any, what: str, description: Any) -> None:
    """Both as one folder, in the place of the one that is there."""
    import orbax.checkpoint as ocp  # half a second that only those pay who save

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
    """What was written beside the arrays.

    Raises:
        LoraError: it has another format than this version.
    """
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        description = checkpointer.restore(folder, ocp.args.Composite(**{what: ocp.args.JsonRestore()}))[what]
    if description.get("format") != version:
        found = description.get("format")
        raise LoraError(f"{folder} has format {found}, this version reads {version}: update lora_jax.")
    return description


def read_arrays(folder: Path, shapes: Any) -> Any:
    """The arrays, as NumPy's; `shapes` are those of `describe_shape`, in the same tree.

    Raises:
        LoraError: an array is of another shape than is said.
    """
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        args = ocp.args.StandardRestore(jax.tree.map(_empty, shapes))
        restored = checkpointer.restore(folder, ocp.args.Composite(arrays=args)).arrays
    for found, expected in zip(*map(jax.tree.leaves, (restored, shapes)), strict=True):
        if describe_shape(found) != expected:
            raise LoraError(f"{folder} is damaged: it has {describe_shape(found)} where it says {expected}.")
    return restored


def _checkpointer() -> Any:
    """Of this process alone: one of several may save or load without waiting for the others."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    i = jax.process_index()
    only = ocp.options.MultiprocessingOptions(primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"only_{i}")
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=only))
    return ocp.Checkpointer(handler, multiprocessing_options=only)


def check_arrays(node: Any, path: str, beside: str = "") -> None:
    """Nested dicts with strings for keys, and arrays with something in them: what comes back as it went."""
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
    """An array such as `describe_shape` described, for orbax to fill another one like it: on no device."""
    dtype, _, dims = text.rstrip("]").partition("[")
    return np.empty([int(n) for n in dims.split(",") if n.strip()], jnp.dtype(dtype))
