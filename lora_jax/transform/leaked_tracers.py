"""What to say of a value that was kept beyond the end of the trace that it belongs to."""

from typing import Any

import jax

from lora_jax.core.paths import flatten_with_names


def describe_leak(params: Any, adapters: Any, args: Any, kwargs: Any) -> str:
    """Return the message for an error of JAX: which argument is a value of a trace that has ended, and the mend."""
    names, leaves, _ = flatten_with_names({"params": params, "adapters": adapters, "args": args, "kwargs": kwargs})
    for name, leaf in zip(names, leaves, strict=True):
        try:
            if isinstance(leaf, jax.core.Tracer):
                _ = leaf + 0
        except jax.errors.UnexpectedTracerError:
            return (
                f"{name!r} is a value from inside another jit, grad, vmap or scan, kept beyond its end: return it from "
                "there, or pass the array that it was made from."
            )
    return (
        "the function closes over a value from inside another jit, grad, vmap or scan, kept beyond its end: pass that "
        "value to the function as an argument."
    )
