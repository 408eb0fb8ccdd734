"""Frozen weights of fewer bits: quantized formats, on a mesh, on disk and from files.

Start with `format`: what a format is. `nf4` (its kernels in `nf4_pallas`, the layouts of files in `nf4_layouts`),
`int8_fp8` and `qwix` are the formats; `quantize` packs the weights of a tree and `change` measures what that changes,
`placement` puts them on a mesh, `host` in the memory of the host, `merge` merges adapters into them, `checkpoint` saves
and loads them. `lazy`, `open_files` and `bitsandbytes` read weights from files one at a time.

May import core, sharding, checkpoints' folders of arrays, and interop's key map and safetensors index.
"""

from lora_jax.bases.change import Change
from lora_jax.bases.checkpoint import load, save
from lora_jax.bases.format import Format, dense
from lora_jax.bases.host import HostArray, to_host
from lora_jax.bases.int8_fp8 import EightBits, Fp8, Int8
from lora_jax.bases.lazy import Stored, from_torch
from lora_jax.bases.merge import merge
from lora_jax.bases.nf4 import Nf4, Nf4Weight
from lora_jax.bases.open_files import open_safetensors
from lora_jax.bases.placement import place
from lora_jax.bases.quantize import quantize
from lora_jax.bases.qwix import QwixWeight
from lora_jax.core.packed import Packed

__all__ = [
    "Change",
    "EightBits",
    "Format",
    "Fp8",
    "HostArray",
    "Int8",
    "Nf4",
    "Nf4Weight",
    "Packed",
    "QwixWeight",
    "Stored",
    "dense",
    "from_torch",
    "load",
    "merge",
    "open_safetensors",
    "place",
    "quantize",
    "save",
    "to_host",
]
