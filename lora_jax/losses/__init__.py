"""Losses of language models that form no logits: of 8,192 tokens over 128,256 words, those would be 4.2 GB in fp32.

`linear` has the functions, `cross_entropy` the formulas. The pass over blocks of rows is `core/row_losses.py`.

May import core.
"""

from lora_jax.losses.linear import linear_cross_entropy, linear_log_probs

__all__ = ["linear_cross_entropy", "linear_log_probs"]
