"""What a save may replace: nothing at all, an empty folder, or what a save of the same format wrote.

Whatever else is there is refused by its name, before any work. Nothing that others wrote is ever removed.
"""

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from lora_jax.checkpoints.failures import not_written
from lora_jax.checkpoints.reading import read_whole
from lora_jax.core.errors import LoraError


class Format(NamedTuple):
    """What a folder of some format has in it, which says what a save may replace.

    Args:
        called: the content, in messages.
        marks: entries that each such folder has.
        names: paths that it may have, as patterns; a path stands for all that is below it.
    """

    called: str
    marks: tuple[str, ...]
    names: tuple[str, ...]


def check_target(folder: str | Path, format: Format | None) -> Path:
    """Return the folder that is to be written, behind all links.

    Args:
        folder: to write.
        format: of the folders that may be replaced; None if only an empty one may.

    Raises:
        LoraError: a file is there, or anything that a save of this format did not write; it cannot be written.
    """
    target = real_path(folder)
    try:
        read_whole(target, lambda: _check(target, format))
    except OSError as error:
        raise not_written(folder, error) from error
    return target


def real_path(path: str | Path) -> Path:
    """Return the path of what is to be written, behind all links.

    Raises:
        LoraError: it has a character that no path has.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise LoraError(f"{str(path)!r} is no path: {error}. Give another one.") from error
    except OSError as error:
        raise not_written(path, error) from error


def _check(target: Path, format: Format | None) -> None:
    """Raise if a folder cannot be written, or must not be replaced."""
    if os.path.lexists(target) and not target.is_dir():
        raise LoraError(f"{target} is no folder; it is left as it is. Give another path.")
    if target.is_dir():
        refuse_other_things(target, format)
        if os.path.ismount(target) or target.samefile(Path.cwd()):
            what = "a place where a disk is mounted" if os.path.ismount(target) else "the working folder"
            raise LoraError(f"{target} is {what}, which cannot be replaced: save to a new folder in it.")
    _check_rights(target)


def foreign(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the paths in a folder that are none of these names, nor below them."""
    found = []
    for entry in sorted(folder.iterdir()):
        parts = [name.partition("/") for name in names]
        below = [rest for first, _, rest in parts if fnmatchcase(entry.name, first)]
        if not below or ("" not in below and not entry.is_dir()):
            found.append(entry.name)
        elif "" not in below:
            found += [f"{entry.name}/{path}" for path in foreign(entry, below)]
    return found


def refuse_other_things(target: Path, format: Format | None) -> None:
    """Raise if a folder holds anything that a save may not replace."""
    entries = sorted(os.listdir(target))
    if entries and format is None:
        raise LoraError(f"{target} exists and is not empty; it is left as it is. Give another folder.")
    if not entries or format is None:
        return
    if not all(mark in entries for mark in format.marks):
        raise LoraError(
            f"{target} exists and holds no {format.called}; it is left as it is. It has {entries[0]!r}: save to "
            "another folder, or to a new one in it."
        )
    if others := foreign(target, format.names):
        raise LoraError(
            f"{target} holds {others[0]!r}, which is no part of {format.called}; all is left as it is. Move it to "
            "another place, or save to another folder, or to a new one in it."
        )


def _check_rights(target: Path) -> None:
    """Raise if a folder cannot be made, as far as that can be told without trying."""
    above = next(path for path in target.parents if os.path.lexists(path))
    if not above.is_dir():
        raise LoraError(f"{target} cannot be made, as {above} is a file: give another path.")
    for path in (above, target) if target.exists() else (above,):
        if not os.access(path, os.W_OK | os.X_OK):
            raise LoraError(
                f"{target} cannot be written: there is no right to write to {path}, where folders are made and "
                "replaced. Save to another place, or to a new folder in one that may be written."
            )
