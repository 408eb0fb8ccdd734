"""Find of what the inputs of products can be made again, for `lora_apply(fn, keep="thin")`.

An input x of a product with an adapted weight is followed back through elementwise operations to arrays that a training
step keeps with frozen weights too: operands of nonlinear operations, such as the residual stream, which a norm squares,
or gate and up, which are multiplied. Sums over an axis are where that ends, as their results are small, and so are
products, which are never made again.
"""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.core._compat import Jaxpr, JaxprEqn, Literal, Operation, Var, open_jaxpr, scan_groups
from lora_jax.core.recent import Recent
from lora_jax.core.remade import Remade, itself, numbers
from lora_jax.core.targets import NOTHING, Kept
from lora_jax.transform.adapted_weight import AdaptedWeight

ELEMENTWISE = {
    *(
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
    ),
    *(
        "convert_element_type",
        "copy",
        "cos",
        "cosh",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
    ),
    *("ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg"),
    *("nextafter", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh"),
    *("sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
    *("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"),  # and what only moves numbers
}
PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
CALLS = {"jit", "pjit", "custom_jvp_call"}
REMATS = {"checkpoint", "remat2"}
LOOPS = {"cond", "custom_vjp_call", "scan", "while"}
# What a derivative is computed from: of these operations their operands, of these their results, and of those that are
# linear in two operands one for the other.
OPERANDS = {
    *(
        "abs",
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "clamp",
        "cos",
        "cosh",
        "erf",
        "erf_inv",
        "erfc",
    ),
    *("integer_pow", "log", "log1p", "max", "min", "pow", "select_n", "sin", "sinh", "square", "tan", *REMATS, *LOOPS),
}
RESULTS = {"cbrt", "div", "exp", "exp2", "expm1", "logistic", "rsqrt", "sqrt", "tanh"}
BILINEAR = {*PRODUCTS, "mul", "div"}  # div is linear in one alone, and computed from both
PROGRAMS_KEPT = 64  # whose analysis is remembered: one for each set of shapes
SMALL = 8  # an array with an eighth of the numbers costs nothing to speak of


class Known(NamedTuple):
    """A number in a program, and what says whether another one is the same."""

    value: Any
    key: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Remake:
    """A program of elementwise operations. Two are equal if they do the same, so that equal layers share a trace."""

    steps: tuple[tuple[Operation, tuple[int | Known, ...]], ...]  # each with its operands: earlier values, or numbers
    result: int

    def __call__(self, *sources: jax.Array) -> jax.Array:
        values = list(sources)
        for operation, operands in self.steps:
            values += operation.bind(*[o.value if isinstance(o, Known) else values[o] for o in operands])
        return values[self.result]


class Origin(NamedTuple):
    """Of what an array can be made again, and how."""

    sources: tuple[Var, ...]
    make: Callable[..., jax.Array]


class Origins(NamedTuple):
    """Of what the two operands of a product can be made; a weight has none."""

    first: Origin | None
    second: Origin | None

    def all_sources(self) -> list[Var]:
        return [v for origin in self if origin is not None for v in origin.sources]

    def given(self, values: list[Any], read: Callable[[Any], Any]) -> list[Any]:
        """Return the operands, the weight with what x can be made of, if x is traced; `read` gives values."""
        weight, other = (0, 1) if isinstance(values[0], AdaptedWeight) else (1, 0)
        origin = self[other]
        if origin is None or not isinstance(values[other], jax.core.Tracer):
            return values
        sources = tuple(map(read, origin.sources))
        if any(isinstance(source, AdaptedWeight) for source in sources):
            return values
        x = Remade(values[other], sources, origin.make)
        return [dataclasses.replace(v, x=x) if i == weight else v for i, v in enumerate(values)]


class Remakes:
    """What the inputs of all products of a program can be made of, in its calls and loops too.

    Inside a `jax.checkpoint` of the program there is nothing to find: what that does not save is made again as a whole.

    Args:
        jaxpr: the program.
        is_parameter: for each of its inputs whether it is a weight or another frozen array.
    """

    def __init__(self, jaxpr: Any, is_parameter: Sequence[bool]) -> None:
        self.flows: dict[int, _Flow] = {}
        self.around: dict[int, _Flow | None] = {}  # by the id of an equation; None inside a remat
        self.found: dict[int, dict[int, Origins]] = {}
        self.remats = 0  # around the jaxpr that is followed
        self.lock = threading.Lock()  # several threads may call one function
        self._follow(jaxpr, [_Depends(p, not p) for p in is_parameter])
        self.arguments = set(open_jaxpr(jaxpr)[0].invars)  # which the caller holds

    def of(self, jaxpr: Jaxpr) -> dict[int, Origins]:
        """Return {number of an equation: of what its operands can be made}, for one of its jaxprs."""
        if id(jaxpr) not in self.flows:
            return {}
        with self.lock:
            if id(jaxpr) not in self.found:
                self.found[id(jaxpr)] = self.flows[id(jaxpr)].origins()
            return self.found[id(jaxpr)]

    def kept(self, eqn: JaxprEqn, x: Any) -> Kept | None:
        """Return the bytes that a derivative keeps of a product's input x; None inside a `jax.checkpoint`.

        A product in what is not followed, such as a loss over a vocabulary, keeps x.
        """
        whole = numbers(x.shape) * x.dtype.itemsize
        if id(eqn) not in self.around:
            return Kept(whole, whole)
        flow = self.around[id(eqn)]
        if flow is None:
            return None
        inputs = [v for v in eqn.invars[:2] if not isinstance(v, Literal) and _numbers(v) == numbers(x.shape)]
        found = next((v for v in inputs if flow.of_all([v])[0].on_inputs), None)
        if found in self.arguments:
            return NOTHING
        return Kept(whole, whole) if found is None else flow.kept_of(found)

    def _follow(self, jaxpr: Any, inputs: Sequence["_Depends"]) -> list["_Depends"]:
        """Note on what the values of a jaxpr depend, and return that of its outputs."""
        jaxpr, _ = open_jaxpr(jaxpr)
        earlier = self.flows.get(id(jaxpr))
        if earlier is not None:  # one function that is called twice
            inputs = [a | b for a, b in zip(inputs, earlier.inputs, strict=True)]
            if inputs == earlier.inputs:
                return earlier.of_all(jaxpr.outvars)
        flow = self.flows[id(jaxpr)] = _Flow(jaxpr, list(inputs))
        if self.remats:
            self.found[id(jaxpr)] = {}
        for eqn in jaxpr.eqns:
            self.around[id(eqn)] = None if self.remats else flow
            given = flow.of_all(eqn.invars)
            results = [_any(given)] * len(eqn.outvars)
            is_remat = eqn.primitive.name in REMATS
            self.remats += is_remat
            for inner, operands in _bodies(eqn, given):
                out = self._follow(inner, operands)
                if eqn.primitive.name == "scan":  # what one step hands to the next may depend on more
                    n_consts, n_carry = scan_groups(eqn)
                    carry = [a | b for a, b in zip(operands[n_consts:], out[:n_carry], strict=False)]
                    out = self._follow(inner, [*operands[:n_consts], *carry, *operands[n_consts + n_carry :]])
                if eqn.primitive.name in {*CALLS, *REMATS, "scan"}:
                    results = out
            self.remats -= is_remat
            flow.depends.update(zip(eqn.outvars, results, strict=True))
        return flow.of_all(jaxpr.outvars)


class Analyses:
    """The analyses of the programs that one `lora_apply` has seen last, so that an eager call finds its own."""

    def __init__(self) -> None:
        self._recent: Recent[tuple[Any, Remakes]] = Recent(PROGRAMS_KEPT)

    def of(self, jaxpr: Any, is_parameter: Sequence[bool]) -> Remakes:
        """Return the analysis of a program, which is kept beside it so that its id is not used again."""
        key = id(jaxpr), tuple(is_parameter)
        return self._recent.get(key, lambda: (jaxpr, Remakes(jaxpr, is_parameter)))[1]


class _Depends(NamedTuple):
    """On what a value depends. One that depends on both is an activation, through which derivatives go."""

    on_parameters: bool = False
    on_inputs: bool = False

    def __or__(self, other: Any) -> "_Depends":
        return _Depends(self.on_parameters or other.on_parameters, self.on_inputs or other.on_inputs)


def _any(values: Sequence[_Depends]) -> _Depends:
    return _Depends(any(v.on_parameters for v in values), any(v.on_inputs for v in values))


def _bodies(eqn: JaxprEqn, given: list[_Depends]) -> list[tuple[Any, list[_Depends]]]:
    """Return the programs inside an equation, each with what its inputs depend on."""
    name, params = eqn.primitive.name, eqn.params
    if name in {*CALLS, *REMATS, "scan", "shard_map"}:
        return [(_called(eqn), given)]
    if name == "while":
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        carry = [_any(given)] * (len(given) - n_cond - n_body)
        return [(params["body_jaxpr"], [*given[n_cond : n_cond + n_body], *carry])]
    return [(branch, given[1:]) for branch in params["branches"]] if name == "cond" else []


def _called(eqn: JaxprEqn) -> Jaxpr:
    jaxpr, _ = open_jaxpr(eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"])
    return jaxpr


def _is_elementwise(eqn: JaxprEqn) -> bool:
    if eqn.primitive.name in CALLS:  # small functions, such as `jax.nn.silu`, count as one operation
        return all(map(_is_elementwise, _called(eqn).eqns))
    return eqn.primitive.name in ELEMENTWISE


def _numbers(v: Any) -> int:
    return numbers(v.aval.shape)


def _bytes(v: Any) -> int:
    return _numbers(v) * int(v.aval.dtype.itemsize)


class _Flow:
    """The data flow of one jaxpr, whose inputs depend on parameters or not."""

    def __init__(self, jaxpr: Jaxpr, inputs: list[_Depends]) -> None:
        self.jaxpr, self.inputs = jaxpr, inputs
        self.depends: dict[Var, _Depends] = dict(zip(jaxpr.invars, inputs, strict=True))
        self.depends |= dict.fromkeys(jaxpr.constvars, _Depends(on_parameters=True))
        self.made_at = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
        self.chosen: dict[Var, tuple[Var, ...]] = {}

    def of_all(self, values: Sequence[Any]) -> list[_Depends]:
        return [_Depends() if isinstance(v, Literal) else self.depends[v] for v in values]

    def origins(self) -> dict[int, Origins]:
        """Return {number of a product: of what its operands are best made again}."""
        self._choose()
        products = [(i, eqn) for i, eqn in enumerate(self.jaxpr.eqns) if eqn.primitive.name in PRODUCTS]
        return {i: Origins(*map(self._origin, eqn.invars[:2])) for i, eqn in products}

    def kept_of(self, x: Var) -> Kept:
        """Return the bytes that a derivative keeps for an input of a product alone, as it is or as its sources."""
        self._choose()
        return Kept(*(self._for_this(values, _bytes) for values in ((x,), self._sources(x))))

    def _choose(self) -> None:
        """Choose of what each value is best made, once."""
        if not self.chosen:
            for v in self.made_at:  # in the program's order, so that the recursion of `_sources` ends at once
                self._sources(v)

    def _origin(self, v: Any) -> Origin | None:
        return Origin(self._sources(v), self._make(v)) if self._is_activation(v) else None

    def _is_activation(self, v: Any) -> bool:
        return self.of_all([v]) == [_Depends(True, True)]

    @functools.cached_property
    def kept(self) -> set[Var]:
        """The values of which a derivative is computed, where weights are frozen."""
        kept: list[Any] = []
        for eqn in self.jaxpr.eqns:
            name = eqn.primitive.name
            if name in BILINEAR:
                first, second = eqn.invars[:2]
                kept += [first] * self._is_activation(second) + [second] * self._is_activation(first)
            if name in OPERANDS:
                kept += filter(self._is_activation, eqn.invars)
            if name in RESULTS:
                kept += eqn.outvars
            if name in CALLS:
                inner = _Flow(_called(eqn), self.of_all(eqn.invars))
                for e in inner.jaxpr.eqns:
                    inner.depends.update(dict.fromkeys(e.outvars, _any(inner.of_all(e.invars))))
                inside = inner.kept
                ends = zip([*eqn.invars, *eqn.outvars], [*inner.jaxpr.invars, *inner.jaxpr.outvars], strict=True)
                kept += [v for v, u in ends if not isinstance(u, Literal) and u in inside]
        return {v for v in kept if not isinstance(v, Literal)}

    def _sources(self, v: Var) -> tuple[Var, ...]:
        """Return the arrays that v is best made of; v itself, if that is better kept.

        Those of which the fewest numbers are kept for this alone. Of equally good ones the first in the program, as
        other inputs are made of them too.
        """
        if v not in self.chosen:
            self.chosen[v] = (v,)
            eqn = self.jaxpr.eqns[self.made_at[v]] if v in self.made_at else None
            if eqn is not None and _is_elementwise(eqn):
                inputs = [u for u in eqn.invars if not isinstance(u, Literal)]
                earlier = tuple(dict.fromkeys(itertools.chain.from_iterable(map(self._sources, inputs))))
                little = _numbers(v) // SMALL
                more = self._for_this(earlier) - self._for_this((v,))
                larger = sum(map(_numbers, earlier)) - _numbers(v)
                if more < -little or (more <= little and larger <= little):
                    self.chosen[v] = earlier
        return self.chosen[v]

    def _for_this(self, values: Sequence[Var], measure: Callable[[Var], int] = _numbers) -> int:
        """Return how many numbers, or bytes, would be kept for this alone."""
        return sum(measure(v) for v in values if v not in self.kept and self._is_activation(v))

    def _make(self, v: Var) -> Callable[..., jax.Array]:
        """Return the program that makes v of its sources."""
        if self._sources(v) == (v,):
            return itself
        places = {source: i for i, source in enumerate(self._sources(v))}
        needed: set[int] = set()  # numbers of equations
        rest: list[Any] = [v]
        while rest:  # and not by recursion: chains may be longer than Python's stack
            u = rest.pop()
            if not isinstance(u, Literal) and u not in places and self.made_at[u] not in needed:
                needed.add(self.made_at[u])
                rest += self.jaxpr.eqns[self.made_at[u]].invars

        def operand(u: Any) -> int | Known:
            if isinstance(u, Literal):
                return Known(u.val, f"{u.aval} {np.asarray(u.val).tobytes()!r}")
            return places[u]

        steps: list[tuple[Operation, tuple[int | Known, ...]]] = []
        for eqn in (self.jaxpr.eqns[i] for i in sorted(needed)):
            steps.append((Operation.of(eqn), tuple(map(operand, eqn.invars))))
            places.update(zip(eqn.outvars, itertools.count(len(places))))
        return Remake(tuple(steps), places[v])
