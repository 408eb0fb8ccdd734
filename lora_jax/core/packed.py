"""A frozen weight in fewer bits than an array's: a pytree node in the place of the array.

The formats are in `bases/`. Axes: s stacked matrices, each packed by itself, so that a scan slices the packed arrays.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
from jax.sharding import AxisType, NamedSharding

from lora_jax.core import deferred as views
from lora_jax.core.deferred import Size, View


class Packed(abc.ABC):
    """A frozen weight, as arrays that begin with its stack axes.

    `view` is what a program did to each matrix on its way to a product: that is done when it is unpacked.
    """

    inner: tuple[int, ...]  # the shape of one matrix as it was packed
    unpacked: Any  # the dtype of its values
    view: View
    used: NamedSharding | None  # where a matrix is, as it was packed, while something is multiplied by it
    parts: ClassVar[tuple[str, ...]]  # the names of the packed arrays

    @abc.abstractmethod
    def unpack(self) -> jax.Array:
        """[*s, *inner] in fp32."""

    @abc.abstractmethod
    def repack(self, w: jax.Array) -> Self:
        """Other matrices [*s, *inner], packed in the same way."""

    @property
    @abc.abstractmethod
    def own_axes(self) -> int:
        """Of the first packed array, beside the stack: they follow the first axes of a matrix."""

    @abc.abstractmethod
    def own_specs(self, spec: Sequence[Any], size: Size) -> dict[str, tuple[Any, ...]]:
        """How the packed arrays' axes beside the stack are split where `spec` splits a matrix.

        What cannot be split in that way, because it would cut through blocks, is whole.
        """

    @property
    def stack(self) -> tuple[int, ...]:
        return getattr(self, self.parts[0]).shape[: -self.own_axes]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stack, *views.viewed_shape(self.inner, self.view))

    @property
    def dtype(self) -> Any:
        return views.viewed_dtype(self.unpacked, self.view)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, jax.Array]:
        """The packed arrays by name."""
        found = {name: getattr(self, name) for name in self.parts}
        return {name: array for name, array in found.items() if array is not None}

    def dense(self) -> jax.Array:
        """The weight as an array."""
        return views.view_matrices(self.unpack().astype(self.unpacked), len(self.stack), self.view)

    def dot(self, x: jax.Array, inputs: tuple[int, ...], precision: Any) -> jax.Array | None:
        """x @ W [*T, *outputs] over these axes of W, for x [*T, *inputs], without an array of W's size.

        None where a format has no way to do that, for this product or on this device.
        """
        return None

    def again(self, w: jax.Array) -> Self:
        """Another weight of this shape, packed in the same way."""
        packed = self.repack(views.unview_matrices(w, len(self.stack), self.inner, self.view))
        return dataclasses.replace(packed, view=self.view, used=self.used)  # type: ignore[type-var]

    def seen(self, name: str, how: Any) -> Self:
        """The same weight, each matrix transposed, reshaped or cast."""
        return dataclasses.replace(self, view=(*self.view, (name, how)))  # type: ignore[type-var]

    def on_stack(self, fn: Callable[[jax.Array], Any]) -> Self:
        """The same function of every packed array, which does something to the stack axes."""
        return jax.tree.map(fn, self)

    def as_given(self) -> Any:
        """The node that the weight was read from; itself, if it is this library's own."""
        return self

    @property
    def sharding(self) -> Any:
        """Where the weight is, from where its first packed array is."""
        own, n = getattr(self, self.parts[0]).sharding, len(self.stack)
        if not isinstance(own, NamedSharding):
            return own
        entries = [*own.spec, *[None] * (n + len(self.inner) - len(own.spec))]
        spec = views.viewed_spec(entries[n:], self.inner, self.view, _parts(own.mesh))
        return NamedSharding(own.mesh, jax.P(*entries[:n], *spec))

    def placed(self, sharding: NamedSharding, gathered: Sequence[str] = ()) -> Self:
        """The same weight on a mesh, each packed array where the weight is to be.

        Over the `gathered` axes of the mesh, the packed arrays come together whenever something is multiplied by them.
        """
        n, size = len(self.stack), _parts(sharding.mesh)
        entries = [*sharding.spec, *[None] * (self.ndim - len(sharding.spec))]
        spec = views.unviewed_spec(entries[n:], self.inner, self.view, size)
        own = self.own_specs(spec, size)
        arrays = {
            name: jax.device_put(
                array,
                NamedSharding(sharding.mesh, jax.P(*entries[:n], *own[name]), memory_kind=sharding.memory_kind),
            )
            for name, array in self.arrays().items()
        }
        left = [tuple(name for name in views.names_of(entry) if name not in gathered) or None for entry in spec]
        used = NamedSharding(sharding.mesh, jax.P(*left)) if sharding.mesh.size > 1 else None
        return dataclasses.replace(self, **arrays, used=used)  # type: ignore[type-var]

    def gathered(self) -> Self:
        """For a product: in a program over a mesh, the packed arrays where they are used."""
        if self.used is None:
            return self
        own = self.own_specs(tuple(self.used.spec), _parts(self.used.mesh))
        arrays = {
            name: _constrained(array, self.used.mesh, len(self.stack), own[name])
            for name, array in self.arrays().items()
        }
        return dataclasses.replace(self, **arrays)  # type: ignore[type-var]


def _constrained(array: Any, mesh: Any, stack: int, own: tuple[Any, ...]) -> jax.Array:
    """In a program over this mesh: an array whose axes beside the stack are split like that, and no others."""
    here = jax.sharding.get_abstract_mesh()
    if not isinstance(array, jax.core.Tracer) or set(here.manual_axes) & set(mesh.axis_names):
        return array  # in a shard_map, it is the program that says what is where
    kinds = dict(zip(here.axis_names, here.axis_types, strict=True))

    def only(kind: Any, entry: Any) -> Any:
        return tuple(name for name in views.names_of(entry) if kinds.get(name, AxisType.Auto) == kind) or None

    if AxisType.Explicit in kinds.values():
        kept = jax.typeof(array).sharding.spec[:stack]
        array = jax.sharding.reshard(array, jax.P(*kept, *(only(AxisType.Explicit, entry) for entry in own)))
    if AxisType.Auto not in kinds.values() and kinds:
        return array
    free = [jax.P.UNCONSTRAINED] * stack
    auto = jax.P(*free, *(only(AxisType.Auto, entry) for entry in own))
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, auto))


def _parts(mesh: Any) -> Size:
    return lambda entry: views.size_of(entry, mesh)


def is_packed(leaf: Any) -> bool:
    """Whether a node of a tree of parameters is a packed weight."""
    return isinstance(leaf, Packed)


def unpacked(leaf: Any) -> Any:
    """What may be packed, as an array."""
    return leaf.dense() if is_packed(leaf) else leaf


def as_given(leaf: Any) -> Any:
    """A packed weight of another library as that library's node again; all else as it is."""
    return leaf.as_given() if is_packed(leaf) else leaf
