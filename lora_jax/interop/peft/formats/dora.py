"""DoRA in PEFT's files: LoRA with `use_dora`, and the length of each output as `lora_magnitude_vector`."""

from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.dora import DoraAdapter
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array, ParameterMatch
from lora_jax.interop.peft.formats.format import Arrays, Format
from lora_jax.interop.peft.formats.lora import LoraFormat
from lora_jax.interop.peft.parameters import arrays_of


class DoraFormat(LoraFormat):
    """`peft_type` "LORA" with `use_dora`."""

    name = "DORA"
    adapter = DoraAdapter
    module_kinds = ("linear", "conv1d", "conv", "embedding")
    is_lora = False
    zeros_change_nothing = False

    uses_dora = True
    endings = MappingProxyType({**LoraFormat.endings, "m": "lora_magnitude_vector"})
    has_lora_bias = False

    convert = Format.convert  # no adapter of another kind is a DoRA in another form

    def expected_shapes(self, arrays: Arrays) -> dict[str, tuple[int, ...]]:
        outputs, window = len(arrays["b"]), [1] * (arrays["a"].ndim - 2)
        return {"m": (1, outputs, *window) if window else (outputs,)}

    def problem_of_layers(self, match: ParameterMatch, found: int) -> str | None:
        if found == len(match.names):
            return None
        return "has layers with DoRA and layers without, which have no magnitudes"

    def unchanged_outputs(self, module: str, match: ParameterMatch, params: Any) -> Array:
        """Return the lengths that the outputs of W have."""
        weight = arrays_of(params).get(match.path)
        if weight is None:
            raise LoraError(
                f"{module} holds {match.path!r}, which has no adapter, and DoRA writes the length of each of its "
                "outputs: give the parameters, save_peft(..., params=params)."
            )
        index = next(index for index, own in match.names.items() if own == module)
        w = match.to_torch(np.asarray(jax.device_get(weight), np.float32)[match.where(index)])
        inputs = tuple(axis for axis in range(w.ndim) if axis != match.output_axis(w.ndim))
        return np.sqrt(np.sum(np.square(w), axis=inputs))
