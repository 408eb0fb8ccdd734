"""What the header of an image model's file says beside tensors: `ss_*` of sd-scripts, diffusers' options of PEFT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.errors import LoraError, short
from lora_jax.core.untrusted import parse_json
from lora_jax.interop.image.names import DENOISERS
from lora_jax.interop.peft.config import config_of
from lora_jax.interop.peft.formats.format import Config, Format
from lora_jax.interop.peft.options import LARGEST, Options

ADAPTER = "lora_adapter_metadata"  # where diffusers keeps the options of PEFT, each under its component's name
_SHOWN = ("modelspec.", "ss_base_model_version", "ss_network_", "ss_output_name", "ss_sd_model_name", "sshs_")
_LONGEST = 1000  # characters of an entry that is shown


def metadata_of(path: Path) -> dict[str, str]:
    """Return what a header says beside its tensors; the file is one that `safetensors_index.header` has checked."""
    from lora_jax.interop._safetensors import safe_open

    with safe_open(path, "np") as file:
        return dict(file.metadata() or {})


def shown(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that say what a file is, by whom and for what, each cut where it is long."""
    return {name: text[:_LONGEST] for name, text in sorted(metadata.items()) if name.startswith(_SHOWN)}


def options_of(metadata: Mapping[str, str], component: str, kind: Format, path: Path) -> Config | None:
    """Return what diffusers' metadata says of a component's adapters, or None if it says nothing.

    Raises:
        LoraError: it is no JSON of options, has one that is not understood, or is of another kind than the tensors.
    """
    if ADAPTER not in metadata:
        return None
    text = metadata[ADAPTER].encode()
    if len(text) > LARGEST:
        raise LoraError(f"{path}: {ADAPTER} has {len(text):,} bytes, expected at most {LARGEST:,}.")
    found = parse_json(text, f"{path}: {ADAPTER}")
    if not isinstance(found, dict):
        raise LoraError(f"{path}: {ADAPTER} is {short(found)}, expected an object of options.")
    for name in DENOISERS if component in DENOISERS else (component,):
        entries = {key.removeprefix(f"{name}."): own for key, own in found.items() if key.startswith(f"{name}.")}
        if entries:
            return _config(entries, kind, path)
    return None


def _config(entries: dict[str, Any], kind: Format, path: Path) -> Config:
    entries.setdefault("peft_type", kind.peft_type)
    config = config_of(Options(path, entries))
    if config.format is not kind:
        raise LoraError(f"{path}: its tensors are of {kind.name}, and by {ADAPTER} they are of {config.format.name}.")
    if config.start is not None:
        raise LoraError(
            f"{path}: init_lora_weights is {config.start!r}, which changed the base too. Save it as plain LoRA first: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...) in PEFT."
        )
    return config
