"""Read a folder as one save left it, though others may replace it meanwhile."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from lora_jax.core.argument_checks import check_folder
from lora_jax.core.errors import LoraError

TRIES = 100

T = TypeVar("T")
Read = TypeVar("Read", bound=Callable[..., Any])


def of_one_save(read: Read) -> Read:
    """Let a function of a folder begin again if another save took the place of the folder while it was read."""

    @functools.wraps(read)
    def again(folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        check_folder(f"{read.__name__}(folder, ...)", folder)
        return read_whole(Path(folder), lambda: read(folder, *args, **kwargs))

    return cast(Read, again)


def read_whole(folder: Path, read: Callable[[], T]) -> T:
    """Return what `read` reads of a folder as one save left it: again, if another save came meanwhile."""
    for _ in range(TRIES):
        before = identity(folder)
        try:
            found = read()
        except Exception:
            if identity(folder) == before:
                raise
        else:
            if identity(folder) == before:
                return found
    raise LoraError(f"{folder} is replaced all the time, faster than it can be read: read a copy of it.")


def identity(folder: Path) -> tuple[int, int, int] | None:
    """Return what tells a file or folder from another one that takes its place; None if there is none."""
    try:
        found = folder.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns
