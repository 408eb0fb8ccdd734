"""VeRA in PEFT's files: `vera_lambda_d` and `vera_lambda_b`, and the projections that all modules share.

The projections follow from a seed, so that a folder need not hold them.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from lora_jax.adapters.vera import VeraAdapter, shared_projections
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.formats.format import COMMON_OPTIONS, Arrays, Config, Format, Matches, Module
from lora_jax.interop.peft.formats.lora import is_transposed
from lora_jax.interop.peft.options import Options

_OPTIONS = "bias d_initial fan_in_fan_out init_weights projection_prng_key r save_projection vera_dropout"


class VeraFormat(Format):
    """`peft_type` "VERA"."""

    name = peft_type = "VERA"
    adapter = VeraAdapter
    module_kinds = ("linear", "conv1d")
    joins_parts = False

    options = COMMON_OPTIONS | {*_OPTIONS.split()}
    free_options = ("inference_mode", "init_weights", "save_projection")
    default_rank = 256
    alpha_option = ""  # it has none

    endings = MappingProxyType({"d": "vera_lambda_d", "b": "vera_lambda_b"})
    shared_tensors = ("base_model.vera_A", "base_model.vera_B")  # [r, inputs] and [outputs, r]

    needs_model = "has shared projections, and its tensors do not tell the inputs of its modules"

    def read(self, options: Options) -> Config:
        seed = options.entries.get("projection_prng_key", 0)
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise options.error(f"projection_prng_key is {short(seed)}, expected a whole number of 32 bits.")
        return super().read(options)._replace(extra={"seed": seed})

    def scale_in(self, config: Config, module: str) -> float:
        return 1.0

    def entries(self, modules: Mapping[str, Module], matches: Matches, bias: str) -> dict[str, Any]:
        (arrays, _), *_ = modules.values()
        return {
            "bias": bias.replace("lora", "vera"),
            "fan_in_fan_out": is_transposed(modules, matches),
            "init_weights": True,
            "r": self.rank_of(arrays),
            "vera_dropout": 0.0,
        }

    def expected_shapes(self, arrays: Arrays) -> dict[str, tuple[int, ...]]:
        return {field: (arrays[field].size,) for field in self.endings}

    def rank_of(self, arrays: Arrays) -> int:
        return len(arrays["d"])

    def outputs_of(self, arrays: Arrays) -> int:
        return len(arrays["b"])

    def shared_fields(
        self, config: Config, tensors: Mapping[str, Array], modules: Mapping[str, Module], matches: Matches
    ) -> dict[str, Any]:
        """Return the seed of the projections, and their widths: the inputs and outputs of the largest modules."""
        seed = config.extra["seed"]
        if not tensors:
            inputs = [
                match.axes.fans(match.shape)[1]
                for match in matches.values()
                if any(name in modules for name in match.names.values())
            ]
            outputs = [self.outputs_of(module.arrays) for module in modules.values()]
            return {"seed": seed, "widths": (max(inputs, default=1), max(outputs))}
        ranks = {self.rank_of(module.arrays): None for module in modules.values()}
        found = [tensors[name] for name in self.shared_tensors if name in tensors]
        if len(found) == 2 and all(array.ndim == 2 and array.size for array in found):
            (rank, inputs), (outputs, _) = (array.shape for array in found)
            if list(ranks) == [rank] and _are_drawn(found, seed, rank, inputs, outputs):
                return {"seed": seed, "widths": (inputs, outputs)}
        raise LoraError(
            f"holds vera_A and vera_B other than those that projection_prng_key={seed} stands for, and this version "
            "keeps the key alone: merge that adapter in PEFT."
        )

    def holds(self, adapters: Mapping[str, Adapter], matches: Matches) -> bool:
        """Return whether all share the projections that PEFT makes for these modules: as wide as the widest of them."""
        if not super().holds(adapters, matches):
            return False
        own = {(a.seed, a.widths, a.d.shape[-1]): None for a in adapters.values() if isinstance(a, VeraAdapter)}
        _, *fans = zip(*(match.axes.fans(match.shape) for match in matches.values()), strict=True)
        return len(own) == 1 and next(iter(own))[1] == tuple(map(max, fans))

    def shared_to_tensors(self, adapters: Sequence[Any]) -> tuple[dict[str, Array], dict[str, Any]]:
        first = adapters[0]
        pair = shared_projections(first.seed, first.d.shape[-1], *first.widths)
        tensors = dict(zip(self.shared_tensors, (one.T for one in pair), strict=True))
        return tensors, {"projection_prng_key": first.seed, "save_projection": True}

    def keeps_shared(self, entries: Mapping[str, Any]) -> bool:
        return bool(entries["save_projection"])


def _are_drawn(found: Sequence[Array], seed: int, rank: int, inputs: int, outputs: int) -> bool:
    """Return whether the projections are those that PEFT draws from the seed."""
    drawn = shared_projections(seed, rank, inputs, outputs)
    return all(np.array_equal(one, own.T.astype(one.dtype)) for one, own in zip(found, drawn, strict=True))
