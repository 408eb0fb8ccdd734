"""How the factor A starts: give one of these as `lora.Lora(rank=8, init_a=...)`."""

from lora_jax.adapters.initializers import gaussian, kaiming

__all__ = ["gaussian", "kaiming"]
