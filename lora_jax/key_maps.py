"""Key maps: which tensor of a published model each parameter is, for well-known architectures and for one's own."""

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
