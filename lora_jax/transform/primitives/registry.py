"""The table of rules: what each primitive does to an adapted weight."""

from collections.abc import Callable
from typing import Any

from lora_jax.core._compat import JaxprEqn, bind
from lora_jax.transform.adapted_weight import plain

Rule = Callable[..., list[Any]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of the primitives of these names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def no_rule(eqn: JaxprEqn, *args: Any, why: str = "is not an operation that a weight in factored form can pass") -> Any:
    """Any other operation: run as it stands, on plain arrays."""
    return bind(eqn, [plain(a, why, eqn) for a in args])
