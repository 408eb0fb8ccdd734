"""`adapter_config.json`: what it says of a folder that is read, and what is written of a folder's tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.peft.config_keys import changes_nothing, why_it_is_refused
from lora_jax.interop.peft.formats.format import Config, Format, Matches, Module
from lora_jax.interop.peft.formats.registry import format_of
from lora_jax.interop.peft.options import Options


def read_config(path: Path) -> Config:
    """Return what a config says.

    Raises:
        LoraError: there is no such file, or it is not of this format; it is of another kind of adapter; it has an
            option that is not understood and may change what the adapter computes.
    """
    return config_of(Options(path))


def config_of(options: Options) -> Config:
    """Return what the entries of a config say; errors as of `read_config`."""
    format = format_of(options)
    for name, value in sorted(options.entries.items()):
        if name not in format.options and not changes_nothing(name, value):
            raise options.error(why_it_is_refused(name, value))
    return format.read(options)


def entries_of(
    format: Format, modules: Mapping[str, Module], matches: Matches, bias: str, modules_to_save: list[str] | None
) -> dict[str, Any]:
    """Return the options that every version of PEFT knows, and those that differ from their defaults.

    Args:
        matches: of each module one of the parameters that it is.
        bias: which biases are written whole: "none", "lora_only" or "all".
        modules_to_save: the modules whose weights are written whole.
    """
    return {
        "peft_type": format.peft_type,
        "target_modules": sorted(name for name in modules if not matches[name].entry.is_of_experts),
        "inference_mode": True,
        "modules_to_save": modules_to_save,
    } | format.entries(modules, matches, bias)


def with_more(format: Format, entries: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with further entries.

    Raises:
        LoraError: PEFT does not have one of them for this kind, or it contradicts what is written.
    """
    unknown = {name for name in ("base_model_name_or_path", "task_type") if entries[name] is None}
    told = {"target_parameters": None, "lora_bias": False, "exclude_modules": None, "trainable_token_indices": None}
    told |= entries
    for name, value in more.items():
        if name not in format.options:
            raise LoraError(
                f"config[{name!r}] is {short(value)}, which {format.peft_type} does not have: leave it out."
            )
        if name in told and told[name] != value and name not in unknown and name not in format.free_options:
            raise LoraError(
                f"config[{name!r}] is {short(value)}, but by what is written it is {short(told[name])}: leave it out."
            )
    return {**entries, **more}
