"""What is trained whole, as PEFT keeps it beside adapters, read and written: biases, heads, norms, tables."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array, KeyMap, ParameterMatch, parameter_parts, parts_by_tensor
from lora_jax.interop.peft.dtypes import widest


def arrays_of_whole(matches: Mapping[str, ParameterMatch], whole: Mapping[str, Array]) -> dict[str, jax.Array]:
    """Return the parameters that the file holds whole, by their paths.

    Raises:
        LoraError: the file holds only a part of one.
    """
    arrays = {}
    for path, parts in parameter_parts(matches, whole).items():
        match = matches[path]
        missing = [name for index, name in match.tensors().items() if index not in parts]
        if missing:
            raise LoraError(f"the file holds a part of {path!r} whole, but not {short(missing[0])}.")
        array = np.zeros(match.shape, widest(parts.values()))
        for index, part in parts.items():
            array[match.where(index)] = part
        arrays[path] = jnp.asarray(array)
    return arrays


def with_base(full: Mapping[str, Any], base: Mapping[str, Any], others: Container[str]) -> dict[str, Any]:
    """Return W + D of arrays that are written whole, in the wider of their dtypes.

    Raises:
        LoraError: there is no W, or the array is among the others too.
    """
    for path in full:
        if path in others:
            raise LoraError(f"{path!r} is among the adapters and among the others: leave one of them out.")
        if path not in base:
            raise LoraError(
                f"{path!r} is a FullAdapter, which PEFT keeps as W + D: give the parameters, save_peft(..., "
                "params=params), or merge it instead."
            )
    return {
        path: a.merge(base[path].astype(jnp.promote_types(base[path].dtype, a.delta.dtype))) for path, a in full.items()
    }


def rest_of_modules(
    whole: Mapping[str, Any], base: Mapping[str, Any], key_map: KeyMap, adapted: Container[str]
) -> dict[str, Any]:
    """Return the other parameters of modules whose weight is written whole: PEFT does not load one without them."""
    matches = key_map.match({path: tuple(np.shape(leaf)) for path, leaf in {**base, **whole}.items()}, strict=False)
    modules = {
        name.removesuffix(".weight"): None
        for path in whole
        if path in matches
        for name in matches[path].tensors().values()
        if name.endswith(".weight") and name.removesuffix(".weight") not in adapted
    }
    return {
        path: base[path]
        for path, match in matches.items()
        if path not in whole and any(name.rpartition(".")[0] in modules for name in match.tensors().values())
    }


def whole_to_tensors(
    others: Mapping[str, Any], key_map: KeyMap, adapted: Container[str]
) -> tuple[dict[str, Array], str, list[str] | None]:
    """Return the tensors that were trained whole, and what the config says of them: `bias` and `modules_to_save`.

    Args:
        adapted: the modules that have adapters.
    """
    groups = parts_by_tensor(key_map.match({path: tuple(np.shape(leaf)) for path, leaf in others.items()}))
    tensors = {name: joined(name, parts, others) for name, parts in groups.items()}
    weights = {name.removesuffix(".weight"): None for name in tensors if name.endswith(".weight")}
    found: dict[str, Array] = {}
    modules: dict[str, None] = {}
    bias = "none"
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in adapted:
            name = f"{module}.base_layer.{leaf}"
            bias = "lora_only" if leaf == "bias" and bias == "none" else bias
        elif module in weights:
            modules[module] = None
        else:
            bias = "all"
        found[name] = tensor
    return found, bias, sorted(modules) or None


def joined(name: str, parts: Sequence[ParameterMatch], arrays: Mapping[str, Any]) -> Array:
    """Return a tensor of torch's from the parameters that it consists of."""
    pieces = []
    for match in parts:
        index = next(index for index, tensor in match.tensors().items() if tensor == name)
        pieces.append(match.to_torch(np.asarray(jax.device_get(arrays[match.path]))[match.where(index)]))
    if parts[0].entry.part is None:
        return pieces[0]
    return np.concatenate(pieces, axis=parts[0].output_axis(pieces[0].ndim))
