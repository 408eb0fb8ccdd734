"""`adapter_config.json`, as HF PEFT writes it: read, checked, and what it says of each module."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_jax.errors import LoraError

LIMIT = 2.0**127  # what fp32 can hold
LARGEST = 8 * 2**20  # bytes of a config; PEFT's have a few thousand

# Options that change nothing about what a saved adapter computes, or that are read below.
KNOWN = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "use_rslora",
    ]
)
# Starts that also change the base: beside the base as it was published, the adapter alone is another model.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

T = TypeVar("T")


class Config(NamedTuple):
    rank: int
    alpha: float
    rslora: bool
    transposed: bool  # weights are [in, out], as those of transformers' Conv1D
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: tuple[str, ...]  # none where it is a regular expression
    target_parameters: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_config(path: Path) -> Config:
    """The facts of a config of LoRA.

    Raises:
        LoraError: no such file, or not of this format; another kind of adapter; an option that this version lacks.
    """
    facts = _read(path)
    kind = facts.get("peft_type")
    if kind != "LORA":
        raise LoraError(f"{path}: peft_type is {kind!r}; this version of lora_jax reads LORA.")
    for name in sorted(facts):
        if name not in KNOWN and facts[name]:
            raise LoraError(f"{path}: {name} is {short(facts[name])}, which this version of lora_jax does not have.")
    targets = facts.get("target_modules")
    start = facts.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        raise LoraError(
            f"{path}: init_lora_weights is {start!r}, which changed the base too. Save it as plain LoRA first: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...) in PEFT."
        )
    return Config(
        rank=_number(path, "r", facts.get("r", 8), whole=True),
        alpha=_number(path, "lora_alpha", facts.get("lora_alpha", 8)),
        rslora=bool(facts.get("use_rslora")),
        transposed=bool(facts.get("fan_in_fan_out")),
        rank_pattern=_pattern(path, "rank_pattern", facts, whole=True),
        alpha_pattern=_pattern(path, "alpha_pattern", facts, whole=False),
        target_modules=() if isinstance(targets, str) else _strings(path, "target_modules", targets),
        target_parameters=_strings(path, "target_parameters", facts.get("target_parameters")),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise LoraError(f"{path} has more than {LARGEST:,} bytes, and is no config of an adapter.")
        facts = json.loads(text)
    except OSError as error:
        raise LoraError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{path} is no JSON: {str(error)[:200]}.") from error
    if not isinstance(facts, dict):
        raise LoraError(f"{path} holds a {type(facts).__name__}, expected an object of options.")
    return facts


def _number(path: Path, name: str, value: Any, whole: bool = False) -> Any:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) < LIMIT or (whole and value < 1):
        expected = "a whole number of at least 1" if whole else "a finite number of fp32"
        raise LoraError(f"{path}: {name} is {short(value)}, expected {expected}.")
    return value


def _pattern(path: Path, name: str, facts: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    found = facts.get(name) or {}
    if not isinstance(found, dict):
        raise LoraError(f"{path}: {name} is {short(found)}, expected an object of patterns and numbers.")
    for pattern in found:
        _compile(f"{path}: {name}", pattern)
    return {pattern: _number(path, f"{name}[{short(pattern)}]", value, whole) for pattern, value in found.items()}


def _strings(path: Path, name: str, value: Any) -> tuple[str, ...]:
    value = value or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise LoraError(f"{path}: {name} is {short(value)}, expected a list of names.")
    return tuple(value)


def short(value: Any) -> str:
    """What a file says, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _first_match(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that the module ends with, from its start or from a dot on."""
    for pattern, value in patterns.items():
        if _compile("a pattern", pattern).match(module):
            return value
    return default


def _compile(where: str, pattern: str) -> Any:
    """A pattern of a file may be written to take for ever: `re` gets names only, RE2 takes linear time for any."""
    anchored = rf"(.*\.)?({pattern})$"
    if re.fullmatch(r"\^?[\w.-]{0,1000}", pattern):
        return re.compile(anchored)
    try:
        import re2
    except ImportError as error:
        raise LoraError(
            f"{where} has the regular expression {short(pattern)}, for which RE2 is needed: pip install google-re2."
        ) from error
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(anchored, options)
    except re2.error as error:
        raise LoraError(f"{where} has {short(pattern)}, which is no regular expression of RE2: {error}.") from error
