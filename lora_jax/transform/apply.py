"""`lora_apply`: any function of parameters becomes the same function with adapters beside the parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import jax

from lora_jax.core._compat import vary, varying_axes
from lora_jax.core.adapter import Adapter
from lora_jax.core.adapter_checks import check_adapters
from lora_jax.core.argument_checks import check_function
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.core.recent import Recent
from lora_jax.transform.adapted_weight import adapted
from lora_jax.transform.interpreter import CALLS_KEPT, Interpreter
from lora_jax.transform.leaked_tracers import describe_leak
from lora_jax.transform.materialize import Materialize, Patterns
from lora_jax.transform.per_example import has_examples, over_examples
from lora_jax.transform.remakes import Analyses
from lora_jax.transform.signatures import with_signature
from lora_jax.transform.tracing import tracer

Params = TypeVar("Params")
Rest = ParamSpec("Rest")
Out = TypeVar("Out")
Keep = Literal["thin", "inputs"]


def lora_apply(
    fn: Callable[Concatenate[Params, Rest], Out], *, keep: Keep = "inputs", materialize: Patterns = False
) -> Callable[Concatenate[Params, Mapping[str, Adapter], Rest], Out]:
    """Turn `fn(params, *args, **kwargs)` into `apply(params, adapters, *args, **kwargs)`, for any traceable `fn`.

    Every adapted weight W takes part in matrix products as W' = W + (alpha / r) A B, computed as
    x @ W + (alpha / r) (x @ A) @ B: neither W' nor A B is formed. `apply` is an ordinary JAX function of two pytrees:
    jit it, differentiate it with respect to the second, vmap over a stack of adapters. The program is traced once
    for each set of shapes, so make `apply` once and call it often.

    Args:
        fn: any function whose first argument is a pytree of parameters. Other arguments may be arrays, which are
            traced, or anything hashable (flags, strings, None), which is kept. Floats are traced as arrays are, and
            another one is no other program, unless `fn` looks at the number, as `if rate > 0` does.
        keep: what a derivative keeps for the gradient of A in each product x @ W'. "inputs": x, as JAX does. "thin": x
            is not kept where elementwise operations, norms and masks of dropout can make it again from arrays that the
            frozen model keeps anyway; products are never computed again. The numbers are the same up to rounding.
            Inside the function's own `jax.checkpoint` its policy decides, as ever. docs/memory.md has figures.
        materialize: where W' may be formed at its full size, because the program does something else to the weight
            than multiply by it: True for all weights, or regular expressions for whole paths.

    Returns:
        `apply(params, adapters, *args, **kwargs)`, which returns what `fn` does; `adapters` are `{path: adapter}`.

    Raises:
        LoraError: `keep` is neither of the two. When called: adapters for paths that the parameters do not have, or of
            another shape; an adapted weight in an operation that cannot stay factored, with path, operation and source
            line.

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
    check_function("lora_apply(fn)", "fn", fn)
    if keep not in ("thin", "inputs"):
        raise LoraError(f"lora_apply(keep={keep!r}): 'inputs' keeps x for the gradient of A, 'thin' makes it again.")
    trace, interpreter, fallback = tracer(fn), Interpreter(Recent(CALLS_KEPT)), Materialize.of(materialize)
    analyses = Analyses()

    @functools.wraps(fn)
    def apply(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2:
            raise LoraError(
                f"apply(params, adapters, ...) takes parameters and adapters by position, found {len(args)} positional "
                f"arguments and the keywords {list(kwargs)}. If the function takes its parameters elsewhere, bring "
                "them to the front: lora_apply(lambda params, *args, **kw: fn(*args, variables=params, **kw))."
            )
        params, adapters, *rest = args
        if has_examples(adapters):
            return over_examples(apply, params, adapters, rest, kwargs)
        names, leaves, _ = flatten_with_names(params)
        check_adapters(adapters, names, leaves)
        fallback.check(names)
        if not adapters and not any(map(is_packed, leaves)):
            return fn(params, *rest, **kwargs)

        def adapt(name: str, leaf: Any) -> Any:
            return adapted(leaf, adapters.get(name), name, fallback)

        try:
            program = trace(*_as_varying_as(adapters, (params, tuple(rest), kwargs)))
            remakes = analyses.of(program.jaxpr, program.is_parameter()) if keep == "thin" else None
            return program.run(dataclasses.replace(interpreter, remakes=remakes), program.arrays, adapt)
        except jax.errors.UnexpectedTracerError as error:
            raise LoraError(describe_leak(params, adapters, rest, kwargs)) from error

    return with_signature(apply, fn)


def _as_varying_as(adapters: Any, args: Any) -> Any:
    """Let arguments differ between the devices of a `shard_map` where the adapters do."""
    axes = sorted({axis for array in jax.tree.leaves(adapters) for axis in varying_axes(array)})
    return jax.tree.map(lambda leaf: vary(leaf, axes) if is_array(leaf) else leaf, args) if axes else args
