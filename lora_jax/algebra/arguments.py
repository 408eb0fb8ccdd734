"""What the ways to merge adapters are given: names of methods, densities, majorities."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.core.argument_checks import check_key
from lora_jax.core.errors import LoraError

MAJORITIES = ("total", "frequency")


def check_method(method: Any, methods: Sequence[str], others: Sequence[str], compat: Any) -> None:
    """Raise unless there is such a method; a name of the other side is told which side it is on."""
    if method in methods:
        return
    hint = ""
    if method in others:
        hint = ", which has compat='peft'" if compat is None else "; leave compat out for this one"
    raise LoraError(f"compose(method={method!r}): expected one of {', '.join(methods)}{hint}.")


def check_options(
    method: str, density: Any, majority: Any, key: Any, *, sparse: bool, elects: bool, draws: bool
) -> None:
    """Raise unless the options are those of a method.

    Args:
        sparse: whether it takes a density.
        elects: whether it elects signs.
        draws: whether it draws random numbers.
    """
    call = f"compose(method={method!r}"
    if sparse != (density is not None):
        raise LoraError(
            f"{call}) keeps a share of the entries of each change: give density=0.5, or another share."
            if sparse
            else f"{call}, density={density!r}): this method keeps all entries; leave density out."
        )
    if sparse and not (isinstance(density, int | float | np.number) and 0 < density <= 1):
        raise LoraError(f"{call}, density={density!r}): expected a share above 0 and at most 1, such as 0.5.")
    if majority not in MAJORITIES:
        raise LoraError(f"{call}, majority={majority!r}): expected 'total' or 'frequency'.")
    if majority != "total" and not elects:
        raise LoraError(f"{call}, majority={majority!r}): this method elects no signs; leave majority out.")
    if draws and key is None:
        raise LoraError(f"{call}) draws random numbers: give it key=jax.random.key(0).")
    if key is not None:
        check_key("compose(parts, method, key=key)", key)
