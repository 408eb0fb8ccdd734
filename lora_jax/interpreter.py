"""Evaluate a jaxpr in which some values are kernels.

The loop is the one of JAX's "Writing custom interpreters" guide. Equations that see no kernel run as they stand:
whole scans, `custom_vjp` calls and nested jits among them, with the user's rules. Calls that do see one are built
again around the same loop, so that a scan stays a scan and a remat stays a remat.
"""

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
from lora_jax.rules import RULES, Rule, no_rule


def evaluate(jaxpr: Jaxpr, consts: list[Any], args: list[Any], inline: bool = False) -> list[Any]:
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
                out = evaluate_call(eqn, values)
            elif any(isinstance(value, Kernel) for value in values):
                out = _rule(eqn)(eqn, *values)
            else:
                out = bind(eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
        for v in (*eqn.invars, *eqn.outvars):  # an eager call holds no more than the program needs
            if not isinstance(v, Literal) and last_use.get(v, i) == i:
                env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def evaluate_call(eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    """The outputs of a call's body, in the place of the call."""
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    return evaluate(jaxpr, consts, args)


def _jit(eqn: JaxprEqn, *args: Any) -> list[Any]:
    def body(*args: Any) -> list[Any]:
        return evaluate_call(eqn, list(args))

    body.__name__ = body.__qualname__ = eqn.params["name"]
    return jax.jit(body, inline=eqn.params["inline"])(*args)


def _remat(eqn: JaxprEqn, *args: Any) -> list[Any]:
    def body(*args: Any) -> list[Any]:
        return evaluate_call(eqn, list(args))

    return jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(*args)


def _scan(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """A scan over stacked layers slices the factors along with the weight. Only kernels change the body."""
    n_consts, n_carry = scan_groups(eqn)
    consts, carry, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]

    def plain(value: Any, why: str) -> Any:
        return value.dense(f"{describe(eqn)} {why}") if isinstance(value, Kernel) else value

    def slices(value: Any) -> Any:
        if not isinstance(value, Kernel):
            return value
        if not value.can_scan():
            return plain(value, "slices it along an axis that its adapter does not stack")
        return value.scan_slices()

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        out = evaluate_call(eqn, [*consts, *carry, *xs])
        out = [plain(value, "gives it out of its body") for value in out]
        return out[:n_carry], out[n_carry:]

    init = [plain(value, "carries it from step to step") for value in carry]
    params = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    out_carry, ys = lax.scan(body, init, [slices(value) for value in xs], **params)
    return [*out_carry, *ys]


CALLS: dict[Any, Rule] = {jit_p: _jit, remat_p: _remat, scan_p: _scan}


def _rule(eqn: JaxprEqn) -> Rule:
    return CALLS.get(eqn.primitive) or RULES.get(eqn.primitive) or no_rule
