"""Which weights get which adapter: rules over paths, checked against what the program does with each weight."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._compat import source_line
from lora_jax.adapters.base import Adapter, Rule
from lora_jax.axes import KernelAxes
from lora_jax.errors import LoraError
from lora_jax.interpreter import Interpreter
from lora_jax.kernel import STATIC, Kernel, Product
from lora_jax.paths import flatten_with_names, is_array, nearest
from lora_jax.program import tracer
from lora_jax.table import count, format_table, size


def plan(fn: Callable[..., Any], params: Any, *args: Any, rules: Mapping[str, Rule | None], **kwargs: Any) -> "Plan":
    """Decide which weights of `fn(params, *args, **kwargs)` get an adapter, and along which axes.

    The function is traced abstractly: nothing is computed or allocated, and `jax.ShapeDtypeStruct`s do for arrays.
    Each matched weight is followed to the products that use it, and their dimension numbers say which of its axes
    are contracted, which are outputs and which are stacked.

    Args:
        fn, params, args, kwargs: a call as it would be made without adapters.
        rules: `{pattern: rule}`; a pattern is a regular expression for a whole path, as in
            `".*/(query|value)/kernel"`. The first that matches decides. None leaves what it matches frozen.

    Returns:
        A `Plan`: `{path: Target}`, and a table when printed.

    Raises:
        LoraError: a pattern is no regular expression, or matches no path (the nearest are listed), or only paths that
            earlier rules took; a matched weight cannot be adapted (each with the reason and the source line); a rank
            is larger than a weight's smaller side.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> model = lambda params, x: jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"].T
    >>> params = {"up": {"kernel": jnp.ones((8, 16))}, "down": {"kernel": jnp.ones((4, 16))}}
    >>> print(lora.plan(model, params, jnp.ones((4, 8)), rules={".*/kernel": lora.Lora(rank=2, alpha=4)}))
    path         shape    axes                 rule                   parameters  bytes  FLOPs
    -----------  -------  -------------------  ---------------------  ----------  -----  -----
    down/kernel  [4, 16]  inputs 1, outputs 0  Lora(rank=2, alpha=4)          40  160 B    320
    up/kernel    [8, 16]  inputs 0, outputs 1  Lora(rank=2, alpha=4)          48  192 B    384
    2 of 2 weights adapted: 88 parameters beside 192 (31.43%), 352 B. FLOPs are those added to one forward pass.
    """
    names, leaves, _ = flatten_with_names(params)
    chosen = _choose(rules, names)
    program = tracer(fn)(params, args, kwargs)
    log = Log()

    def follow(name: str, leaf: Any) -> Any:
        return PlannedKernel(leaf, name, tuple(range(leaf.ndim)), (), 1, log) if chosen.get(name) else leaf

    jax.eval_shape(lambda arrays: program.run(Interpreter(rebuilt=None), arrays, follow), program.arrays)

    weights = dict(zip(names, leaves, strict=True))
    problems = {p: why for p, rule in chosen.items() if rule and (why := _problem(p, weights[p], rule, log))}
    if problems:
        shown = "\n".join(f"  {path!r}: {why}" for path, why in list(problems.items())[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise LoraError(
            f"the rules match {len(problems)} weight(s) that cannot be adapted:\n{shown}{more}\n"
            "Narrow the pattern, or leave them frozen by an earlier rule, such as "
            f"{{{re.escape(next(iter(problems)))!r}: None}}."
        )

    targets = {}
    for path, rule in chosen.items():
        if rule is None:
            continue
        weight, uses = weights[path], log.uses[path]
        targets[path] = Target(path, tuple(weight.shape), weight.dtype, uses[0].axes, rule, tuple(uses))
    total = sum(math.prod(leaf.shape) for leaf in leaves if is_array(leaf))
    return Plan(targets, len(leaves), total)


@dataclass(frozen=True)
class Use:
    """One product of the program that a planned weight takes part in."""

    axes: KernelAxes
    tokens: int  # rows of x, for each stacked matrix
    times: int  # that a call runs it
    primitive: str
    source: str


@dataclass(frozen=True)
class Target:
    """A weight that is to have an adapter."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: KernelAxes
    rule: Rule
    uses: tuple[Use, ...]

    def abstract(self) -> Adapter:
        """The adapter's shapes."""
        return jax.eval_shape(lambda key: self.rule.init(key, self.shape, self.axes), jax.random.key(0))

    def flops(self) -> int:
        """FLOPs that the adapter adds to one forward pass at the planned batch; a gradient costs three times that."""
        return sum(use.times * self.rule.flops(self.shape, self.axes, use.tokens) for use in self.uses)


@dataclass(frozen=True)
class Plan(Mapping[str, Target]):
    """`{path: Target}` in the parameters' own order; print it to see what will be trained and what it costs."""

    targets: dict[str, Target]
    base_leaves: int
    base_parameters: int

    def __getitem__(self, path: str) -> Target:
        return self.targets[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __str__(self) -> str:
        rows, parameters, memory = [], 0, 0
        for target in self.targets.values():
            arrays = jax.tree.leaves(target.abstract())
            n = sum(math.prod(a.shape) for a in arrays)
            nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
            parameters, memory = parameters + n, memory + nbytes
            rows.append(
                [
                    target.path,
                    list(target.shape),
                    target.axes,
                    target.rule,
                    f"{n:,}",
                    size(nbytes),
                    count(target.flops()),
                ]
            )
        share = parameters / (self.base_parameters + parameters)
        table = format_table(["path", "shape", "axes", "rule", "parameters", "bytes", "FLOPs"], rows, right=3)
        return (
            f"{table}\n{len(self)} of {self.base_leaves} weights adapted: {parameters:,} parameters beside "
            f"{self.base_parameters:,} ({share:.2%}), {size(memory)}. FLOPs are those added to one forward pass."
        )


class Log:
    """What the program was seen to do with the planned weights."""

    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = {}
        self.obstacles: dict[str, list[str]] = {}

    def use(self, path: str, product: Product, times: int) -> None:
        use = Use(product.axes, product.tokens, times, product.eqn.primitive.name, source_line(product.eqn))
        self.uses.setdefault(path, []).append(use)

    def obstacle(self, path: str, why: str) -> None:
        reasons = self.obstacles.setdefault(path, [])
        if why not in reasons:
            reasons.append(why)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PlannedKernel(Kernel):
    """A matched weight while planning: it multiplies as it is, and takes notes."""

    log: Log = field(metadata=STATIC)

    def multiply(self, product: Product) -> jax.Array:
        self.log.use(self.path, product, self.times)
        return product.y

    def dense(self, why: str) -> jax.Array:
        self.log.obstacle(self.path, why)
        return self.value


def _choose(rules: Mapping[str, Rule | None], names: list[str]) -> dict[str, Rule | None]:
    """The first rule that matches each path, in the order of the paths."""
    if not isinstance(rules, Mapping) or not rules:
        raise LoraError(f"rules are a dict such as {{'.*/kernel': lora.Lora(rank=8)}}, found {rules!r}.")
    patterns: list[tuple[str, re.Pattern[str]]] = []
    for pattern, rule in rules.items():
        if rule is not None and not isinstance(rule, Rule):
            raise LoraError(
                f"the rule for {pattern!r} is {rule!r}, expected a rule such as lora.Lora(rank=8), or None."
            )
        try:
            patterns.append((pattern, re.compile(pattern)))
        except (re.error, TypeError) as error:
            raise LoraError(f"the pattern {pattern!r} is not a regular expression: {error}.") from None

    chosen: dict[str, Rule | None] = {}
    matched = {pattern: [name for name in names if compiled.fullmatch(name)] for pattern, compiled in patterns}
    for pattern, found in matched.items():
        fresh = [name for name in found if name not in chosen]
        if not found:
            near = "\n".join(f"  {name}" for name in nearest(pattern, names))
            raise LoraError(
                f"the rule {pattern!r} matches no parameter. A pattern stands for a whole path; "
                f"the nearest paths are\n{near}"
            )
        if not fresh:
            raise LoraError(
                f"the rule {pattern!r} is never reached: all {len(found)} paths that it matches, {found[0]!r} first, "
                "are taken by earlier rules. Put it before them, or drop it."
            )
        chosen |= dict.fromkeys(fresh, rules[pattern])
    return {name: chosen[name] for name in names if name in chosen}


def _problem(path: str, leaf: Any, rule: Rule, log: Log) -> str | None:
    """Why a matched weight cannot be adapted, if it cannot."""
    if not is_array(leaf):
        return f"is a {type(leaf).__name__}, not an array"
    shape = f"{leaf.dtype}{list(leaf.shape)}"
    if leaf.ndim < 2:
        return f"is a {'vector' if leaf.ndim else 'scalar'} {shape}, low-rank factors need a matrix"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{shape} is not of a floating dtype"
    if reasons := log.obstacles.get(path):
        return f"{shape}: {reasons[0]}"
    uses = log.uses.get(path)
    if not uses:
        return f"{shape} is not used by the function"
    first = uses[0]
    for use in uses[1:]:
        if first.axes not in (use.axes, use.axes.transpose()):
            return (
                f"{shape} is used in two ways: {first.axes} by `{first.primitive}` at {first.source}, "
                f"{use.axes} by `{use.primitive}` at {use.source}"
            )
    _, d, k = first.axes.fans(leaf.shape)
    if rule.rank > min(d, k):
        return f"{shape} with {first.axes}: rank {rule.rank} is above min({d}, {k}), give it at most {min(d, k)}"
    return None
