"""LoKr in PEFT's files: `lokr_w1`, and `lokr_w2_a` and `lokr_w2_b`, or `lokr_w2` where the second factor is whole.

With `decompose_both` the first factor can be a product too, `lokr_w1_a` and `lokr_w1_b`; it is small, and read whole.
"""

import math
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lora_jax.adapters.lokr import LokrAdapter
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import ParameterMatch
from lora_jax.interop.peft.dtypes import widened
from lora_jax.interop.peft.formats.format import Arrays, Config, Matches, Module, Modules, does_not_fit
from lora_jax.interop.peft.formats.loha import LohaFormat

MOST_ENTRIES = 2**32  # of the LoRA that a LoKr is, with which it is inspected and merged; of the largest models, 2e9


class LokrFormat(LohaFormat):
    """`peft_type` "LOKR". Its options are LoHa's and those by which PEFT takes inputs and outputs apart."""

    name = peft_type = "LOKR"
    adapter = LokrAdapter
    module_kinds = ("linear",)
    joins_parts = False

    options = LohaFormat.options | {"decompose_both", "decompose_factor", "rank_dropout_scale"}

    endings = MappingProxyType({"w1": "lokr_w1", "a": "lokr_w2_b", "b": "lokr_w2_a"})
    other_endings = MappingProxyType({"lokr_w2": "a", "lokr_w1_a": "left", "lokr_w1_b": "right"})  # a whole, without b
    refused_beginnings = MappingProxyType({"lokr_t": "use_effective_conv2d=False"})
    optional = ("w1", "b")
    pairs = ()
    scaled = "w1"

    def entries(self, modules: Mapping[str, Module], matches: Matches, bias: str) -> dict[str, Any]:
        factor = decompose_factor([arrays for arrays, _ in modules.values()])
        return super().entries(modules, matches, bias) | {"decompose_both": False, "decompose_factor": factor}

    def rank_to_write(self, arrays: Arrays) -> int:
        """Return the rank: of a whole second factor the smallest with which PEFT keeps it whole, see below."""
        rank = self.rank_of(arrays)
        return (max(arrays["a"].shape) + 1) // 2 if rank is None else rank

    def problem_of_shapes(self, arrays: Arrays) -> str | None:
        names = {field: ending for ending, field in self.other_endings.items()} | dict(self.endings)
        listed = ", ".join(f"{names[field]} {list(array.shape)}" for field, array in arrays.items())
        if any(array.ndim != 2 or 0 in array.shape for array in arrays.values()):
            return f"has {listed}, expected matrices"
        if not _has_first(arrays):
            return f"has {listed}, and of the first factor neither the whole nor both of its own"
        pairs = [(arrays[x], arrays[y]) for x, y in (("b", "a"), ("left", "right")) if x in arrays]
        if any(x.shape[1] != y.shape[0] for x, y in pairs):
            return f"has {listed}, of no common rank"
        entries = _first(arrays)[0] * len(arrays["a"]) * (self.inputs_of(arrays) + self.outputs_of(arrays))
        if entries > MOST_ENTRIES:
            return f"has {listed}, and as LoRA {entries:,} entries, expected at most {MOST_ENTRIES:,}"
        return None

    def resolved(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> Arrays:
        """Return the arrays with the first factor whole."""
        if "w1" in arrays:
            return arrays
        left, right = widened(arrays["left"]), widened(arrays["right"])
        if len(right) != config.rank_of(module):
            raise LoraError(f"has a lokr_w1_b of rank {len(right)}, by the config {config.rank_of(module)}")
        return {"w1": left @ right} | {name: arrays[name] for name in ("a", "b") if name in arrays}

    def endings_of(self, match: ParameterMatch, arrays: Arrays) -> Mapping[str, str]:
        return self.endings if "b" in arrays else {**self.endings, "a": "lokr_w2"}

    def tensors_of(self, match: ParameterMatch, arrays: Arrays) -> Arrays:
        names = self.endings_of(match, arrays)
        return {names[field]: array for field, array in arrays.items()}

    def rank_of(self, arrays: Arrays) -> int | None:
        return len(arrays["a"]) if "b" in arrays else None

    def inputs_of(self, arrays: Arrays) -> int:
        return _first(arrays)[1] * arrays["a"].shape[1]

    def outputs_of(self, arrays: Arrays) -> int:
        return _first(arrays)[0] * len(arrays["b"] if "b" in arrays else arrays["a"])

    def module_kind(self, config: Config, module: str, arrays: Arrays, tensors: Container[str]) -> str:
        return "linear"

    def from_torch(self, match: ParameterMatch, arrays: Arrays, start: int) -> Arrays:
        self.check_module(match)
        if (self.inputs_of(arrays), self.outputs_of(arrays)) != match.axes.fans(match.shape)[1:]:
            raise does_not_fit(match, arrays)
        return {field: array.T for field, array in arrays.items()}

    def to_torch(self, match: ParameterMatch, ours: Arrays) -> Arrays:
        return {field: array.T for field, array in ours.items()}

    def fit(self, modules: Modules) -> Modules | None:
        """Return None where no option makes PEFT take inputs and outputs apart as these modules do."""
        return None if decompose_factor([arrays for arrays, _ in modules.values()]) is None else modules


def _has_first(arrays: Arrays) -> bool:
    """Return whether the first factor is there once: whole, or as both of its own factors."""
    return [name for name in ("w1", "left", "right") if name in arrays] in (["w1"], ["left", "right"])


def _first(arrays: Arrays) -> tuple[int, int]:
    """Return the sides of the first factor, [outputs, inputs]."""
    left, right = (arrays["w1"], arrays["w1"]) if "w1" in arrays else (arrays["left"], arrays["right"])
    return left.shape[0], right.shape[1]


def decompose_factor(found: Sequence[Arrays]) -> int | None:
    """Return the option by which PEFT takes outputs and inputs of these modules apart, or None if there is none.

    -1 stands for the divisors that are nearest to the square root, the smaller one first. Another factor stands for
    itself where it divides the number, and else for the largest divisor up to it and to the square root. A second
    factor is whole exactly where the rank is at least half of its longer side.
    """
    pairs = []
    for arrays in found:
        (q, p), m = arrays["w1"].shape, arrays["a"].shape[1]
        n = len(arrays["b"] if "b" in arrays else arrays["a"])
        if "b" in arrays and len(arrays["a"]) >= max(m, n) / 2:
            return None
        pairs += [(q, n), (p, m)]
    for factor in (-1, *sorted({first for first, _ in pairs})):
        if all(first == _smaller_divisor(first * second, factor) for first, second in pairs):
            return factor
    return None


def _smaller_divisor(size: int, factor: int) -> int:
    if factor > 0 and size % factor == 0:
        return factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return next(n for n in range(most, 0, -1) if size % n == 0)
