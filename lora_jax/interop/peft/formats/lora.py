"""LoRA in PEFT's files: `lora_A.weight` and `lora_B.weight`; of embeddings `lora_embedding_A` and `_B`."""

import math
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import ParameterMatch
from lora_jax.interop.peft.formats.format import COMMON_OPTIONS, Arrays, Config, Format, Matches, Module
from lora_jax.interop.peft.formats.ranks import alpha_of, ranks_and_alphas
from lora_jax.interop.peft.options import Options, value_of_module

# The options that LoRA, DoRA and AdaLoRA share.
_SHARED = """
    alpha_pattern bias corda_config ensure_weight_tying eva_config fan_in_fan_out init_lora_weights layer_replication
    loftq_config lora_alpha lora_dropout lora_ga_config megatron_core qalora_group_size r rank_pattern
    trainable_token_indices use_rslora
"""
LORA_OPTIONS = COMMON_OPTIONS | {*_SHARED.split()}
# Starts that change the base too: beside the base as it was published, the adapter computes something else. What the
# first ones took out of the base follows from the base, and is taken out again when the adapter is loaded.
REPEATABLE_STARTS = ("pissa", "olora")
OTHER_STARTS = ("corda", "loftq", "lora_ga")

_TABLE = {"a": "lora_embedding_A", "b": "lora_embedding_B"}  # tensors of embeddings


class LoraFormat(Format):
    """`peft_type` "LORA" without `use_dora`."""

    name = peft_type = "LORA"
    adapter: ClassVar[type[Adapter]] = LoraAdapter
    module_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "conv", "embedding", "experts", "experts_transposed")
    is_low_rank = True

    options = LORA_OPTIONS | {"lora_bias", "target_parameters", "use_dora"}
    free_options = ("inference_mode", "init_lora_weights", "lora_dropout")
    alpha_option = "lora_alpha"
    uses_dora = False

    endings = MappingProxyType({"a": "lora_A.weight", "b": "lora_B.weight"})
    other_endings = MappingProxyType({ending: field for field, ending in _TABLE.items()})
    of_training: ClassVar[tuple[str, ...]] = ("lora_velora_embed", "lora_monteclora_sampler")
    pairs = (("a", "b"),)
    scaled = "b"

    has_lora_bias = True
    has_rows = True

    def is_meant_by(self, options: Options) -> bool:
        return options.flag("use_dora") == self.uses_dora

    def read(self, options: Options) -> Config:
        return super().read(options)._replace(start=_start(options))

    def scale_in(self, config: Config, module: str) -> float:
        """Return alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        rank, alpha = config.rank_of(module), value_of_module(config.alpha_pattern, module, config.alpha)
        return alpha / math.sqrt(rank) if config.rslora else alpha / rank

    def entries(self, modules: Mapping[str, Module], matches: Matches, bias: str) -> dict[str, Any]:
        experts = sorted(name for name in modules if matches[name].entry.is_of_experts)
        entries = entries_of_lora(modules, matches, bias) | {"use_rslora": False, "use_dora": self.uses_dora}
        if experts:
            entries["target_parameters"] = experts
        return entries | ranks_and_alphas(*_by_pattern(modules, matches), self.alpha_option)

    def endings_of(self, match: ParameterMatch, arrays: Arrays) -> Mapping[str, str]:
        return {**self.endings, **_TABLE} if match.entry.kind == "embedding" else self.endings

    def module_kind(self, config: Config, module: str, arrays: Arrays, tensors: Container[str]) -> str:
        is_table = f"{module}.{_TABLE['a']}" in tensors
        return "embedding" if is_table else super().module_kind(config, module, arrays, tensors)

    def convert(self, adapter: Adapter) -> Adapter | None:
        """Return the LoRA that an adapter of another kind is in another form."""
        lora = adapter.to_lora()
        return None if lora is None else super().convert(lora)


def entries_of_lora(modules: Mapping[str, Module], matches: Matches, bias: str) -> dict[str, Any]:
    """Return the entries of the config that LoRA, DoRA and AdaLoRA share."""
    return {
        "bias": bias,
        "fan_in_fan_out": is_transposed(modules, matches),
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }


def is_transposed(modules: Mapping[str, Module], matches: Matches) -> bool:
    """Return `fan_in_fan_out`: whether torch's weights are [in, out], as those of transformers' Conv1D."""
    kinds = {matches[name].entry.kind for name in modules}
    return "conv1d" in kinds and "linear" not in kinds


def _start(options: Options) -> str | None:
    """Return the start that changed the base, if it can be made again."""
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(OTHER_STARTS):
        raise options.error(
            f"init_lora_weights is {start!r}, which changed the base too. Save it as plain LoRA first: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...) in PEFT."
        )
    return next((name for name in REPEATABLE_STARTS if isinstance(start, str) and start.startswith(name)), None)


def _by_pattern(modules: Mapping[str, Module], matches: Matches) -> tuple[dict[str, int], dict[str, float]]:
    """Return ranks and alphas by what patterns are matched with: of experts, the module that holds their parameter."""
    both: dict[str, tuple[int, float]] = {}
    for name, (arrays, scale) in modules.items():
        match = matches[name]
        module = name.rpartition(".")[0] if match.entry.is_of_experts else name
        rank = len(arrays["a"]) // match.experts
        own = (rank, alpha_of(scale, rank))
        if both.setdefault(module, own) != own:
            raise LoraError(f"{module} has experts of rank and alpha {both[module]} and {own}; PEFT has one for all.")
    return {name: rank for name, (rank, _) in both.items()}, {name: alpha for name, (_, alpha) in both.items()}
