"""What of a module is trained whole, as HF PEFT keeps it: biases, heads, norms, tables."""

from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.full import FullAdapter
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array, KeyMap, Placed, groups_of
from lora_jax.interop.peft.formats import Module
from lora_jax.interop.peft.from_modules import shapes_of


def lora_biases(
    full: Mapping[str, FullAdapter],
    key_map: KeyMap,
    params: Any,
    modules: Mapping[str, Module],
    placed: Mapping[str, Placed],
) -> tuple[dict[str, Array], dict[str, FullAdapter]]:
    """`lora_B.bias` c of all modules, from the adapters of their biases, and the adapters that are of something else.

    bias' = bias + s c. PEFT has it for all modules or for none, and not beside embeddings and experts.

    Raises:
        LoraError: of a module with several parameters not all are known.
    """
    if not all(place.entry.kind in ("linear", "conv1d", "conv") for place in placed.values()):
        return {}, dict(full)
    places = key_map.place({path: tuple(adapter.delta.shape) for path, adapter in full.items()})
    known = {} if params is None else key_map.place(shapes_of(params), strict=False)
    groups, own = groups_of(known | places), {}
    for path, place in places.items():
        delta = np.asarray(jax.device_get(full[path].delta))
        parts = {name: place.to_torch(delta[place.where(index)]) for index, name in place.tensors().items()}
        if all(_is_bias_of(modules, name, part) for name, part in parts.items()):
            own[path] = parts
    if not own:
        return {}, dict(full)
    added = {}
    for name, module in modules.items():
        pieces = [
            own[place.path][f"{name}.bias"] if place.path in own else np.zeros(place.outputs, np.float32)
            for place in groups.get(f"{name}.bias", [])
        ]
        outputs = len(module.arrays["b"])
        c = np.concatenate(pieces) if pieces else np.zeros(outputs, np.float32)
        if len(c) != outputs:
            raise LoraError(
                f"{name} has {outputs} outputs, and {len(c)} biases of it are known. Give all parameters: "
                "save_peft(..., params=params)."
            )
        added[f"{name}.lora_B.bias"] = c / np.asarray(module.scale, c.dtype) if c.any() else c
    return added, {path: adapter for path, adapter in full.items() if path not in own}


def _is_bias_of(modules: Mapping[str, Module], name: str, delta: Array) -> bool:
    module = modules.get(name.removesuffix(".bias"))
    return name.endswith(".bias") and (not delta.any() or (module is not None and module.scale != 0))


def with_base(full: Mapping[str, Any], base: Mapping[str, Any], others: Container[str]) -> dict[str, Any]:
    """W + D of arrays that are written whole, in the wider of their dtypes."""
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
    """The other parameters of modules whose weight is written whole: PEFT loads none without them."""
    placed = key_map.place({path: tuple(np.shape(leaf)) for path, leaf in {**base, **whole}.items()}, strict=False)
    modules = {
        name.removesuffix(".weight"): None
        for path in whole
        if path in placed
        for name in placed[path].tensors().values()
        if name.endswith(".weight") and name.removesuffix(".weight") not in adapted
    }
    return {
        path: base[path]
        for path, place in placed.items()
        if path not in whole and any(name.rpartition(".")[0] in modules for name in place.tensors().values())
    }


def whole_tensors(
    others: Mapping[str, Any], key_map: KeyMap, adapted: Container[str]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors that were trained whole, and what the config says of them."""
    groups = groups_of(key_map.place({path: tuple(np.shape(leaf)) for path, leaf in others.items()}))
    tensors: dict[str, list[Array]] = {}
    for name, parts in groups.items():
        for place in parts:
            index = next(index for index, tensor in place.tensors().items() if tensor == name)
            whole = np.asarray(jax.device_get(others[place.path]))
            tensors.setdefault(name, []).append(place.to_torch(whole[place.where(index)]))
    found: dict[str, Array] = {}
    modules: dict[str, None] = {}
    bias = "none"
    weights = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    for name, pieces in tensors.items():
        place = groups[name][0]
        tensor = (
            pieces[0] if place.entry.part is None else np.concatenate(pieces, axis=place.output_axis(pieces[0].ndim))
        )
        module, _, leaf = name.rpartition(".")
        if module in adapted:
            name = f"{module}.base_layer.{leaf}"
            bias = "lora_only" if leaf == "bias" and bias == "none" else bias
        elif module in weights:
            modules[module] = None
        else:
            bias = "all"
        found[name] = tensor
    return found, {"bias": bias, "modules_to_save": sorted(modules) or None}
