"""Trace a function of parameters to a jaxpr, once for each set of shapes."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from lora_jax.core._compat import open_jaxpr
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.transform.adapted_weight import plain
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.packed_inputs import as_constant, check_packed
from lora_jax.transform.static_arguments import Static


@dataclass(frozen=True)
class Program:
    """A traced function, and the arrays that it was traced for."""

    jaxpr: Any
    closed_over: list[Any]  # its first arguments
    names: list[str]  # of the parameters
    arrays: list[Any]  # the parameters, then the other arguments; what is no array was kept as it is
    out_tree: PyTreeDef

    def run(self, interpreter: Interpreter, arrays: Sequence[Any], adapt: Callable[[str, Any], Any]) -> Any:
        """Return the function's result for these arrays, with `adapt(name, array)` in the place of each parameter."""
        n = len(self.names)
        weights = [as_constant(name, w) if is_packed(w) else w for name, w in zip(self.names, arrays[:n], strict=True)]
        values = [*self.closed_over, *map(adapt, self.names, weights), *arrays[n:]]
        jaxpr, consts = open_jaxpr(self.jaxpr)
        out = interpreter.evaluate(jaxpr, consts, values)
        return jax.tree.unflatten(self.out_tree, [plain(o, "the function returns it") for o in out])

    def is_parameter(self) -> list[bool]:
        """Return for each input of the jaxpr whether it is a parameter."""
        n = len(self.names)
        return [False] * len(self.closed_over) + [True] * n + [False] * (len(self.arrays) - n)


def _abstract(array: Any) -> Any:
    """Return what the function is traced with: the shape of a packed weight, of which it knows nothing."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype) if is_packed(array) else array


def tracer(fn: Callable[..., Any]) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Program]:
    """Return `trace(params, args, kwargs) -> Program`. Tracing, and its cache, are those of `jax.jit`.

    A float among the arguments is traced as JAX does, with a weak dtype, so that another one is no other program. It is
    kept as it is for a function that looks at the number, which is found out by trying.
    """
    looks_at_floats = False

    @functools.partial(jax.jit, static_argnums=0)
    def call(static: Static, *arrays: Any) -> Any:
        params, args, kwargs = static.fill(arrays)
        return fn(params, *args, **kwargs)

    def trace(params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        names, weights, tree = flatten_with_names(params)
        for name, weight in zip(names, weights, strict=True):
            if is_packed(weight):
                check_packed(name, weight)
        others, others_tree = jax.tree.flatten((args, kwargs))
        nonlocal looks_at_floats
        floats = [type(leaf) in (float, complex) for leaf in others]
        if any(floats) and not looks_at_floats:
            arrays = [jnp.asarray(o) if is_float else o for o, is_float in zip(others, floats, strict=True)]
            with contextlib.suppress(
                TypeError, ValueError, AttributeError
            ):  # what has another reason comes again below
                return program(names, weights, tree, arrays, others_tree)
        found = program(names, weights, tree, others, others_tree)
        looks_at_floats = looks_at_floats or any(floats)
        return found

    def program(names: list[str], weights: list[Any], tree: Any, others: list[Any], others_tree: Any) -> Program:
        leaves = [*weights, *others]
        arrays = [jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves if is_array(leaf)]
        with jax.disable_jit(False):  # the program is wanted as it is, scans and all
            static, shapes = Static.of(leaves, (tree, others_tree)), list(map(_abstract, arrays))
            traced = call.trace(static, *shapes)
            # Values of an outer trace that `fn` closes over have become the first arguments.
            lifted = len(traced.jaxpr.in_avals) - len(arrays)
            closed_over = open_jaxpr(jax.make_jaxpr(call, static_argnums=0)(static, *shapes))[1] if lifted else []
        of_arrays = [name for name, leaf in zip(names, weights, strict=True) if is_array(leaf)]
        return Program(traced.jaxpr, closed_over, of_arrays, arrays, jax.tree.structure(traced.out_info))

    return trace
