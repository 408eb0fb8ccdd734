"""Models from published folders, examples from files, and a training run of both: what `lora-jax train` does.

- Start with `model`: what a loaded model is, and `load`. `config` reads config.json (with `config_fields` and `rope`),
  `decoder` is the function (with `attention` and `experts`), `loading` reads the weights, `generate` writes texts.
- `examples` reads files, `chat` and `templates` make texts of conversations, `tokenizer` and `tokens` make tokens of
  them, `packed_rows` rows of tokens, and `preferences` is what DPO does with pairs.
- `training_run` is `finetune`, with `options` and `objectives`; `meter` reads what its steps say, and `records` and
  `trackers` keep it.

May import all rooms but the command's.
"""

from lora_jax.recipes.config import Config, read_config
from lora_jax.recipes.examples import read_examples
from lora_jax.recipes.held_out import hold_out, write_samples
from lora_jax.recipes.loading import default_specs
from lora_jax.recipes.model import Model, abstract, load, packing
from lora_jax.recipes.objectives import answer_loss, preference_loss
from lora_jax.recipes.options import Options
from lora_jax.recipes.packed_rows import packed_batches
from lora_jax.recipes.preferences import dpo_loss, preference_batches
from lora_jax.recipes.tokenizer import Tokenizer
from lora_jax.recipes.tokens import tokenized, tokenized_pairs
from lora_jax.recipes.training_run import Result, evaluate, finetune

__all__ = [
    "Config",
    "Model",
    "Options",
    "Result",
    "Tokenizer",
    "abstract",
    "answer_loss",
    "default_specs",
    "dpo_loss",
    "evaluate",
    "finetune",
    "hold_out",
    "load",
    "packed_batches",
    "packing",
    "preference_batches",
    "preference_loss",
    "read_config",
    "read_examples",
    "tokenized",
    "tokenized_pairs",
    "write_samples",
]
