"""GraLoRA in PEFT's files: a LoRA of its own for each block of a grid of N x N, and a plain one beside these.

Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", arXiv 2505.20355. With N
blocks of inputs and of outputs and s = r / N, the change of block (n, j) is A[n, :, j s:(j + 1) s] B[j, n s:(n + 1) s].
"""

from types import MappingProxyType

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.formats.format import COMMON_OPTIONS, Arrays, Config
from lora_jax.interop.peft.formats.read_as_lora import ReadAsLora, check_entries
from lora_jax.interop.peft.options import Options

_OPTIONS = "alpha bias fan_in_fan_out gralora_dropout gralora_k hybrid_r init_weights r"


class GraloraFormat(ReadAsLora):
    """`peft_type` "GRALORA": as LoRA, of rank N r, with zeros between its blocks, and of `hybrid_r` more."""

    name = peft_type = "GRALORA"
    module_kinds = ("linear", "conv1d")
    options = COMMON_OPTIONS | {*_OPTIONS.split()}
    default_rank = 32
    alpha_option = "alpha"
    endings = MappingProxyType(
        {
            "a": "gralora_A",
            "b": "gralora_B",
            "general_a": "gralora_A_general.weight",
            "general_b": "gralora_B_general.weight",
        }
    )
    optional = ("general_a", "general_b")
    axes = MappingProxyType({"a": 3, "b": 3, "general_a": 2, "general_b": 2})

    def read(self, options: Options) -> Config:
        hybrid = options.get("hybrid_r") and options.whole_number("hybrid_r", 1)
        return (
            super()
            .read(options)
            ._replace(extra={"blocks": options.whole_number("gralora_k", 2), "hybrid": hybrid or 0})
        )

    def scale_in(self, config: Config, module: str) -> float:
        return config.alpha / (config.rank + config.extra["hybrid"])

    def factors(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> tuple[Array, Array]:
        """Return A and B whose rank is (n, j, s): A has zeros but for the inputs of n, and B for the outputs of j."""
        a, b = arrays["a"], arrays["b"]  # [N, inputs / N, r] and [N, r, outputs / N]
        n, inputs, rank = a.shape
        outputs, hybrid = b.shape[2], config.extra["hybrid"]
        self.check_rank(rank, config, module)
        if b.shape[:2] != (n, rank) or n != config.extra["blocks"] or rank % n:
            raise LoraError(
                f"has gralora_A {list(a.shape)} and gralora_B {list(b.shape)}, expected gralora_k="
                f"{config.extra['blocks']} blocks of rank {rank}, which they divide"
            )
        check_entries(n * rank * n * (inputs + outputs))
        s = rank // n
        whole_a = np.zeros((n, n, s, n, inputs), a.dtype)
        whole_b = np.zeros((n, outputs, n, n, s), b.dtype)
        for i in range(n):
            whole_a[i, :, :, i, :] = np.moveaxis(a[i].reshape(inputs, n, s), 0, -1)  # [j, s, inputs]
            whole_b[i, :, :, i, :] = np.moveaxis(b[i].reshape(n, s, outputs), -1, 0)  # [outputs, n, s]
        a, b = whole_a.reshape(n * rank, n * inputs), whole_b.reshape(n * outputs, n * rank)
        own = [arrays[name] for name in ("general_a", "general_b") if name in arrays]
        if [array.shape for array in own] != ([(hybrid, n * inputs), (n * outputs, hybrid)] if hybrid else []):
            raise LoraError(
                f"has a plain LoRA of {[list(array.shape) for array in own]}, by the config of rank {hybrid}"
            )
        return (np.concatenate([a, own[0]]), np.concatenate([b, own[1]], axis=1)) if hybrid else (a, b)
