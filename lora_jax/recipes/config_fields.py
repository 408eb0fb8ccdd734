"""The fields of a config.json, each of which has to be read, or known to change nothing."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.core.errors import LoraError, short

REQUIRED = object()

# Fields that change nothing of what the model computes from tokens: names, versions, tokens of the tokenizer, how it
# was initialized, how texts are drawn from it, and what is returned beside logits.
INERT = (
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "do_sample",
    "dtype",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "model_type",
    "num_beams",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "router_aux_loss_coef",
    "sep_token_id",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
)


class Fields:
    """The fields of a config.json.

    Args:
        facts: the fields and their values.
        where: the file, for messages.
    """

    def __init__(self, facts: Mapping[str, Any], where: str) -> None:
        self.facts, self.where = facts, where
        self._read: dict[str, None] = {}

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """Return a field; `default` where it is missing.

        Raises:
            LoraError: it is missing, and there is no default.
        """
        self._read[name] = None
        if name in self.facts:
            return self.facts[name]
        if default is REQUIRED:
            raise LoraError(f"{self.where} lacks {name!r}, which says what the model computes.")
        return default

    def count(self, name: str, default: Any = REQUIRED, least: int = 1) -> int:
        """Return a whole number; `default` where the field is null or missing."""
        value = self._or_default(name, default)
        if type(value) is not int or not least <= value < 2**31:
            self.refuse(name, value, f"a whole number of at least {least}")
        return int(value)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """Return a finite number above 0; `default` where the field is null or missing."""
        value = self._or_default(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.refuse(name, value, "a number above 0")
        return float(value)

    def number_or_none(self, name: str, default: float | None = None) -> float | None:
        """Return a number above 0, or None where the field is null."""
        value = self.get(name, default)
        return None if value is None else self.number(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false; `default` where the field is null or missing."""
        value = self._or_default(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return bool(value)

    def only(self, name: str, *supported: Any) -> None:
        """Raise unless a field is missing, null, or has one of these values."""
        value = self.get(name, None)
        if value is not None and not any(value == one and type(value) is type(one) for one in supported):
            self.refuse(name, value, " or ".join(map(repr, supported)) or "no such field")

    def refuse(self, name: str, value: Any, expected: str) -> None:
        raise LoraError(f"{self.where}: {name} is {short(value)}, expected {expected}.")

    def check_all_read(self, ignore: Iterable[str]) -> None:
        """Raise if a field was not read, and is not known to change nothing. Fields that are null ask for nothing."""
        known = {*self._read, *INERT, *ignore}
        unknown = [name for name, value in self.facts.items() if name not in known and value is not None]
        if unknown:
            raise LoraError(
                f"{self.where}: {unknown[0]} is {short(self.facts[unknown[0]])}, and nothing here knows what it changes"
                f"{f', nor {len(unknown) - 1} more: {short(unknown[1:])}' if unknown[1:] else ''}. If it changes "
                "nothing of what the model computes, take it out of the file, or: "
                f"load(folder, ignore={short(unknown)})."
            )

    def _or_default(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        return default if value is None and default is not REQUIRED else value
