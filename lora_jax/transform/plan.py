"""Which weights get which adapter: rules over paths, checked against what the program does with each weight."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Rule
from lora_jax.core.argument_checks import check_function
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError, LoraWarning
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.core.patterns import NEAREST, first_match
from lora_jax.core.targets import Plan, Target, abstract_adapters
from lora_jax.transform.adapted_weight import AdaptedWeight, adapted
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.materialize import Materialize, Patterns
from lora_jax.transform.probe import Log, Probe, probe
from lora_jax.transform.remakes import Remakes
from lora_jax.transform.rule_checks import OF_OWN_PACKING, check_rules, hint_of_own_packing, is_own_packing
from lora_jax.transform.tracing import Program, tracer

NO_RULES: Mapping[str, Rule | None] = MappingProxyType({})


def plan(
    fn: Callable[..., Any],
    params: Any,
    /,
    *args: Any,
    rules: Mapping[str, Rule | None] = NO_RULES,
    materialize: Patterns = False,
    **kwargs: Any,
) -> "Plan":
    """Decide which weights of `fn(params, *args, **kwargs)` get an adapter, and along which axes.

    The function is traced abstractly: nothing is computed or allocated, and `jax.ShapeDtypeStruct`s do for arrays.
    Each matched weight is followed to the products that use it, and their dimension numbers say which of its axes
    are contracted, which are outputs and which are stacked.

    Args:
        fn, params, args, kwargs: a call as it would be made without adapters; `fn` and `params` by position.
        rules: by keyword, `{pattern: rule}`; a pattern is a regular expression for a whole path, as in
            `".*/(query|value)/kernel"`. The first that matches decides. None leaves what it matches frozen.
        materialize: which weights may be formed at full size where the program does something else to them than
            multiply by them, as for `lora.lora_apply`: True for all, or regular expressions for whole paths.

    Returns:
        A `Plan`: `{path: Target}`, and a table when printed.

    Raises:
        LoraError: a pattern is no regular expression, or matches no path (the nearest are listed), or only paths that
            earlier rules took; a matched weight cannot be adapted (each with the reason and the source line); a rank
            is larger than a weight's smaller side; all rules are None; a rule's `stack` does not fit the weight.

    Warns:
        LoraWarning: a weight that looks like a batch of matrices meets an input that is no batch, as in `jax.vmap` over
            the members of an ensemble: they share A, unless its rule names the stack.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> model = lambda params, x: jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"].T
    >>> params = {"up": {"kernel": jnp.ones((8, 16))}, "down": {"kernel": jnp.ones((4, 16))}}
    >>> rules = {".*/kernel": lora.Lora(rank=2, alpha=4)}
    >>> print(lora.plan(model, params, jnp.ones((4, 8)), rules=rules))  # doctest: +NORMALIZE_WHITESPACE
    path         shape    axes                 rule                   parameters  bytes  FLOPs    x  thin
    -----------  -------  -------------------  ---------------------  ----------  -----  -----  ---  ----
    down/kernel  [4, 16]  inputs 1, outputs 0  Lora(rank=2, alpha=4)          40  160 B    320  0 B   0 B
    up/kernel    [8, 16]  inputs 0, outputs 1  Lora(rank=2, alpha=4)          48  192 B    384  0 B   0 B
    2 of 2 weights adapted: 88 parameters beside 192 (31.43%), 352 B. FLOPs are those added to one forward pass. x is
    what a gradient keeps of a weight's inputs for its adapter alone, thin the same with lora_apply(fn, keep="thin").
    """
    check_function("plan(fn, params, *args, rules={...})", "fn", fn)
    names, leaves, _ = flatten_with_names(params)
    chosen = first_match(check_rules(rules, args), names, hint=hint_of_own_packing(names, leaves) + NEAREST)
    program = tracer(fn)(params, args, kwargs)
    weights = dict(zip(names, leaves, strict=True))
    allowed, log = Materialize.of(materialize), Log(Remakes(program.jaxpr, program.is_parameter()))
    allowed.check(names)

    def follow(name: str, leaf: Any) -> Any:
        rule = chosen.get(name)
        if rule is None or rule.whole:
            return adapted(leaf, None, name, probe)
        return AdaptedWeight(leaf, Probe.of(name, leaf.ndim, log), (name,), probe)

    jax.eval_shape(lambda arrays: program.run(Interpreter(jitted_calls=None), arrays, follow), program.arrays)

    targets, problems = {}, {}
    for path, rule in chosen.items():
        if rule is None:
            continue
        found = _target(path, weights[path], rule, log, allowed.allows(path))
        if isinstance(found, Target):
            targets[path] = found
        else:
            problems[path] = found

    targets = _among(targets)

    formable = {path for path in problems if log.obstacles.get(path) and _is_matrix(weights[path])}

    # Adapters for these axes are tried on the program, to find what cannot stay factored.
    obstacles = _try(program, targets)
    formable |= obstacles.keys()
    for path, reasons in obstacles.items():
        if allowed.allows(path):
            targets[path] = dataclasses.replace(targets[path], materialized=tuple(reasons))
        else:
            problems[path] = _refusal(targets[path], reasons)
    problems |= {path: why for path, target in targets.items() if (why := _never_trained(target))}
    if problems:
        raise LoraError(_report({path: problems[path] for path in chosen if path in problems}, formable))
    _warn_of_batched(targets)
    total = sum(math.prod(leaf.shape) for leaf in leaves if is_array(leaf))
    return Plan(targets, len(leaves), total)


def _target(path: str, leaf: Any, rule: Rule, log: Log, materialize: bool) -> Target | str:
    """Return the target of a matched weight, or why it cannot be adapted."""
    if not is_array(leaf):
        return f"is a {type(leaf).__name__}, not an array"
    shape = f"{leaf.dtype}{list(leaf.shape)}"
    if rule.whole and jnp.issubdtype(leaf.dtype, jnp.floating):
        axes = KernelAxes((), (), tuple(range(leaf.ndim)))
        return Target(path, tuple(leaf.shape), leaf.dtype, axes, rule, ())
    if leaf.ndim < 2:
        return f"is a {'vector' if leaf.ndim else 'scalar'} {shape}, low-rank factors need a matrix"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{shape} is not of a floating dtype{f'; {OF_OWN_PACKING}' if is_own_packing(leaf) else ''}"
    uses, obstacles = log.uses.get(path, []), log.obstacles.get(path, [])
    if obstacles and not (uses or materialize):
        return f"{shape}: {obstacles[0]}"
    if not (uses or obstacles):
        return f"{shape} is not used by the function"
    # A weight that is never multiplied, only formed, has no axes of its own: all but the last count as inputs.
    # The first use that a gradient passes decides which way round the factors are.
    uses.sort(key=lambda use: use.stopped)
    axes = uses[0].axes if uses else KernelAxes((), tuple(range(leaf.ndim - 1)), (leaf.ndim - 1,))
    # What one use shows to be stacked is stacked, though another may multiply by all of it as one matrix.
    shown = axes.with_stack(axis for use in uses for axis in use.axes.stack)
    axes = shown if shown.inputs and shown.outputs else axes
    rule = rule.at(path, tuple(leaf.shape))
    if problem := _stack_problem(rule, leaf.ndim, axes):
        return f"{shape} with {axes}: {problem}"
    axes = axes.with_stack(axis % leaf.ndim for axis in rule.stack or ())  # type: ignore[union-attr]
    if problem := rule.problem(tuple(leaf.shape), axes):
        return f"{shape} with {axes}: {problem}"
    return Target(path, tuple(leaf.shape), leaf.dtype, axes, rule, tuple(uses))


def _stack_problem(rule: Rule, ndim: int, axes: KernelAxes) -> str | None:
    """Return why the weight cannot have the stack that its rule names; None if it can."""
    stack: Any = rule.stack or ()
    if wrong := [axis for axis in stack if not -ndim <= axis < ndim]:
        return f"{rule} names the axis {wrong[0]}, and the weight has the axes 0 to {ndim - 1}"
    left = axes.with_stack(axis % ndim for axis in stack)
    lost = next((name for name in ("inputs", "outputs") if not getattr(left, name)), None)
    return lost and f"{rule} leaves no {lost} to the matrices of the stack"


def _warn_of_batched(targets: Mapping[str, Target]) -> None:
    """Warn of weights that look like a batch of matrices and meet an input that all of the batch has in common.

    In `jax.vmap` over members of an ensemble, the first layer of each gets the same x, so that the program multiplies x
    by all of them as one matrix [d, members k] and they would share A. Other layers show that they are a batch: those
    are stacked along the same axis.
    """
    stacks = {(axis, target.shape[axis]): path for path, target in targets.items() for axis in target.axes.stack}
    for path, target in targets.items():
        _, inputs, outputs = target.axes
        if target.rule.stack is not None or "outputs" not in target.rule.shares or not inputs or len(outputs) < 2:
            continue
        for axis in outputs:
            if axis < min(inputs) and (like := stacks.get((axis, target.shape[axis]))):
                stacked, whole = (dataclasses.replace(target.rule, stack=stack) for stack in ((axis,), ()))  # type: ignore[type-var]
                warnings.warn(
                    f"{path!r} {list(target.shape)} multiplies an input that all of its axis {axis} has in common, so "
                    f"that one A is trained for all indices along it; {like!r} is a stack of matrices along that axis. "
                    f"If they are members or experts, each with factors of its own, give {path!r} the rule {stacked}; "
                    f"if not, {whole}.",
                    LoraWarning,
                    stacklevel=3,
                )


def _among(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Return the targets with rules that were told of all matrices they are used for: one object for equal rules."""
    users: dict[Any, list[Target]] = {}
    for target in targets.values():
        users.setdefault(_identity(target.rule), []).append(target)
    rules = {
        key: alike[0].rule.among(target.axes.fans(target.shape)[1:] for target in alike) for key, alike in users.items()
    }
    return {path: dataclasses.replace(target, rule=rules[_identity(target.rule)]) for path, target in targets.items()}


def _identity(rule: Rule) -> Any:
    """Return what is equal for equal rules; a user's own rule may hold what cannot be hashed, and is itself alone."""
    try:
        hash(rule)
    except TypeError:
        return id(rule)
    return rule


def _is_matrix(leaf: Any) -> bool:
    return bool(is_array(leaf) and leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating))


def _try(program: Program, targets: Mapping[str, Target]) -> dict[str, list[str]]:
    """Run the program abstractly with adapters; return what it does with each weight that cannot stay factored."""
    log = Log()

    def note(weight: AdaptedWeight, why: str) -> None:
        for path in weight.paths:
            log.obstacle(path, why)

    def run(arrays: Any, adapters: Any) -> Any:
        def adapt(name: str, leaf: Any) -> Any:
            return adapted(leaf, adapters.get(name), name, note)

        return program.run(Interpreter(jitted_calls=None), arrays, adapt)

    jax.eval_shape(run, program.arrays, abstract_adapters(targets))
    return log.obstacles


def _refusal(target: Target, reasons: list[str]) -> str:
    shape, first = f"{target.dtype}{list(target.shape)}", target.uses[0]
    for use in target.uses:
        axes = use.axes.with_stack(target.axes.stack)
        if target.axes not in (axes, axes.transpose()):
            return f"{shape} is used in two ways: {first.axes} by {first.where}, {use.axes} by {use.where}"
    return f"{shape}: {reasons[0]}"


def _never_trained(target: Target) -> str | None:
    if target.rule.whole or not target.uses or target.materialized or not target.uses[0].stopped:
        return None
    shape = f"{target.dtype}{list(target.shape)}"
    return f"{shape} is used behind `stop_gradient` only, by {target.uses[0].where}: its adapter would never train"


def _report(problems: Mapping[str, str], formable: Container[str]) -> str:
    shown = "\n".join(f"  {path!r}: {why}" for path, why in list(problems.items())[:8])
    more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
    first = re.escape(next(iter(problems)))
    advice = f"Narrow the pattern, or leave them frozen by an earlier rule, such as {{{first!r}: None}}"
    path = next((path for path in problems if path in formable), None)
    if path is not None:
        advice += f"; a weight may also be formed at full size where it has to be: materialize={re.escape(path)!r}"
    return f"the rules match {len(problems)} weight(s) that cannot be adapted:\n{shown}{more}\n{advice}."
