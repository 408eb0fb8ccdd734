"""The signature of an adapted function: the function's own, with one more argument."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.core.adapter import Adapter


def with_signature(apply: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """Give `apply` the signature of `fn` with one more argument, for `jax.jit(apply, static_argnames=...)`."""
    del apply.__wrapped__  # type: ignore[attr-defined]
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some callables written in C have none
        return apply
    first, *rest = signature.parameters.values()
    if first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        params = first.replace(kind=first.POSITIONAL_ONLY, default=first.empty)
        name = "adapters"
        while name in signature.parameters:  # an argument of `fn`: of `lora_apply(f)` it is the inner adapters
            name = f"outer_{name}"
        adapters = inspect.Parameter(name, first.POSITIONAL_ONLY, annotation=Mapping[str, Adapter])
        apply.__signature__ = signature.replace(parameters=[params, adapters, *rest])  # type: ignore[attr-defined]
    return apply
