"""Adapters on disk, without a training run around them: `save` and `load`."""

from lora_jax.checkpoints.adapters import load, save

__all__ = ["load", "save"]
