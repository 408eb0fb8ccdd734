"""(IA)^3 in PEFT's files: `ia3_l`, a factor for each output [outputs, 1], or for each input [1, inputs].

Modules among `feedforward_modules` have it on their inputs. On the outputs it is applied after the bias, so that the
bias has it too: `gains_of_biases` reads and writes that.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from lora_jax.adapters.ia3 import Gains, Ia3Adapter, Ia3InputsAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout
from lora_jax.interop.key_map import Array, ParameterMatch
from lora_jax.interop.peft.formats.format import (
    COMMON_OPTIONS,
    OF_OUTPUTS,
    Arrays,
    Config,
    Format,
    Matches,
    Module,
    does_not_fit,
)
from lora_jax.interop.peft.formats.lora import is_transposed
from lora_jax.interop.peft.module_patterns import ModulePatterns
from lora_jax.interop.peft.options import Options


class Ia3Format(Format):
    """`peft_type` "IA3"."""

    name = peft_type = "IA3"
    adapter = Gains
    module_kinds = ("linear", "conv1d")
    is_lora = False
    zeros_change_nothing = False
    scales_biases = True

    options = COMMON_OPTIONS | {"fan_in_fan_out", "feedforward_modules", "init_ia3_weights"}
    free_options = ("inference_mode", "init_ia3_weights")
    alpha_option = ""  # it has none

    endings = MappingProxyType({"input_gain": "ia3_l", "gain": "ia3_l"})
    optional = ("input_gain", "gain")
    has_biases = False

    needs_model = "has factors on one side of its modules, and its tensors do not tell the other side"

    @property
    def layout(self) -> Mapping[str, Layout]:
        return {"gain": OF_OUTPUTS, "input_gain": ("stack", "inputs")}

    def read(self, options: Options) -> Config:
        found = options.get("feedforward_modules")
        if isinstance(found, str):
            whole = ModulePatterns({f"^(?:{found})": True}, f"{options.path}: feedforward_modules")
            return super().read(options)._replace(extra={"inputs": whole})
        return super().read(options)._replace(extra={"inputs": options.names("feedforward_modules")})

    def scale_in(self, config: Config, module: str) -> float:
        return 1.0

    def entries(self, modules: Mapping[str, Module], matches: Matches, bias: str) -> dict[str, Any]:
        inputs = sorted(name for name, module in modules.items() if "input_gain" in module.arrays)
        others = [name for name in modules if name not in inputs]
        are_told = not any(name.endswith(tuple(inputs)) for name in others)  # PEFT looks at the ends of names
        return {
            "fan_in_fan_out": is_transposed(modules, matches),
            "feedforward_modules": inputs if are_told else "|".join(map(re.escape, inputs)),
            "init_ia3_weights": True,
        }

    def problem_of_shapes(self, arrays: Arrays) -> str | None:
        for array in arrays.values():
            if array.ndim != 2 or 1 not in array.shape or not array.size:
                return f"has ia3_l of shape {list(array.shape)}, expected [outputs, 1] or [1, inputs]"
        return None

    def resolved(self, config: Config, module: str, arrays: Arrays, fans: tuple[int, int] | None) -> Arrays:
        """Return the factors as a vector, under the name of the side that they are on."""
        [vector], known = arrays.values(), config.extra["inputs"]
        on_inputs = known.value_of(module, False) if isinstance(known, ModulePatterns) else module.endswith(known)
        if vector.shape[0 if on_inputs else 1] != 1:
            side = "inputs, since it is among feedforward_modules" if on_inputs else "outputs"
            raise LoraError(f"has ia3_l of shape {list(vector.shape)}, by the config one on its {side}")
        return {"input_gain" if on_inputs else "gain": vector.reshape(-1)}

    def tensors_of(self, match: ParameterMatch, arrays: Arrays) -> Arrays:
        [(name, vector)] = arrays.items()
        return {"ia3_l": vector.reshape((1, -1) if name == "input_gain" else (-1, 1))}

    def rank_of(self, arrays: Arrays) -> int | None:
        return None

    def outputs_of(self, arrays: Arrays) -> int:
        if "gain" not in arrays:
            raise LoraError("factors on the inputs of a module that is several parameters here are not read: merge it.")
        return len(arrays["gain"])

    def from_torch(self, match: ParameterMatch, arrays: Arrays, start: int) -> Arrays:
        self.check_module(match)
        [(name, vector)] = arrays.items()
        if name == "input_gain":
            nothing = np.zeros((match.outputs, 1), vector.dtype)
            return {name: match.factors_from_torch(vector[None], nothing, 0)[0][..., 0]}
        part = vector[start : start + match.outputs]
        if len(part) != match.outputs or (match.entry.part is None and len(vector) != len(part)):
            raise does_not_fit(match, arrays)
        return {name: match.in_our_order(part.reshape(match.sizes_of("out")))}

    def to_torch(self, match: ParameterMatch, ours: Arrays) -> Arrays:
        [(name, gain)] = ours.items()
        if name == "gain":
            return {name: match.in_torch_order(gain).reshape(-1)}
        if match.entry.part is not None:
            raise LoraError(
                f"{match.path!r} has factors on its inputs, and is one of several parameters of a module, for which "
                "PEFT has one such vector: merge it instead."
            )
        nothing = np.zeros((1, *match.sizes_of("out")), gain.dtype)
        return {name: match.factors_to_torch(gain[..., None], nothing)[0].reshape(-1)}

    def problem_of_layers(self, match: ParameterMatch, found: int) -> str | None:
        return None if found == len(match.names) else "has layers with (IA)^3 and layers without, which have no factors"

    def build(
        self, match: ParameterMatch, arrays: Mapping[str, Any], scale: float, shared: Mapping[str, Any]
    ) -> Adapter:
        if arrays["gain"] is not None:
            return Ia3Adapter(arrays["gain"], match.axes, match.sizes_of("in"))
        return Ia3InputsAdapter(arrays["input_gain"], match.axes, match.sizes_of("out"))

    def holds(self, adapters: Mapping[str, Adapter], matches: Matches) -> bool:
        return all(isinstance(adapters[path], Gains) and self.is_for(match) for path, match in matches.items())

    def unchanged_outputs(self, module: str, match: ParameterMatch, params: Any) -> Array:
        return np.ones(match.outputs, np.float32)
