"""What each operation of JAX does to an adapted weight, by the operation's name.

With `core/products.py`, all that knows dimension numbers. An operation that has no rule asks the adapted weight for a
plain array, which is refused unless the user allowed it.
"""

from lora_jax.transform.primitives import contractions, convolutions, indexing, shapes
from lora_jax.transform.primitives.registry import FROZEN, RULES, no_rule

__all__ = ["FROZEN", "RULES", "contractions", "convolutions", "indexing", "no_rule", "shapes"]
