"""Two checkpoints to adapters: `difference`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.dora import Dora
from lora_jax.adapters.full import Full, FullAdapter
from lora_jax.adapters.lora import Lora, LoraAdapter
from lora_jax.adapters.token_rows import Rows
from lora_jax.algebra.compress import Report
from lora_jax.algebra.truncation import Limit, Truncation, limit, truncated
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import check_is
from lora_jax.core.arrays import describe, refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import unpacked
from lora_jax.core.paths import flatten_with_names, is_array, nearest, path_key
from lora_jax.core.targets import Plan, Target

CALL = "difference(base, tuned, plan)"


def difference(
    base: Any,
    tuned: Any,
    plan: Plan,
    *,
    rank: int | None = None,
    energy: float | None = None,
    iterations: int | None = None,
    key: jax.Array | None = None,
    rest: bool = False,
    report: Report | None = None,
) -> dict[str, Adapter]:
    """Return the adapters that turn one checkpoint into another, or are the nearest to it.

    The plan says which weights get adapters, along which axes. A weight with a `Lora` rule gets the change of that rank
    that is nearest to W' - W (Eckart and Young), one with `Full` the whole change, one with `Rows` its rows of W'.
    Weights that did not change get no adapter. It computes in fp64 on this host, one matrix after another.

    Args:
        base, tuned: two trees of parameters with the same paths and shapes; packed weights are unpacked one by one.
        plan: as `lora.plan` makes it, for the base.
        rank: of all adapters of `Lora` rules, in the place of the rules' own; or
        energy: the share of the squared norm of each change that is held, above 0 and at most 1, by as small a rank as
            that takes.
        iterations: of a randomised decomposition, which is much faster for large matrices; None for the exact one.
        key: of the random numbers of that.
        rest: whether more may have changed than the adapters hold: weights without a place in the plan, and rows that
            `Rows` do not name. By default this is refused.
        report: called with the path and a `Truncation(rank, energy)` of each adapter of factors.

    Returns:
        `{path: adapter}`.

    Raises:
        LoraError: the trees do not have the same paths and shapes; a weight changed that no adapter holds; a rule is
            not one of these; nothing changed; numbers are not finite; both limits are given, or one is out of its
            range.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.eye(4), "b": jnp.zeros(4)}, jnp.ones(4)
    >>> model = lambda p, x: x @ p["w"] + p["b"]
    >>> plan = lora.plan(model, params, x, rules={"w": lora.Lora(rank=2), "b": lora.Full()})
    >>> tuned = {"w": params["w"].at[0].add(0.5), "b": jnp.ones(4)}
    >>> adapters = lora.difference(params, tuned, plan)
    >>> bool(jnp.allclose(lora.merge(params, adapters)["w"], tuned["w"]))
    True
    """
    check_is(CALL, "plan", plan, Plan, "a plan, as lora.plan(fn, params, batch, rules=...) makes it")
    by_rules = rank is None and energy is None
    to = limit("difference", 1 if by_rules else rank, energy, iterations, key)
    if by_rules:
        to = to._replace(rank=None)
    _check_rules(plan)
    found: dict[str, Adapter] = {}
    changed = False
    for path, before, after in _changed(base, tuned, plan):
        changed = True
        if path not in plan:
            if not rest:
                raise LoraError(
                    f"{path!r} changed too, and has no place in the plan: give it a rule, such as lora.Full() or "
                    "lora.Lora(rank=8), or go on without it, rest=True."
                )
            continue
        found[path], left = _adapter(plan[path], before, after, to, rest)
        if report is not None and left is not None:
            report(path, left)
    if not found:
        what = "of the plan's weights none" if changed else "nothing"
        raise LoraError(f"difference(base, tuned, plan): {what} has changed.")
    return {path: found[path] for path in plan if path in found}


def _check_rules(plan: Plan) -> None:
    for path, target in plan.items():
        if not isinstance(target.rule, Lora | Full | Rows) or isinstance(target.rule, Dora):
            raise LoraError(
                f"{path!r} is planned with {target.rule}: differences are held by lora.Lora, lora.Full and lora.Rows."
            )


def _changed(base: Any, tuned: Any, plan: Plan) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, W and W' of each weight that differs."""
    trees = []
    for name, tree in (("base", base), ("tuned", tuned)):
        names, leaves, _ = flatten_with_names(tree)
        refuse_spread(tree)
        for path, leaf in zip(names, leaves, strict=True):
            if not is_array(leaf) or isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
                raise LoraError(f"{CALL}: {path!r} in {name} is {describe(leaf)}, expected an array with numbers.")
        trees.append(dict(zip(names, leaves, strict=True)))
    old, new = trees
    for one, other, where in ((old, new, "tuned"), (new, old, "base")):
        for path in one:
            if path not in other:
                near = ", ".join(map(repr, nearest(path, other, n=2)))
                raise LoraError(f"{path!r} is not in {where}, where the nearest are {near}: not two of one model.")
    for path in plan:
        if path not in old or tuple(old[path].shape) != plan[path].shape:
            raise LoraError(f"the plan has {path!r} of shape {list(plan[path].shape)}, which is not in base so.")
    for path, leaf in old.items():
        if tuple(leaf.shape) != tuple(new[path].shape):
            raise LoraError(f"{path!r} has shape {list(leaf.shape)} in base, and {list(new[path].shape)} in tuned.")
        before, after = unpacked(leaf), unpacked(new[path])
        if jnp.issubdtype(before.dtype, jax.dtypes.extended):
            before, after = jax.random.key_data(before), jax.random.key_data(after)
        before, after = np.asarray(before), np.asarray(after)
        if not np.array_equal(before, after, equal_nan=before.dtype.kind == "f"):
            yield path, before, after


def _adapter(target: Target, before: Any, after: Any, to: Limit, rest: bool) -> tuple[Adapter, Truncation | None]:
    """Return the adapter of a weight that changed, and what it holds if it is one of factors."""
    path, rule, axes = target.path, target.rule, target.axes
    change = after.astype(np.float64) - before.astype(np.float64)
    if not np.isfinite(change).all():
        raise LoraError(f"{path!r} holds infinity or NaN in base or in tuned: no difference of it has a meaning.")
    if isinstance(rule, Full):
        return FullAdapter(jnp.asarray(change.astype(np.float32)), axes), None
    if isinstance(rule, Rows):
        left = np.delete(change, rule.indices, axis=rule.axis)
        if left.any() and not rest:
            raise LoraError(f"{path!r} changed in other rows than {rule}: name these too, or give it a lora.Lora rule.")
        return rule.init(jax.random.key(0), jnp.asarray(after), axes), None
    assert isinstance(rule, Lora)
    stack, inputs, outputs = axes.sizes(change.shape)
    n, d, k = axes.fans(change.shape)
    matrices = change.transpose([*axes.stack, *axes.inputs, *axes.outputs]).reshape(n, d, k)
    if to.rank is None and to.energy is None:
        to = to._replace(rank=int(rule.rank))  # type: ignore[arg-type]
    if to.key is not None:
        to = to._replace(key=path_key(to.key, path))
    a, b, left_over = truncated(lambda i: matrices[i], n, to)
    a, b = a.reshape(*stack, *inputs, -1), b.reshape(*stack, left_over.rank, *outputs)
    scale = dataclasses.replace(rule, rank=left_over.rank).scale
    root = np.sqrt(abs(scale)).astype(np.float32)
    return LoraAdapter(jnp.asarray(a / root), jnp.asarray(np.sign(scale) * b / root), axes, scale), left_over
