"""Key maps: which tensor of a torch model each parameter is, for published architectures and for models of one's own.

The constants are key maps of architectures, and of the trees that other JAX libraries have for them; `KeyMap` and the
functions that make its entries are for other models.
"""

from lora_jax.interop.architectures import BERT, GEMMA, GPT2, LLAMA, T5, VIT, VIT_4
from lora_jax.interop.entries import Entry, array, conv, conv1d, embedding, experts, linear
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.other_trees import (
    GEMMA_FLAX,
    KERAS_GEMMA,
    KERAS_LLAMA,
    MAXTEXT_LLAMA,
    MAXTEXT_MIXTRAL,
    MAXTEXT_QWEN,
    TUNIX,
    TUNIX_GEMMA,
)

__all__ = [
    "BERT",
    "GEMMA",
    "GEMMA_FLAX",
    "GPT2",
    "KERAS_GEMMA",
    "KERAS_LLAMA",
    "LLAMA",
    "MAXTEXT_LLAMA",
    "MAXTEXT_MIXTRAL",
    "MAXTEXT_QWEN",
    "T5",
    "TUNIX",
    "TUNIX_GEMMA",
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
