"""The one exception of the library, and its one warning."""

from typing import Any

from lora_jax.core.text import printable


class LoraError(ValueError):
    """Something does not fit. The message names the path, what was found, what was expected and the mend.

    Names in messages may come from files that are not trusted, so no character of them reaches a terminal that it would
    obey: only the breaks between lines are kept.

    >>> import lora_jax as lora
    >>> lora.Lora(rank=0)
    Traceback (most recent call last):
    lora_jax.core.errors.LoraError: Lora(rank=0): the rank is a whole number of at least 1, for example 8.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


class LoraWarning(UserWarning):
    """Something was done as asked, and may not be what was meant. The message names the path and the mend.

    >>> import warnings, lora_jax as lora
    >>> warnings.filterwarnings("error", category=lora.LoraWarning)  # to stop where there is one
    """


def short(value: Any) -> str:
    """What a file says, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
