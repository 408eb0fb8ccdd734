"""The names of a file's tensors as HF PEFT writes them, made of those that other ways of saving leave.

PEFT's names are `base_model.model.MODULE.lora_A.weight`. What else is in a name says where it was saved, and nothing of
the adapter: the adapter's own name, as in a model's `state_dict`; `_orig_mod` of a compiled model; PEFT's prefix twice,
of a model that was wrapped twice; or no prefix at all.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_jax.core.errors import LoraError, short

PREFIX = "base_model.model."  # what the names of all tensors of modules begin with
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
# In a model in memory, the name of the adapter comes after that of the array; PEFT leaves it out of files.
_WITH_ADAPTERS_NAME = re.compile(
    r"(?P<array>(?:.+\.)?(?:lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|lora_diag|(?:hada|lokr|vera|ia3|miss|gralora|delora)_\w+"
    r"|lora_velora_embed|trainable_tokens_delta|modules_to_save))\.(?P<adapter>(?!(?:weight|bias)$)[^.]+)(?P<rest>(?:\.\w+)*)"
)
_LENGTHS = "lora_magnitude_vector"  # which has no ".weight" in files


def names_as_peft_has_them(names: Iterable[str], shared: Sequence[str], path: Path) -> dict[str, str]:
    """Return `{name: PEFT's name, without its prefix}` of all tensors in a file.

    Args:
        names: in the file.
        shared: full names of tensors that are of no module; they keep their prefix.
        path: of the file, for messages.

    Raises:
        LoraError: some names have PEFT's prefix and others do not; they are of several adapters; two are one name.
    """
    plain, adapters = {}, dict[str, None]()
    for name in names:
        plain[name] = _without_adapters_name(_COMPILED.sub("", name), adapters)
    if len(adapters) > 1:
        first, *_ = adapters
        known = ", ".join(short(adapter) for adapter in [*adapters][:8])
        raise LoraError(
            f"{path} holds adapters of {len(adapters)} names, {known}, and a folder has one adapter: save each to a "
            f"folder of its own, in PEFT model.save_pretrained(folder, selected_adapters=[{short(first)}])."
        )
    of_modules = {name: own for name, own in plain.items() if own not in shared}
    without = [name for name, own in of_modules.items() if not own.startswith(PREFIX)]
    if without and len(without) < len(of_modules):
        raise LoraError(f"{path} holds {short(without[0])}, expected names that begin with {PREFIX!r}, as others do.")
    found: dict[str, str] = {}
    before: dict[str, str] = {}
    for name, own in plain.items():
        while own.startswith(PREFIX):
            own = own.removeprefix(PREFIX)
        if own in before:
            raise LoraError(f"{path} holds {short(before[own])} and {short(name)}, which are two names of one tensor.")
        found[name] = own
        before[own] = name
    return found


def _without_adapters_name(name: str, adapters: dict[str, None]) -> str:
    """Return a name without that of its adapter, which is put among the adapters."""
    if (named := _WITH_ADAPTERS_NAME.fullmatch(name)) is not None:
        adapters[named["adapter"]] = None
        name = named["array"].removesuffix(".modules_to_save") + named["rest"]
    return name.removesuffix(".weight") if name.endswith(f"{_LENGTHS}.weight") else name
