"""Weights that are read when they are needed, so that a model larger than the memory can be packed from files."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.arrays import describe
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import flatten_with_names, is_array, nearest
from lora_jax.interop.key_map import KeyMap, ParameterMatch, output_offsets, parts_by_tensor


@dataclass(frozen=True)
class Stored:
    """A weight that is read when it is needed: a leaf for `lora.bases.quantize` in the place of an array.

    Args:
        like: its shape and dtype, as a `jax.ShapeDtypeStruct`; of a packed weight, a `Packed` with such leaves.
        read: reads the array (of NumPy or JAX) or the packed weight, again at each call.

    >>> import jax, jax.numpy as jnp, numpy as np, lora_jax as lora
    >>> like = jax.ShapeDtypeStruct((64, 4), jnp.float32)
    >>> params = {"w": lora.bases.Stored(like, lambda: np.ones((64, 4), np.float32))}
    >>> lora.bases.quantize(params, {"w": lora.bases.Int8()})
    {'w': EightBits(64x4: q 64x4 int8, scales 4)}
    """

    like: Any
    read: Callable[[], Any] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        return self.like.shape

    @property
    def dtype(self) -> Any:
        """Return the dtype of the weight."""
        return self.like.dtype


def like(leaf: Any) -> Any:
    """Return a leaf; of a `Stored` one, its shape and dtype."""
    return leaf.like if isinstance(leaf, Stored) else leaf


def read(path: str, leaf: Any) -> Any:
    """Return a leaf; a `Stored` one is read.

    Raises:
        LoraError: what was read has another shape, dtype or format than `like`.
    """
    if not isinstance(leaf, Stored):
        return leaf
    found = leaf.read()
    if _outline(found) != _outline(leaf.like):
        raise LoraError(f"{path!r} was read as {describe(found)}, expected {describe(leaf.like)}.")
    return found


def from_torch(tensors: Mapping[str, Any], params: Any, key_map: KeyMap, *, ignore: str = "") -> Any:
    """Return the tree `params` of `Stored` leaves, which read torch's tensors and transpose, reshape and stack them.

    Args:
        tensors: `{name: Stored}` as of `lora.bases.open_safetensors`, or `{name: array}`.
        params: the shapes and dtypes: arrays, or `jax.eval_shape(init, key)`, which allocates nothing.
        key_map: maps each path to its tensor, such as `lora.key_maps.LLAMA`.
        ignore: a regular expression for the names of tensors that are no parameters of the model.

    Returns:
        A tree of `Stored` for `lora.bases.quantize`. A weight that is packed already keeps its codes and scales:
        operations on its axes are deferred until it is dequantized.

    Raises:
        LoraError: a path or a tensor has no counterpart, or one of another shape; stacked layers are packed in
            different ways; a packed tensor holds several parameters.

    >>> import jax.numpy as jnp, numpy as np, lora_jax as lora
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("kernel", "layers.{i}", "i in out"))
    >>> tensors = {f"layers.{i}.weight": np.full((3, 2), i, np.float32) for i in range(4)}  # [out, in]
    >>> stored = lora.bases.from_torch(tensors, {"kernel": jnp.zeros((4, 2, 3))}, key_map)
    >>> stored["kernel"].read()[:, 0, 0]
    array([0., 1., 2., 3.], dtype=float32)
    """
    names, leaves, treedef = flatten_with_names(params)
    for name, leaf in zip(names, leaves, strict=True):
        if not is_array(leaf) or is_packed(leaf):
            raise LoraError(f"{name!r} is a {type(leaf).__name__}, expected an array, or the shape and dtype of one.")
    matches = key_map.match({name: leaf.shape for name, leaf in zip(names, leaves, strict=True)})
    stored = {name: tensor if isinstance(tensor, Stored) else _kept(tensor) for name, tensor in tensors.items()}
    groups, starts = parts_by_tensor(matches), output_offsets(matches)
    outputs = {tensor: sum(match.outputs for match in parts) for tensor, parts in groups.items()}
    _check_names(matches, stored, ignore)
    found = []
    for name, leaf in zip(names, leaves, strict=True):
        pieces = {
            index: _piece(matches[name], index, leaf.dtype, tensor, stored[tensor], starts[name], outputs[tensor])
            for index, tensor in matches[name].tensors().items()
        }
        found.append(_stacked(matches[name], pieces))
    return treedef.unflatten(found)


def _kept(array: Any) -> Stored:
    """Return an array as a `Stored` leaf."""
    return Stored(jax.ShapeDtypeStruct(array.shape, array.dtype), lambda: array)


def _check_names(matches: Mapping[str, ParameterMatch], stored: Mapping[str, Stored], ignore: str) -> None:
    """Check that each parameter has its tensors, and each tensor its parameter."""
    paths = {name: path for path, match in matches.items() for name in match.tensors().values()}
    for name, path in paths.items():
        if name not in stored:
            near = ", ".join(nearest(name, stored, n=3)) or "none"
            raise LoraError(
                f"{path!r} is {name!r} by the key map, but there is no such tensor; the nearest are {near}. Names that "
                "only begin with something else are met by key_map.under(name=...)."
            )
    try:
        left = [name for name in stored if name not in paths and not re.fullmatch(ignore, name)]
    except (re.error, TypeError) as error:
        raise LoraError(f"ignore={ignore!r} is not a regular expression: {error}.") from None
    if left:
        raise LoraError(
            f"no parameter is {left[0]!r}, nor {len(left) - 1} more tensors: it is another model, or one that has no "
            f"place for them, which from_torch(ignore={re.escape(left[0])!r}) says."
        )


# One parameter --------------------------------------------------------------------------------------------------------


def _piece(
    match: ParameterMatch, index: tuple[int, ...], dtype: Any, name: str, tensor: Stored, start: int, outputs: int
) -> Stored:
    """Return a parameter's part of one tensor, in our layout."""
    whole = match.entry.part is None
    if not whole and (outputs != tensor.shape[match.output_axis(len(tensor.shape))] or is_packed(tensor.like)):
        why = f"those given have {outputs} outputs together: give all of them"
        if is_packed(tensor.like):
            why = "what is packed cannot be cut: give parameters and a key map in which it is whole"
        raise LoraError(f"{match.path!r} is one of several parameters in {name!r}, {describe(tensor.like)}; {why}.")
    if jnp.issubdtype(tensor.dtype, jnp.floating) != jnp.issubdtype(dtype, jnp.floating):
        raise LoraError(f"{name!r} is {describe(tensor.like)}, but {match.path!r} has numbers of {jnp.dtype(dtype)}.")
    if is_packed(tensor.like) and match.entry.moves_outputs:
        raise LoraError(
            f"{name!r} is {describe(tensor.like)}, and {match.path!r} has its outputs in another order or of another "
            "size, which what is packed cannot be given: quantize the parameters themselves, lora.bases.quantize."
        )
    if is_packed(tensor.like):
        return Stored(
            _as_parameter(match, index, dtype, tensor.like),
            lambda: _as_parameter(match, index, dtype, read(name, tensor)),
        )

    def piece(array: Any) -> Any:
        return match.from_torch(match.outputs_of(array, start), index).astype(dtype, copy=False)

    of_this_shape = jax.ShapeDtypeStruct(tensor.shape, np.uint8)  # any dtype: what counts are the axes
    return Stored(jax.eval_shape(piece, of_this_shape), lambda: piece(np.asarray(read(name, tensor))))


def _as_parameter(match: ParameterMatch, index: tuple[int, ...], dtype: Any, w: Any) -> Any:
    """Return a packed weight as our parameter: moving its axes is deferred until it is dequantized."""
    w = match.from_torch(_Axes(w), index).w  # type: ignore[arg-type, attr-defined]
    return w if w.dtype == dtype else w.with_deferred("cast", jnp.dtype(dtype))


class _Axes:
    """A packed weight with an array's `transpose` and `reshape`, which are deferred."""

    def __init__(self, w: Any) -> None:
        self.w, self.shape = w, w.shape

    def reshape(self, shape: tuple[int, ...]) -> "_Axes":
        return self if tuple(shape) == self.shape else _Axes(self.w.with_deferred("reshape", tuple(shape)))

    def transpose(self, order: Any) -> "_Axes":
        order = tuple(map(int, order))
        return self if order == tuple(range(len(order))) else _Axes(self.w.with_deferred("transpose", order))


def _stacked(match: ParameterMatch, pieces: Mapping[tuple[int, ...], Stored]) -> Stored:
    """Stack the pieces of a parameter along its stacked axes, if it has some."""
    first = next(iter(pieces.values()))
    if not match.unstacked:
        return first
    packed = [is_packed(piece.like) for piece in pieces.values()]
    counts = match.shape[: len(match.unstacked)]
    if any(packed):
        for index, piece in pieces.items():
            if _outline(piece.like) != _outline(first.like):
                raise LoraError(
                    f"{match.path!r} is a stack of {match.tensors()[index]!r} and others, which are packed in another "
                    "way or not at all: give parameters and a key map of layers that are not stacked."
                )
        if match.unstacked != tuple(range(len(counts))):
            raise LoraError(
                f"{match.path!r}: packed weights are stacked along their first axes, not {match.unstacked}."
            )
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct((*counts, *a.shape), a.dtype), first.like)
    else:
        like = jax.ShapeDtypeStruct(match.shape, first.dtype)
    return Stored(like, partial(_read_stacked, match, like, pieces))


def _read_stacked(match: ParameterMatch, like: Any, pieces: Mapping[tuple[int, ...], Stored]) -> Any:
    """Read one piece after the other into the whole parameter."""
    whole = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), like)
    for index, piece in pieces.items():
        where = index if is_packed(like) else match.where(index)
        for array, part in zip(jax.tree.leaves(whole), jax.tree.leaves(piece.read()), strict=True):
            array[where] = part
    return whole


def _outline(w: Any) -> Any:
    """Return the structure, shapes and dtypes of an array or packed weight, to compare two."""
    return jax.tree.structure(w), [describe(leaf) for leaf in jax.tree.leaves(w)]
