"""rsLoRA: W' = W + (alpha / sqrt(r)) A B, whose outputs and gradients keep their size as r grows.

Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.
"""

import math
from dataclasses import dataclass

from lora_jax.adapters.lora import Lora


@dataclass(frozen=True)
class RsLora(Lora):
    """`Lora` with the scale alpha / sqrt(rank); arguments and errors are those of `Lora`.

    >>> RsLora(rank=16, alpha=8).scale
    2.0
    """

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else float(self.alpha) / math.sqrt(int(self.rank))  # type: ignore[arg-type]
