"""Which checkpoints of a run stay: the newest, the best by a metric, and those at multiples of a step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Retention:
    """The rule by which checkpoints stay, and the scores of those that there are.

    Args:
        keep: how many of the newest stay.
        keep_every: those at multiples of this step stay.
        best: `(metric, "max")` or `(metric, "min")`: the best by this metric stays; of equally good ones the earliest.
        scores: `{step: score}`, the higher the better; None where the metric was not measured.
    """

    keep: int
    keep_every: int | None = None
    best: tuple[str, str] | None = None
    scores: dict[int, float | None] = field(default_factory=dict)

    def note(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Note the score of a checkpoint."""
        value = metrics.get(self.best[0]) if self.best else None
        if self.best is None or value is None or math.isnan(value):
            self.scores[step] = None
        else:
            self.scores[step] = value if self.best[1] == "max" else -value

    def forget(self, step: int) -> None:
        """Forget the score of a checkpoint that was not written."""
        self.scores.pop(step, None)

    def best_of(self, steps: Sequence[int]) -> int | None:
        """Return the best of these steps, or None if none has a score."""
        scored = [(score, -step) for step in steps if (score := self.scores.get(step)) is not None]
        return -max(scored)[1] if scored else None

    def kept(self, steps: Sequence[int], newest: int | None) -> set[int]:
        """Return which of these steps stay.

        Args:
            steps: that have a checkpoint.
            newest: that the run has saved. Later ones belong to a run that this one does not continue, and do not stay.
        """
        own = sorted(step for step in steps if newest is None or step <= newest)
        kept = set(own[-self.keep :])
        if self.keep_every:
            kept |= {step for step in own if step % self.keep_every == 0}
        best = self.best_of(own)
        return kept if best is None else kept | {best}


def is_best(best: Any) -> bool:
    """Whether this is a metric and a direction."""
    return isinstance(best, tuple | list) and len(best) == 2 and isinstance(best[0], str) and best[1] in ("max", "min")
