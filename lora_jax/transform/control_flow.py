"""Calls and control flow that take an adapted weight, built again around it: a scan stays a scan, a remat a remat.

Each function here takes `body(jaxpr, args)`, which evaluates an inner jaxpr, and an equation. Only what an adapted
weight does in the body changes; settings, policies and shardings are the program's own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.core._compat import (
    JaxprEqn,
    Literal,
    Var,
    as_differentiated,
    bind,
    describe,
    jit_p,
    open_jaxpr,
    remat_p,
    scan_groups,
)
from lora_jax.core.arrays import is_key
from lora_jax.core.errors import LoraError
from lora_jax.core.factor_products import FACTOR_PRODUCT
from lora_jax.core.packed import is_packed
from lora_jax.core.packed_parts import InParts
from lora_jax.core.remade import REMADE_PRODUCT
from lora_jax.core.row_losses import LOGITS, ROW_LOSSES, blocks, found, row_losses
from lora_jax.transform.adapted_weight import AdaptedWeight, plain

Body = Callable[[Any, Sequence[Any]], list[Any]]
Call = Callable[[Body, JaxprEqn, Sequence[Any]], list[Any]]


def jit(body: Body, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Evaluate the body; the interpreter keeps it jitted. Shardings that the program states hold inside."""
    args = [_placed(arg, s) for arg, s in zip(args, eqn.params["in_shardings"], strict=True)]
    out = body(eqn.params["jaxpr"], args)
    return [_placed(o, s) for o, s in zip(out, eqn.params["out_shardings"], strict=True)]


def _placed(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if isinstance(value, AdaptedWeight):
        return value if is_packed(value.value) else value.replace(_placed(value.value, sharding))
    return lax.with_sharding_constraint(value, sharding)


def remat(body: Body, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    params = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
    run = jax.checkpoint(functools.partial(body, eqn.params["jaxpr"]), **params)
    return as_differentiated(run, list(args)) if eqn.params["differentiated"] else run(list(args))


def scan(body: Body, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Scan over stacked layers, which slices the operand along with the weight."""
    n_consts, n_carry = scan_groups(eqn)
    params = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    jaxpr = eqn.params["jaxpr"]
    sliced = {source: args[source] for source in range(n_consts + n_carry, len(args))}
    stacks = {  # what the body gives out as it got it: stacked again, it is the adapted weight that the scan runs over
        i: sliced[source]
        for i, source in enumerate(_forwarded(jaxpr))
        if i >= n_carry and source in sliced and isinstance(sliced[source], AdaptedWeight)
    }
    args = [_repeated(arg, params["length"]) for arg in args]
    consts, carry, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
    moving, kept = _carried(eqn, jaxpr, carry, n_consts)
    xs = [_sliced(eqn, x) for x in xs]

    def step(moving: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        out = body(jaxpr, [*consts, *_with(kept, moving, n_carry), *xs])
        new = [plain(o, "changes it from step to step", eqn) for i, o in enumerate(out[:n_carry]) if i not in kept]
        ys = [plain(o, "gives it out of its body", eqn) for i, o in enumerate(out) if i >= n_carry and i not in stacks]
        return new, ys

    moving, ys = lax.scan(step, moving, xs, **params)
    return _with(kept | stacks, [*moving, *ys], len(eqn.outvars))


def while_loop(body: Body, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = args[:n_cond], args[n_cond : n_cond + n_body], args[n_cond + n_body :]
    moving, kept = _carried(eqn, eqn.params["body_jaxpr"], carry, n_body)

    def cond(moving: Sequence[Any]) -> Any:
        [go_on] = body(eqn.params["cond_jaxpr"], [*cond_consts, *_with(kept, moving, len(carry))])
        return go_on

    def step(moving: Sequence[Any]) -> Sequence[Any]:
        out = body(eqn.params["body_jaxpr"], [*body_consts, *_with(kept, moving, len(carry))])
        return [plain(o, "changes it from step to step", eqn) for i, o in enumerate(out) if i not in kept]

    return _with(kept, lax.while_loop(cond, step, moving), len(carry))


def cond(body: Body, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Choose a branch. A weight that every branch returns unchanged stays an adapted weight."""
    index, *operands = args
    branches = eqn.params["branches"]
    sources = [_forwarded(branch) for branch in branches]
    kept = {
        i: operands[source]
        for i, source in enumerate(sources[0])
        if source is not None and all(s[i] == source for s in sources) and isinstance(operands[source], AdaptedWeight)
    }

    def run(branch: Any, *operands: Any) -> list[Any]:
        out = body(branch, operands)
        chosen = [plain(o, "chooses between it and others", eqn) for i, o in enumerate(out) if i not in kept]
        return [_strongly_typed(o) for o in chosen]

    rest = lax.switch(index, [functools.partial(run, branch) for branch in branches], *operands)
    return _with(kept, rest, len(eqn.outvars))


def shard_map(body: Body, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Map over devices. The operand's arrays are split as the axes of the weight are that they share."""
    args = [_divisible(arg, spec) for arg, spec in zip(args, eqn.params["in_specs"], strict=True)]
    specs = [
        _specs(arg, spec) if isinstance(arg, AdaptedWeight) else spec
        for arg, spec in zip(args, eqn.params["in_specs"], strict=True)
    ]

    def local(*args: Any) -> tuple[Any, ...]:
        out = body(eqn.params["jaxpr"], args)
        return tuple(plain(o, "gives it out of its body", eqn) for o in out)

    run = jax.shard_map(
        local,
        mesh=eqn.params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(eqn.params["out_specs"]),
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )
    return list(run(*args))


def inlined(body: Body, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Evaluate one of this library's own functions as it stands, without the derivative that it states."""
    return body(eqn.params["call_jaxpr"], args)


def losses_of_rows(body: Body, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Take the losses of x @ W' block by block, as the program does of x @ W.

    Under the program's own `jax.vmap` its blocks are evaluated as they stand, and again for the derivative.
    """
    how, (x, labels, weights, *head) = found(eqn), args
    if len(head) != 1 or not isinstance(head[0], AdaptedWeight) or isinstance(x, AdaptedWeight):
        return bind(eqn, [plain(arg, "takes losses of it", eqn) for arg in args])
    if any(map(is_key, jax.tree.leaves(head[0].operand))):
        raise LoraError(
            f"{head[0].paths[0]!r} has dropout, and {describe(eqn)} multiplies by it in blocks of rows, which have no "
            f"masks of their own. Leave it out: lora.with_dropout takes some of the adapters too, and "
            f"{{**lora.with_dropout(others, key), {head[0].paths[0]!r}: adapters[{head[0].paths[0]!r}]}} is all."
        )
    if how is None:
        return inlined(body, eqn, args)

    def project(x: jax.Array, weight: AdaptedWeight, wide: bool) -> jax.Array:
        of_shape = jax.ShapeDtypeStruct(weight.shape, weight.value.dtype)
        program = jax.make_jaxpr(functools.partial(how.project, wide=wide))(x, of_shape)
        if is_packed(weight.value):
            weight = weight.replace(InParts(weight.value, program.out_avals[0].dtype))
        return body(program, [x, weight])[0]

    weight = _repeated(head[0], blocks(labels))
    if is_packed(weight.value):
        weight = weight.replace(weight.value.gathered().with_whole_scales())
    return [row_losses(dataclasses.replace(how, project=project), x, labels, weights, weight)]


def _divisible(value: Any, spec: Any) -> Any:
    """Return the weight with explicit factors, if its matrices are split over devices."""
    if not isinstance(value, AdaptedWeight):
        return value
    if is_packed(value.value) and any(spec[len(value.value.stack) :]):
        value = value.replace(value.value.dense())
    axes = value.operand.axes
    splits = any(spec[axis] for axis in (*axes.inputs, *axes.outputs) if axis < len(spec))
    return value.replace(value.value, value.operand.to_lora()) if splits else value


def _specs(weight: AdaptedWeight, spec: Any) -> Any:
    """Return the partition specs of an adapted weight's arrays, given that of its value."""
    every = jax.P(*spec, *[None] * (weight.ndim - len(spec)))
    of_value = spec
    if is_packed(weight.value):
        of_value = weight.value.on_stack(lambda leaf: jax.P(*spec[: len(weight.value.stack)]))
    specs = weight.replace(of_value, weight.operand.specs(every))
    return specs if weight.factor is None else dataclasses.replace(specs, factor=jax.P())  # type: ignore[arg-type]


def _repeated(value: Any, times: int) -> Any:
    return value.replace(value.value, value.operand.repeat(times)) if isinstance(value, AdaptedWeight) else value


def _sliced(eqn: JaxprEqn, value: Any) -> Any:
    """Return an operand of a scan with the axes that its body will see; the arrays are not sliced yet."""
    if not isinstance(value, AdaptedWeight):
        return value
    value = value.scaled()
    if is_packed(value.value) and not value.value.stack:
        value = value.replace(value.value.dense())
    if value.operand.group(0) not in ("stack", "unknown"):
        return plain(value, "slices it along an axis that its adapter does not stack", eqn)
    return value.replace(value.value, value.operand.sliced())


def _carried(eqn: JaxprEqn, jaxpr: Any, carry: Sequence[Any], n_consts: int) -> tuple[list[Any], dict[int, Any]]:
    """Return what a loop changes, and the adapted weights that it hands from step to step unchanged."""
    sources = _forwarded(jaxpr)
    kept = {i: c for i, c in enumerate(carry) if isinstance(c, AdaptedWeight) and sources[i] == n_consts + i}
    moving = [plain(c, "changes it from step to step", eqn) for i, c in enumerate(carry) if i not in kept]
    return moving, kept


def _with(kept: dict[int, Any], others: Sequence[Any], n: int) -> list[Any]:
    rest = iter(others)
    return [kept[i] if i in kept else next(rest) for i in range(n)]


def _forwarded(jaxpr: Any) -> list[int | None]:
    """Return for each output of a jaxpr the number of the input that it is, through calls and loops; else None."""
    jaxpr, _ = open_jaxpr(jaxpr)
    source: dict[Var, int] = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for out, operand in _passed_through(eqn):
            if not isinstance(operand, Literal) and operand in source:
                source[out] = source[operand]
    return [None if isinstance(v, Literal) else source.get(v) for v in jaxpr.outvars]


def _passed_through(eqn: JaxprEqn) -> list[tuple[Var, Any]]:
    """Return the results of an equation that are operands of it, each with that operand."""
    if eqn.primitive in (jit_p, remat_p):
        sources = _forwarded(eqn.params["jaxpr"])
        return [(v, eqn.invars[s]) for v, s in zip(eqn.outvars, sources, strict=True) if s is not None]
    if eqn.primitive.name == "while":
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        sources = _forwarded(eqn.params["body_jaxpr"])
        return [(v, eqn.invars[n_cond + n_body + i]) for i, v in enumerate(eqn.outvars) if sources[i] == n_body + i]
    if eqn.primitive.name == "scan":
        n_consts, n_carry = scan_groups(eqn)
        sources = _forwarded(eqn.params["jaxpr"])[:n_carry]
        return [(eqn.outvars[i], eqn.invars[n_consts + i]) for i, s in enumerate(sources) if s == n_consts + i]
    return []


def _strongly_typed(value: Any) -> Any:
    """Return a value without weak type: branches have to agree in that too."""
    return lax.convert_element_type(value, value.dtype) if getattr(value, "weak_type", False) else value


CALLS: dict[str, Call] = {
    jit_p.name: jit,
    remat_p.name: remat,
    "scan": scan,
    "while": while_loop,
    "cond": cond,
    "shard_map": shard_map,
}
OWN_CALLS: dict[str, Call] = {
    FACTOR_PRODUCT: inlined,  # the factors of adapters are adapted in their turn
    REMADE_PRODUCT: inlined,
    LOGITS: inlined,
    ROW_LOSSES: losses_of_rows,
}
