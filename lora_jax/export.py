"""Adapters into the safetensors of a published model, without building it: shard by shard, in little memory.

W' = W + s B A, in fp32 and rounded once to W's dtype. Each file is copied but for the bytes of adapted tensors: names,
order, dtypes, metadata and the index stay what they were.
"""

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter
from lora_jax.errors import LoraError
from lora_jax.folders import refuse_to_replace, written
from lora_jax.keymap import KINDS, Array, KeyMap
from lora_jax.paths import nearest
from lora_jax.peft import torch_factors_of_folder
from lora_jax.peft_save import torch_factors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
CHUNK = 2**20  # entries of a tensor at a time: they fit into a CPU's cache
BLOCK = 2**24  # bytes at a time of what is only copied
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".safetensors"}  # are not copied


class Change(NamedTuple):
    """What is added to a tensor: L @ R for each of the matrices that it is made of."""

    factors: list[tuple[Array, Array]]  # L [rows, r] and R [r, columns]
    shape: tuple[int, ...]  # that the tensor has to have


class Tensor(NamedTuple):
    """Where a tensor is in a file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int  # bytes


def merge_checkpoint(
    source: str | Path,
    target: str | Path,
    adapters: Mapping[str, Adapter] | str | Path,
    key_map: KeyMap | None = None,
    *,
    params: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Write a model of Hugging Face with adapters merged into its weights.

    Holds a few chunks of a tensor in memory, whatever the size of the model.

    Args:
        source: a folder with `model.safetensors` or an index and its shards.
        target: a new folder: the same files, with the merged tensors in their places.
        adapters: `{path: adapter}`, with `key_map`; or a folder of HF PEFT, whose own names say where they go. What
            that folder holds whole takes the place of the tensor with its name.
        params: as of `save_peft`.
        progress: called with the bytes done and those of all adapted tensors.

    Returns:
        `{tensor: rounding loss}`: |W' rounded - W'| / |W' - W|, of norms. 1 means that nothing of the change is left.

    Raises:
        LoraError: the source has no safetensors, or damaged ones; a tensor is missing, has another shape, or is
            quantised; the target exists. Nothing is written.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    refuse_to_replace(target)
    tensors, files, changes, whole = _checked(source, adapters, key_map, params)
    with written(target) as new:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in OTHER_WEIGHTS:
                shutil.copyfile(path, new / path.name)
        return _write(source, new, tensors, files, changes, whole, progress)


def check_checkpoint(
    source: str | Path,
    adapters: Mapping[str, Adapter] | str | Path,
    key_map: KeyMap | None = None,
    *,
    params: Any = None,
) -> None:
    """Raise what `merge_checkpoint` would raise, and write nothing."""
    _checked(Path(source).absolute(), adapters, key_map, params)


def _checked(
    source: Path, adapters: Mapping[str, Adapter] | str | Path, key_map: KeyMap | None, params: Any
) -> tuple[dict[str, Tensor], list[str], dict[str, Change], dict[str, Array]]:
    """The tensors and files of the source, what is added to tensors, and what takes their places."""
    tensors, files = _tensors(source)
    whole: dict[str, Array] = {}
    if isinstance(adapters, str | Path):
        changes, whole = _changes_of_folder(Path(adapters))
    elif key_map is None:
        raise LoraError("merge_checkpoint(key_map=...): which tensor each path is, such as lora.key_maps.LLAMA.")
    else:
        changes = _changes(adapters, key_map, params)
    _check(source, tensors, changes, whole)
    return tensors, files, changes, whole


def read_tensors(source: Path) -> "Tensors":
    """The tensors of a model's folder, each read when it is asked for.

    Raises:
        LoraError: as `merge_checkpoint`.
    """
    return Tensors(source, _tensors(source.absolute())[0])


class Tensors(Mapping[str, Array]):
    """`{name: tensor}` in the order of the files."""

    def __init__(self, source: Path, places: Mapping[str, Tensor]) -> None:
        self._source, self.places = source, places

    def __getitem__(self, name: str) -> Array:
        place = self.places[name]
        if place.dtype not in DTYPES:
            raise LoraError(f"{name!r} is of {place.dtype} in {self._source}, expected one of {', '.join(DTYPES)}.")
        with (self._source / place.file).open("rb") as file:
            file.seek(place.start)
            return np.frombuffer(file.read(place.size), DTYPES[place.dtype]).reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


# What is added --------------------------------------------------------------------------------------------------------


def _changes(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> dict[str, Change]:
    factors, placed = torch_factors(adapters, key_map, params)
    return {
        name + placed[name].entry.suffix: _change(placed[name].entry.kind, a, b, scale, placed[name].experts)
        for name, (a, b, scale) in factors.items()
    }


def _changes_of_folder(folder: Path) -> tuple[dict[str, Change], dict[str, Array]]:
    factors, whole = torch_factors_of_folder(folder)
    return {f"{name}.weight": _change(kind, a, b, scale, 1) for name, (kind, a, b, scale) in factors.items()}, whole


def _change(kind: str, a: Array, b: Array, scale: float, experts: int) -> Change:
    """Torch's A and B of a module as the products that are added to its tensor."""
    wide_a, wide_b = np.asarray(a, np.float32), np.asarray(b, np.float32) * np.float32(scale)
    window = a.shape[2:]
    a2 = wide_a.reshape(experts, a.shape[0] // experts, -1)
    b2 = np.moveaxis(wide_b.reshape(b.shape[0], -1, experts), -1, 0)
    turned = KINDS[kind][0].split().index("in") < KINDS[kind][0].split().index("out")
    factors = [(a_.T, b_.T) if turned else (b_, a_) for a_, b_ in zip(a2, b2, strict=True)]
    inner = (a.shape[1], b.shape[0]) if turned else (b.shape[0], a.shape[1])
    return Change(factors, (*((experts,) if "expert" in KINDS[kind][0] else ()), *inner, *window))


# Files ----------------------------------------------------------------------------------------------------------------


def _tensors(source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a model, in order, and the files that they are in."""
    if not source.is_dir():
        raise LoraError(f"there is no folder {source}.")
    files = [SINGLE]
    if (source / INDEX).is_file():
        files = _indexed(source / INDEX)
    found: dict[str, Tensor] = {}
    for file in files:
        if not (source / file).is_file():
            raise LoraError(f"there is no {source / file}: merge_checkpoint reads {SINGLE}, or the shards of {INDEX}.")
        for name, tensor in _header(source / file).items():
            if name in found:
                raise LoraError(f"{source} holds {name!r} twice, in {found[name].file} and {file}.")
            found[name] = tensor
    return found, files


def _indexed(path: Path) -> list[str]:
    """The files that an index names, which are names and no paths."""
    try:
        weights = json.loads(path.read_bytes())["weight_map"]
        files = sorted(dict.fromkeys(weights.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoraError(f"{path} is no index of safetensors: {str(error)[:200]}.") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise LoraError(f"{path} names {str(file)[:100]!r}, expected names of safetensors files beside it.")
    return files


def _header(path: Path) -> dict[str, Tensor]:
    """Where the tensors of a file are. `safetensors` checks that they lie beside one another in the file."""
    from lora_jax._safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} cannot be read: {str(error)[:200]}.") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    return {
        name: Tensor(path.name, facts["dtype"], tuple(facts["shape"]), 8 + length + begin, end - begin)
        for name, facts in entries.items()
        if name != "__metadata__"
        for begin, end in [facts["data_offsets"]]
    }


def _check(
    source: Path, tensors: Mapping[str, Tensor], changes: Mapping[str, Change], whole: Mapping[str, Array]
) -> None:
    """All of it before anything is written."""
    shapes = {name: change.shape for name, change in changes.items()} | {n: a.shape for n, a in whole.items()}
    for name, shape in shapes.items():
        if name not in tensors:
            tied = " A tied head is in the file once, under the name of the embedding." * ("head" in name)
            raise LoraError(
                f"{source} has no tensor {name!r}; the nearest are {', '.join(nearest(name, tensors, n=3)) or 'none'}. "
                f"Names that only begin with something else are met by key_map.under(name=...).{tied}"
            )
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise LoraError(
                f"{name!r} is of {tensor.dtype} in {source}: quantised weights would be rounded again. Merge into the "
                "weights that they were made of, and quantise the result."
            )
        if tensor.shape != shape:
            raise LoraError(f"{name!r} has shape {list(tensor.shape)} in {source}, its adapter {list(shape)}.")


def _write(
    source: Path,
    new: Path,
    tensors: Mapping[str, Tensor],
    files: list[str],
    changes: Mapping[str, Change],
    whole: Mapping[str, Array],
    progress: Callable[[int, int], None] | None,
) -> dict[str, float]:
    """The files again, with sums and other tensors in their places; and the rounding loss of each sum."""
    losses: dict[str, float] = {}
    total, done = sum(tensors[name].size for name in changes), 0
    for file in files:
        touched = [
            name for name, tensor in tensors.items() if tensor.file == file and (name in changes or name in whole)
        ]
        with (source / file).open("rb") as old, (new / file).open("wb") as out:
            for name in sorted(touched, key=lambda name: tensors[name].start):
                tensor = tensors[name]
                _copy(old, out, tensor.start - old.tell())
                if name in changes:
                    losses[name] = _merge(old, out, tensor, changes[name].factors)
                    done += tensor.size
                    if progress is not None:
                        progress(done, total)
                else:
                    out.write(whole[name].astype(DTYPES[tensor.dtype]).tobytes())
                    old.seek(tensor.size, os.SEEK_CUR)
            _copy(old, out, (source / file).stat().st_size - old.tell())
    return losses


def _copy(old: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        block = old.read(min(size, BLOCK))
        if not block:
            raise LoraError(f"{old.name} became shorter while it was read.")
        out.write(block)
        size -= len(block)


def _merge(old: BinaryIO, out: BinaryIO, tensor: Tensor, factors: list[tuple[Array, Array]]) -> float:
    """Read a tensor, write its sum, and tell the rounding loss."""
    dtype: Any = np.dtype(DTYPES[tensor.dtype])
    lost = changed = 0.0
    computed: deque[tuple[Any, Any]] = deque()

    def write(left_to_write: int) -> float:
        """Write what was computed first, while the rest is being computed."""
        lost = 0.0
        while len(computed) > left_to_write:
            rounded, errors = computed.popleft()
            out.write(np.asarray(rounded).view(np.uint8).data)
            lost += float(np.asarray(errors).sum(dtype=np.float64))
        return lost

    for left, right in factors:
        changed += _squared_norm(left, right)
        rows = _rows(left.shape[0], CHUNK // right.shape[1])
        for start in range(0, left.shape[0], rows):
            part = left[start : start + rows]
            count = part.shape[0] * right.shape[1]
            w = np.frombuffer(old.read(count * dtype.itemsize), dtype).reshape(part.shape[0], -1)
            computed.append(_sum_in_fp64(w, part, right) if dtype == np.float64 else _sum(w, part, right))
            lost += write(1)
    lost += write(0)
    return math.sqrt(lost / changed) if changed else 0.0


def _rows(n: int, most: int) -> int:
    """How many of n rows at a time: a divisor if there is a large one, so that one program serves all parts."""
    most = max(1, min(n, most))
    return next((rows for rows in range(most, most // 2, -1) if n % rows == 0), most)


@jax.jit
def _sum(w: jax.Array, left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W + L R rounded to W's dtype, and of each row the squared norm of what rounding took."""
    exact = w.astype(jnp.float32) + jnp.matmul(left, right, precision="highest")
    rounded = exact.astype(w.dtype)
    error = rounded.astype(jnp.float32) - exact
    return rounded, jnp.einsum("ij,ij->i", error, error)


def _sum_in_fp64(w: Array, left: Array, right: Array) -> tuple[Array, float]:
    """The same for fp64, which JAX has only where that is asked for; nothing is lost that counts."""
    return w + left.astype(np.float64) @ right, 0.0


def _squared_norm(left: Array, right: Array) -> float:
    """Of L R, as the trace of (L^T L)(R R^T)."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    return max(0.0, float(np.sum((left.T @ left) * (right @ right.T))))
