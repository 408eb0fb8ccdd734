"""Folders that are written as a whole or not at all: under a hidden name, and renamed when complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lora_jax.core.errors import LoraError


def hidden(folder: Path, state: str) -> Path:
    """Return the hidden name under which a folder is written ("new"), or kept while it is replaced ("old")."""
    return folder.with_name(f".{folder.name}.lora_jax-{state}")


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into: at the end of the block it replaces `folder`, on an error it is removed."""
    new = hidden(folder, "new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    replace(folder)


def refuse_to_replace(folder: Path) -> None:
    """Raise if a folder exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoraError(f"{folder} exists and is not empty; it is left as it is. Give another folder.")


def replace(folder: Path) -> None:
    """Rename the new folder to its name, and remove the old one.

    If the process is killed in between, the old folder is whole under its own name or a hidden one.
    """
    old = hidden(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # older than what is in the folder now
        os.rename(folder, old)
    os.rename(hidden(folder, "new"), folder)
    shutil.rmtree(old, ignore_errors=True)
