"""Kinds of PEFT that are a LoRA in another form: read as the LoRA that they are, exactly, and written as LoRA."""

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.formats.format import Arrays, Config, Format
from lora_jax.interop.peft.formats.lora import LoraFormat
from lora_jax.interop.peft.options import Options

MOST_ENTRIES = 2**32  # of the factors that a module's tensors become; of the largest models, 2e9


class ReadAsLora(LoraFormat):
    """The base class of these kinds. One says which tensors it has, and how A and B are made of them."""

    is_written = False
    module_kinds: ClassVar[tuple[str, ...]] = ("linear",)
    other_endings = MappingProxyType({})
    of_training: ClassVar[tuple[str, ...]] = ()
    axes: ClassVar[Mapping[str, int]]  # how many axes each array has in a file
    has_lora_bias = False
    has_rows = False

    @abc.abstractmethod
    def factors(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> tuple[Array, Array]:
        """Return A [r, inputs] and B [outputs, r] of a module; arguments and errors as of `resolved`."""

    def is_meant_by(self, options: Options) -> bool:
        return True

    def read(self, options: Options) -> Config:
        return Format.read(self, options)

    def holds(self, adapters: Mapping[str, Any], matches: Mapping[str, Any]) -> bool:
        return False

    def rank_of(self, arrays: Arrays) -> int | None:
        """Return None: that of the LoRA is not the one that the config says."""
        return None

    def problem_of_shapes(self, arrays: Arrays) -> str | None:
        for name, array in arrays.items():
            if array.ndim != self.axes[name] or 0 in array.shape:
                return f"has {self.endings[name]} of shape {list(array.shape)}, expected {self.axes[name]} axes"
        return None

    def resolved(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> Arrays:
        a, b = self.factors(config, module, arrays, fans)
        found = {"a": a, "b": b}
        if why := Format.problem_of_shapes(self, found):
            raise LoraError(why)
        return found

    def check_rank(self, found: int, config: Config, module: str) -> None:
        """Raise if a module has another rank than the config says."""
        if found != config.rank_of(module):
            raise LoraError(
                f"has rank {found}, by the config {config.rank_of(module)}: the two files do not belong together"
            )


def check_entries(entries: int) -> None:
    """Raise if the factors of a module would have too many entries."""
    if entries > MOST_ENTRIES:
        raise LoraError(f"has {entries:,} entries as LoRA, expected at most {MOST_ENTRIES:,}")
