"""The one exception of the library."""


class LoraError(ValueError):
    """Something does not fit. The message names the path, what was found, what was expected and the mend."""
