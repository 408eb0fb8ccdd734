"""LoHa in PEFT's files: `hada_w1_a`, `hada_w1_b`, `hada_w2_a` and `hada_w2_b`."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from lora_jax.adapters.loha import LohaAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.interop.key_map import Array, ParameterMatch
from lora_jax.interop.peft.formats.format import COMMON_OPTIONS, Arrays, Format, Matches, Module
from lora_jax.interop.peft.formats.ranks import alpha_of, ranks_and_alphas

_OPTIONS = "alpha alpha_pattern init_weights module_dropout r rank_dropout rank_pattern use_effective_conv2d"


class LohaFormat(Format):
    """`peft_type` "LOHA"."""

    name = peft_type = "LOHA"
    adapter: ClassVar[type[Adapter]] = LohaAdapter
    module_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    options = COMMON_OPTIONS | {*_OPTIONS.split()}

    endings = MappingProxyType({"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"})
    refused_beginnings = MappingProxyType({"hada_t": "use_effective_conv2d=False"})
    pairs: ClassVar[tuple[tuple[str, str], ...]] = (("a1", "b1"), ("a2", "b2"))
    scaled = "b2"

    has_biases = False

    def entries(self, modules: Mapping[str, Module], matches: Matches, bias: str) -> dict[str, Any]:
        ranks = {name: self.rank_to_write(arrays) for name, (arrays, _) in modules.items()}
        alphas = {name: alpha_of(modules[name].scale, rank) for name, rank in ranks.items()}
        told = {"init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0, "use_effective_conv2d": False}
        return told | ranks_and_alphas(ranks, alphas, self.alpha_option)

    def rank_to_write(self, arrays: Arrays) -> int:
        """Return the rank that the config says of a module."""
        return len(arrays["a1"])

    def expected_shapes(self, arrays: Arrays) -> dict[str, tuple[int, ...]]:
        return {"a2": arrays["a1"].shape, "b2": arrays["b1"].shape}

    def tensors_of(self, match: ParameterMatch, arrays: Arrays) -> Arrays:
        """Return the tensors as matrices: inputs and window of a convolution are one axis in PEFT."""
        return super().tensors_of(match, {field: array.reshape(len(array), -1) for field, array in arrays.items()})

    def as_factor(self, match: ParameterMatch, a: Array) -> Array:
        """Return a factor with the window of a convolution apart from its inputs."""
        window = match.sizes_of("window")
        if window and a.ndim == 2 and a.shape[1] % math.prod(window) == 0:
            return a.reshape(len(a), -1, *window)
        return a
