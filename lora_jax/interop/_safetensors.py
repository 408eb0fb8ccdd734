"""Import safetensors, an optional dependency, or raise an error that says how to install it."""

from typing import Any

from lora_jax.core.errors import LoraError

try:
    import safetensors
    import safetensors.numpy
except ImportError as error:
    raise LoraError(
        "files of HF PEFT and of published models need safetensors, which is not installed: "
        "pip install 'lora_jax[peft]'"
    ) from error

SafetensorError: Any = safetensors.SafetensorError
safe_open: Any = safetensors.safe_open
