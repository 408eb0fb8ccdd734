"""The table of rules: what to do where a primitive meets an adapted weight."""

from collections.abc import Callable
from typing import Any

from lora_jax.core._compat import JaxprEqn, bind
from lora_jax.transform.adapted_weight import plain

PrimitiveRule = Callable[..., list[Any]]  # (equation, *operands) -> results
RULES: dict[str, PrimitiveRule] = {}
FROZEN: dict[str, PrimitiveRule] = {}  # for operations on plain arrays, the few that do not run as they stand


def rule(*names: str, table: dict[str, PrimitiveRule] = RULES) -> Callable[[PrimitiveRule], PrimitiveRule]:
    """Register a function as the rule of the primitives of these names."""

    def register(fn: PrimitiveRule) -> PrimitiveRule:
        table.update(dict.fromkeys(names, fn))
        return fn

    return register


def no_rule(eqn: JaxprEqn, *args: Any, why: str = "is not an operation that a weight in factored form can pass") -> Any:
    """Run an operation without a rule as it stands, on plain arrays: `why` says what it does that needs them."""
    return bind(eqn, [plain(a, why, eqn) for a in args])
