"""Merge adapters into the safetensors of a published model without building it: shard by shard, in little memory.

W' = W + s B A, for DoRA with each output scaled to its length, is computed in fp32 and rounded once to W's dtype. Each
file is copied except for the bytes of adapted tensors: names, order, dtypes, metadata and the index stay as they were.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.arrays import refuse_spread
from lora_jax.checkpoints.atomic_dir import written
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import matmul_highest
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.interop import safetensors_index
from lora_jax.interop.key_map import MODULE_KINDS, Array, KeyMap
from lora_jax.interop.peft.formats.registry import LORA
from lora_jax.interop.peft.load import load_by_module
from lora_jax.interop.peft.to_modules import modules_to_save, torch_modules
from lora_jax.interop.safetensors_index import Tensor, read, tensors_in

DTYPES = {name: safetensors_index.DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}  # that adapters are added to
CHUNK = 2**20  # entries of a tensor that are added at a time: they fit into a CPU's cache
BLOCK = 2**22  # bytes that are copied at a time
THREADS = 4  # twice the cores of the smallest machines: half of the time is reading and writing
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".safetensors"}  # files not to copy


class Change(NamedTuple):
    """What is added to a tensor: L @ R for each of the matrices that it consists of."""

    factors: list[tuple[Array, Array]]  # L [rows, r] and R [r, columns]
    shape: tuple[int, ...]  # the shape that the tensor has to have
    lengths: Array | None = None  # [rows]: DoRA's lengths, to which the rows of W + L R are scaled


class Part(NamedTuple):
    """Bytes of a file that are read and written in one step."""

    file: str
    start: int
    size: int
    name: str = ""  # of the tensor that the bytes belong to, if it changes
    dtype: Any = None
    base: Array | None = None  # what is written in the place of the file's own numbers
    factors: tuple[Array, Array] | None = None  # L and R whose product is added
    lengths: Array | None = None  # to which the rows are scaled


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

    Only a few chunks of a tensor are in memory at a time, whatever the size of the model.

    Args:
        source: a folder with `model.safetensors` or an index and its shards.
        target: a new folder: the same files, with the merged tensors in their places.
        adapters: `{path: adapter}`, with `key_map`; or a folder of HF PEFT, which names the tensors itself. A tensor
            that this folder holds whole replaces the model's tensor of that name before anything is added.
        key_map: from parameters to modules.
        params: as for `save_peft`.
        progress: called with the bytes done and those of all adapted tensors.

    Returns:
        `{tensor: rounding loss}`: |W' rounded - W'| / |W' - W| in Frobenius norms. 1 means that nothing of the change
        is left.

    Raises:
        LoraError: the source has no safetensors, or damaged ones; a tensor is missing, has another shape, or is
            quantised; the target is not empty or cannot be written, such as on a full disk. Then nothing has changed.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    check_target(target, None)
    if isinstance(adapters, Mapping):
        refuse_spread(adapters)
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
    """Raise the errors that `merge_checkpoint` would raise, and write nothing."""
    _checked(Path(source).absolute(), adapters, key_map, params)


def _checked(
    source: Path, adapters: Mapping[str, Adapter] | str | Path, key_map: KeyMap | None, params: Any
) -> tuple[dict[str, Tensor], list[str], dict[str, Change], dict[str, Array]]:
    """Return the tensors and files of the source, what is added to tensors, and what replaces tensors."""
    tensors, files = tensors_in(source)
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
    """Return the tensors of a model's folder, each of which is read when it is asked for.

    Raises:
        LoraError: as `merge_checkpoint`.
    """
    return Tensors(source, tensors_in(source.absolute())[0])


class Tensors(Mapping[str, Array]):
    """`{name: tensor}` in the order of the files. `places` says where each is."""

    def __init__(self, source: Path, places: Mapping[str, Tensor]) -> None:
        self._source, self.places = source, places

    def __getitem__(self, name: str) -> Array:
        tensor = self.places[name]
        if tensor.dtype not in DTYPES:
            raise LoraError(f"{name!r} is of {tensor.dtype} in {self._source}, expected one of {', '.join(DTYPES)}.")
        return read(self._source, tensor, DTYPES[tensor.dtype]).reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


# What is added --------------------------------------------------------------------------------------------------------


def _changes(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> dict[str, Change]:
    """Return what adapters add to each tensor; kinds that are LoRA in another form are taken as LoRA."""
    found = modules_to_save(adapters, key_map, params)
    if not found.format.is_low_rank:
        found = torch_modules(adapters, key_map, params, LORA)
    changes = {}
    for name, module in found.modules.items():
        match = found.matches[name]
        a, b, lengths = module.arrays["a"], module.arrays["b"], module.arrays.get("m")
        if lengths is not None and match.entry.kind not in ("linear", "conv"):
            raise LoraError(
                f"{match.path!r} has DoRA on a {match.entry.kind}, whose lengths run along its columns: load the model "
                "and merge with lora.merge."
            )
        changes[name + match.entry.suffix] = _change(match.entry.kind, a, b, module.scale, match.experts, lengths)
    return changes


def _changes_of_folder(folder: Path) -> tuple[dict[str, Change], dict[str, Array]]:
    adapters, whole, key_map = load_by_module(folder)
    return _changes(adapters, key_map, None), whole


def _change(kind: str, a: Array, b: Array, scale: float, experts: int, lengths: Array | None) -> Change:
    """Return the products of torch's A and B of a module that are added to its tensor."""
    wide_a, wide_b = np.asarray(a, np.float32), np.asarray(b, np.float32) * np.float32(scale)
    window = a.shape[2:]
    a2 = wide_a.reshape(experts, a.shape[0] // experts, -1)
    b2 = np.moveaxis(wide_b.reshape(b.shape[0], -1, experts), -1, 0)
    axes = MODULE_KINDS[kind].axes.split()
    inputs_first = axes.index("in") < axes.index("out")
    factors = [(a_.T, b_.T) if inputs_first else (b_, a_) for a_, b_ in zip(a2, b2, strict=True)]
    inner = (a.shape[1], b.shape[0]) if inputs_first else (b.shape[0], a.shape[1])
    shape = (*((experts,) if "expert" in axes else ()), *inner, *window)
    return Change(factors, shape, None if lengths is None else np.asarray(lengths, np.float32))


# Files ----------------------------------------------------------------------------------------------------------------


def _check(
    source: Path, tensors: Mapping[str, Tensor], changes: Mapping[str, Change], whole: Mapping[str, Array]
) -> None:
    """Raise, before anything is written, if a tensor is missing, quantised or of another shape."""
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
    """Write the files with the merged and replaced tensors, and return the rounding loss of each merged one.

    The files are written in parts, several at a time: some are added while others are read and written.
    """
    parts: list[Part] = []
    for file in files:
        size = (source / file).stat().st_size
        (new / file).touch()
        os.truncate(new / file, size)
        parts += _parts(file, size, tensors, changes, whole)
    lost, changed = dict.fromkeys(changes, 0.0), dict.fromkeys(changes, 0.0)
    total, done = sum(tensors[name].size for name in changes), 0
    with ThreadPoolExecutor(THREADS) as pool:
        for part, (loss, change) in zip(parts, pool.map(partial(_write_part, source, new), parts), strict=True):
            if part.name in changes:
                lost[part.name] += loss
                changed[part.name] += change
                done += part.size
                if progress is not None:
                    progress(done, total)
    return {name: math.sqrt(lost[name] / changed[name]) if changed[name] else 0.0 for name in changes}


def _parts(
    file: str, size: int, tensors: Mapping[str, Tensor], changes: Mapping[str, Change], whole: Mapping[str, Array]
) -> Iterator[Part]:
    """Yield all bytes of a file in order."""
    at = 0
    touched = {n: t for n, t in tensors.items() if t.file == file and (n in changes or n in whole)}
    for name, tensor in sorted(touched.items(), key=lambda item: item[1].start):
        yield from _copied(file, at, tensor.start)
        at = tensor.start + tensor.size
        base = whole.get(name)
        if name in changes:
            yield from _summed(file, tensor, name, changes[name], base)
        elif base is not None:
            yield Part(file, tensor.start, tensor.size, name, base=base.astype(DTYPES[tensor.dtype], copy=False))
    yield from _copied(file, at, size)


def _copied(file: str, start: int, end: int) -> Iterator[Part]:
    """Yield bytes that do not change."""
    for at in range(start, end, BLOCK):
        yield Part(file, at, min(BLOCK, end - at))


def _summed(file: str, tensor: Tensor, name: str, change: Change, base: Array | None) -> Iterator[Part]:
    """Yield some rows of W + L R at a time, where W is the file's, or `base`."""
    dtype: Any = np.dtype(DTYPES[tensor.dtype])
    flat = None if base is None else base.astype(dtype, copy=False).reshape(-1)
    done = 0  # entries
    for left, right in change.factors:
        rows = _rows(left.shape[0], CHUNK // right.shape[1])
        for start in range(0, left.shape[0], rows):
            some = left[start : start + rows]
            count = some.shape[0] * right.shape[1]
            w = None if flat is None else flat[done : done + count]
            at = tensor.start + done * dtype.itemsize
            lengths = None if change.lengths is None else change.lengths[start : start + rows]
            yield Part(file, at, count * dtype.itemsize, name, dtype, w, (some, right), lengths)
            done += count


def _write_part(source: Path, new: Path, part: Part) -> tuple[float, float]:
    """Read, change and write some bytes of a file; return the squared norms of rounding errors and of the change."""
    if part.base is None:
        with (source / part.file).open("rb") as old:
            old.seek(part.start)
            data = np.frombuffer(old.read(part.size), np.uint8)
        if data.size != part.size:
            raise LoraError(f"{source / part.file} became shorter while it was read.")
    else:
        data = np.ascontiguousarray(part.base).reshape(-1).view(np.uint8)
    lost = changed = 0.0
    if part.factors is not None:
        left, right = part.factors
        add = _sum_in_fp64 if part.dtype == np.float64 else _sum
        w = data.view(part.dtype).reshape(left.shape[0], -1)
        rounded, errors, changes = add(w, left, right, part.lengths)
        data, lost = np.asarray(rounded).view(np.uint8), _total(errors)
        changed = _squared_norm(left, right) if changes is None else _total(changes)
    with (new / part.file).open("r+b") as out:
        out.seek(part.start)
        out.write(data.data)
    return lost, changed


def _rows(n: int, most: int) -> int:
    """Return how many of n rows to add at a time: if possible a large divisor of n, which one program serves."""
    most = max(1, min(n, most))
    return next((rows for rows in range(most, most // 2, -1) if n % rows == 0), most)


@jax.jit
def _sum(
    w: jax.Array, left: jax.Array, right: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return W' in W's dtype, and for each row the squared norms of the rounding errors and, for DoRA, of W' - W.

    Without lengths, W' - W is L R, whose norm follows from the factors.
    """
    wide = w.astype(jnp.float32)
    exact, changes = wide + matmul_highest(left, right), None
    if lengths is not None:
        exact = exact * _gain(jnp, exact, lengths)[:, None]
        changes = jnp.square(exact - wide).sum(-1)
    rounded = exact.astype(w.dtype)
    error = rounded.astype(jnp.float32) - exact
    return rounded, jnp.einsum("ij,ij->i", error, error), changes


def _sum_in_fp64(w: Array, left: Array, right: Array, lengths: Array | None) -> tuple[Array, float, Array | None]:
    """Return the same for fp64, which JAX has only where it is enabled; its rounding errors do not count."""
    exact = w + left.astype(np.float64) @ right
    if lengths is None:
        return exact, 0.0, None
    exact *= _gain(np, exact, lengths)[:, None]
    return exact, 0.0, np.square(exact - w).sum(-1)


def _gain(xp: Any, rows: Any, lengths: Any) -> Any:
    """Return the factor that scales each row to its length, 1 for a row of zeros; `xp` is NumPy or jax.numpy."""
    norms = xp.linalg.norm(rows, axis=-1)
    return xp.where(norms == 0, 1.0, lengths / xp.where(norms == 0, 1.0, norms))


def _total(squares: Any) -> float:
    return float(np.asarray(squares).sum(dtype=np.float64))


def _squared_norm(left: Array, right: Array) -> float:
    """Return the squared norm of L R, which is the trace of (L^T L)(R R^T)."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    return max(0.0, float(np.sum((left.T @ left) * (right @ right.T))))
