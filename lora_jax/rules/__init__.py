"""Primitive -> rule: what each operation does to a kernel. With `products.py`, all that knows dimension numbers.

An operation that has no rule asks the kernel for a plain array, which is refused unless the user allowed it.
"""

from lora_jax.rules import multiply, rows, structure
from lora_jax.rules.registry import RULES, no_rule

__all__ = ["RULES", "multiply", "no_rule", "rows", "structure"]
