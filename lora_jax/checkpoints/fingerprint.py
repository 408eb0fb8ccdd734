"""Lines of text that tell whether arrays are the same as before, on whatever mesh or host they are.

A fingerprint reads a few entries, which is enough to tell one base from another. A checksum reads every bit, which
finds a damaged file. Both read bits and do no arithmetic on values: NaN, -0.0 and rounding make no difference.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.arrays import describe, is_key
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import flatten_with_names, is_array

SAMPLES = 256  # entries of each array, about


def fingerprint(params: Any) -> dict[str, str]:
    """Return dtype, shape and a hash of some entries of each leaf: `{path: "float32[384, 8] 1f3a9c0d5e7b2468"}`.

    No array is gathered: each host reads the samples that it holds, and all samples are exchanged at once.

    Args:
        params: any tree. Leaves without content (`jax.ShapeDtypeStruct`) have no hash; leaves that are not arrays have
            their type and, if they are numbers, strings or bytes, their value.
    """
    _, leaves, tree = flatten_with_names(params)
    opened = tree.unflatten([leaf.arrays() if is_packed(leaf) else leaf for leaf in leaves])
    names, leaves, _ = flatten_with_names(opened)
    samples = {name: _sample(leaf) for name, leaf in zip(names, leaves, strict=True) if _has_content(leaf)}
    apart = [
        name
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    samples |= _add_up({name: samples[name] for name in apart})
    hashes = {name: f" {hashlib.sha256(sample.tobytes()).hexdigest()[:16]}" for name, sample in samples.items()}
    return {name: describe(leaf) + hashes.get(name, "") for name, leaf in zip(names, leaves, strict=True)}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return dtype, shape and a sum over all bits of each array: `{path: "float32[384, 8] 5e7b2468"}`.

    Any single flipped bit changes the sum. Each host sums the words that it holds, and all sums are added up at once.
    """
    sums = {name: _checksum(array) for name, array in arrays.items() if array.size}
    sums |= _add_up({name: sums[name] for name in sums if not arrays[name].is_fully_addressable})
    found = {name: f" {int(total[0]):08x}" for name, total in sums.items()}
    return {name: describe(array) + found.get(name, "") for name, array in arrays.items()}


def differences(saved: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what differs between two fingerprints, a line for each path. Hashes are compared where both have one.

    >>> differences({"a": "float32[2] 00ff", "b": "int32[]"}, {"a": "float32[2] 00fe", "c": "int32[]"})
    ['a: float32[2] with other contents', 'b: saved as int32[], missing now', 'c: int32[] now, not saved']
    """
    lines = []
    for path in [*saved, *(path for path in found if path not in saved)]:
        (before, _, content), (now, _, content_now) = (_split(side.get(path, "")) for side in (saved, found))
        if not now:
            lines.append(f"{path}: saved as {before}, missing now")
        elif not before:
            lines.append(f"{path}: {now} now, not saved")
        elif before != now:
            lines.append(f"{path}: saved as {before}, {now} now")
        elif content and content_now and content != content_now:
            lines.append(f"{path}: {now} with other contents")
    return lines


def _split(text: str) -> tuple[str, str, str]:
    """Split a line into dtype and shape, a separator, and the hash, which may be empty."""
    shape, bracket, content = text.rpartition("] ")
    return (f"{shape}]", bracket, content) if bracket else (text, "", "")


# A few entries of each array ------------------------------------------------------------------------------------------


def _has_content(leaf: Any) -> bool:
    """Whether a leaf is an array with values, and not only the shape of one."""
    return is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)


def _sample(leaf: Any) -> np.ndarray[Any, Any]:
    """Return the bytes of entries at even distances along each axis; zeros for those that only another host holds."""
    if not isinstance(leaf, jax.Array):
        picked = np.asarray(leaf)
        for axis, (n, step) in enumerate(_steps(leaf.shape)):
            picked = np.take(picked, np.arange(0, n, step), axis=axis)
        return _bytes(picked)
    array = plain_data(leaf)
    out = np.zeros([-(-n // step) for n, step in _steps(array.shape)], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id != 0:
            continue
        inside, places = [], []  # indices of this shard's samples: in its own data, and among all samples
        for index, (n, step) in zip(shard.index, _steps(array.shape), strict=True):
            start, stop, _ = index.indices(n)
            first, last = -(-start // step), -(-stop // step)
            inside.append(np.arange(first, last) * step - start)
            places.append(slice(first, last))
        out[tuple(places)] = np.asarray(_pick(shard.data, inside))
    return _bytes(out)


def _steps(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the size of each axis, and the distance between samples along it."""
    along = max(2, round(SAMPLES ** (1 / max(1, len(shape)))))
    return [(n, max(1, -(-n // along))) for n in shape]


@jax.jit
def _pick(data: jax.Array, indices: list[np.ndarray[Any, Any]]) -> jax.Array:
    """Return the entries at these indices along each axis."""
    for axis, index in enumerate(indices):
        data = jnp.take(data, index, axis=axis)
    return data


# Every bit of each array ----------------------------------------------------------------------------------------------


def _checksum(leaf: jax.Array) -> np.ndarray[Any, Any]:
    """Return [1], the sum of the words modulo 2^32, each times an odd number of its own. The order does not matter.

    Of an array that is spread over hosts, only the words that this host is the first to hold are summed.
    """
    array = plain_data(leaf)
    if array.is_fully_addressable:
        return _sum_of_words(np.asarray(array), [0] * array.ndim, array.shape)
    total = np.zeros(1, np.uint32)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            starts = [index.indices(n)[0] for index, n in zip(shard.index, array.shape, strict=True)]
            total += _sum_of_words(np.asarray(shard.data), starts, array.shape)
    return total


def _sum_of_words(part: np.ndarray[Any, Any], starts: Sequence[int], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return [1], the sum for a part of an array of this shape, the part starting at these indices."""
    width = max(1, part.dtype.itemsize // 4)  # 32-bit words in an entry
    words = _bytes(part).view(f"uint{8 * min(4, part.dtype.itemsize)}").reshape(*part.shape, width).astype(np.uint32)
    factor = np.arange(1, 2 * width, 2, dtype=np.uint32)  # twice the word's index in the whole array, plus one
    for axis, (start, n) in enumerate(zip(starts, part.shape, strict=True)):
        stride = 2 * width * math.prod(shape[axis + 1 :]) % 2**32
        along = np.arange(start, start + n, dtype=np.uint32) * np.uint32(stride)
        factor = factor + along.reshape(n, *[1] * (part.ndim - axis))
    return np.sum(words * factor, dtype=np.uint32).reshape(1)


def plain_data(leaf: jax.Array) -> jax.Array:
    """Return an array itself, or the data of a random key."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the bytes of an array."""
    if jnp.issubdtype(array.dtype, jnp.integer) and jnp.iinfo(array.dtype).bits < 8:
        array = array.astype(np.int8)  # the unused bits of a packed dtype are undefined
    return np.frombuffer(array.tobytes(), np.uint8)


def _add_up(found: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Add up over all hosts what each has found in its part of the arrays."""
    if not found:
        return {}
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.concatenate(list(found.values())))
    parts = np.split(gathered.sum(axis=0, dtype=gathered.dtype), np.cumsum([part.size for part in found.values()])[:-1])
    return dict(zip(found, parts, strict=True))
