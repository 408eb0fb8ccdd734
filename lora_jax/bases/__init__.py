"""How frozen weights are kept in fewer bits."""

from lora_jax.bases.base import Format as Format
from lora_jax.bases.base import dense as dense
from lora_jax.bases.eight_bits import EightBits as EightBits
from lora_jax.bases.eight_bits import Fp8 as Fp8
from lora_jax.bases.eight_bits import Int8 as Int8
from lora_jax.bases.files import open_safetensors as open_safetensors
from lora_jax.bases.merging import merge as merge
from lora_jax.bases.nf4 import Nf4 as Nf4
from lora_jax.bases.nf4 import Nf4Weight as Nf4Weight
from lora_jax.bases.places import place as place
from lora_jax.bases.quantize import quantize as quantize
from lora_jax.bases.qwix import QwixWeight as QwixWeight
from lora_jax.bases.saved import load as load
from lora_jax.bases.saved import save as save
from lora_jax.bases.stored import Stored as Stored
from lora_jax.bases.stored import from_torch as from_torch
from lora_jax.packed import Packed as Packed
