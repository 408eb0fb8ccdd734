"""What is read and written when adapters are merged into published files, checked before anything is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.interop import safetensors_index
from lora_jax.interop.expert_files import with_experts_apart
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.low_bits.config import METHODS, MODELOPT_FILE, quantization_facts
from lora_jax.interop.model_config import model_facts
from lora_jax.interop.peft.tied_tables import Tied, check_tied
from lora_jax.interop.safetensors_index import Tensor
from lora_jax.interop.tensor_changes import (
    Changes,
    changes_of_adapters,
    changes_of_folder,
    has_one_table_for_both,
    with_rows_in_base,
)
from lora_jax.interop.tied_files import Untied, settled, shapes_with_head, tie_of

DTYPES = {name: safetensors_index.DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}  # that adapters are added to
PACKED = ("_packed", "_blocks")  # what the names of tensors with codes have, after that of the weight: see low_bits


class Work(NamedTuple):
    """What is read and written."""

    tensors: dict[str, Tensor]
    files: list[str]
    changes: Changes
    untied: Untied | None


def checked(
    source: Path,
    found: tuple[dict[str, Tensor], list[str]],
    adapters: Mapping[str, Adapter] | str | Path,
    key_map: KeyMap | None,
    others: Any,
    params: Any,
    tied: Tied,
) -> Work:
    """Return the tensors and files of the source, and what becomes of the tensors.

    Args:
        found: the tensors and the files.

    Raises:
        LoraError: as `merge_checkpoint` raises before it writes.
    """
    check_tied(tied)
    tensors, files = found
    tie, copies = tie_of(source, tensors), dict[str, str]()
    if isinstance(adapters, str | Path):
        if key_map is not None or others is not None or params is not None:
            raise LoraError(f"{adapters} names its tensors itself: leave out key_map, others and params.")
        changes, copies = changes_of_folder(Path(adapters), shapes_with_head(tie, tensors))
    elif key_map is None:
        raise LoraError("merge_checkpoint(key_map=...): which tensor each path is, such as lora.key_maps.LLAMA.")
    else:
        changes = changes_of_adapters(adapters, others, key_map, params)
        if tied == "refuse" and has_one_table_for_both(key_map, params):
            tied = "both"
    changes, untied = settled(source, tie, tensors, changes, copies, tied)
    changes = with_experts_apart(changes, tensors)
    changes = {name: with_rows_in_base(name, change) for name, change in changes.items()}
    if untied is not None:
        tensors = tensors | untied.added
    mend = "Names that only begin with something else are met by key_map.under(name=...)."
    if key_map is None:
        mend = (
            "An adapter for a model with other names is loaded and merged with a key map: lora.load_peft(folder, "
            "params, key_map), and then lora.merge_checkpoint(source, adapters, target, key_map, others=others)."
        )
    _check(source, tensors, changes, mend)
    return Work(tensors, files, changes, untied)


def _check(source: Path, tensors: Mapping[str, Tensor], changes: Changes, mend: str) -> None:
    """Raise, before anything is written, if a tensor is missing, quantised or of another shape.

    Args:
        mend: what to do about one that is missing.
    """
    for name, change in changes.items():
        if name not in tensors and any(name + ending in tensors for ending in PACKED):
            raise LoraError(f"{source} has {name!r} in few bits. {_mend_of_packed(source)}")
        if name not in tensors:
            tied = " A tied head is in the file once, under the name of the embedding." * ("head" in name)
            raise LoraError(
                f"{source} has no tensor {name!r}; the nearest are {', '.join(nearest(name, tensors, n=3)) or 'none'}. "
                f"{mend}{tied}"
            )
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise LoraError(
                f"{name!r} is of {tensor.dtype} in {source}: quantised weights would be rounded again. "
                f"{_mend_of_packed(source)}"
            )
        for shape in change.shapes:
            if tensor.shape != shape:
                raise LoraError(f"{name!r} has shape {list(tensor.shape)} in {source}, its adapter {list(shape)}.")


def _mend_of_packed(source: Path) -> str:
    """Return what to do about weights in few bits: what unpacks them, where this version reads them."""
    facts = quantization_facts(model_facts(source))
    method = facts.get("quant_method") if isinstance(facts, dict) else None
    if (method in METHODS and method != "bitsandbytes") or (source / MODELOPT_FILE).is_file():
        return "lora.merge_quantized(source, adapters, target) unpacks them, and writes 8 bits, or all in bf16."
    return "Merge into the weights that they were made of, and quantise the result: lora.merge_quantized does both."
