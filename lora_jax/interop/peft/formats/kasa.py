"""KaSA in PEFT's files: LoRA with `kasa_config`, a factor `lora_diag` for each direction, and less of the base.

Wang et al. 2024, "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", arXiv 2412.06071. Before
training the r smallest singular values of W are taken out of it, so that beside the published W the adapter is a LoRA
of rank 2 r: B diag(e) A, and what was taken out, with a minus.
"""

from types import MappingProxyType

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.dtypes import widened
from lora_jax.interop.peft.formats.format import Arrays, Config
from lora_jax.interop.peft.formats.lora import LORA_OPTIONS, LoraFormat
from lora_jax.interop.peft.formats.read_as_lora import ReadAsLora
from lora_jax.interop.peft.options import Options


class KasaFormat(ReadAsLora):
    """`peft_type` "LORA" with `kasa_config`."""

    name = "KASA"
    peft_type = "LORA"
    options = LORA_OPTIONS | {"kasa_config"}
    endings = MappingProxyType({**LoraFormat.endings, "e": "lora_diag"})
    axes = MappingProxyType({"a": 2, "b": 2, "e": 1})
    start_in_factors = True

    def is_meant_by(self, options: Options) -> bool:
        return options.flag("kasa_config")

    def read(self, options: Options) -> Config:
        config = LoraFormat.read(self, options)
        if config.start is not None:
            raise options.error(f"it has kasa_config, and began with {config.start!r} too: two parts of one weight.")
        return config._replace(start="kasa")

    def factors(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> tuple[Array, Array]:
        a, b, e = arrays["a"], widened(arrays["b"]), widened(arrays["e"])
        self.check_rank(len(a), config, module)
        if e.shape != a.shape[:1] or b.shape[1:] != e.shape:
            shapes = [list(array.shape) for array in (a, e, b)]
            raise LoraError("has lora_A {}, lora_diag {} and lora_B {}, of no common rank".format(*shapes))
        return a, b * e
