"""Bases of adapters that began as a part of the weights, which HF PEFT takes out again when it loads them."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import unpacked
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.core.targets import Plan
from lora_jax.initialization.olora import olora
from lora_jax.initialization.pissa import pissa
from lora_jax.initialization.svd import svd
from lora_jax.interop.key_map import Array, ParameterMatch, parts_by_tensor
from lora_jax.interop.peft.formats.format import Module

# The kinds of modules for which PEFT has each start: it decomposes the weight as the matrix [out, in] that it is.
_MODULES = {"pissa": ("linear", "conv1d"), "olora": ("linear",), "kasa": ("linear",)}


def residuals(
    start: str, matches: Mapping[str, ParameterMatch], modules: Mapping[str, Module], params: Any
) -> dict[str, jax.Array]:
    """Return `{path: W - s A0 B0}` of all adapted parameters, where A0 and B0 are what their modules started with.

    Raises:
        LoraError: there are shapes and no arrays; PEFT has no such start for a module; what the start raises.
    """
    array = _reader(start, params)
    bases: dict[str, Array] = {}
    for part in _adapted(start, matches, modules, array):
        arrays, scale = modules[part.module]
        rest = _residual(start, part.module, part.weight, len(arrays["a"]), scale)
        rest = rest.T if part.kind == "linear" else rest
        offset = 0
        for match, index in part.parts:
            if match.path not in bases:
                bases[match.path] = array(match.path).copy()
            bases[match.path][match.where(index)] = match.from_torch(match.outputs_of(rest, offset), index)
            offset += match.outputs
    return {path: jnp.asarray(base) for path, base in bases.items()}


def without_start(
    start: str, matches: Mapping[str, ParameterMatch], modules: Mapping[str, Module], params: Any
) -> dict[str, Module]:
    """Return modules of rank 2 r for W itself: A B - A0 B0, where A0 and B0 are what they started with.

    Raises:
        LoraError: as `residuals`.
    """
    found = dict(modules)
    for part in _adapted(start, matches, modules, _reader(start, params)):
        arrays, scale = modules[part.module]
        a, b = first_factors(start, part.module, part.kind, part.weight, len(arrays["a"]), scale)
        own = {"a": np.concatenate([arrays["a"], a.T]), "b": np.concatenate([arrays["b"], -b.T], axis=1)}
        found[part.module] = Module({**arrays, **own}, scale)
    return found


class _Adapted(NamedTuple):
    """A module of torch's that has an adapter, and its whole weight."""

    module: str
    kind: str
    parts: list[tuple[ParameterMatch, tuple[int, ...]]]  # the parameters that it consists of, and where in these
    weight: Array  # [in, out]


def _adapted(
    start: str,
    matches: Mapping[str, ParameterMatch],
    modules: Mapping[str, Module],
    array: Callable[[str], Array],
) -> Iterator[_Adapted]:
    """Yield the modules that have adapters, one after another, with their weights."""
    for name, parts in parts_by_tensor(matches).items():
        kind = parts[0].entry.kind
        module = name.removesuffix(parts[0].entry.suffix)
        if kind == "array" or module not in modules:
            continue
        _check_kind(start, module, kind)
        placed = [(match, next(i for i, tensor in match.tensors().items() if tensor == name)) for match in parts]
        pieces = [match.to_torch(array(match.path)[match.where(index)]) for match, index in placed]
        whole = np.concatenate(pieces, axis=parts[0].output_axis(2))
        yield _Adapted(module, kind, placed, whole.T if kind == "linear" else whole)


def first_factors(start: str, module: str, kind: str, w: Array, rank: int, scale: float) -> tuple[Array, Array]:
    """Return A0 [in, r] and B0 [r, out] with which the start of this rank begins for W [in, out].

    Raises:
        LoraError: PEFT has no such start for a module of this kind; what the start raises.
    """
    _check_kind(start, module, kind)
    if start == "kasa":
        return _smallest(module, w, rank, scale)
    started = _started(start, module, w, rank, scale)[1][module]
    return np.asarray(started.a), np.asarray(started.b)


def _check_kind(start: str, module: str, kind: str) -> None:
    """Raise if PEFT has no such start for a module of this kind."""
    if kind not in _MODULES[start]:
        raise LoraError(f"{module} is of the kind {kind!r}, which PEFT does not start with {start!r}.")


def _smallest(module: str, w: Array, rank: int, scale: float) -> tuple[Array, Array]:
    """Return the factors of the r smallest singular values of W, which KaSA takes out of it.

    Raises:
        LoraError: W has no more than these.
    """
    if rank >= min(w.shape):
        raise LoraError(f"{module} has KaSA of rank {rank} for {list(w.shape)}, which leaves nothing of it.")
    if scale == 0:
        raise LoraError(f"{module} has KaSA with a scale of 0, of which the part of the weight is no multiple.")
    if not np.isfinite(w).all():
        raise LoraError(f"the weight of {module} holds infinity or NaN, and has no singular values.")
    u, values, vt = svd(np.asarray(w, np.float64), slice(-rank, None))
    return (u * values / scale).astype(np.float32), vt.astype(np.float32)


def _residual(start: str, module: str, w: Array, rank: int, scale: float) -> Array:
    """Return W [in, out] without the part that the start of this rank takes."""
    return np.asarray(_started(start, module, w, rank, scale)[0][module])


def _started(
    start: str, module: str, w: Array, rank: int, scale: float
) -> tuple[dict[str, jax.Array], dict[str, LoraAdapter]]:
    """Return what is left of W [in, out], and the adapter with which the start of this rank begins."""
    a, b = jnp.zeros((w.shape[0], rank)), jnp.zeros((rank, w.shape[1]))
    fresh = {module: LoraAdapter(a, b, KernelAxes((), (0,), (1,)), scale)}
    return (pissa if start == "pissa" else olora)({module: jnp.asarray(w)}, fresh)


def _reader(start: str, params: Any) -> Callable[[str], Array]:
    """Return what reads the array of a path, and keeps it, if all parameters are arrays."""
    weights = _weights(start, params)
    return functools.cache(lambda path: np.asarray(unpacked(weights[path])))


def _weights(start: str, params: Any) -> dict[str, Any]:
    """Return the parameters by their paths, if all are arrays."""
    if not isinstance(params, Plan):
        names, leaves, _ = flatten_with_names(params)
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            return {name: leaf for name, leaf in zip(names, leaves, strict=True) if is_array(leaf)}
    found = "a plan" if isinstance(params, Plan) else "shapes"
    raise LoraError(
        f"these adapters began with {start!r} as a part of the weights, and are for the rest of them, which takes the "
        f"weights to make, found {found}: give the parameters themselves, load_peft(folder, params, key_map)."
    )
