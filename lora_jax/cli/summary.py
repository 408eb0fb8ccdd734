"""What adapters do to each weight, read from a folder of this library or of HF PEFT."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax import checkpoint
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.cli.spectrum import Spectrum, spectrum
from lora_jax.core.errors import LoraError
from lora_jax.interop.name_templates import split
from lora_jax.interop.peft.load import CONFIG, load_by_module


class WeightSummary(NamedTuple):
    """One adapted weight, and the change that its adapter makes."""

    weight: str
    kind: str
    shape: tuple[int, ...]  # of each matrix, [inputs, outputs]
    matrices: int
    rank: int
    scale: float
    spectrum: Spectrum

    @property
    def parameters(self) -> int:
        """The number of entries of A and B."""
        return self.matrices * self.rank * sum(self.shape)


def summarize(folder: Path) -> list[WeightSummary]:
    """Return a summary of each adapted weight, in the order of their names.

    Raises:
        LoraError: the folder holds no adapters, or some that are not W + s A B.
    """
    if (folder / CONFIG).exists():
        adapters, _, key_map = load_by_module(folder)
        kinds = {split(entry.path)[0]: entry.kind for entry in key_map.entries}
    else:
        adapters, _ = checkpoint.load(folder)
        kinds = dict.fromkeys(adapters, "lora")
    rows = []
    for path, adapter in sorted(adapters.items()):
        factors = adapter.to_lora() or adapter
        if not isinstance(factors, LoraAdapter):
            raise LoraError(f"{path!r} is a {type(adapter).__name__}; this version inspects what is W + s A B.")
        rows.append(_summary(path, kinds[path], factors))
    return rows


def _summary(path: str, kind: str, adapter: LoraAdapter) -> WeightSummary:
    """Return the summary of one adapter."""
    stack, _, _ = adapter.axes.sizes(adapter.kernel_shape())
    _, d, k = adapter.axes.fans(adapter.kernel_shape())
    rank = adapter.a.shape[-1]
    a, b = np.asarray(adapter.a).reshape(*stack, d, rank), np.asarray(adapter.b).reshape(*stack, rank, k)
    scale = float(adapter.scale)
    return WeightSummary(path, kind, (d, k), math.prod(stack), rank, scale, spectrum(a, b, scale))
