"""MiSS in PEFT's files: `miss_block`, a B whose A is fixed: input i goes to row i mod r of it.

Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", arXiv 2409.15371.
"""

from types import MappingProxyType

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.formats.format import COMMON_OPTIONS, Arrays, Config
from lora_jax.interop.peft.formats.read_as_lora import ReadAsLora
from lora_jax.interop.peft.options import Options


class MissFormat(ReadAsLora):
    """`peft_type` "MISS", with `init_weights` true, false or "mini"; "bat" multiplies blocks of W and is no LoRA."""

    name = peft_type = "MISS"
    options = COMMON_OPTIONS | {"bias", "init_weights", "mini_r", "miss_dropout", "r"}
    default_rank = 64
    endings = MappingProxyType({"block": "miss_block"})
    axes = MappingProxyType({"block": 2})

    needs_shapes = "is of MiSS, and its tensors do not tell the inputs of its modules"

    def read(self, options: Options) -> Config:
        how = options.get("init_weights")
        if how not in (True, False, None, "mini"):
            raise options.error(
                f"init_weights is {how!r}, with which MiSS multiplies blocks of the weight, and that is no LoRA: merge "
                "it in PEFT, model.merge_and_unload(), and take the merged weights."
            )
        return super().read(options)._replace(extra={"repeats": how == "mini"})

    def scale_in(self, config: Config, module: str) -> float:
        return 1.0

    def factors(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> tuple[Array, Array]:
        """Return A with A[j, i] = 1 where i mod r = j, and B; a "mini" one repeats its columns over the outputs."""
        assert fans is not None
        block, (inputs, outputs) = arrays["block"], fans
        rank, width = block.shape
        self.check_rank(rank, config, module)
        if rank > inputs or outputs % width or (width != outputs and not config.extra["repeats"]):
            raise LoraError(
                f"has miss_block {list(block.shape)}, which does not fit {inputs} inputs, {outputs} outputs"
            )
        a = (np.arange(inputs) % rank == np.arange(rank)[:, None]).astype(block.dtype)
        return a, np.tile(block, outputs // width).T
