"""Folders that are written as a whole or not at all, whoever else writes there and whenever a process is killed.

Each save has a hidden folder of its own beside its target:

    .NAME.lora_jax-1a2b3c4d/lock     locked for as long as the process that saves is alive
    .NAME.lora_jax-1a2b3c4d/part     what is being written
    .NAME.lora_jax-1a2b3c4d/new      the same, complete; it changes places with the target
    .NAME.lora_jax-1a2b3c4d/old0     the target as it was, on its way out

1. The target is what one save left, whole. Of two that end at the same time the later one stays.
2. It is never absent where the system can exchange two names in one step, as Linux can. Elsewhere it is for the moment
   between two renames; what was there is then in `old0`, and the next save puts it back if the process was killed.
3. Nothing is removed but entries that a save of this format writes, by their names, and hidden folders whose lock is
   free: those of processes that ended. Where a file system has no locks, these stay.
4. Through a symbolic link, the folder that it leads to is replaced.
5. What takes the place of something else is on disk before: a machine that loses its power keeps one or the other.

A reader that opens several files of a folder one after another may meet two saves: `reading` is for that.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_jax.checkpoints.failures import not_written
from lora_jax.checkpoints.replaceable import Format, check_target, foreign, real_path, refuse_other_things
from lora_jax.core.errors import LoraError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LONGEST_NAME = 200  # bytes; systems allow 255, and a hidden name is longer than that of its target
TRIES = 100  # of a writer that others come before
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux

# Writing --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written(folder: str | Path, format: Format | None = None) -> Iterator[Path]:
    """Yield an empty folder to write into, which takes the place of `folder` at the end of the block.

    On an error nothing has changed, and nothing is left.

    Args:
        folder: to write, as `check_target` accepts it.
        format: of what may be replaced.

    Raises:
        LoraError: it cannot be written, or what is there cannot be replaced.
    """
    target = check_target(folder, format)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target, format)
        with _work_folder(target, format) as work:
            part = work / "part"  # of a killed process, with what its writers leave: none of it was ever the target's
            part.mkdir()
            yield part
            check_target(target, format)
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, part)
            if format is not None:  # where nothing is replaced, nothing can be lost
                _sync(part)
            os.rename(part, work / "new")
            _replace(target, work, format)
            _sync_folder(target.parent)
    except OSError as error:
        raise not_written(target, error) from error


@contextlib.contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to, which takes the place of `path` at the end of the block.

    Raises:
        LoraError: it cannot be written.
    """
    target = real_path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target, None)
        with _work_folder(target, None) as work:
            yield work / "new"
            _sync(work)
            os.replace(work / "new", target)
    except OSError as error:
        raise not_written(target, error) from error


def _replace(target: Path, work: Path, format: Format | None) -> None:
    """Put the new folder into the place of the target. What was there is then in the work folder, if anything."""
    new = work / "new"
    for i in range(TRIES):
        try:
            os.rename(new, target)  # there is none, or an empty one
            return
        except OSError as error:
            if error.errno not in TAKEN:
                raise
        if format is None:
            refuse_other_things(target, format)
        elif _exchange(new, target):
            return
        else:
            with contextlib.suppress(FileNotFoundError):  # moved by another writer
                os.rename(target, work / f"old{i}")
    raise LoraError(f"{target} was not written: others save there all the time. Save to a folder of its own.")


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; false where the system has no such step."""
    rename = _renameat2()
    return rename is not None and not rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


@functools.cache
def _renameat2() -> Any:
    try:
        return ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not on Linux
        return None


def _sync(folder: Path) -> None:
    """Wait until all that is in a folder is on disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(root)


def _sync_folder(folder: str | Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# The folders of saves that are under way ------------------------------------------------------------------------------


@contextlib.contextmanager
def _work_folder(target: Path, format: Format | None) -> Iterator[Path]:
    """Make the hidden folder of one save, and remove it in the end."""
    work, lock = _claim(target)
    with _closing(lock):
        try:
            yield work
        finally:
            _remove(work, target, format)


@contextlib.contextmanager
def _closing(lock: int | None) -> Iterator[None]:
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _claim(target: Path) -> tuple[Path, int | None]:
    """Make a hidden folder and lock it; return it and the lock."""
    for _ in range(TRIES):
        work = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}")
        work.mkdir()
        try:
            return work, _lock(work)
        except BlockingIOError:
            continue  # another process was faster, took it for a leftover, and removes it
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise
    raise LoraError(f"{target} was not written: its hidden folders are removed all the time by another process.")


def _lock(work: Path) -> int | None:
    """Lock a hidden folder for as long as this process lives, and return the handle; None where there are no locks.

    Raises:
        BlockingIOError: another process has it.
    """
    if fcntl is None:
        return None
    try:
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        raise BlockingIOError from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(lock), os.stat(work / "lock"))
    except (BlockingIOError, FileNotFoundError):
        same = False
    except OSError:  # the file system has no locks
        os.close(lock)
        return None
    if not same:
        os.close(lock)
        raise BlockingIOError
    return lock


def _clear(target: Path, format: Format | None) -> None:
    """Remove what killed processes left beside a target, after putting back what they had moved aside."""
    for work in leftovers(target):
        try:
            lock = _lock(work)
        except OSError:
            continue  # of a process that is alive, or of another user
        if lock is not None:
            with _closing(lock), contextlib.suppress(OSError):  # it stays where it is
                _remove(work, target, format)


def leftovers(target: Path) -> list[Path]:
    """Return the hidden folders of saves to a target, of those that are under way and of those that were killed."""
    pattern = re.compile(re.escape(_prefix(target)) + "[0-9a-f]{8}")
    return [path for path in sorted(target.parent.iterdir()) if pattern.fullmatch(path.name) and path.is_dir()]


def moved_aside(target: Path) -> Path | None:
    """Return where a killed process left a target that is missing since, or None."""
    found = [path for work in leftovers(target) for path in _olds(work)] if target.parent.is_dir() else []
    return found[-1] if found else None


def _remove(work: Path, target: Path, format: Format | None) -> None:
    """Remove the hidden folder of a save that has ended.

    What it holds of others, who wrote into the target in the very moment in which it was replaced, goes back there.
    """
    olds = _olds(work)
    if olds and not os.path.lexists(target):  # killed between two renames
        os.rename(olds.pop(), target)
    for folder in filter(Path.is_dir, [work / "new", *olds]):
        for name in foreign(folder, format.names) if format is not None else []:
            if os.path.lexists(target / name):
                return  # both stay
            os.rename(folder / name, target / name)
    # The lock goes last: without it the folder looks like one of a process that ended, and others would begin to remove
    # what is being removed here.
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _olds(work: Path) -> list[Path]:
    return sorted(work.glob("old*"), key=lambda path: (len(path.name), path.name))


def _prefix(target: Path) -> str:
    """Return what the names of a target's hidden folders begin with."""
    name = os.fsencode(target.name)
    short = target.name if len(name) <= LONGEST_NAME else hashlib.sha256(name).hexdigest()
    return f".{short}.lora_jax-"
