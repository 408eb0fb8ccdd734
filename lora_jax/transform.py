"""`lora_apply`: any function of parameters becomes the same function with adapters beside the parameters."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._compat import vary, varying_axes
from lora_jax.adapters.base import Adapter
from lora_jax.errors import LoraError
from lora_jax.fallback import Materialize, Patterns
from lora_jax.interpreter import Interpreter
from lora_jax.kernel import Kernel
from lora_jax.packed import is_packed
from lora_jax.paths import flatten_with_names, is_array, nearest
from lora_jax.program import tracer


def lora_apply(fn: Callable[..., Any], *, materialize: Patterns = False) -> Callable[..., Any]:
    """`fn(params, *args, **kwargs)` -> `apply(params, adapters, *args, **kwargs)`, for any traceable `fn`.

    Every adapted weight W takes part in matrix products as W' = W + (alpha / r) A B, computed as
    x @ W + (alpha / r) (x @ A) @ B: neither W' nor A B is formed. `apply` is an ordinary JAX function of two pytrees:
    jit it, differentiate it with respect to the second, vmap over a stack of adapters. The program is traced once
    for each set of shapes, so make `apply` once and call it often.

    Args:
        fn: any function whose first argument is a pytree of parameters. Other arguments may be arrays, which are
            traced, or anything hashable (flags, strings, None), which is kept.
        materialize: where W' may be formed at its full size, because the program does something else to the weight
            than multiply by it: True for all weights, or regular expressions for whole paths.

    Raises:
        LoraError: (when called) adapters for paths that the parameters do not have, or of another shape; an adapted
            weight in an operation that cannot stay factored, with path, operation and source line.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def model(params, x):
    ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
    >>> params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
    >>> x = jnp.ones((3, 4))
    >>> adapters = lora.init(jax.random.key(0), params, lora.plan(model, params, x, rules={".*": lora.Lora(rank=2)}))
    >>> apply = lora.lora_apply(model)
    >>> bool(jnp.all(apply(params, adapters, x) == model(params, x)))      # a fresh adapter changes nothing
    True
    """
    trace, interpreter, fallback = tracer(fn), Interpreter(rebuilt={}), Materialize.of(materialize)

    @functools.wraps(fn)
    def apply(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2:
            raise LoraError(
                f"apply(params, adapters, ...) takes parameters and adapters by position, found {len(args)} positional "
                f"arguments and the keywords {list(kwargs)}. If the function takes its parameters elsewhere, bring "
                "them to the front: lora_apply(lambda params, *args, **kw: fn(*args, variables=params, **kw))."
            )
        params, adapters, *rest = args
        names, leaves, _ = flatten_with_names(params)
        check_adapters(adapters, names, leaves)
        if not adapters and not any(map(is_packed, leaves)):
            return fn(params, *rest, **kwargs)

        def adapt(name: str, leaf: Any) -> Any:
            return Kernel.of(leaf, adapters.get(name), name, fallback)

        try:
            program = trace(*_as_varying_as(adapters, (params, tuple(rest), kwargs)))
            return program.run(interpreter, program.arrays, adapt)
        except jax.errors.UnexpectedTracerError as error:
            raise LoraError(_escaped(params, adapters, rest, kwargs)) from error

    return _with_signature(apply, fn)


def _as_varying_as(adapters: Any, args: Any) -> Any:
    """In `shard_map`: with adapters of its own, all that a device computes may differ from what the others do."""
    axes = sorted({axis for array in jax.tree.leaves(adapters) for axis in varying_axes(array)})
    return jax.tree.map(lambda leaf: vary(leaf, axes) if is_array(leaf) else leaf, args) if axes else args


def _escaped(params: Any, adapters: Any, args: Any, kwargs: Any) -> str:
    """Which argument is a value of a trace that has ended."""
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


def _with_signature(apply: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`'s signature and one more argument, for whoever goes by names: `jax.jit(apply, static_argnames=...)`."""
    del apply.__wrapped__  # type: ignore[attr-defined]
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some callables written in C have none
        return apply
    first, *rest = signature.parameters.values()
    if first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        params = first.replace(kind=first.POSITIONAL_ONLY, default=first.empty)
        adapters = inspect.Parameter("adapters", first.POSITIONAL_ONLY, annotation=Mapping[str, Adapter])
        apply.__signature__ = signature.replace(parameters=[params, adapters, *rest])  # type: ignore[attr-defined]
    return apply


def check_adapters(adapters: Mapping[str, Adapter], names: list[str], leaves: list[Any]) -> None:
    """Every adapter has its weight, and fits it.

    Raises:
        LoraError: the adapters are no `{path: adapter}`; a path is not among the parameters, or is no array of floats
            there; shapes differ.
    """
    if not isinstance(adapters, Mapping):
        raise LoraError(
            f"adapters are a dict {{path: adapter}} as lora.init makes it, found {type(adapters).__name__}."
        )
    weights = dict(zip(names, leaves, strict=True))
    for path, adapter in adapters.items():
        if not isinstance(adapter, Adapter):
            raise LoraError(
                f"adapters[{path!r}] is a {type(adapter).__name__}, expected an adapter as lora.init makes it."
            )
        if path not in weights:
            near = ", ".join(map(repr, nearest(path, names)))
            raise LoraError(
                f"there is an adapter for {path!r}, but the parameters have no such path; the nearest are {near}. "
                "These adapters belong to another model: make new ones with lora.plan and lora.init."
            )
        weight = weights[path]
        if not (is_array(weight) and jnp.issubdtype(weight.dtype, jnp.floating)):
            found = weight.dtype if is_array(weight) else type(weight).__name__
            raise LoraError(f"there is an adapter for {path!r}, but that is {found}, expected an array of floats.")
        dtypes = sorted({str(a.dtype) for a in jax.tree.leaves(adapter) if _is_counted(a.dtype)})
        if dtypes:
            raise LoraError(
                f"the adapter for {path!r} holds {', '.join(dtypes)} arrays, expected floats: cast them back with "
                "jax.tree.map(lambda array: array.astype(jnp.float32), adapters)."
            )
        try:
            found, expected = adapter.kernel_shape(), tuple(weight.shape)
        except LoraError as error:
            raise LoraError(f"the adapter for {path!r} {error} lora.init makes one that fits.") from None
        if found != expected:
            raise LoraError(
                f"the adapter for {path!r} fits a weight of shape {list(found)}, "
                f"but the parameter has {list(expected)}. "
                "These adapters belong to another model: make new ones with lora.plan and lora.init."
            )


def _is_counted(dtype: Any) -> bool:
    return not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jax.dtypes.prng_key))
