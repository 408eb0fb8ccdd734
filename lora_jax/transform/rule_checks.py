"""Checks of the rules of a plan: that they are rules at all, and that no weight is one that its owner has packed."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.core.adapter import Rule
from lora_jax.core.argument_checks import found
from lora_jax.core.arrays import describe
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import is_array

Rules = Mapping[str, Rule | None]

OF_OWN_PACKING = (
    "adapters of a packed weight are for one that lora.bases has packed: give the model the weight itself, x @ w, and "
    "the base lora.bases.quantize(params, {pattern: lora.bases.Int8()})"
)


def check_rules(rules: Rules, args: Sequence[Any]) -> Rules:
    """Return the rules of a plan.

    Args:
        rules: as they are given.
        args: what is given by position, the rules among them by mistake.

    Raises:
        LoraError: they are no dict of rules, or all are None.
    """
    if isinstance(rules, Mapping) and not rules and args and _are_rules(args[-1]):
        given = {pattern: str(rule) for pattern, rule in args[-1].items()}
        raise LoraError(
            f"plan(fn, params, *args, rules={{...}}) takes its rules by keyword, found {given} by position, where the "
            "arguments of fn are: plan(fn, params, *args, rules={...})."
        )
    if not isinstance(rules, Mapping) or not rules:
        value = rules if isinstance(rules, Mapping | list | tuple | set) else found(rules)
        raise LoraError(
            f"rules are a dict such as {{'.*/kernel': lora.Lora(rank=8)}}, found {value}: "
            "plan(fn, params, *args, rules={...})."
        )
    if all(rule is None for rule in rules.values()):
        raise LoraError(
            f"all rules are None and would leave everything frozen: {dict(rules)!r}. Give one rule at least."
        )
    for pattern, rule in rules.items():
        if rule is not None and not isinstance(rule, Rule):
            mend = " (lora.bases.quantize(params, rules) packs frozen weights)" if hasattr(rule, "pack") else ""
            raise LoraError(
                f"the rule for {pattern!r} is {found(rule)}, expected a rule such as lora.Lora(rank=8), or None{mend}."
            )
    return rules


def _are_rules(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(rule, Rule) for rule in value.values())


def is_own_packing(leaf: Any) -> bool:
    """Return whether a leaf is a matrix of integers of 8 bits or fewer, whose scales lie elsewhere."""
    return bool(is_array(leaf) and leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.integer) and _bits(leaf) <= 8)


def _bits(leaf: Any) -> int:
    return int(jnp.iinfo(leaf.dtype).bits)


def hint_of_own_packing(names: Sequence[str], leaves: Sequence[Any]) -> str:
    """Return what to say of a pattern that matches nothing, where a matrix is in parts, such as `w/q` and `w/scale`."""
    own = next((pair for pair in zip(names, leaves, strict=True) if is_own_packing(pair[1])), None)
    return "" if own is None else f"{own[0]!r} is {describe(own[1])}; {OF_OWN_PACKING}. "
