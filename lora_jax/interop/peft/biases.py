"""`lora_bias`: what adapters add to the biases of their modules, read and written.

bias' = bias + s c, with c as `lora_B.bias` of the module.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.full import FullAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.text import printable
from lora_jax.interop.key_map import Array, KeyMap, ParameterMatch, parameter_parts, parts_by_tensor
from lora_jax.interop.peft.dtypes import divided, widest
from lora_jax.interop.peft.formats.format import Module
from lora_jax.interop.peft.parameters import shapes_of


def adapters_of_biases(matches: Mapping[str, ParameterMatch], added: Mapping[str, Array]) -> dict[str, Adapter]:
    """Return what is added to biases, by their tensors' names, as adapters of the parameters."""
    adapters: dict[str, Adapter] = {}
    for path, parts in parameter_parts(matches, added).items():
        delta = np.zeros(matches[path].shape, widest(parts.values()))
        for index, part in parts.items():
            delta[matches[path].where(index)] = part
        adapters[path] = FullAdapter(jnp.asarray(delta), KernelAxes((), (), tuple(range(delta.ndim))))
    return adapters


def biases_to_tensors(
    full: Mapping[str, FullAdapter],
    key_map: KeyMap,
    params: Any,
    modules: Mapping[str, Module],
    matches: Mapping[str, ParameterMatch],
) -> tuple[dict[str, Array], dict[str, FullAdapter]]:
    """Return `lora_B.bias` of all modules from the adapters of their biases, and the adapters of other parameters.

    PEFT has it for all modules or for none, and not beside embeddings and experts.

    Raises:
        LoraError: some parts of a module with several parameters are not known.
    """
    if not all(match.entry.kind in ("linear", "conv1d", "conv") for match in matches.values()):
        return {}, dict(full)
    own_matches = key_map.match({path: tuple(adapter.delta.shape) for path, adapter in full.items()})
    own: dict[str, dict[str, Array]] = {}
    for path, match in own_matches.items():
        delta = np.asarray(jax.device_get(full[path].delta))
        parts = {name: match.to_torch(delta[match.where(index)]) for index, name in match.tensors().items()}
        if all(_is_bias_of(modules, name, part) for name, part in parts.items()):
            own[path] = parts
    if not own:
        return {}, dict(full)
    known = {} if params is None else key_map.match(shapes_of(params), strict=False)
    groups = parts_by_tensor(known | own_matches)
    added = {}
    for name, module in modules.items():
        pieces = [
            own[match.path][f"{name}.bias"] if match.path in own else np.zeros(match.outputs, np.float32)
            for match in groups.get(f"{name}.bias", [])
        ]
        outputs = len(module.arrays["b"])
        c = np.concatenate(pieces) if pieces else np.zeros(outputs, np.float32)
        if len(c) != outputs:
            raise LoraError(
                f"{printable(name)} has {outputs} outputs, and {len(c)} biases of it are known. Give all parameters: "
                "save_peft(..., params=params)."
            )
        added[f"{name}.lora_B.bias"] = divided(c, module.scale) if c.any() else c
    return added, {path: adapter for path, adapter in full.items() if path not in own}


def _is_bias_of(modules: Mapping[str, Module], name: str, delta: Array) -> bool:
    """Return whether a change can be written as s c of one of the modules; a change of zero needs none."""
    module = modules.get(name.removesuffix(".bias"))
    return name.endswith(".bias") and (not delta.any() or (module is not None and module.scale != 0))
