"""The interface of a packed weight: a frozen weight of fewer bits, as a pytree node in the place of an array.

The formats are in `bases/`. Axes: s stacked matrices, each packed by itself, so that a scan slices the packed arrays.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from lora_jax.core.deferred import (
    Deferred,
    Size,
    and_then,
    apply_deferred,
    dtype_after,
    shape_after,
    spec_after,
    spec_before,
    undo_deferred,
)
from lora_jax.core.no_array import NoArray
from lora_jax.core.partition import names_of, size_of
from lora_jax.core.short_repr import ShortRepr, parts, repr_of_arrays, shape_and_dtype

HOST = "pinned_host"  # JAX's name of the memory of a host from which its devices copy by themselves


class Packed(ShortRepr, NoArray, abc.ABC):
    """A frozen weight, stored as packed arrays that begin with its stack axes.

    What a program does to each matrix before it multiplies by it is recorded in `deferred`, and applied to the
    dequantized values. `shape` and `dtype` are those after it.

    Attributes:
        inner: the shape of one matrix as it was packed.
        value_dtype: the dtype that dequantized values are rounded to.
        deferred: what is done to each matrix after that.
        compute_sharding: of one matrix, as it was packed, while something is multiplied by it; None for none.
        parts: the names of the fields that hold packed arrays.
        dot_dtype: of the results of `dot`, where it is not x's.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> base = lora.bases.quantize({"w": jnp.ones((64, 4))}, {"w": lora.bases.Int8()})
    >>> isinstance(base["w"], lora.bases.Packed), base["w"].shape, base["w"].nbytes
    (True, (64, 4), 272)
    """

    inner: tuple[int, ...]  # the shape of one matrix as it was packed
    value_dtype: Any  # the dtype that dequantized values are rounded to
    deferred: Deferred  # what is done to each matrix after that
    compute_sharding: NamedSharding | None  # of one matrix, as it was packed, while something is multiplied by it
    parts: ClassVar[tuple[str, ...]]  # the names of the fields that hold packed arrays
    dot_dtype: Any = None  # of the results of `dot`, where it is not x's

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """Return the matrices as they were packed, [*s, *inner], in fp32. This defines the format."""

    @abc.abstractmethod
    def repack(self, w: jax.Array) -> Self:
        """Return other matrices [*s, *inner], packed in the same way.

        Args:
            w: the matrices, floats.
        """

    @property
    @abc.abstractmethod
    def array_ndim(self) -> int:
        """Return how many axes the first packed array has after the stack axes."""

    @abc.abstractmethod
    def array_specs(self, spec: Sequence[Any], size: Size) -> dict[str, tuple[Any, ...]]:
        """Return the spec of each packed array, without its stack axes, for the spec of one matrix.

        An axis that cannot be split in that way, because a block would be cut, is whole.

        Args:
            spec: of one matrix: a name or names of mesh axes, or None, for each of its axes.
            size: says the size of such an entry, in devices.
        """

    def matrix_spec(self, own: Sequence[Any]) -> list[Any]:
        """Return the spec of one matrix for that of the first packed array, by default of the same axes.

        Args:
            own: the entries for the axes of the first packed array, without its stack axes.
        """
        return list(own)

    def blocks(self, w: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """Return a weight of this shape, and its axes along which numbers share a scale, by default whole matrices.

        The numbers keep their order as far as that can be: they are not to be copied for it.

        Args:
            w: as it was packed or as it would be, [*s, *inner].
        """
        return w, tuple(range(len(self.stack), w.ndim))

    @property
    def stack(self) -> tuple[int, ...]:
        """Return the sizes of the stack axes."""
        return getattr(self, self.parts[0]).shape[: -self.array_ndim]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that this stands for."""
        return (*self.stack, *shape_after(self.inner, self.deferred))

    @property
    def dtype(self) -> Any:
        """Return the dtype of the weight that this stands for."""
        return dtype_after(self.value_dtype, self.deferred)

    @property
    def ndim(self) -> int:
        """Return the number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return the number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all packed arrays."""
        return sum(-(-array.size * bits(array.dtype) // 8) for array in self.arrays().values())

    def arrays(self) -> dict[str, jax.Array]:
        """Return the packed arrays by name."""
        found = {name: getattr(self, name) for name in self.parts}
        return {name: array for name, array in found.items() if array is not None}

    def dense(self) -> jax.Array:
        """Return the weight as an array on the device."""
        here = self.brought()
        return apply_deferred(here.dequantize().astype(self.value_dtype), len(self.stack), self.deferred)

    @property
    def on_host(self) -> bool:
        """Return whether the packed arrays are in the memory of the host."""
        return any(map(_on_host, self.arrays().values()))

    def brought(self) -> Self:
        """Return the weight with its packed arrays on the device; those on the host are copied."""
        return jax.tree.map(_brought, self)

    def dot(self, x: jax.Array, inputs: tuple[int, ...], precision: Any) -> jax.Array | None:
        """Multiply x [*T, *inputs] by W over these axes of W -> [*T, *outputs], without an array of W's size.

        None where a format has no kernel for this product, or none on this device.

        Args:
            x: [*T, *inputs].
            inputs: the axes of one matrix that are contracted with x, in the order of x's last axes.
            precision: of the product, as of `jax.lax.dot_general`.

        Returns:
            [*T, *outputs], or None.
        """
        return None

    def with_whole_scales(self) -> Self:
        """Return the same weight with every scale in one array, which can be cut where the weight is."""
        return self

    def repack_like(self, w: jax.Array) -> Self:
        """Return another weight of this shape, packed in the same way, with the same deferred operations.

        Args:
            w: an array of this weight's shape.
        """
        packed = self.repack(undo_deferred(w, len(self.stack), self.inner, self.deferred))
        return dataclasses.replace(packed, deferred=self.deferred, compute_sharding=self.compute_sharding)  # type: ignore[type-var]

    def with_deferred(self, name: str, how: Any) -> Self:
        """Return the weight with one more deferred operation: "transpose", "reshape" or "cast".

        Two transposes in a row become one, or none.

        Args:
            name: "transpose", "reshape" or "cast".
            how: the permutation, the shape of one matrix or the dtype.
        """
        return dataclasses.replace(self, deferred=and_then(self.deferred, name, how))  # type: ignore[type-var]

    def on_stack(self, fn: Callable[[jax.Array], Any]) -> Self:
        """Return the weight with a function that changes only the stack axes applied to every packed array.

        Args:
            fn: takes and returns an array.
        """
        return jax.tree.map(fn, self)

    def as_given(self) -> Any:
        """Return the node of another library that the weight was read from; itself, if it is this library's own."""
        return self

    def __repr__(self) -> str:
        if not hasattr(getattr(self, self.parts[0], None), "shape"):
            return repr_of_arrays(self)  # a mask, or specs
        stored = ", ".join(parts(self, list(self.arrays())))
        return f"{type(self).__name__}({shape_and_dtype(self.shape, self.dtype)}: {stored})"

    @property
    def sharding(self) -> Any:
        """Return the sharding of the weight, computed from that of its first packed array."""
        own, n = getattr(self, self.parts[0]).sharding, len(self.stack)
        if not isinstance(own, NamedSharding):
            return own
        entries = [*own.spec, *[None] * (n + self.array_ndim - len(own.spec))]
        spec = spec_after(self.matrix_spec(entries[n:]), self.inner, self.deferred, _parts(own.mesh))
        return NamedSharding(own.mesh, jax.P(*entries[:n], *spec), memory_kind=own.memory_kind)

    def placed(self, sharding: NamedSharding, gathered: Sequence[str] = ()) -> Self:
        """Move the packed arrays to where the weight is to be, and return the weight there.

        Args:
            sharding: of the weight.
            gathered: mesh axes over which the packed arrays are gathered whenever something is multiplied by them.
        """
        n, size = len(self.stack), _parts(sharding.mesh)
        entries = [*sharding.spec, *[None] * (self.ndim - len(sharding.spec))]
        spec = spec_before(entries[n:], self.inner, self.deferred, size)
        own = self.array_specs(spec, size)
        arrays = {
            name: move(
                array,
                NamedSharding(sharding.mesh, jax.P(*entries[:n], *own[name]), memory_kind=sharding.memory_kind),
            )
            for name, array in self.arrays().items()
        }
        left = [tuple(name for name in names_of(entry) if name not in gathered) or None for entry in spec]
        while_used = NamedSharding(sharding.mesh, jax.P(*left)) if sharding.mesh.size > 1 else None
        return dataclasses.replace(self, **arrays, compute_sharding=while_used)  # type: ignore[type-var]

    def gathered(self) -> Self:
        """Return the weight with its packed arrays constrained to `compute_sharding`, before a product over a mesh."""
        if self.compute_sharding is None:
            return self
        mesh, here = self.compute_sharding.mesh, self.brought()
        own = self.array_specs(tuple(self.compute_sharding.spec), _parts(mesh))
        arrays = {name: _constrained(array, mesh, len(self.stack), own[name]) for name, array in here.arrays().items()}
        return dataclasses.replace(here, **arrays)  # type: ignore[type-var]


def bits(dtype: Any) -> int:
    """Return the bits of a number as devices keep it. NumPy counts a byte for each number of 4 bits."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    return int(jnp.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * jnp.dtype(dtype).itemsize


def move(array: Any, sharding: Any) -> Any:
    """Move an array to where it is to be; of a mere shape, say where it would be."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return jax.device_put(array, sharding)


def _on_host(array: Any) -> bool:
    return bool(jax.typeof(array).memory_space == jax.memory.Space.Host)


def _brought(array: Any) -> Any:
    return jax.device_put(array, jax.memory.Space.Device) if _on_host(array) else array


def _constrained(array: Any, mesh: Any, stack: int, own: tuple[Any, ...]) -> jax.Array:
    """Constrain a traced array to the spec `own` along its axes after the stack axes, which stay as they are."""
    here = jax.sharding.get_abstract_mesh()
    if not isinstance(array, jax.core.Tracer) or set(here.manual_axes) & set(mesh.axis_names):
        return array  # in a shard_map, it is the program that says what is where
    kinds = dict(zip(here.axis_names, here.axis_types, strict=True))

    def only(kind: Any, entry: Any) -> Any:
        return tuple(name for name in names_of(entry) if kinds.get(name, AxisType.Auto) == kind) or None

    if AxisType.Explicit in kinds.values():
        kept = jax.typeof(array).sharding.spec[:stack]
        array = jax.sharding.reshard(array, jax.P(*kept, *(only(AxisType.Explicit, entry) for entry in own)))
    if AxisType.Auto not in kinds.values() and kinds:
        return array
    free = [jax.P.UNCONSTRAINED] * stack
    auto = jax.P(*free, *(only(AxisType.Auto, entry) for entry in own))
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, auto))


def _parts(mesh: Any) -> Size:
    return lambda entry: size_of(entry, mesh)


def is_packed(leaf: Any) -> bool:
    """Return whether a node of a tree of parameters is a packed weight."""
    return isinstance(leaf, Packed)


def unpacked(leaf: Any) -> Any:
    """Return a packed weight as an array, and all else as it is."""
    return leaf.dense() if is_packed(leaf) else leaf


def as_given(leaf: Any) -> Any:
    """Return a packed weight of another library as that library's node again, and all else as it is."""
    return leaf.as_given() if is_packed(leaf) else leaf
