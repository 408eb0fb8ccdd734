"""When a checkpoint is due, found out with as few reads of the state's step as possible."""

from typing import Any

import numpy as np


class Schedule:
    """The calls of `save`, and the next step to save at.

    Reading the step of a state waits for the device. A training step increases it by one at most, so it is not read
    before the next checkpoint can be due.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self.restart()

    def restart(self) -> None:
        """Begin anew, as the next state may have any step."""
        self._calls = 0
        self._read_at = 1  # the call at which to read the state's step
        self._next_step = 0  # to save at; 0 if not known yet

    def due(self, state: Any, newest: int | None, now: bool) -> int | None:
        """Count a call, and return the step of the state if it is to be saved, or None.

        Args:
            state: that may be saved.
            newest: the newest step that has a checkpoint, if any.
            now: whether to save whatever the step is.
        """
        self._calls += 1
        if not now and self._calls < self._read_at:
            return None
        step = int(np.asarray(state.step))
        if not self._next_step:
            self._next_step = self._after(step - 1 if newest is None else newest)
        self._read_at = self._calls + max(1, self._next_step - step)
        return step if (now or step >= self._next_step) and step != newest else None

    def saved(self, step: int) -> None:
        """Plan the next checkpoint after one of this step, the step of the last call."""
        self._next_step = self._after(step)
        self._read_at = self._calls + self._next_step - step

    def _after(self, step: int) -> int:
        """Return the first multiple of `every` that is above a step."""
        return (step // self._every + 1) * self._every
