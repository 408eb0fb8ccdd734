"""Merge adapters into the safetensors of a published model without building it: shard by shard, in little memory.

W' = W + s B A, for DoRA with each output scaled to its length, is computed in fp32 and rounded once to W's dtype. Each
file is copied except for the bytes of adapted tensors: names, order, dtypes, metadata and the index stay as they were,
unless a head that was tied to the table gets a tensor of its own. What becomes of each tensor is in `tensor_changes`.
"""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.atomic_dir import written
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import A_KEY_MAP, check_adapter_dict, check_folder, check_is
from lora_jax.core.arrays import matmul_highest, refuse_spread
from lora_jax.core.errors import LoraError, LoraWarning
from lora_jax.interop.file_parts import Part, parts_of
from lora_jax.interop.key_map import Array, KeyMap
from lora_jax.interop.merge_rows import merged_rows
from lora_jax.interop.merge_work import DTYPES, Work, checked
from lora_jax.interop.peft.files import CONFIG
from lora_jax.interop.peft.tied_tables import Tied
from lora_jax.interop.safetensors_index import Tensor, read, tensors_in
from lora_jax.interop.tied_files import header_with, write_untied

CALL = "merge_checkpoint(source, adapters, target, key_map)"
THREADS = 4  # twice the cores of the smallest machines: half of the time is reading and writing
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".safetensors"}  # files not to copy


def merge_checkpoint(
    source: str | Path,
    adapters: Mapping[str, Adapter] | str | Path,
    target: str | Path,
    key_map: KeyMap | None = None,
    *,
    others: Any = None,
    params: Any = None,
    tied: Tied = "refuse",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Write a model of Hugging Face with adapters merged into its weights.

    Only a few chunks of a tensor are in memory at a time, whatever the size of the model.

    Args:
        source: a folder with `model.safetensors` or an index and its shards.
        adapters: `{path: adapter}`, with `key_map`; or a folder of HF PEFT, which names the tensors itself, and of
            which all is merged: what it holds whole, biases, trained tokens, and adapters that began with PiSSA or
            OLoRA, whose start is taken off the model's own weights. Those of all experts in one parameter are merged
            into files with a tensor for each expert and projection, too.
        target: a new folder: the same files, with the merged tensors in their places.
        key_map: from parameters to modules.
        others: `{path: array}`, or nested dicts, that take the place of parameters before anything is added: the second
            result of `load_peft`, which adapters that began with PiSSA are wrong without.
        params: as for `save_peft`. They also tell whether the program has one table for the lookups and for the head.
        tied: what becomes of a change of the table of tokens alone, or of the head alone, where the files have one
            tensor for both. "refuse" it; "untie": write a head of its own, and `tie_word_embeddings` in the config, so
            that the merged model is the adapted one; or change "both" ends, which is meant by adapters of a program
            that has one table for both. PEFT's own adapters of a table are for its lookups alone, except for trained
            tokens and with `ensure_weight_tying`.
        progress: called with the bytes done and those of all changed tensors.

    Returns:
        `{tensor: rounding loss}` of each tensor that changes: |W' rounded - W'| / |W' - W| in Frobenius norms. 1 means
        that nothing of the change is left.

    Raises:
        LoraError: the source has no safetensors, or damaged ones; a tensor is missing, has another shape, or is
            quantised; adapters or others are not finite; a merged number is beyond the tensor's dtype; a change of one
            end of a tied table; the target is not empty or cannot be written, such as on a full disk. Then nothing has
            changed.

    Warns:
        LoraWarning: the target was given before the adapters, which was the order once.

    >>> import jax.numpy as jnp, numpy as np, tempfile, lora_jax as lora
    >>> from safetensors.numpy import load_file, save_file
    >>> from pathlib import Path
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("up/kernel", "mlp.up"))
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"up/kernel": lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 3)), axes, 0.5)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "base").mkdir()
    ...     save_file({"mlp.up.weight": np.ones((3, 4), np.float32)}, f"{folder}/base/model.safetensors")
    ...     losses = lora.merge_checkpoint(f"{folder}/base", adapters, f"{folder}/merged", key_map)
    ...     losses, load_file(f"{folder}/merged/model.safetensors")["mlp.up.weight"][0].tolist()
    ({'mlp.up.weight': 0.0}, [1.5, 1.5, 1.5, 1.5])
    """
    if _is_target_first(adapters, target):
        adapters, target = target, adapters
        warnings.warn(f"the order is {CALL}: the target came before the adapters.", LoraWarning, stacklevel=2)
    check_folder(CALL, source, "source")
    check_folder(CALL, target, "target")
    source, target = Path(source).absolute(), Path(target).absolute()
    check_target(target, None)
    if not isinstance(adapters, str | Path):
        check_adapter_dict(CALL, adapters)
        refuse_spread(adapters)
    if key_map is not None:
        check_is(CALL, "key_map", key_map, KeyMap, A_KEY_MAP)
    work = checked(source, tensors_in(source), adapters, key_map, others, params, tied)
    with written(target) as new:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in OTHER_WEIGHTS:
                shutil.copyfile(path, new / path.name)
        write_untied(new, work.untied)
        return _write(source, new, work, progress)


def _is_target_first(adapters: Any, target: Any) -> bool:
    """Return whether adapters were given where the target belongs, as was the order before."""
    if isinstance(target, Mapping):
        return isinstance(adapters, str | Path)
    folders = isinstance(adapters, str | Path) and isinstance(target, str | Path)
    first, last = (folders and os.path.isfile(os.path.join(folder, CONFIG)) for folder in (adapters, target))
    return last and not first


def check_checkpoint(
    source: str | Path,
    adapters: Mapping[str, Adapter] | str | Path,
    key_map: KeyMap | None = None,
    *,
    others: Any = None,
    params: Any = None,
    tied: Tied = "refuse",
) -> None:
    """Raise the errors that `merge_checkpoint` would raise before it writes, and write nothing."""
    source = Path(source).absolute()
    checked(source, tensors_in(source), adapters, key_map, others, params, tied)


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


# Files ----------------------------------------------------------------------------------------------------------------


def _write(source: Path, new: Path, work: Work, progress: Callable[[int, int], None] | None) -> dict[str, float]:
    """Write the files with the changed tensors, and return the rounding loss of each.

    The files are written in parts, several at a time: some are added while others are read and written.
    """
    tensors, changes = work.tensors, work.changes
    added = {} if work.untied is None else work.untied.added
    parts: list[Part] = []
    for file in work.files:
        own = {name: tensor for name, tensor in added.items() if tensor.file == file}
        header, length = header_with(source / file, own) if own else (b"", 0)
        size = (source / file).stat().st_size
        grown = len(header) - length + sum(tensor.size for tensor in own.values())
        (new / file).touch()
        os.truncate(new / file, size + grown)
        parts += parts_of(source, file, size, tensors, changes, own, header, length)
    lost, changed = dict.fromkeys(changes, 0.0), dict.fromkeys(changes, 0.0)
    total, done = sum(part.size for part in parts if part.name), 0
    with ThreadPoolExecutor(THREADS) as pool:
        for part, (loss, change) in zip(parts, pool.map(partial(_write_part, source, new), parts), strict=True):
            if part.name in changes:
                lost[part.name] += loss
                changed[part.name] += change
                done += part.size
                if progress is not None:
                    progress(done, total)
    return {name: math.sqrt(lost[name] / changed[name]) if changed[name] else 0.0 for name in changes}


def _write_part(source: Path, new: Path, part: Part) -> tuple[float, float]:
    """Read, change and write some bytes of a file; return the squared norms of rounding errors and of the change."""
    lost = changed = 0.0
    if part.base is None or part.name:
        with (source / part.file).open("rb") as old:
            old.seek(part.start)
            data = np.frombuffer(old.read(part.size), np.uint8)
        if data.size != part.size:
            raise LoraError(f"{source / part.file} became shorter while it was read.")
    else:
        data = part.base
    if part.name:
        data, lost, changed = _merged(data.view(part.dtype), part)
    with (new / part.file).open("r+b") as out:
        out.seek(part.at)
        out.write(data.data)
    return lost, changed


def _merged(w: Array, part: Part) -> tuple[Array, float, float]:
    """Return the bytes of W', and the squared norms of rounding errors and of the change.

    Raises:
        LoraError: a number of W' is beyond the dtype.
    """
    left, right = part.factors or (None, None)
    add = _sum_in_fp64 if part.dtype == np.float64 else _sum
    shape = (-1,) if left is None else (left.shape[0], -1)
    base, delta = (None if array is None else array.reshape(shape) for array in (part.base, part.delta))
    operands = (w.reshape(shape), base, left, right, delta, part.lengths)
    rounded, errors, changes = add(*operands)
    lost, merged = _total(errors), np.asarray(rounded)
    changed = _squared_norm(*part.factors) if changes is None and part.factors else _total(changes)
    if not math.isfinite(lost + changed):
        lost, changed = _norms_of_finite(part, merged, *operands)
    return merged.reshape(-1).view(np.uint8), lost, changed


def _norms_of_finite(
    part: Part,
    merged: Array,
    w: Array,
    base: Array | None,
    left: Array | None,
    right: Array | None,
    delta: Array | None,
    lengths: Array | None,
) -> tuple[float, float]:
    """Return the squared norms where W' is finite: what is not in W itself stays as it is.

    Raises:
        LoraError: what was finite is not any more.
    """
    with np.errstate(all="ignore"):
        start = (w if base is None else base).astype(np.float64)
        product = None if left is None or right is None else left.astype(np.float64) @ right.astype(np.float64)
        exact = merged_rows(np, start, product, delta, lengths)
    finite = np.isfinite(merged)
    if (np.isfinite(start) & ~finite).any():
        most = float(jnp.finfo(part.dtype).max)
        raise LoraError(
            f"{part.name!r} would hold numbers beyond {most:.5g}, the largest of its dtype {part.dtype}, and nothing "
            "was written: save the model in a wider dtype first, such as bfloat16, and merge into that; or the "
            "adapters are of a training that diverged."
        )
    with np.errstate(all="ignore"):
        lost, changed = (np.where(finite, exact - other.astype(np.float64), 0) for other in (merged, w))
        return float(np.square(lost).sum()), float(np.square(changed).sum())


@jax.jit
def _sum(
    w: jax.Array,
    base: jax.Array | None,
    left: jax.Array | None,
    right: jax.Array | None,
    delta: jax.Array | None,
    lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return W' in W's dtype, and the squared norms of rows, or entries, of the rounding errors and of W' - W.

    Where only L R is added, W' - W is this, and its norm follows from the factors. Numbers that are not finite make
    these norms so.
    """
    wide = w.astype(jnp.float32)
    product = None if left is None or right is None else matmul_highest(left, right)
    exact = merged_rows(jnp, wide if base is None else base.astype(jnp.float32), product, delta, lengths)
    rounded = exact.astype(w.dtype)
    only_factors = base is None and delta is None and lengths is None
    changes = None if only_factors else _squares(exact - wide)
    return rounded, _squares(rounded.astype(jnp.float32) - exact), changes


def _sum_in_fp64(
    w: Array, base: Array | None, left: Array | None, right: Array | None, delta: Array | None, lengths: Array | None
) -> tuple[Array, float, Array]:
    """Return the same for fp64, which JAX has only where it is enabled; its rounding errors do not count."""
    with np.errstate(all="ignore"):  # what is not finite shows in the norm of the change
        product = None if left is None or right is None else left.astype(np.float64) @ right
        exact = merged_rows(np, w if base is None else base.astype(np.float64), product, delta, lengths)
        return np.ascontiguousarray(exact), 0.0, np.square(exact - w)


def _squares(array: jax.Array) -> jax.Array:
    """Return the squared norms of rows, or the squares of the entries of a vector."""
    return jnp.square(array) if array.ndim == 1 else jnp.einsum("ij,ij->i", array, array)


def _total(squares: Any) -> float:
    return float(np.asarray(squares).sum(dtype=np.float64))


def _squared_norm(left: Array, right: Array) -> float:
    """Return the squared norm of L R, which is the trace of (L^T L)(R R^T)."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    return max(0.0, float(np.sum((left.T @ left) * (right @ right.T))))
