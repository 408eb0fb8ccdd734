"""Models from published folders: a config.json and safetensors become a function and its parameters.

Start with `model`: what a loaded model is, and `load`. `config` reads config.json (with `config_fields` and `rope`),
`decoder` is the function (with `attention` and `experts`), `loading` reads the weights, `generate` writes texts.

May import all rooms but the command's.
"""

from lora_jax.recipes.config import Config, read_config
from lora_jax.recipes.loading import default_specs
from lora_jax.recipes.model import Model, abstract, load, packing

__all__ = ["Config", "Model", "abstract", "default_specs", "load", "packing", "read_config"]
