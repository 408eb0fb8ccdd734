"""Merge adapters into a published model and write it in 8 bits, or what is published in few bits in bf16.

One tensor after the other is read, merged in fp32 and rounded, some rows at a time. The files are those that vLLM and
transformers read with compressed-tensors: X.weight in 8 bits, X.weight_scale, and `quantization_config` in config.json.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.atomic_dir import written
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import A_KEY_MAP, check_adapter_dict, check_folder, check_is
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.interop.eight_bit_codes import EIGHT_BITS, EightBits
from lora_jax.interop.key_map import Array, KeyMap
from lora_jax.interop.low_bits.codes import grid_shape
from lora_jax.interop.low_bits.config import MODELOPT_FILE, packing_of
from lora_jax.interop.low_bits.files import LowBit, Weight, as_dense, read_weight, weights_of
from lora_jax.interop.merge_checkpoint import OTHER_WEIGHTS
from lora_jax.interop.merge_rows import Sums, Survival, merged_in_rows
from lora_jax.interop.merge_work import DTYPES, Work, checked
from lora_jax.interop.model_config import CONFIG, model_facts
from lora_jax.interop.peft.tied_tables import Tied
from lora_jax.interop.safetensors_index import DTYPES as ALL_DTYPES
from lora_jax.interop.safetensors_index import Tensor, index_of, tensors_in
from lora_jax.interop.safetensors_writer import header_of
from lora_jax.interop.tensor_changes import Change
from lora_jax.interop.tied_files import write_untied

CALL = "merge_quantized(source, adapters, target, key_map)"
LINEARS = r"(?!.*(vision|visual|audio|multi_modal)).*\.layers\.\d+\..*_proj"
COPIED = 2**22  # bytes at a time


def merge_quantized(
    source: str | Path,
    adapters: Mapping[str, Adapter] | str | Path,
    target: str | Path,
    key_map: KeyMap | None = None,
    *,
    to: str = "fp8",
    others: Any = None,
    params: Any = None,
    tied: Tied = "refuse",
    modules: str = LINEARS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Survival]:
    """Write a model of Hugging Face with adapters merged into its weights, the linear layers in 8 bits.

    The source may be published in few bits itself, as `lora.bases.open_safetensors` reads them; its weights are
    unpacked, and `to="bf16"` leaves all so. A tensor and some rows of it in fp32 are in memory at a time.

    Args:
        source: a folder with `model.safetensors` or an index and its shards.
        adapters, target, key_map: as of `lora.merge_checkpoint`.
        to: "fp8" or "int8", with a scale for each output; "fp8_block", with one for each 128 x 128 numbers, as of
            DeepSeek-V3; or "bf16", which is for sources in few bits. Activations are rounded as the model runs.
        others, params, tied: as of `lora.merge_checkpoint`.
        modules: a regular expression for whole names of modules: those of two axes are written in 8 bits, all others
            stay as they are. By default those of the layers of Llama's and its relatives' text models.
        progress: called with the bytes read so far and those of all tensors.

    Returns:
        `{tensor: Survival(kept, loss)}` of each tensor that changes.

    Raises:
        LoraError: as `lora.merge_checkpoint`; `modules` match nothing, or a weight that is not finite. Then nothing has
            changed.

    >>> import jax.numpy as jnp, json, numpy as np, tempfile, lora_jax as lora
    >>> from pathlib import Path
    >>> from safetensors.numpy import load_file, save_file
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("up/kernel", "mlp.up"))
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"up/kernel": lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 3)), axes, 0.5)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "base").mkdir()
    ...     _ = Path(folder, "base/config.json").write_text(json.dumps({"model_type": "mine"}))
    ...     save_file({"mlp.up.weight": np.ones((3, 4), np.float32)}, f"{folder}/base/model.safetensors")
    ...     more = {"to": "int8", "modules": "mlp.up"}
    ...     _ = lora.merge_quantized(f"{folder}/base", adapters, f"{folder}/merged", key_map, **more)
    ...     tensors = load_file(f"{folder}/merged/model.safetensors")
    >>> {name: (str(tensor.dtype), tensor.shape) for name, tensor in sorted(tensors.items())}
    {'mlp.up.weight': ('int8', (3, 4)), 'mlp.up.weight_scale': ('float32', (3, 1))}
    """
    check_folder(CALL, source, "source")
    check_folder(CALL, target, "target")
    source, target = Path(source).absolute(), Path(target).absolute()
    check_target(target, None)
    if to not in (*EIGHT_BITS, "bf16"):
        raise LoraError(f"merge_quantized(to={to!r}): expected one of {', '.join((*EIGHT_BITS, 'bf16'))}.")
    if not isinstance(adapters, str | Path):
        check_adapter_dict(CALL, adapters)
        refuse_spread(adapters)
    if key_map is not None:
        check_is(CALL, "key_map", key_map, KeyMap, A_KEY_MAP)
    tensors, files = tensors_in(source)
    weights = weights_of(source, tensors, packing_of(source))
    dense = {name: as_dense(weight) for name, weight in weights.items()}
    work = checked(source, (dense, files), adapters, key_map, others, params, tied)
    plans = _plans(work, weights, EIGHT_BITS.get(to), modules, source)
    index = index_of(source)
    with written(target) as new:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in OTHER_WEIGHTS and path.name != MODELOPT_FILE and path != index:
                shutil.copyfile(path, new / path.name)
        write_untied(new, work.untied)
        found = _write(source, new, work, plans, progress)
        _write_config(new, EIGHT_BITS.get(to), [plan for plan in plans if plan.format is None])
        if index is not None:
            _write_index(new / index.name, plans)
    return found


# What is written ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A tensor of the source, and the tensors that are written of it.

    Args:
        name: of the tensor.
        weight: where its numbers are.
        change: what becomes of it, if it changes.
        format: in which it is rounded; None for its own dtype.
    """

    name: str
    weight: Weight
    file: str
    change: Change | None
    format: EightBits | None

    @property
    def dtype(self) -> str:
        """Return the dtype of the weight, or of its scales; of what was packed, bf16."""
        return "BF16" if isinstance(self.weight, LowBit) else self.weight.dtype

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield the name, dtype and shape of each tensor that is written, in order."""
        shape = self.weight.shape
        if self.format is None:
            yield self.name, self.dtype, shape
            return
        yield self.name, self.format.dtype, shape
        block = min(self.format.block[0], shape[0]), min(self.format.block[1], shape[1])
        yield f"{self.name}_scale", self.dtype, grid_shape((shape[0], shape[1]), block)

    @property
    def is_copied(self) -> bool:
        """Return whether the bytes of the file are written as they are."""
        return self.change is None and self.format is None and isinstance(self.weight, Tensor)


def _plans(
    work: Work, weights: Mapping[str, Weight], format: EightBits | None, modules: str, source: Path
) -> list[_Plan]:
    """Return what is written of each tensor, in the order of the files."""
    try:
        matches = re.compile(modules).fullmatch
    except re.error as error:
        raise LoraError(f"merge_quantized(modules={modules!r}) is no regular expression: {error}.") from None
    found, packed = [], {as_dense(weight): weight for weight in weights.values()}
    for name, tensor in work.tensors.items():
        module, _, last = name.rpartition(".")
        is_matrix = last == "weight" and len(tensor.shape) == 2 and 0 not in tensor.shape
        rounded = format if is_matrix and tensor.dtype in DTYPES and matches(module) else None
        found.append(_Plan(name, packed.get(tensor, tensor), tensor.file, work.changes.get(name), rounded))
    if format is not None and not any(plan.format for plan in found):
        raise LoraError(
            f"{source} has no linear layers that {modules!r} matches, so that nothing would be written in 8 bits: give "
            "merge_quantized(modules=...) a regular expression for whole names, such as r'.*\\.attention\\..*'."
        )
    return found


def _write(
    source: Path, new: Path, work: Work, plans: list[_Plan], progress: Callable[[int, int], None] | None
) -> dict[str, Survival]:
    """Write the files, and return what is left of each change."""
    found: dict[str, Survival] = {}
    total = sum(math.prod(plan.weight.shape) * np.dtype(ALL_DTYPES[plan.dtype]).itemsize for plan in plans)
    done = 0
    for file in work.files:
        own = [plan for plan in plans if plan.file == file]
        with (new / file).open("wb") as out:
            tensors = (tensor for plan in own for tensor in plan.tensors())
            out.write(header_of(tensors, _metadata(source / file)))
            for plan in own:
                survival = _write_tensor(source, out, plan)
                if survival is not None:
                    found[plan.name] = survival
                done += math.prod(plan.weight.shape) * np.dtype(ALL_DTYPES[plan.dtype]).itemsize
                if progress is not None:
                    progress(done, total)
    return {name: found[name] for name in work.changes}


def _metadata(path: Path) -> dict[str, Any]:
    """Return what a file of safetensors, which has been checked, says of itself."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}


def _write_tensor(source: Path, out: BinaryIO, plan: _Plan) -> Survival | None:
    """Write a tensor, with its scales behind it, and return what is left of its change."""
    if plan.is_copied:
        assert isinstance(plan.weight, Tensor)
        _copy(source, out, plan.weight)
        return None
    w = read_weight(source, plan.weight, _own_dtype(plan.weight))
    scales, sums = [], Sums()
    for before, after in merged_in_rows(plan.name, w, plan.change, 1 if plan.format is None else plan.format.block[0]):
        stored, own, rounded = _rounded(plan, after)
        out.write(_bytes(stored))
        scales += own
        if plan.change is not None:
            sums.add(before, after, _rounded(plan, before)[2], rounded)
    for own_scales in scales:
        out.write(_bytes(own_scales))
    return None if plan.change is None else sums.survival()


def _bytes(array: Array) -> Any:
    """Return an array as bytes; buffers of NumPy do not have dtypes such as bf16."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _own_dtype(weight: Weight) -> Any:
    return ALL_DTYPES[weight.dtype]


def _copy(source: Path, out: BinaryIO, tensor: Tensor) -> None:
    """Write the bytes of a tensor as they are."""
    with (source / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        left = tensor.size
        while left and (data := file.read(min(COPIED, left))):
            out.write(data)
            left -= len(data)
    if left:
        raise LoraError(f"{source / tensor.file} became shorter while it was read.")


def _rounded(plan: _Plan, w: Array) -> tuple[Array, list[Array], Array]:
    """Return some rows of W as they are written, their scales, and the numbers that these stand for."""
    dtype = ALL_DTYPES[plan.dtype]
    if plan.format is not None:
        q, scales = plan.format.rounded(w.astype(np.float32), jnp.float32 if dtype == np.float64 else dtype)
        return q, [scales], plan.format.values(q, scales)
    with np.errstate(all="ignore"):
        stored = w.astype(dtype)
    if not np.isfinite(stored).all():
        most = float(jnp.finfo(dtype).max)
        raise LoraError(f"{plan.name!r} would hold numbers beyond {most:.5g}, the largest of its dtype {plan.dtype}.")
    return stored, [], stored.astype(w.dtype)


# The files beside -----------------------------------------------------------------------------------------------------


def _write_config(new: Path, format: EightBits | None, left: list[_Plan]) -> None:
    """Write into config.json how the linear layers are packed, in the place of what it said before.

    Args:
        left: the tensors that are not packed.
    """
    facts = model_facts(new)
    text = facts.get("text_config")
    for own in (facts, text if isinstance(text, dict) else {}):
        own.pop("quantization_config", None)
        own.pop("compression_config", None)
    if format is not None:
        matrices = [plan.name for plan in left if plan.name.endswith(".weight") and len(plan.weight.shape) == 2]
        linear = [name.removesuffix(".weight") for name in matrices if "embed" not in name]
        facts["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": format.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": format.scheme()},
            "ignore": list(dict.fromkeys([*linear, "lm_head"])),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
    (new / CONFIG).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_index(path: Path, plans: list[_Plan]) -> None:
    """Write which file each tensor is in."""
    written = [(plan.file, *tensor) for plan in plans for tensor in plan.tensors()]
    total = sum(math.prod(shape) * np.dtype(ALL_DTYPES[dtype]).itemsize for _, _, dtype, shape in written)
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, name, _, _ in written}}
    path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
