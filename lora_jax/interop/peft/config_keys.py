"""Keys of a config that no format knows: those that change nothing of what an adapter computes, and the others.

A key without a value, or with PEFT's "none" or false, is of something that is turned off. Of keys that are set, those
in the table say how or with what an adapter was trained. Any other one may change what it computes.
"""

import re
from typing import Any

from lora_jax.core.errors import short
from lora_jax.core.text import printable

_OFF = ("none", "None", "null", "false", "False")
_OF_TRAINING = re.compile(
    r"""
    .*_dropout | .*_lr | .*_lr_ratio | .*_lr_embedding | learning_rate | weight_decay | seed  # how it was trained
    | (torch|transformers|trl|unsloth|axolotl|swift|trainer|library)_version                 # with what
    | velora_config  # gradients from compressed activations; the product is LoRA's
    | monteclora_config  # A with noise in training; without noise the product is LoRA's
    | megatron_config | megatron_core | qalora_group_size  # sizes that are used with other options alone
    | lora_dtype | torch_dtype | dtype | merge_weights | init_weights | init_lora_weights
    | library_name | parent_library | base_model_class | base_model_revision | model_type | _name_or_path | _commit_hash
    | modules_to_tie | target_modules_to_tie  # which of two tied ends a file says twice
    """,
    re.VERBOSE,
)
# What is to be done about keys that are known to change what an adapter computes.
_WAYS = {
    "alora_invocation_tokens": "it acts from some tokens of a text on, and no change of weights does: use it in PEFT",
    "arrow_config": "for each token it chooses among several adapters: load these from their own folders",
}
_MERGED = (
    "if it changes what the adapter computes, merge it in PEFT, model.merge_and_unload(), and take the merged weights; "
    "if it says only how it was trained, take it out of adapter_config.json"
)


def changes_nothing(key: str, value: Any) -> bool:
    """Return whether an adapter computes the same without this entry.

    >>> changes_nothing("use_something", False), changes_nothing("use_something", True)
    (True, False)
    >>> changes_nothing("trainer_version", "1.2")
    True
    """
    return not value or value in _OFF or _OF_TRAINING.fullmatch(key) is not None


def why_it_is_refused(key: str, value: Any) -> str:
    """Return what is wrong with an entry that may change something, and what to do."""
    known = printable(key[:100])
    return f"{known} is {short(value)}, which this version of lora_jax does not have: {_WAYS.get(key, _MERGED)}."
