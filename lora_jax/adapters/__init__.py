"""Kinds of adapters, one formula a file, and what is done to adapters of any kind: dropout, sums.

Imports core and nothing else. Start with `lora.py`: the rule `Lora` and its `LoraAdapter`; `low_rank.py` has the
operand that this is in a program. Kinds that are LoRA in another form (`factored.py`) only say in which; DoRA and
(IA)^3 scale outputs as well (`output_scaled.py`). Importing this package registers the kinds of this library.
"""

from lora_jax.adapters import adalora, dora, full, ia3, loha, lokr, lora, lora_fa, token_rows, vera

__all__ = ["adalora", "dora", "full", "ia3", "loha", "lokr", "lora", "lora_fa", "token_rows", "vera"]
