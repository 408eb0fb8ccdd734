"""The only file that imports `jax.extend`, with one name for each thing that JAX's releases move or rename.

Tested on JAX 0.10.2 and 0.12.0. Everything used is a public name of `jax.extend`, but for one of `jax._src`, which is
imported where it is used: `coordination_client`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun
from jax.extend.core.primitives import jit_p, remat_p

__all__ = [
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Operation",
    "Primitive",
    "Var",
    "as_differentiated",
    "at_equation",
    "bind",
    "called_function",
    "coordination_client",
    "describe",
    "jaxpr_as_fun",
    "jit_p",
    "open_jaxpr",
    "remat_p",
    "scan_groups",
    "shape_like",
    "source_line",
    "vary",
    "varying_axes",
]


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, list[Any]]:
    """Return a jaxpr and its constants, which before JAX 0.12 only a `ClosedJaxpr` has."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def scan_groups(eqn: JaxprEqn) -> tuple[int, int]:
    """Return how many operands of a scan are constants, and how many its carry; the rest are scanned over.

    JAX 0.11 replaced `num_consts` and `num_carry` by one tree, `ft_in`, of three groups.
    """
    if "ft_in" in eqn.params:
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def varying_axes(array: Any) -> frozenset[str]:
    """Return the axes of a `shard_map` along which an array differs between devices. JAX 0.10 moved them."""
    kind = jax.typeof(array)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else kind.vma)


def vary(array: Any, axes: Iterable[str]) -> Any:
    """Return an array, in a `shard_map`, as one that may differ between devices along these axes."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def shape_like(array: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Return another shape, of an array's dtype and, in a `shard_map`, with its varying axes."""
    kind = jax.typeof(array)
    return jax.ShapeDtypeStruct(shape, kind.dtype, manual_axis_type=kind.mat)


@dataclass(frozen=True)
class Operation:
    """A primitive and its parameters: equal for equations that compute the same."""

    primitive: Any
    key: tuple[tuple[str, Any], ...]  # the parameters, with 0.0 and -0.0 apart and NaN equal to NaN
    items: tuple[tuple[str, Any], ...] = field(compare=False)

    @classmethod
    def of(cls, eqn: JaxprEqn) -> "Operation":
        items = tuple(sorted(eqn.params.items()))
        return cls(eqn.primitive, tuple((name, _exactly(value)) for name, value in items), items)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        return dict(self.items)

    def bind(self, *args: Any) -> list[Any]:
        """Run the primitive; the results are always a list."""
        out = self.primitive.bind(*args, **self.primitive.get_bind_params(self.params))
        return list(out) if self.primitive.multiple_results else [out]


def _exactly(value: Any) -> Any:
    return (type(value), repr(value)) if isinstance(value, float | complex | np.inexact) else value


def bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Run one equation as it stands.

    Under a trace it is a jitted call, the same for equal equations, which JAX inlines. So what JAX derives of one
    operation, its linearization above all, it finds again for the next of the kind, as for the functions of jax.numpy.
    """
    operation = Operation.of(eqn)
    if eqn.primitive.name in _CALLS or not any(isinstance(arg, jax.core.Tracer) for arg in args):
        return operation.bind(*args)
    try:
        run = _jitted(operation)
    except TypeError:  # parameters that cannot be hashed
        return operation.bind(*args)
    return run(*args)


@functools.lru_cache(maxsize=4096)
def _jitted(operation: Operation) -> Any:
    return jax.jit(operation.bind, inline=True)


def as_differentiated(run: Callable[..., Any], *args: Any) -> Any:
    """Run a function that is one `jax.checkpoint`, as the part that is left of one after a derivative was taken.

    Only then does the compiler keep what it recomputes apart from what was computed before.
    """
    leaves, tree = jax.tree.flatten(args)
    program, out = jax.make_jaxpr(lambda *leaves: run(*jax.tree.unflatten(tree, leaves)), return_shape=True)(*leaves)
    jaxpr, consts = open_jaxpr(program)
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *leaves], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in jaxpr.eqns:
        params = eqn.params | ({"differentiated": True} if eqn.primitive is remat_p else {})
        env |= zip(eqn.outvars, Operation.of(eqn.replace(params=params)).bind(*map(read, eqn.invars)), strict=True)
    return jax.tree.unflatten(jax.tree.structure(out), [read(v) for v in jaxpr.outvars])


def called_function(eqn: JaxprEqn) -> str:
    """Return the name of the function that a `custom_jvp` is of."""
    jaxpr, _ = open_jaxpr(eqn.params["call_jaxpr"])
    return str(jaxpr.debug_info.func_name)


# Their parameters hold programs, for which JAX has caches of its own.
_CALLS = {"jit", "remat2", "checkpoint", "scan", "while", "cond", "shard_map", "custom_jvp_call", "custom_vjp_call"}


@contextlib.contextmanager
def at_equation(eqn: JaxprEqn) -> Iterator[None]:
    """Give whatever is traced inside the equation's own name scope, source line and mesh context."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    where = source_info_util.user_context(eqn.source_info.traceback, name_stack=names)
    token = _around.set((*_around.get(), eqn))
    try:
        with where, eqn.ctx.manager:
            yield
    finally:
        _around.reset(token)


_around: contextvars.ContextVar[tuple[JaxprEqn, ...]] = contextvars.ContextVar("equations around", default=())


def source_line(eqn: JaxprEqn) -> str:
    """Return the user's line that made an equation: `file.py:12:4 (function)`.

    The equations inside JAX's own functions have no such line; then it is the line of the call around them.
    """
    lines = (source_info_util.summarize(e.source_info) for e in (eqn, *reversed(_around.get())))
    return next((line for line in lines if line), "an unknown line")


def describe(eqn: JaxprEqn) -> str:
    """Return an equation as messages name it: `dot_general at model.py:12:4 (attention)`."""
    return f"`{eqn.primitive.name}` at {source_line(eqn)}"


def coordination_client() -> Any:
    """Return the client of the service that connects several processes; None for a process by itself.

    It passes texts from one process to another without a computation. JAX has no public name for it; other libraries
    that write files from several processes, orbax among them, take it from the same place.
    """
    from jax._src import distributed

    return distributed.global_state.client
