"""Evaluate a jaxpr in which some values are kernels.

The loop is the one of JAX's "Writing custom interpreters" guide. Equations that see no kernel run as they stand:
whole scans, `custom_vjp` calls and nested jits among them, with the user's rules. Calls that do see one are built
again around the same loop, so that a scan stays a scan and a remat stays a remat.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from lora_jax._compat import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    at_equation,
    bind,
    jit_p,
    open_jaxpr,
    remat_p,
    scan_groups,
    scan_p,
)
from lora_jax.kernel import Kernel, describe
from lora_jax.rules import RULES, no_rule


@dataclass(frozen=True)
class Interpreter:
    """Evaluates jaxprs, and keeps what it has built for their calls.

    With `rebuilt`, a second eager call finds its nested jits and scans already compiled. Without, each call of a body
    is traced by itself, so that a plan sees each.
    """

    rebuilt: dict[int, tuple[JaxprEqn, Callable[..., Any]]] | None

    def evaluate(self, jaxpr: Jaxpr, consts: list[Any], args: list[Any], inline: bool = False) -> list[Any]:
        """The outputs of a jaxpr for these inputs; any input or output may be a `Kernel`.

        With `inline`, the bodies of jitted calls among the jaxpr's own equations stand in their place.
        """
        env: dict[Var, Any] = {}
        last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, Literal)}
        last_use |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            values = [read(v) for v in eqn.invars]
            with at_equation(eqn):
                if inline and eqn.primitive is jit_p:
                    out = self._body(eqn, *values)
                elif any(isinstance(value, Kernel) for value in values):
                    out = self._with_kernels(eqn, values)
                else:
                    out = bind(eqn, values)
            env.update(zip(eqn.outvars, out, strict=True))
            for v in (*eqn.invars, *eqn.outvars):  # an eager call holds no more than the program needs
                if not isinstance(v, Literal) and last_use.get(v, i) == i:
                    env.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def _with_kernels(self, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
        call = {jit_p: self._jit, remat_p: self._remat, scan_p: self._scan}.get(eqn.primitive)
        return call(eqn, args) if call else RULES.get(eqn.primitive, no_rule)(eqn, *args)

    def _body(self, eqn: JaxprEqn, *args: Any) -> list[Any]:
        jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
        return self.evaluate(jaxpr, consts, list(args))

    def _kept(self, eqn: JaxprEqn, run: Callable[..., Any], inline: bool) -> Callable[..., Any]:
        """`run` under jit, the same one for the same equation (which is held, so that its id stays its own)."""
        if self.rebuilt is None:
            return jax.jit(run, inline=inline)
        if id(eqn) not in self.rebuilt:
            self.rebuilt[id(eqn)] = eqn, jax.jit(run, inline=inline)
        return self.rebuilt[id(eqn)][1]

    def _jit(self, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
        def body(*args: Any) -> list[Any]:
            return self._body(eqn, *args)

        body.__name__ = body.__qualname__ = eqn.params["name"]
        return self._kept(eqn, body, inline=eqn.params["inline"])(*args)

    def _remat(self, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
        params = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(functools.partial(self._body, eqn), **params)(*args)

    def _scan(self, eqn: JaxprEqn, args: list[Any]) -> list[Any]:
        """A scan over stacked layers slices the factors along with the weight. Only kernels change the body."""
        n_consts, n_carry = scan_groups(eqn)
        params = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}

        def plain(value: Any, why: str) -> Any:
            return value.dense(f"{describe(eqn)} {why}") if isinstance(value, Kernel) else value

        def repeated(value: Any) -> Any:
            times = params["length"]
            return dataclasses.replace(value, times=value.times * times) if isinstance(value, Kernel) else value

        def sliced(value: Any) -> Any:
            if isinstance(value, Kernel) and not value.can_scan():
                return plain(value, "slices it along an axis that its adapter does not stack")
            return value.scan_slices() if isinstance(value, Kernel) else value

        def run(*args: Any) -> list[Any]:
            consts = [repeated(value) for value in args[:n_consts]]
            carry = [plain(value, "carries it from step to step") for value in args[n_consts : n_consts + n_carry]]
            xs = [sliced(value) for value in args[n_consts + n_carry :]]

            def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
                out = [plain(v, "gives it out of its body") for v in self._body(eqn, *consts, *carry, *xs)]
                return out[:n_carry], out[n_carry:]

            carry, ys = lax.scan(body, carry, xs, **params)
            return [*carry, *ys]

        return self._kept(eqn, run, inline=True)(*args)
