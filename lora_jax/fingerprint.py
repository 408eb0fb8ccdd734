"""Whether arrays are the same as before, told from a line of text for each: the same on any mesh, on any host.

A fingerprint reads a few entries, which is enough to know one base from another. A checksum reads every bit, which
finds a damaged file. Neither does arithmetic on the values: NaN, -0.0 and rounding cannot make two runs differ.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.paths import flatten_with_names, is_array

SAMPLES = 256  # entries of each array, about


def fingerprint(params: Any) -> dict[str, str]:
    """`{path: "float32[384, 8] 1f3a9c0d5e7b2468"}`: shape, dtype, and a hash of some entries along each axis.

    Nothing is gathered: each host reads the samples that it holds, and they are exchanged once, for all arrays.

    Args:
        params: any tree; of leaves without content (`jax.ShapeDtypeStruct`) only the shape is told, and of leaves
            that are no arrays the value where it is a plain one.
    """
    names, leaves, _ = flatten_with_names(params)
    samples = {name: _sample(leaf) for name, leaf in zip(names, leaves, strict=True) if _has_content(leaf)}
    apart = [
        name
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    samples |= _exchange({name: samples[name] for name in apart})
    hashes = {name: f" {hashlib.sha256(sample.tobytes()).hexdigest()[:16]}" for name, sample in samples.items()}
    return {name: describe(leaf) + hashes.get(name, "") for name, leaf in zip(names, leaves, strict=True)}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """`{path: "float32[384, 8] 5e7b2468"}`: shape, dtype, and a sum over all bits. No single flipped bit escapes it."""
    sums = jax.device_get({name: _checksum(array) for name, array in arrays.items() if array.size})
    return {name: describe(array) + (f" {sums[name]:08x}" if array.size else "") for name, array in arrays.items()}


def differences(saved: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What differs between two fingerprints, a line for each path. Contents count where both have them.

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


def describe(leaf: Any) -> str:
    """`float32[384, 8]`; for what is no array, its type and, of plain values, the value."""
    if is_array(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    plain = isinstance(leaf, bool | int | float | complex | str | bytes)  # others may print where they are in memory
    return f"{type(leaf).__name__}({leaf!r})" if plain else type(leaf).__name__


def _split(text: str) -> tuple[str, str, str]:
    """Shape and content: the content is behind the shape's bracket."""
    shape, bracket, content = text.rpartition("] ")
    return (f"{shape}]", bracket, content) if bracket else (text, "", "")


# A few entries of each array ------------------------------------------------------------------------------------------


def _has_content(leaf: Any) -> bool:
    return is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)


def _sample(leaf: Any) -> np.ndarray[Any, Any]:
    """The bytes of entries at even distances along each axis; zeros for those that only another host holds."""
    if not isinstance(leaf, jax.Array):
        picked = np.asarray(leaf)
        for axis, (n, step) in enumerate(_steps(leaf.shape)):
            picked = np.take(picked, np.arange(0, n, step), axis=axis)
        return _bytes(picked)
    array = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    out = np.zeros([-(-n // step) for n, step in _steps(array.shape)], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id != 0:
            continue
        inside, places = [], []  # the samples of this shard: in its own data, and among all samples
        for index, (n, step) in zip(shard.index, _steps(array.shape), strict=True):
            start, stop, _ = index.indices(n)
            first, last = -(-start // step), -(-stop // step)
            inside.append(np.arange(first, last) * step - start)
            places.append(slice(first, last))
        out[tuple(places)] = np.asarray(_pick(shard.data, inside))
    return _bytes(out)


def _steps(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Each axis's size, and the distance between its samples."""
    along = max(2, round(SAMPLES ** (1 / max(1, len(shape)))))
    return [(n, max(1, -(-n // along))) for n in shape]


@jax.jit
def _pick(data: jax.Array, indices: list[np.ndarray[Any, Any]]) -> jax.Array:
    for axis, index in enumerate(indices):
        data = jnp.take(data, index, axis=axis)
    return data


def _bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if jnp.issubdtype(array.dtype, jnp.integer) and jnp.iinfo(array.dtype).bits < 8:
        array = array.astype(np.int8)  # the unused bits of a packed dtype are anything
    return np.frombuffer(array.tobytes(), np.uint8)


def _exchange(samples: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The samples of arrays that are spread over hosts: of each byte, all hosts but one hold a zero."""
    if not samples:
        return {}
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.concatenate(list(samples.values())))
    parts = np.split(gathered.sum(axis=0, dtype=np.uint8), np.cumsum([part.size for part in samples.values()])[:-1])
    return dict(zip(samples, parts, strict=True))


# Every bit of each array ----------------------------------------------------------------------------------------------


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """The sum of all words, each times an odd number of its own, modulo 2^32: the same in any order of summing."""
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of each entry, as one uint32 or along a new axis of them."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jax.lax.bitcast_convert_type(array, f"uint{jnp.finfo(array.dtype).bits}")
    return array.astype(jnp.uint32)
