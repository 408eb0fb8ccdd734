"""The one exception of the library, and its one warning."""

from typing import Any


class LoraError(ValueError):
    """Something does not fit. The message names the path, what was found, what was expected and the mend."""


class LoraWarning(UserWarning):
    """Something was done as asked, and may not be what was meant. The message names the path, and the mend."""


def short(value: Any) -> str:
    """What a file says, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
