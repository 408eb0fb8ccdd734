"""What `to_lora` did to each weight, as a table; and singular directions of a changed weight that the base has not.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228: fine-tuning with
factors leaves large singular vectors that are like none of the pretrained weight's, which goes with forgetting.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_jax.core.by_path import ByPath
from lora_jax.core.text import format_table
from lora_jax.initialization.svd import svd

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ConvertedWeight:
    """What became of the adapter of one weight.

    Attributes:
        path: of the weight.
        kind: of the adapter that was given, as checkpoints call it: "dora", "lokr", ...
        shape: of one matrix, [inputs, outputs]; of the whole weight, if it is no matrix.
        matrices: how many are stacked.
        rank: of the LoRA; None for an adapter that stayed what it was.
        loss: |D - s A B| / |D|, where D is the change that the given adapter makes, in Frobenius norms of all matrices
            together: 0 where the LoRA is that change.
        intruders: how many of the largest singular vectors of W + s A B, of all matrices together, are like none of
            W's; None where it was not asked for.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    matrices: int
    rank: int | None
    loss: float
    intruders: int | None


@dataclass(frozen=True, repr=False)
class Conversion(ByPath[ConvertedWeight]):
    """`{path: ConvertedWeight}`; its text is a table.

    Attributes:
        weights: `{path: ConvertedWeight}`.
    """

    @property
    def loss(self) -> float:
        """The largest loss of a weight."""
        return max(weight.loss for weight in self.weights.values())

    @property
    def intruders(self) -> int:
        """The number of intruder dimensions of all weights."""
        return sum(weight.intruders or 0 for weight in self.weights.values())

    def __repr__(self) -> str:
        header = ["weight", "from", "inputs, outputs", "matrices", "rank", "loss", "intruders"]
        cells = [
            [w.path, w.kind, list(w.shape), w.matrices, _or_dash(w.rank), f"{w.loss:.3g}", _or_dash(w.intruders)]
            for w in self.weights.values()
        ]
        return format_table(header, cells, right=4)


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def intruder_dimensions(w: Array, change: Array, top: int, threshold: float) -> int:
    """Return how many of the largest singular vectors of W + D are like none of W's.

    Args:
        w: [d, k], of which the vectors over the outputs are compared, as torch's left ones are.
        change: D [d, k].
        top: how many of the largest ones are looked at.
        threshold: the largest |cosine| with any singular vector of W below which one is an intruder.

    >>> w = np.array([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    >>> change = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    >>> [intruder_dimensions(w, share * change, top=1, threshold=0.5) for share in (0.0, 1.0)]
    [0, 1]
    """
    *_, known = svd(w, slice(None))
    *_, found = svd(w + change, slice(top))
    cosines = np.abs(found @ known.T).max(axis=-1)
    return int((cosines < threshold).sum())
