"""How the weights of a published folder are packed, as its config.json says: `quantization_config`.

What decides is `quant_method`. Methods that are not read are refused by name, and so are options that change what a
model computes beside its weights. How activations and caches are rounded is left out: here they are not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.core.errors import LoraError, short
from lora_jax.core.untrusted import read_json
from lora_jax.interop.model_config import CONFIG, LARGEST, model_facts

MODELOPT_FILE = "hf_quant_config.json"
MEND = "Take the weights that it was made of, before they were packed, and lora.recipes.load(folder, bits=4) or 8."
MX, NV = (1, 32), (1, 16)  # blocks of the formats of 4-bit floats
WHOLE = 2**31  # of a block that is as long as the weight
# Formats of compressed-tensors: how q is written, and which blocks share a scale, where the format says it.
_COMPRESSED = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision", "dense"),
)
_MODELOPT = {
    "NVFP4": NV,
    "W4A16_NVFP4": NV,
    "FP8": (WHOLE, WHOLE),
    "FP8_PER_CHANNEL_PER_TOKEN": (1, WHOLE),
    "FP8_PB_WO": (128, 128),
    "MIXED_PRECISION": (WHOLE, WHOLE),
}
METHODS = ("bitsandbytes", "compressed-tensors", "fp8", "modelopt", "mxfp4")  # bitsandbytes': lora_jax.bases


class Packing(NamedTuple):
    """How weights of a folder may be packed.

    Args:
        method: `quant_method`.
        bits: of packed integers.
        blocks: rows and columns that share a scale; `WHOLE` for all.
        asymmetric: whether all packed integers have zeros.
    """

    method: str
    bits: tuple[int, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()
    asymmetric: bool = False


def packing_of(folder: Path) -> Packing | None:
    """Return how the weights of a folder are packed; None where they are not, or as bitsandbytes packs them.

    Raises:
        LoraError: the config cannot be read; another method, or another option of a method, than are read here.
    """
    path, facts = folder / CONFIG, quantization_facts(model_facts(folder))
    if facts is None and (folder / MODELOPT_FILE).is_file():
        path = folder / MODELOPT_FILE
        entries = read_json(path, LARGEST, "config of ModelOpt", finite=False)
        facts = entries.get("quantization") if isinstance(entries, dict) else None
        facts = {"quant_method": "modelopt", **facts} if isinstance(facts, dict) else {}
    return None if facts is None else parse_packing(facts, str(path))


def quantization_facts(facts: Mapping[str, Any]) -> Any:
    """Return what a config says of packed weights, itself or in that of its text model; None where it says nothing."""
    text = facts.get("text_config")
    for own in (facts, text if isinstance(text, dict) else {}):
        for name in ("quantization_config", "compression_config"):
            if own.get(name) is not None:
                return own[name]
    return None


def parse_packing(facts: Any, where: str = CONFIG) -> Packing | None:
    """Return what a `quantization_config` says; errors as of `packing_of`.

    >>> parse_packing({"quant_method": "fp8", "weight_block_size": [128, 128]})
    Packing(method='fp8', bits=(), blocks=((128, 128),), asymmetric=False)
    """
    if not isinstance(facts, dict):
        raise LoraError(f"{where}: quantization_config is {short(facts)}, expected an object.")
    method = facts.get("quant_method")
    if method is None and "quant_algo" in facts:
        method = "modelopt"
    if method == "modelopt_fp4":
        method = "modelopt"
    if method not in METHODS:
        raise LoraError(
            f"{where}: the weights are packed by {short(method)}, expected one of {', '.join(METHODS)}. {MEND}"
        )
    readers = {"fp8": _fp8, "compressed-tensors": _compressed, "modelopt": _modelopt}
    if method == "bitsandbytes":
        return None
    return readers[method](facts, where) if method in readers else Packing("mxfp4", blocks=(MX,))


def _fp8(facts: Mapping[str, Any], where: str) -> Packing:
    """DeepSeek-V3's format, that of transformers' FineGrainedFP8Config: a scale for each block, or for the weight."""
    if (experts := facts.get("expert_dtype", "fp8")) != "fp8":
        raise LoraError(f"{where}: expert_dtype is {short(experts)}, expected 'fp8'. {MEND}")
    size = facts.get("weight_block_size", [128, 128])
    return Packing("fp8", blocks=((WHOLE, WHOLE) if size is None else _pair("weight_block_size", size, where),))


def _modelopt(facts: Mapping[str, Any], where: str) -> Packing:
    found = facts.get("quant_algo")
    if not isinstance(found, str) or found not in _MODELOPT:
        raise LoraError(f"{where}: quant_algo is {short(found)}, expected one of {', '.join(_MODELOPT)}. {MEND}")
    if found in ("NVFP4", "W4A16_NVFP4") and facts.get("group_size", 16) != 16:
        raise LoraError(f"{where}: group_size of NVFP4 is {short(facts['group_size'])}, expected 16. {MEND}")
    return Packing("modelopt", blocks=(_MODELOPT[found],))


def _compressed(facts: Mapping[str, Any], where: str) -> Packing:
    """The format of compressed-tensors, which llm-compressor writes and vLLM reads."""
    groups = facts.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise LoraError(f"{where}: config_groups is {short(groups)}, expected an object of objects.")
    formats = [facts.get("format"), *(group.get("format") for group in groups.values())]
    for found in formats:
        if found is not None and found not in _COMPRESSED:
            raise LoraError(f"{where}: format is {short(found)}, expected one of {', '.join(_COMPRESSED)}. {MEND}")
    _check_sparsity(facts, where)
    weights = [group["weights"] for group in groups.values() if group.get("weights") is not None]
    schemes = [_scheme(own, where) for own in weights]
    integers = [own for own in weights if own.get("type", "int") == "int"]
    return Packing(
        "compressed-tensors",
        tuple(dict.fromkeys(bits for bits, _ in schemes)),
        tuple(dict.fromkeys(block for _, block in schemes)),
        bool(integers) and all(own.get("symmetric", True) is False for own in integers),
    )


def _check_sparsity(facts: Mapping[str, Any], where: str) -> None:
    """Raise where weights are sparse, or rotated by transforms that the model undoes while it runs."""
    sparsity = facts.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise LoraError(f"{where}: sparsity_config is {short(sparsity)}, expected none. {MEND}")
    transforms = facts.get("transform_config") or {}
    if not isinstance(transforms, dict) or transforms.get("config_groups"):
        raise LoraError(f"{where}: transform_config rotates weights and activations, expected none. {MEND}")


def _scheme(weights: Any, where: str) -> tuple[int, tuple[int, int]]:
    """Return how many bits the weights of a group have, and which block shares a scale."""
    if not isinstance(weights, dict):
        raise LoraError(f"{where}: weights of a group are {short(weights)}, expected an object.")
    bits = weights.get("num_bits", 8)
    if bits not in (2, 4, 8) or type(bits) is not int:  # others lie across bytes, and not in all versions alike
        raise LoraError(f"{where}: num_bits is {short(bits)}, expected 2, 4 or 8. {MEND}")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "tensor":
        return bits, (WHOLE, WHOLE)
    if strategy == "channel":
        return bits, (1, WHOLE)
    if strategy in ("group", "tensor_group"):
        return bits, _pair("group_size", [1, size], where)
    if strategy == "block":
        return bits, _pair("block_structure", weights.get("block_structure"), where)
    raise LoraError(
        f"{where}: strategy is {short(strategy)}, expected tensor, channel, group, tensor_group or block. {MEND}"
    )


def _pair(name: str, size: Any, where: str) -> tuple[int, int]:
    """Return the size of a block."""
    good = isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n <= WHOLE for n in size)
    if not good:
        raise LoraError(f"{where}: {name} is {short(size)}, expected numbers above 0.")
    return size[0], size[1]
