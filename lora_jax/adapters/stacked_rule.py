"""Rules that can be told which axes of their weights are stacked matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from lora_jax.adapters.arguments import check_stack
from lora_jax.core.adapter import Rule


@dataclass(frozen=True)
class StackedRule(Rule):
    """A rule whose adapters have arrays of their own for each of several stacked matrices.

    Args:
        stack: an axis of the weight, or several, with a matrix at each index: experts, members of an ensemble. Both
            factors get these axes, whatever the program does with them; axes that the program shows to be stacked, by
            a scan or a batched product, need not be named. `()` says that there are none, where `lora.plan` warns.

    Raises:
        LoraError: `stack` is neither a whole number nor several different ones.
    """

    stack: int | Sequence[int] | None = field(default=None, kw_only=True)

    shares = MappingProxyType({"outputs": "A", "inputs": "B"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "stack", check_stack(type(self).__name__, self.stack))

    @property
    def of_stack(self) -> str:
        """Return what the rule's text says of the argument."""
        given = self.stack
        return "" if given is None else f", stack={given[0] if len(given) == 1 else given}"  # type: ignore[arg-type, index]
