"""Biases of modules whose outputs are scaled after the bias was added, as HF PEFT has (IA)^3: y = (x W + b) * g.

Here b has an adapter of its own, b * g.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.ia3 import Ia3Adapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array, KeyMap, ParameterMatch, parameter_parts, parts_by_tensor
from lora_jax.interop.name_templates import NameTable
from lora_jax.interop.peft.formats.format import Modules
from lora_jax.interop.peft.parameters import shapes_of
from lora_jax.interop.peft.to_modules import TorchModules


def adapters_of_gains(matches: Mapping[str, ParameterMatch], modules: Modules) -> dict[str, Adapter]:
    """Return the adapters of those parameters that are biases of modules with factors on their outputs."""
    gains = {f"{name}.bias": module.arrays["gain"] for name, module in modules.items() if "gain" in module.arrays}
    adapters: dict[str, Adapter] = {}
    ones = parameter_parts(matches, {name: np.ones_like(gain) for name, gain in gains.items()})
    for path, parts in parameter_parts(matches, gains).items():
        whole = np.ones(matches[path].shape, np.float32)
        for index, part in parts.items():
            whole[matches[path].where(index)] = part / ones[path][index]  # without what torch's numbers are times
        adapters[path] = gain_of_bias(jnp.asarray(whole))
    return adapters


def gain_of_bias(gain: jax.Array) -> Ia3Adapter:
    """Return the adapter of a bias with these factors, of its own shape."""
    return Ia3Adapter(gain, KernelAxes((), (), tuple(range(gain.ndim))), ())


def is_gain_of_bias(adapter: Any) -> TypeGuard[Ia3Adapter]:
    """Return whether an adapter is the factors of a bias."""
    return isinstance(adapter, Ia3Adapter) and not adapter.axes.inputs


def check_that_biases_are_known(planned: Mapping[str, ParameterMatch], modules: Modules, key_map: KeyMap) -> None:
    """Raise if a plan does not tell whether modules with factors on their outputs have biases.

    Args:
        planned: the parameters of the plan.
    """
    known = {name: None for match in planned.values() for name in match.tensors().values()}
    left = [name for name in _possible_biases(modules, key_map) if name not in known]
    if left:
        raise LoraError(
            f"(IA)^3 of {short(left[0].removesuffix('.bias'))} scales its bias too, if it has one, which the plan does "
            "not tell: give the parameters themselves, load_peft(folder, params, key_map)."
        )


def check_gains(found: TorchModules, gains: Mapping[str, Ia3Adapter], key_map: KeyMap, params: Any) -> None:
    """Raise unless all biases of modules with factors on their outputs have the same factors, as PEFT has them.

    Args:
        gains: the factors of biases, by their paths.
    """
    if not found.format.scales_biases:
        if gains:
            path = next(iter(gains))
            raise LoraError(f"{path!r} has factors of a bias, which PEFT has beside (IA)^3 alone: merge it instead.")
        return
    own = key_map.match({path: tuple(np.shape(adapter.gain)) for path, adapter in gains.items()})
    known = {} if params is None else key_map.match(shapes_of(params), strict=False)
    groups = parts_by_tensor(known | own)
    scaled = {f"{name}.bias": m.arrays["gain"] for name, m in found.modules.items() if "gain" in m.arrays}
    for path, match in own.items():
        if alone := [name for name in match.tensors().values() if name not in scaled]:
            raise LoraError(
                f"{path!r} has factors, and the outputs of {_module(alone[0])} have none, which PEFT scales together: "
                "merge it instead."
            )
    for name, gain in scaled.items():
        parts = groups.get(name, [])
        if parts and not np.array_equal(_joined(name, parts, gains), gain):
            raise LoraError(
                f"the outputs of {_module(name)} have other factors than its bias, {parts[0].path!r}, and PEFT has one "
                "vector for both: merge them instead."
            )
    left = [] if params is not None else [n for n in _possible_biases(found.modules, key_map) if n not in groups]
    if left:
        raise LoraError(
            f"the outputs of {_module(left[0])} have factors, and PEFT scales its bias too, if it has one: give the "
            "parameters, save_peft(..., params=params)."
        )


def _joined(name: str, parts: Sequence[ParameterMatch], gains: Mapping[str, Ia3Adapter]) -> Array:
    """Return the factors of a bias that consists of these parts, ones for those that have none."""
    pieces = []
    for match in parts:
        ones = np.ones(match.shape, np.float32)
        gain = np.asarray(jax.device_get(gains[match.path].gain)) if match.path in gains else ones
        where = match.where(next(index for index, tensor in match.tensors().items() if tensor == name))
        pieces.append(match.to_torch(gain[where]) / match.to_torch(ones[where]))
    return np.concatenate(pieces)


def _module(bias: str) -> str:
    return short(bias.removesuffix(".bias"))


def _possible_biases(modules: Modules, key_map: KeyMap) -> Sequence[str]:
    """Return the biases that the key map has for modules with factors on their outputs."""
    table = NameTable([entry.name for entry in key_map.entries if entry.kind == "array"])
    names = [f"{name}.bias" for name, module in modules.items() if "gain" in module.arrays]
    return [name for name in names if table.first(name) is not None]
