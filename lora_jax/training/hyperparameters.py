"""Learning rates, and the check of other numbers that an optimizer is made with."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_jax.core.errors import LoraError

LearningRate = float | Callable[[Any], Any]  # a number, or a schedule: steps taken -> learning rate


def check_positive(call: str, name: str, value: Any, usual: float) -> None:
    """Check that a hyperparameter is a finite number above 0; the message advises the usual value.

    Raises:
        LoraError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
        raise LoraError(f"{call}({name}={value!r}): expected a number above 0, such as {name}={usual}.")
