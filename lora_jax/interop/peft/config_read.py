"""`adapter_config.json`, as HF PEFT writes it: read, checked, and what it says of each module."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_jax.core.errors import LoraError, short

LIMIT = 2.0**127  # what fp32 can hold
LARGEST = 8 * 2**20  # bytes of a config; PEFT's have a few thousand

# Options that change nothing about what a saved adapter computes, or that are read below.
_ALL = """
    auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern layers_to_transform
    modules_to_save peft_type peft_version revision runtime_config target_modules task_type
"""
_LORA = f"""
    {_ALL} alpha_pattern bias corda_config ensure_weight_tying eva_config fan_in_fan_out init_lora_weights
    layer_replication loftq_config lora_alpha lora_dropout lora_ga_config megatron_core qalora_group_size r rank_pattern
    trainable_token_indices use_rslora
"""
_LOHA = f"{_ALL} alpha alpha_pattern init_weights module_dropout r rank_dropout rank_pattern use_effective_conv2d"
_VERA = f"{_ALL} bias d_initial fan_in_fan_out init_weights projection_prng_key r save_projection vera_dropout"
KNOWN = {
    "LORA": frozenset(f"{_LORA} lora_bias target_parameters use_dora".split()),
    "ADALORA": frozenset(f"{_LORA} beta1 beta2 deltaT init_r orth_reg_weight target_r tfinal tinit total_step".split()),
    "LOHA": frozenset(_LOHA.split()),
    "LOKR": frozenset(f"{_LOHA} decompose_both decompose_factor rank_dropout_scale".split()),
    "VERA": frozenset(_VERA.split()),
}
# What rank and alpha are called, and the rank that is meant where there is none.
_NAMES = {
    "LORA": ("r", 8, "lora_alpha"),
    "ADALORA": ("init_r", 12, "lora_alpha"),
    "LOHA": ("r", 8, "alpha"),
    "LOKR": ("r", 8, "alpha"),
    "VERA": ("r", 256, ""),
}
# Starts that also change the base: beside the base as it was published, the adapter alone is another model. Those of
# the first kind follow from the base, and are made again when the adapter is loaded.
REPEATED = ("pissa", "olora")
CHANGE_THE_BASE = ("corda", "loftq", "lora_ga")

T = TypeVar("T")


class Config(NamedTuple):
    kind: str  # of adapters, one of `peft_kinds.KINDS`
    rank: int
    alpha: float
    rslora: bool
    transposed: bool  # weights are [in, out], as those of transformers' Conv1D
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: tuple[str, ...]  # none where it is a regular expression
    target_parameters: tuple[str, ...]
    start: str | None  # one of REPEATED
    lora_bias: bool
    replicated: bool  # the model has some layers of the published one several times
    tokens: tuple[int, ...] | dict[str, tuple[int, ...]]  # rows of the table of embeddings, or of these modules
    seed: int  # of VeRA's projections

    def rank_of(self, module: str) -> int:
        if self.kind == "ADALORA":  # by whole names
            return self.rank_pattern.get(module, self.rank)
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732).

        AdaLoRA divides by the rank that training began with, and 1e-5 more.
        """
        if self.kind == "ADALORA":
            return (self.alpha if self.alpha > 0 else self.rank) / (self.rank + 1e-5)
        if self.kind == "VERA":
            return 1.0
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The rows that are trained of a module's table."""
        if isinstance(self.tokens, tuple):
            return self.tokens
        return next((rows for name, rows in self.tokens.items() if f".{module}".endswith(f".{name}")), ())


def read_config(path: Path) -> Config:
    """The facts of a config.

    Raises:
        LoraError: no such file, or not of this format; another kind of adapter; an option that this version lacks.
    """
    facts = _read(path)
    kind = facts.get("peft_type")
    if not isinstance(kind, str) or kind not in KNOWN:
        raise LoraError(f"{path}: peft_type is {short(kind)}; this version of lora_jax reads {', '.join(KNOWN)}.")
    for name in sorted(facts):
        if name not in KNOWN[kind] and facts[name]:
            raise LoraError(f"{path}: {name} is {short(facts[name])}, which this version of lora_jax does not have.")
    targets = facts.get("target_modules")
    rank, usual, alpha = _NAMES[kind]
    dora = kind == "LORA" and bool(facts.get("use_dora"))
    return Config(
        kind="DORA" if dora else kind,
        rank=_number(path, rank, facts.get(rank, usual), whole=True),
        alpha=_number(path, alpha, facts.get(alpha, 8)),
        rslora=bool(facts.get("use_rslora")),
        transposed=bool(facts.get("fan_in_fan_out")),
        rank_pattern=_kept(path, facts) if kind == "ADALORA" else _pattern(path, "rank_pattern", facts, whole=True),
        alpha_pattern=_pattern(path, "alpha_pattern", facts, whole=False),
        target_modules=() if isinstance(targets, str) else _strings(path, "target_modules", targets),
        target_parameters=_strings(path, "target_parameters", facts.get("target_parameters")),
        start=_start(path, facts.get("init_lora_weights")) if kind == "LORA" else None,
        lora_bias=bool(facts.get("lora_bias")),
        replicated=bool(facts.get("layer_replication")),
        tokens=_tokens(path, facts.get("trainable_token_indices")),
        seed=_seed(path, facts.get("projection_prng_key", 0)) if kind == "VERA" else 0,
    )


def _start(path: Path, start: Any) -> str | None:
    """What the base was changed by, if that can be done again."""
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        raise LoraError(
            f"{path}: init_lora_weights is {start!r}, which changed the base too. Save it as plain LoRA first: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...) in PEFT."
        )
    return next((name for name in REPEATED if isinstance(start, str) and start.startswith(name)), None)


def _tokens(path: Path, found: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Rows of the one table of embeddings, or by the names of modules."""
    lists = found if isinstance(found, dict) else {"": found or []}
    for rows in lists.values():
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            raise LoraError(f"{path}: trainable_token_indices has {short(rows)}, expected a list of numbers of rows.")
    return {name: tuple(rows) for name, rows in lists.items()} if isinstance(found, dict) else tuple(lists[""])


def _seed(path: Path, seed: Any) -> int:
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise LoraError(f"{path}: projection_prng_key is {short(seed)}, expected a whole number of 32 bits.")
    return seed


def _kept(path: Path, facts: Mapping[str, Any]) -> dict[str, int]:
    """How many entries AdaLoRA left each module: of `{"name.lora_E": [true, false, ...]}` the true ones."""
    found = facts.get("rank_pattern") or {}
    if not isinstance(found, dict):
        raise LoraError(f"{path}: rank_pattern is {short(found)}, expected an object of names and masks.")
    for name, mask in found.items():
        if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
            raise LoraError(f"{path}: rank_pattern[{short(name)}] is {short(mask)}, expected a list of true and false.")
    return {name.rpartition(".lora_E")[0]: sum(mask) for name, mask in found.items()}


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
