"""Where a program cannot use a weight in factored form: refuse, or form W' where the user allowed it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_jax.core.errors import LoraError
from lora_jax.core.patterns import first_match
from lora_jax.core.recent import Recent
from lora_jax.transform.adapted_weight import AdaptedWeight

Patterns = bool | str | Sequence[str]


@dataclass(frozen=True, eq=False)
class Materialize:
    """Allow W' to be formed for the weights of some paths, and refuse it for all others."""

    patterns: tuple[re.Pattern[str], ...]
    checked: Recent[None] = field(
        default_factory=lambda: Recent(64)
    )  # lists of paths that the patterns were found to fit

    @classmethod
    def of(cls, patterns: Patterns) -> "Materialize":
        """True for all weights, False for none, or regular expressions for whole paths.

        Raises:
            LoraError: none of these.
        """
        given = {False: [], True: [".*"]}[patterns] if isinstance(patterns, bool) else patterns
        try:
            return cls(tuple(re.compile(p) for p in ([given] if isinstance(given, str) else given)))
        except (re.error, TypeError) as error:
            raise LoraError(
                f"materialize={patterns!r} is neither True, nor False, nor regular expressions for whole paths, "
                f"such as '.*/norm/kernel': {error}."
            ) from None

    def check(self, names: Sequence[str]) -> None:
        """Check that each pattern allows a parameter that no earlier pattern allows; `True` and ".*" always do.

        Raises:
            LoraError: a pattern matches no parameter path (the nearest are listed), or only such as earlier ones match.
        """
        if self.patterns and self.patterns != (re.compile(".*"),):
            self.checked.get(tuple(names), lambda: self._check(names))

    def _check(self, names: Sequence[str]) -> None:
        first_match({pattern.pattern: True for pattern in self.patterns}, names, call="materialize: ")

    def allows(self, path: str) -> bool:
        """Return whether W' may be formed for the weight of this path."""
        return any(pattern.fullmatch(path) for pattern in self.patterns)

    def __call__(self, weight: AdaptedWeight, why: str) -> None:
        for path in weight.paths:
            if not self.allows(path):
                raise LoraError(
                    f"{path!r} cannot stay factored: {why}. "
                    f"Leave it frozen (a rule {{{re.escape(path)!r}: None}} before the one that matched), "
                    f"merge it first (lora.merge(params, {{{path!r}: adapters[{path!r}]}})), "
                    f"or let it be formed there, at its full size (materialize={re.escape(path)!r} "
                    "for lora.plan and lora.lora_apply)."
                )
