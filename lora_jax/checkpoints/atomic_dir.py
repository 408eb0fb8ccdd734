"""Folders that are written whole or not at all: under a hidden name, and renamed when complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lora_jax.core.errors import LoraError


def hidden(folder: Path, state: str) -> Path:
    """The name beside a folder under which it is written ("new"), or was kept while it was replaced ("old")."""
    return folder.with_name(f".{folder.name}.lora_jax-{state}")


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end, and is gone if that is not reached."""
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
    """Raise if anything is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoraError(f"{folder} exists and is not empty; it is left as it is. Give another folder.")


def replace(folder: Path) -> None:
    """Put the new folder in its place. Killed in between, the one that was there is whole under one of its names."""
    old = hidden(folder, "old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # older than what is in the folder now
        os.rename(folder, old)
    os.rename(hidden(folder, "new"), folder)
    shutil.rmtree(old, ignore_errors=True)
