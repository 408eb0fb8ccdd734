"""What went wrong while files were written or read, as errors that name the path and the mend."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.errors import LoraError

FULL = "the disk is full, or a limit is reached: make room and call this again, or write to another disk"
FORBIDDEN = "there is no right to write there: write to another folder, or change who may write to this one"
MENDS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: "the disk is read-only: write to another one",
    errno.ENAMETOOLONG: "a name in the path is too long: take a shorter one",
    errno.ENOTDIR: "a part of the path is a file: take another path",
    errno.EISDIR: "it is a folder: give the path of a file",
    errno.ELOOP: "links in the path lead round in a circle: take another path",
    errno.EBUSY: "it is a place where a disk is mounted, which cannot be replaced: write to a folder in it",
}


def not_written(path: str | Path, error: Exception) -> LoraError:
    """Return the error that something was not written, with what to do about it.

    Args:
        path: that was to be written.
        error: an `OSError`, or what another library made of one, whose text then has that of the system.
    """
    code: Any = getattr(error, "errno", None)
    if code not in MENDS:
        code = next((code for code in MENDS if os.strerror(code).lower() in str(error).lower()), None)
    mend = MENDS.get(code, "mend that and call this again, or write to another folder")
    return LoraError(f"{path} was not written, and what was there is untouched: {first_line(error)}; {mend}.")


def damaged_step(folder: Path, step: int, steps: Sequence[int], why: Any, call: str) -> LoraError:
    """Return the error that a checkpoint is damaged, which names the one to take instead.

    Args:
        folder: of the checkpoints.
        step: of the damaged one.
        steps: that there are.
        why: an error or a text.
        call: that takes another one, with `{}` in the place of its step.
    """
    others = [other for other in steps if other != step]
    earlier = max((other for other in others if other < step), default=max(others, default=None))
    mend = "There is no other one: restore a copy, or start again in another folder."
    if earlier is not None:
        mend = f"Go on from another one: {call.format(earlier)}. There are {', '.join(map(str, others))}."
    return LoraError(f"{folder}, step {step} is damaged and cannot be restored: {first_line(why)}. {mend}")


def first_line(error: Any) -> str:
    """Return the first line of an error or a text, with the error's type, cut where it is long."""
    line = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {line}" if isinstance(error, Exception) else line
