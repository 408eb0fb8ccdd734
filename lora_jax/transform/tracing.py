"""Trace a function of parameters to a jaxpr, once for each set of shapes."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from lora_jax.core._compat import open_jaxpr
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.transform.adapted_weight import plain
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.packed_inputs import as_constant, check_packed


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


@dataclass(frozen=True)
class _Static:
    """The arguments without their arrays. A trace is valid for equal ones and equal shapes."""

    trees: tuple[PyTreeDef, PyTreeDef]  # of the parameters, and of the rest
    key: tuple[Any, ...]  # of each leaf; None stands for an array
    leaves: tuple[Any, ...] = field(compare=False)

    @classmethod
    def of(cls, leaves: Sequence[Any], trees: tuple[PyTreeDef, PyTreeDef]) -> "_Static":
        return cls(trees, tuple(map(_key, leaves)), tuple(None if is_array(leaf) else leaf for leaf in leaves))

    def fill(self, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if key is None else leaf for key, leaf in zip(self.key, self.leaves, strict=True)]
        params, others = self.trees
        n = params.num_leaves
        return params.unflatten(filled[:n]), *others.unflatten(filled[n:])


def _key(leaf: Any) -> Any:
    """Return a key that is equal for the same leaf only: 1, 1.0 and True differ, so do 0.0 and -0.0; NaN equals NaN."""
    if is_array(leaf):
        return None
    if isinstance(leaf, float | complex):
        return type(leaf), repr(leaf)
    try:
        hash(leaf)
    except TypeError:
        raise LoraError(
            f"an argument holds a {type(leaf).__name__}, which is neither an array nor hashable: "
            "pass it as a jax.Array, or bind it with functools.partial before lora_apply."
        ) from None
    return type(leaf), leaf


def _abstract(array: Any) -> Any:
    """Return what the function is traced with: the shape of a packed weight, of which it knows nothing."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype) if is_packed(array) else array


def tracer(fn: Callable[..., Any]) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Program]:
    """Return `trace(params, args, kwargs) -> Program`. Tracing, and its cache, are those of `jax.jit`."""

    @functools.partial(jax.jit, static_argnums=0)
    def call(static: _Static, *arrays: Any) -> Any:
        params, args, kwargs = static.fill(arrays)
        return fn(params, *args, **kwargs)

    def trace(params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        names, weights, tree = flatten_with_names(params)
        for name, weight in zip(names, weights, strict=True):
            if is_packed(weight):
                check_packed(name, weight)
        others, others_tree = jax.tree.flatten((args, kwargs))
        leaves = [*weights, *others]
        arrays = [jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves if is_array(leaf)]
        with jax.disable_jit(False):  # the program is wanted as it is, scans and all
            static, shapes = _Static.of(leaves, (tree, others_tree)), list(map(_abstract, arrays))
            traced = call.trace(static, *shapes)
            # Values of an outer trace that `fn` closes over have become the first arguments.
            lifted = len(traced.jaxpr.in_avals) - len(arrays)
            closed_over = open_jaxpr(jax.make_jaxpr(call, static_argnums=0)(static, *shapes))[1] if lifted else []
        of_arrays = [name for name, leaf in zip(names, weights, strict=True) if is_array(leaf)]
        return Program(traced.jaxpr, closed_over, of_arrays, arrays, jax.tree.structure(traced.out_info))

    return trace
