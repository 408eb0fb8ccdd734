"""Frozen weights in the memory of the host, for a base that is larger than the memory of its devices.

They come to the device where a program multiplies by them: of stacked layers, each step of the scan brings its own, and
the backward pass brings them again. They are only ever read, so nothing is copied back.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from lora_jax.bases.lazy import like, read
from lora_jax.core.aliases import same
from lora_jax.core.arrays import describe
from lora_jax.core.deferred import Deferred, Size
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import HOST, Packed, bits, is_packed, move
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.core.patterns import first_match
from lora_jax.core.serialization import register_node

CALL = "to_host(params, patterns)"


@register_node("lora_jax.HostArray")
@dataclass(frozen=True)
class HostArray(Packed):
    """A weight as it is, in the memory of the host, in the place of an array.

    Attributes:
        array: the weight, [*s, *inner].
        inner: the shape of one matrix.
        value_dtype: the dtype of the weight.
        deferred: what is done to each matrix.
        compute_sharding: of one matrix, while something is multiplied by it; None for none.
    """

    array: jax.Array  # [*s, *inner]
    inner: tuple[int, ...] = field(metadata={"static": True})
    value_dtype: Any = field(metadata={"static": True})
    deferred: Deferred = field(default=(), metadata={"static": True})
    compute_sharding: NamedSharding | None = field(default=None, metadata={"static": True})

    parts = ("array",)

    @property
    def array_ndim(self) -> int:
        return len(self.inner)

    def dequantize(self) -> jax.Array:
        return self.array

    def repack(self, w: jax.Array) -> "HostArray":
        return dataclasses.replace(self, array=w.astype(self.value_dtype), deferred=(), compute_sharding=None)

    def array_specs(self, spec: Sequence[Any], size: Size) -> dict[str, tuple[Any, ...]]:
        return {"array": tuple(spec)}


def to_host(params: Any, patterns: str | Sequence[str], *, stack: int | None = None) -> Any:
    """Move the weights that patterns match to the memory of the host, from where `lora_apply` brings them.

    The model stays as it is. Each product brings its weight to the device, and once more in the backward pass; of
    layers in a scan the weights of one are there at a time, and are copied while those that came first are in use. Call
    it last, when weights are on their mesh: they keep their shardings. What reads a weight otherwise than by
    multiplying, such as the lookup of an embedding, brings all of it.

    Args:
        params: a tree of arrays, packed weights, `Stored` leaves (read one after the other, and never on the device as
            a whole), `jax.ShapeDtypeStruct`s with shardings, as of `lora.abstract`, or of shardings alone.
        patterns: regular expressions for whole paths.
        stack: how many leading axes of an array are stack axes, of layers that are brought one by one; by default one
            of an array with more than two axes, and none of others. Packed weights know theirs.

    Returns:
        The tree with a `HostArray` in the place of each array that matches. Packed weights are what they were, with
        their arrays on the host, and so are shardings.

    Raises:
        LoraError: the devices have no memory of the kind "pinned_host"; a pattern matches no path; a leaf is no array
            of floats, or is traced, or has no more axes than `stack`; on TPUs, it is a stack of packed weights, of
            which XLA would bring all for each.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def model(params, x):
    ...     return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
    >>> params = lora.bases.to_host({"layers": jnp.ones((3, 4, 4))}, "layers")
    >>> params["layers"].sharding.memory_kind
    'pinned_host'
    >>> lora.lora_apply(model)(params, {}, jnp.ones((1, 4))).shape
    (1, 4)
    """
    names, leaves, treedef = flatten_with_names(params, is_leaf=lambda node: isinstance(node, Sharding))
    given = [patterns] if isinstance(patterns, str) else [*patterns]
    matched = first_match(dict.fromkeys(given, True), names, call=f"{CALL}: ")
    work = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name in matched}
    for name, leaf in work.items():
        _check(name, like(leaf), stack)
    moved: dict[Any, Any] = {}  # two leaves that are one array stay one
    for leaf, name in zip(leaves, names, strict=True):
        if name in work and same(leaf) not in moved:
            moved[same(leaf)] = _moved(read(name, leaf), stack)
    return treedef.unflatten(
        [moved[same(leaf)] if name in work else leaf for name, leaf in zip(names, leaves, strict=True)]
    )


def _check(name: str, leaf: Any, stack: int | None) -> None:
    """Raise if a leaf cannot be moved to the memory of the host."""
    if isinstance(leaf, Sharding):
        return _check_kinds(name, leaf)
    if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise LoraError(f"{CALL}: {name!r} is {describe(leaf)}, expected an array of floats: narrow the pattern.")
    if stack is not None and not (is_packed(leaf) or 0 <= stack < leaf.ndim):
        raise LoraError(f"{CALL}: {name!r} of shape {list(leaf.shape)} has no {stack} stack axes beside its own.")
    for array in jax.tree.leaves(leaf):
        if isinstance(array, jax.core.Tracer):
            raise LoraError(f"{CALL}: {name!r} is traced: move it before jax.jit, which takes it as an argument.")
        _check_kinds(name, _where(array), array)
    return None


def _check_kinds(name: str, sharding: Sharding, array: Any = None) -> None:
    """Raise if the devices of an array have no such memory, or if their compiler does not bring it layer by layer."""
    device: Any = sorted(sharding.device_set, key=str)[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise LoraError(
            f"{CALL}: {name!r} cannot be moved, for {device.platform} devices ({device.device_kind}) have no memory of "
            f"the kind {HOST!r}; what they have is {', '.join(map(repr, kinds)) or 'none that has a name'}. Pack it in "
            "fewer bits there, lora.bases.quantize, or split it over more devices."
        )
    if device.platform == "tpu" and array is not None and array.ndim > 2 and bits(array.dtype) < 16:
        raise LoraError(
            f"{CALL}: {name!r} has numbers of {array.dtype}. For each layer XLA's compiler for TPUs would bring the "
            "whole stack of them, and send it back in another order: leave it on the device."
        )


def _where(array: Any) -> Sharding:
    """Return where an array is; of NumPy's, and of a mere shape, where JAX would put it."""
    return getattr(array, "sharding", None) or jnp.zeros(()).sharding


def _moved(leaf: Any, stack: int | None) -> Any:
    """Return a leaf on the host."""
    if isinstance(leaf, Sharding):
        return leaf.with_memory_kind(HOST)
    there = jax.tree.map(lambda array: move(array, _where(array).with_memory_kind(HOST)), leaf)
    if is_packed(there):
        return there
    n = int(there.ndim > 2) if stack is None else stack
    return HostArray(there, there.shape[n:], jnp.dtype(there.dtype))
