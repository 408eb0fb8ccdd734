"""Whether a folder of checkpoints belongs to a run that is alive: two runs in one remove each other's.

The folder itself is locked, which leaves no file in it. The lock ends with its process, however that ends. Where a file
system has no such locks, as some network file systems, no run is ever taken for alive.
"""

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """The lock of a folder, held until `release`, or until this object or the process ends.

    Args:
        folder: to lock, if no other run has it; `held` says whether that is so.
    """

    def __init__(self, folder: Path) -> None:
        self.held = True
        self._end: weakref.finalize[[int], RunLock] | None = None
        if fcntl is None:
            return
        handle = os.open(folder, os.O_RDONLY)
        self._end = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.held = False
        except OSError:  # no locks here
            pass
        # A process that is forked off, such as one that loads data, may outlive this one and must not keep the lock.
        os.register_at_fork(after_in_child=self._end)

    def release(self) -> None:
        """End the lock."""
        if self._end is not None:
            self._end()
        self.held = False
