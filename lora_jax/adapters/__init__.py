"""The kinds of adapter, one formula a file."""

from lora_jax.adapters.base import Adapter
from lora_jax.adapters.lora import LoraAdapter

KINDS: dict[str, type[Adapter]] = {"lora": LoraAdapter}  # by the name that files know them by
