"""Rules over names: of the patterns that match a name, the first one decides."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.core.text import listed

T = TypeVar("T")
NEAREST = "A pattern stands for a whole path; the nearest paths are"
_NAME = re.compile(r"[\w/-]+")  # patterns that match themselves and nothing else


def first_match(
    rules: Mapping[str, T],
    names: Sequence[str],
    others: Sequence[str] = (),
    *,
    call: str = "",
    one: str = "parameter",
    many: str = "paths",
    hint: str = NEAREST,
) -> dict[str, T]:
    """Return, for each name that some pattern matches, the value of the first pattern that does.

    Args:
        rules: `{pattern: value}`; a pattern is a regular expression for a whole name.
        names: what the patterns are matched with; the result has their order.
        others: further names, which only patterns decide that decide none of `names`; the result has them last.
        call, one, many, hint: words for the messages: what they begin with, what a name stands for, in the singular and
            in the plural, and what comes before the nearest names.

    Raises:
        LoraError: a pattern is no regular expression, matches no name (the nearest are listed), or matches only names
            that earlier patterns match.

    >>> first_match({".*/kernel": 8, "head/.*": 4}, ["head/bias", "head/kernel", "scale"])
    {'head/bias': 4, 'head/kernel': 8}
    """
    first, known = dict.fromkeys(names), dict.fromkeys([*names, *others])
    matched = {pattern: _matching(pattern, known, call) for pattern in rules}
    chosen: dict[str, T] = {}
    for pattern, found in matched.items():
        fresh = [name for name in found if name not in chosen]
        if not found:
            near = listed(nearest(pattern, known))
            raise LoraError(f"{call}the pattern {pattern!r} matches no {one}. {hint}\n{near}")
        if not fresh:
            raise LoraError(
                f"{call}the pattern {pattern!r} is never reached: all {len(found)} {many} that it matches, "
                f"{found[0]!r} first, are taken by earlier ones. Put it before them, or drop it."
            )
        chosen |= dict.fromkeys([name for name in fresh if name in first] or fresh, rules[pattern])
    return {name: chosen[name] for name in known if name in chosen}


def _matching(pattern: str, names: Mapping[str, None], call: str) -> list[str]:
    """Return the names that a pattern matches as a whole. A pattern that is a name, as many are, is looked up."""
    try:
        if _NAME.fullmatch(pattern):
            return [pattern] if pattern in names else []
        compiled = re.compile(pattern)
        return [name for name in names if compiled.fullmatch(name)]
    except (re.error, TypeError) as error:
        raise LoraError(f"{call}the pattern {pattern!r} is not a regular expression: {error}.") from None
