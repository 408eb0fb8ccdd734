"""AdaLoRA in PEFT's files: `lora_A`, `lora_E` and `lora_B`, of the ranks that its budget left."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lora_jax.adapters.adalora import AdaLoraAdapter
from lora_jax.core.errors import short
from lora_jax.interop.peft.formats.format import Arrays, Config, Format, Matches, Module, Modules
from lora_jax.interop.peft.formats.lora import LORA_OPTIONS, entries_of_lora
from lora_jax.interop.peft.formats.ranks import alpha_of
from lora_jax.interop.peft.options import Options

_OPTIONS = "beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal tinit total_step"


class AdaLoraFormat(Format):
    """`peft_type` "ADALORA"."""

    name = peft_type = "ADALORA"
    adapter = AdaLoraAdapter
    module_kinds = ("linear", "conv1d")

    options = LORA_OPTIONS | {*_OPTIONS.split()}
    free_options = ("inference_mode", "init_lora_weights", "lora_dropout")
    rank_option = "init_r"
    default_rank = 12
    alpha_option = "lora_alpha"

    endings = MappingProxyType({"a": "lora_A", "e": "lora_E", "b": "lora_B"})
    pairs = (("a", "b"),)
    scaled = "e"
    may_be_empty = True

    has_rows = True

    def read_ranks(self, options: Options) -> dict[str, int]:
        """Return how many entries of e each module kept, from masks: `{"name.lora_E": [true, false, ...]}`."""
        found = options.get("rank_pattern") or {}
        if not isinstance(found, dict):
            raise options.error(f"rank_pattern is {short(found)}, expected an object of names and masks.")
        for name, mask in found.items():
            if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
                raise options.error(f"rank_pattern[{short(name)}] is {short(mask)}, expected a list of true and false.")
        return {name.rpartition(".lora_E")[0]: sum(mask) for name, mask in found.items()}

    def rank_in(self, config: Config, module: str) -> int:
        return config.rank_pattern.get(module, config.rank)

    def scale_in(self, config: Config, module: str) -> float:
        """Return alpha / (r + 1e-5), where r is the rank that training began with."""
        return (config.alpha if config.alpha > 0 else config.rank) / (config.rank + 1e-5)

    def entries(self, modules: Mapping[str, Module], matches: Matches, bias: str) -> dict[str, Any]:
        """Return the largest rank as the first one, and masks for the others.

        PEFT loads no AdaLoRA without a schedule of steps: this is the shortest that it accepts.
        """
        ranks = {name: len(arrays["e"]) for name, (arrays, _) in modules.items()}
        most = max(ranks.values())
        masks = {f"{name}.lora_E": [i < rank for i in range(most)] for name, rank in ranks.items()}
        return entries_of_lora(modules, matches, bias) | {
            "init_r": most,
            "lora_alpha": alpha_of(next(iter(modules.values())).scale, most + 1e-5),
            "rank_pattern": masks if min(ranks.values()) < most else None,
            "tinit": 0,
            "tfinal": 0,
            "total_step": 1,
        }

    def expected_shapes(self, arrays: Arrays) -> dict[str, tuple[int, ...]]:
        return {"e": (len(arrays["a"]), 1)}

    def fit(self, modules: Modules) -> Modules:
        """Return the modules with one scale, the one that most have: a config has one alpha, above zero."""
        scale = Counter(abs(module.scale) for module in modules.values()).most_common(1)[0][0]
        return {name: self.rescaled(module, scale or 1.0) for name, module in modules.items()}
