"""Starts of LoRA that look at weights, gradients or data; see `lora_jax.initialization.starts`."""

from lora_jax.initialization.starts import corda, eva, loftq, lora_ga, olora, orthogonal, pissa

__all__ = ["corda", "eva", "loftq", "lora_ga", "olora", "orthogonal", "pissa"]
