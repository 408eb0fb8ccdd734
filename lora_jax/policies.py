"""What a layer keeps for its backward pass: give one of these as `jax.checkpoint(layer, policy=...)`."""

from lora_jax.training.policies import offload, thin

__all__ = ["offload", "thin"]
