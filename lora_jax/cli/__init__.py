"""The command line `lora-jax`: training of published models, and work on adapters and weights without a model.

- `commands`: the entry point `main`. Start reading here.
- `adapters`: the commands that take adapters.
- `compose`: the command that merges adapters.
- `models`: the commands that take published weights.
- `train`, `run_model`: the commands that run a model.
- `folders`: folders of adapters in any form, and the key maps that name their modules.
- `output`: tables, JSON, plots and progress bars.

May import every wing; none imports it.
"""

from lora_jax.cli.commands import main

__all__ = ["main"]
