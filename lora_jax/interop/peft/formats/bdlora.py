"""BD-LoRA in PEFT's files: LoRA with `use_bdlora`, whose A or B is block-diagonal and holds its blocks alone.

Wang et al. 2025, "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving", arXiv
2510.23346.
"""

from types import MappingProxyType
from typing import Any

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.formats.format import Arrays, Config
from lora_jax.interop.peft.formats.lora import LORA_OPTIONS, LoraFormat
from lora_jax.interop.peft.formats.read_as_lora import ReadAsLora, check_entries
from lora_jax.interop.peft.options import Options

MOST_NAMES = 1000  # parts of modules' names, each of which is looked for in all of them; people write some ten
_KEYS = ("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict")


class BdLoraFormat(ReadAsLora):
    """`peft_type` "LORA" with `use_bdlora`."""

    name = "BD-LORA"
    peft_type = "LORA"
    module_kinds = ("linear", "conv1d")
    options = LORA_OPTIONS | {"use_bdlora"}
    endings = LoraFormat.endings
    axes = MappingProxyType({"a": 2, "b": 2})

    def is_meant_by(self, options: Options) -> bool:
        return options.flag("use_bdlora")

    def read(self, options: Options) -> Config:
        found = options.get("use_bdlora")
        if not isinstance(found, dict) or any(key not in _KEYS for key in found):
            raise options.error(f"use_bdlora is {short(found)}, expected an object of {', '.join(_KEYS)}.")
        inside = {key: found.get(key) or [] for key in _KEYS[:2]}
        for key, names in inside.items():
            are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
            if not are_names or len(names) > MOST_NAMES:
                raise options.error(
                    f"use_bdlora has {key} {short(names)}, expected a list of at most {MOST_NAMES:,} names."
                )
        blocks = found.get("nblocks", 1)
        if type(blocks) is not int or blocks < 1:
            raise options.error(f"use_bdlora has nblocks {short(blocks)}, expected a whole number of at least 1.")
        return LoraFormat.read(self, options)._replace(
            extra={"a": tuple(inside[_KEYS[0]]), "b": tuple(inside[_KEYS[1]]), "blocks": blocks}
        )

    def factors(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> tuple[Array, Array]:
        a, b = arrays["a"], arrays["b"]
        self.check_rank(len(a), config, module)
        if self._is_in(config.extra["a"], module):
            a = _whole("lora_A.weight", a, config.extra["blocks"])
        elif self._is_in(config.extra["b"], module):
            b = _whole("lora_B.weight", b, config.extra["blocks"])
        return a, b

    @staticmethod
    def _is_in(names: Any, module: str) -> bool:
        """Return whether a module is one of these: PEFT looks for them anywhere in its name."""
        return any(name in module for name in names)


def _whole(name: str, packed: Array, blocks: int) -> Array:
    """Return a block-diagonal matrix [rows, n columns] of its blocks [rows / n, columns], one below the other."""
    rows, columns = packed.shape
    check_entries(rows * columns * blocks)
    if rows % blocks:
        raise LoraError(f"has {name} {list(packed.shape)}, which are not nblocks={blocks} blocks")
    whole = np.zeros((blocks, rows // blocks, blocks, columns), packed.dtype)
    own = np.arange(blocks)
    whole[own, :, own, :] = packed.reshape(blocks, -1, columns)
    return whole.reshape(rows, blocks * columns)
