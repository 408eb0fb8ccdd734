"""Kinds of adapters, by the names that files know them under. Each is one file."""

from lora_jax.adapters.adalora import AdaLoraAdapter
from lora_jax.adapters.base import Adapter
from lora_jax.adapters.dora import DoraAdapter
from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.loha import LohaAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.lora_fa import LoraFaAdapter

KINDS: dict[str, type[Adapter]] = {
    "lora": LoraAdapter,
    "lora_fa": LoraFaAdapter,
    "dora": DoraAdapter,
    "adalora": AdaLoraAdapter,
    "loha": LohaAdapter,
    "full": FullAdapter,
}
