"""Kinds of adapters, by the names that files know them under. Each is one file."""

from lora_jax.adapters.adalora import AdaLoraAdapter
from lora_jax.adapters.dora import DoraAdapter
from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.ia3 import Ia3Adapter
from lora_jax.adapters.loha import LohaAdapter
from lora_jax.adapters.lokr import LokrAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.lora_fa import LoraFaAdapter
from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.adapters.vera import VeraAdapter
from lora_jax.core.adapter import Adapter

KINDS: dict[str, type[Adapter]] = {
    "lora": LoraAdapter,
    "lora_fa": LoraFaAdapter,
    "dora": DoraAdapter,
    "adalora": AdaLoraAdapter,
    "loha": LohaAdapter,
    "lokr": LokrAdapter,
    "vera": VeraAdapter,
    "ia3": Ia3Adapter,
    "rows": RowsAdapter,
    "full": FullAdapter,
}
