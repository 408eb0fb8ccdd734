"""Whether a process was told to end: by SIGTERM, or because its host is about to be taken away.

One process keeps its own handler of SIGTERM. Several have to agree on the step at which they end, and JAX's handler
sees to that. It also knows of a host's end where the platform tells of it.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
import numpy as np


class Notice:
    """The wish that this process ends, from `begin` to `end`; it is asked for after every step."""

    def __init__(self) -> None:
        self._several = jax.distributed.is_initialized()
        self._came = self._passed_on = False
        self._handler_before: Any = None
        self._steps = self._first = 0

    def begin(self) -> None:
        if not self._several and threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._on_sigterm) or signal.SIG_DFL

    def restart(self) -> None:
        """The next step is the first one of a training, and may have any number."""
        self._steps = 0

    def came(self, state: Any) -> bool:
        """Whether to end after this step, the same in each process. Reads the state's step once in a training."""
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
        """Whether the training was told of it."""
        self._passed_on = told

    def end(self) -> None:
        """The handler of before is in its place again, and `raise_again` calls it."""
        if self._handler_before is not None and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, self._handler_before)

    def raise_again(self) -> None:
        """Once more, for the handler of before, if the training was not told of it."""
        if self._came and not self._passed_on:
            signal.raise_signal(signal.SIGTERM)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        self.end()  # a second one ends the process at once
