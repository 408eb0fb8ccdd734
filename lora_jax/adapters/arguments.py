"""Checks of the arguments of rules, which run when a rule is made."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import LoraError


def check_rank(name: str, rank: Any) -> None:
    """Raise if a rank is neither a whole number of at least 1 nor a function."""
    if not callable(rank) and (isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1):
        raise LoraError(f"{name}(rank={rank!r}): the rank is a whole number of at least 1, for example 8.")


def check_dtype(name: str, dtype: Any) -> None:
    """Raise if a dtype is no floating one."""
    if not _is_floating(dtype):
        raise LoraError(f"{name}(dtype={dtype!r}): adapters are trained, give a floating dtype such as jnp.float32.")


def check_stack(name: str, stack: Any) -> tuple[int, ...] | None:
    """Return axes of a weight as a tuple; None for None. Raise if they are no whole numbers, or repeat."""
    if stack is None:
        return None
    given = tuple(stack) if isinstance(stack, list | tuple) else (stack,)
    if any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in given) or len(set(given)) < len(given):
        raise LoraError(f"{name}(stack={stack!r}): the stack is an axis of the weight, such as 0, or several, (0, 1).")
    return tuple(map(int, given))


def rank_above(rank: Any, d: int, k: int) -> str | None:
    """Return what is wrong with a rank for d inputs and k outputs; None if nothing is."""
    return f"rank {rank} is above min({d}, {k}), give it at most {min(d, k)}" if rank > min(d, k) else None


def is_usable_alpha(alpha: Any, rank: Any) -> bool:
    """Return whether alpha / rank is a scale that fp32 can hold, other than 0."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.number):
        return False
    scale = abs(float(alpha)) / rank
    return float(jnp.finfo(jnp.float32).tiny) <= scale <= float(jnp.finfo(jnp.float32).max)  # NaN is neither


def _is_floating(dtype: Any) -> bool:
    try:
        return dtype is not None and bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:  # no name of a dtype
        return False
