"""The command line `lora-jax`: adapters and published weights, without a model.

- `commands`: the commands, and the entry point `main`. Start reading here.
- `summary`: what `inspect` and `verify` say of each adapted weight.
- `spectrum`: norm and effective rank of a change, and its best low-rank approximation.
- `output`: tables, JSON, plots and progress bars.

May import every wing; none imports it.
"""

from lora_jax.cli.commands import main

__all__ = ["main"]
