"""The command line `lora-jax`: adapters and published weights, without a model.

- `commands`: the entry point `main`. Start reading here.
- `adapters`: the commands that take adapters.
- `models`: the commands that take published weights.
- `folders`: folders of adapters in any form, and the key maps that name their modules.
- `output`: tables, JSON, plots and progress bars.

May import every wing; none imports it.
"""

from lora_jax.cli.commands import main

__all__ = ["main"]
