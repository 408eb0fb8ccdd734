"""Evaluate a jaxpr in which some values are adapted weights.

The loop is the one of JAX's "Writing custom interpreters" guide. Equations that see no adapted weight run as they
stand: whole scans, `custom_vjp` calls and nested jits among them, with the user's rules. Calls that do see one are
built again around the same loop.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.core._compat import Jaxpr, JaxprEqn, Literal, Var, at_equation, bind, called_function, jit_p, open_jaxpr
from lora_jax.core.recent import Recent
from lora_jax.transform.adapted_weight import AdaptedWeight
from lora_jax.transform.control_flow import CALLS, OWN_CALLS, Call
from lora_jax.transform.primitives import FROZEN, RULES, no_rule
from lora_jax.transform.remakes import REMATS, Remakes
from lora_jax.transform.together import Together

CALLS_KEPT = 4096  # jits and loops of all shapes that one `lora_apply` has seen
OWN_DERIVATIVE = "has a derivative rule of its own, which is stated for the whole weight"


@dataclass(frozen=True)
class Interpreter:
    """Evaluate jaxprs, and keep what was built for their calls.

    With `jitted_calls`, a second eager call finds its nested jits and loops already compiled. Without, each call of a
    body is traced by itself, so that a plan sees each.
    """

    jitted_calls: Recent[tuple[JaxprEqn, Callable[..., Any]]] | None
    remakes: Remakes | None = None  # of what inputs of products are made again, if they are not kept
    joins: bool = True  # whether weights that read the same x take their thin products together

    def evaluate(self, jaxpr: Jaxpr, consts: list[Any], args: Sequence[Any]) -> list[Any]:
        """Return the outputs of a jaxpr for these inputs; any input or output may be an `AdaptedWeight`."""
        env: dict[Var, Any] = {}
        last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, Literal)}
        origins = self.remakes.of(jaxpr) if self.remakes else {}
        together = Together(jaxpr.eqns if self.joins else ())
        last_use |= {v: max(i, last_use.get(v, i)) for i, origin in origins.items() for v in origin.all_sources()}
        last_use |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            values = [read(v) for v in eqn.invars]
            with at_equation(eqn):
                if any(isinstance(value, AdaptedWeight) for value in values):
                    values = origins[i].given(values, read) if i in origins else values
                    out = self._with_adapted(eqn, together.given(i, values, env))
                else:
                    out = FROZEN[name](eqn, *values) if (name := eqn.primitive.name) in FROZEN else bind(eqn, values)
            env.update(zip(eqn.outvars, out, strict=True))
            for v in (*eqn.invars, *eqn.outvars):  # an eager call holds no more than the program needs
                if not isinstance(v, Literal) and last_use.get(v, i) == i:
                    env.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def _with_adapted(self, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        calls = CALLS
        if name == "custom_jvp_call":
            name, calls = called_function(eqn), OWN_CALLS
        if name in calls:
            return self._kept(eqn, calls[name])(args)
        if eqn.primitive.name.startswith("custom_"):
            return no_rule(eqn, *args, why=OWN_DERIVATIVE)
        return RULES.get(name, no_rule)(eqn, *args)

    def _body(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        jaxpr, consts = open_jaxpr(jaxpr)
        return self.evaluate(jaxpr, consts, args)

    def _kept(self, eqn: JaxprEqn, call: Call) -> Callable[..., Any]:
        """Return the call under jit, the same for the same equation, which is kept so that its id is not used again."""

        def run(args: list[Any]) -> list[Any]:
            inside = dataclasses.replace(self, joins=False) if eqn.primitive.name in REMATS else self
            return call(inside._body, eqn, args)

        def jitted() -> tuple[JaxprEqn, Callable[..., Any]]:
            run.__name__ = run.__qualname__ = str(eqn.params.get("name", eqn.primitive.name))
            return eqn, jax.jit(run, inline=eqn.primitive is not jit_p or eqn.params["inline"])

        return (self.jitted_calls.get(id(eqn), jitted) if self.jitted_calls is not None else jitted())[1]
