"""Key maps: which tensor of a torch model each parameter is, for published architectures and for models of one's own.

The constants are key maps of architectures; `KeyMap` and the functions that make its entries are for other models.
"""

from lora_jax.interop.architectures import BERT, GEMMA, GPT2, LLAMA, T5, VIT, VIT_4
from lora_jax.interop.key_map import Entry, KeyMap, array, conv, conv1d, embedding, experts, linear

__all__ = [
    "BERT",
    "GEMMA",
    "GPT2",
    "LLAMA",
    "T5",
    "VIT",
    "VIT_4",
    "Entry",
    "KeyMap",
    "array",
    "conv",
    "conv1d",
    "embedding",
    "experts",
    "linear",
]
