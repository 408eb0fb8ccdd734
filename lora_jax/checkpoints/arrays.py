"""A folder that holds nested dicts of arrays, written with orbax, and their description as JSON.

    folder/arrays          the arrays
    folder/<description>   what they are; of another name in each kind of folder, so that none replaces another kind

How it is written as a whole, whoever else writes there and whenever a process is killed, is in `atomic_dir`.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.atomic_dir import moved_aside, written
from lora_jax.checkpoints.failures import first_line, not_written
from lora_jax.checkpoints.reading import read_whole
from lora_jax.checkpoints.replaceable import Format
from lora_jax.core.arrays import describe
from lora_jax.core.errors import LoraError

# What orbax writes: in each folder, and for arrays.
OF_ORBAX = ("_[A-Z]*", "commit_success.txt")
OF_ARRAYS = (*OF_ORBAX, "_sharding", "_strings.json", "array_metadatas", "d", "manifest.ocdbt", "ocdbt.process_*")

T = TypeVar("T")


def format_of(what: str, called: str) -> Format:
    """Return what a folder with a description of this name has in it, which messages call `called`."""
    inner = [f"arrays/{name}" for name in OF_ARRAYS] + [f"{what}/{name}" for name in ("metadata", *OF_ORBAX)]
    return Format(f"saved {called}", ("arrays", what), (*OF_ORBAX, *inner))


def write(folder: Path, arrays: Any, format: Format, description: Any) -> None:
    """Write arrays and their description as one folder, which replaces the one that is there.

    Args:
        folder: to write.
        arrays: nested dicts, as `check_arrays` accepts them.
        format: of the folder.
        description: for JSON; its "format" is that of the folder.

    Raises:
        LoraError: it cannot be written.
    """
    import orbax.checkpoint as ocp  # takes half a second, which only programs that save or load pay

    if jax.process_count() > 1:
        arrays = jax.device_get(arrays)
    parts = {"arrays": ocp.args.StandardSave(arrays), format.marks[1]: ocp.args.JsonSave(description)}
    with written(folder, format) as new:
        try:
            with local_checkpointer() as checkpointer:
                checkpointer.save(new, ocp.args.Composite(**parts), force=True)
        except Exception as error:  # a full disk raises errors of many types
            raise not_written(folder, error) from error


def read_folder(folder: Path, format: Format, called: str, read: Callable[[Path], T]) -> T:
    """Return what `read` reads from a folder that `write` wrote.

    Args:
        folder: to read.
        format: of the folder.
        called: what is in it, for messages.
        read: to read it with, by `read_description` and `read_arrays`.

    Raises:
        LoraError: there is no such folder, it holds something else, or it is damaged; or as `read` raises it.
    """
    folder = folder.absolute()
    try:
        if not all((folder / mark).is_dir() for mark in format.marks):
            old = moved_aside(Path(os.path.realpath(folder)))
            hint = "" if old is None else f" A save was interrupted: rename {old} to {folder}."
            if not folder.exists() and old is None:
                raise LoraError(f"there is no folder {folder}, which was to hold {called.partition(',')[0]}.")
            raise LoraError(f"{folder} holds no {called}.{hint}")
        return read_whole(folder, lambda: read(folder))
    except LoraError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise LoraError(
            f"{folder} cannot be loaded: {first_line(error)}. If it is damaged, save it again, or restore a copy."
        ) from error


def read_description(folder: Path, what: str, version: int, earliest: int | None = None) -> Any:
    """Read the description of a folder, of this version's format or an earlier one, but none before `earliest`.

    Raises:
        LoraError: it is damaged; its format is none that this version reads.
    """
    import orbax.checkpoint as ocp

    try:
        with local_checkpointer() as checkpointer:
            description = checkpointer.restore(folder, ocp.args.Composite(**{what: ocp.args.JsonRestore()}))[what]
    except Exception as error:  # a damaged file may raise anything
        raise damaged(folder, what, first_line(error)) from error
    if not isinstance(description, dict):
        raise damaged(folder, what, "it holds no description")
    formats = range(version if earliest is None else earliest, version + 1)
    if (found := description.get("format")) not in formats:
        known = " and ".join(map(str, formats))
        raise LoraError(f"{folder} has format {found}, this version reads {known}: update lora_jax.")
    return description


def damaged(folder: Path, what: str, why: str) -> LoraError:
    """Return the error for a part of a folder that is damaged."""
    return LoraError(f"{folder} cannot be loaded: its {what} is damaged, {why}: save it again, or restore a copy.")


def read_arrays(folder: Path, shapes: Any) -> Any:
    """Read the arrays of a folder, as NumPy's.

    Args:
        folder: as `write` wrote it.
        shapes: a tree like that of the arrays, with shape and dtype of each as `describe` returns them.

    Raises:
        LoraError: an array has another shape or dtype.
    """
    import orbax.checkpoint as ocp

    with local_checkpointer() as checkpointer:
        args = ocp.args.StandardRestore(jax.tree.map(empty, shapes))
        restored = checkpointer.restore(folder, ocp.args.Composite(arrays=args)).arrays
    for found, expected in zip(*map(jax.tree.leaves, (restored, shapes)), strict=True):
        if describe(found) != expected:
            raise LoraError(f"{folder} is damaged: it has {describe(found)} where it says {expected}.")
    return restored


def local_checkpointer() -> Any:
    """Return a checkpointer of this process alone, so that one of several may save or load without the others."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    i = jax.process_index()
    only = ocp.options.MultiprocessingOptions(primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"only_{i}")
    # What tells orbax's threads that their folders are there has one name for all processes of a job: the folders of
    # another process would do. So they are made before.
    at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CompositeOptions(multiprocessing_options=only, async_options=at_once)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
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


def empty(text: str) -> np.ndarray[Any, Any]:
    """Return an array of the shape and dtype that `describe` wrote, for orbax to restore one like it."""
    dtype, _, dims = text.rstrip("]").partition("[")
    return np.empty([int(n) for n in dims.split(",") if n.strip()], jnp.dtype(dtype))
