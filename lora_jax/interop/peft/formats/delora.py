"""DeLoRA in PEFT's files: `delora_A`, `delora_B`, `delora_lambda` and `delora_w_norm`.

Bini et al. 2025, "Decoupling Angles and Strength in Low-rank Adaptation", arXiv 2503.18225: W' = W + B D A N,
where D has l / (r |A_i| |B_i|) for each of the r directions, and N the lengths that the columns of W had for each input
when training began.
"""

from types import MappingProxyType

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.dtypes import widened
from lora_jax.interop.peft.formats.format import COMMON_OPTIONS, Arrays, Config
from lora_jax.interop.peft.formats.read_as_lora import ReadAsLora

_OPTIONS = "bias delora_lambda init_weights lambda_pattern module_dropout r rank_pattern"
_SHORTEST = 1e-4  # what PEFT takes the length of a shorter direction to be


class DeloraFormat(ReadAsLora):
    """`peft_type` "DELORA"."""

    name = peft_type = "DELORA"
    options = COMMON_OPTIONS | {*_OPTIONS.split()}
    endings = MappingProxyType(
        {"a": "delora_A", "b": "delora_B", "strength": "delora_lambda", "lengths": "delora_w_norm"}
    )
    axes = MappingProxyType({"a": 2, "b": 2, "strength": 1, "lengths": 1})

    def scale_in(self, config: Config, module: str) -> float:
        return 1.0

    def factors(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> tuple[Array, Array]:
        a, b, strength, lengths = (widened(arrays[name]) for name in self.endings)
        self.check_rank(len(a), config, module)
        if b.shape[1] != len(a) or strength.shape != (1,) or lengths.shape != a.shape[1:]:
            shapes = ", ".join(f"{ending} {list(arrays[name].shape)}" for name, ending in self.endings.items())
            raise LoraError(f"has {shapes}, which do not fit one another")
        norms = [np.maximum(np.linalg.norm(x, axis=axis), _SHORTEST) for x, axis in ((a, 1), (b, 0))]
        return a * lengths, b * (strength / len(a) / (norms[0] * norms[1]))
