"""Whether a process was told to end: by SIGTERM, or because its host is about to be preempted.

A single process has a handler of SIGTERM. Several processes have to agree on the step at which they end: they use the
preemption service of JAX, which also knows of preempted hosts where the platform announces that.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np


class Notice:
    """Listens from `begin` to `end` for a notice that the process is to end; `came` is called after every step."""

    def __init__(self) -> None:
        self._several = jax.distributed.is_initialized()
        self._came = self._passed_on = False
        self._handler_before: Any = None
        self._steps = self._first = 0

    def begin(self) -> None:
        """Install the handler of SIGTERM, in the main thread of a single process."""
        if not self._several and threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._on_sigterm) or signal.SIG_DFL

    def restart(self) -> None:
        """Read the state's step again at the next call of `came`: training may continue from any step."""
        self._steps = 0

    def came(self, state: Any) -> bool:
        """Whether to end after this step; the answer is the same in each process.

        The state's step is read at the first call only, as that waits for the device.
        """
        if not self._several:
            return self._came
        if not getattr(jax.config, "jax_enable_preemption_service", True):
            return False
        from jax.experimental import multihost_utils

        if self._steps == 0:
            self._first = int(np.asarray(state.step))
        self._steps += 1
        return multihost_utils.reached_preemption_sync_point(self._first + self._steps - 1)

    def passed_on(self, told: bool) -> None:
        """Note whether the training loop was told to end."""
        self._passed_on = told

    def end(self) -> None:
        """Restore the handler that was there before `begin`."""
        if self._handler_before is not None and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, self._handler_before)

    def raise_again(self) -> None:
        """Raise SIGTERM again for the handler that was there before, if the training loop was not told of it."""
        if self._came and not self._passed_on:
            signal.raise_signal(signal.SIGTERM)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        self.end()  # a second signal goes to the handler that was there before, which by default ends the process
