"""AdaLoRA's budget: during training, the least important entries of e, over all weights, are set to zero.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from lora_jax.adapters.adalora import AdaLoraAdapter
from lora_jax.core.adapter import Adapter, is_adapter
from lora_jax.core.errors import LoraError
from lora_jax.training.argument_checks import check_optimizer


@functools.partial(export.register_namedtuple_serialization, serialized_name="lora_jax.BudgetState")
class BudgetState(NamedTuple):
    """The state of `adapt_budget`. Lists have one item for each AdaLoRA adapter; shapes never change."""

    inner: Any  # the state of the optimizer
    step: jax.Array  # i32, steps taken
    sensitivity: list[Any]  # I of each array
    uncertainty: list[Any]  # U of each array
    kept: list[jax.Array]  # bool [*stack, r]: which entries of e are kept


def adapt_budget(
    optimizer: optax.GradientTransformation,
    target_rank: int,
    total_steps: int,
    *,
    warmup: int = 0,
    final: int = 0,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Take the optimizer's step, then set e_k <- 0 for the least important k, until `target_rank` a matrix are left.

    I <- beta1 I + (1 - beta1) |p g|,  U <- beta2 U + (1 - beta2) ||p g| - I|,  s = I U of each number p and gradient g;
    S_k = s(e_k) + mean s(A[:, k]) + mean s(B[k, :]). The budget b(t) = target + (start - target) (1 - x)^3 falls from
    step `warmup` (x = 0) to `total_steps - final` (x = 1), where the target is reached exactly; the b entries of
    largest S over all weights are kept. Entries that were set to zero are still trained and may be kept again later, up
    to step `total_steps - final`; from then on they stay zero.

    Use it as the outermost transformation, around masks and partitions: it reads the gradients, parameters and updates
    of a step. Shapes stay the same; `prune` removes the zero entries at the end.

    Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

    Args:
        optimizer: any optax transformation.
        target_rank: the mean rank of all matrices at the end.
        total_steps: of the training; above warmup + final.
        warmup, final: the number of steps at the start that keep all entries, and at the end that choose no more.
        interval: the number of steps from one choice to the next.
        beta1, beta2: decay rates of the means I and U.

    Returns:
        An optax transformation, whose `update` needs the parameters.

    Raises:
        LoraError: the schedule leaves no steps; a number is below 1; (when initialized) there is no AdaLoRA adapter, or
            the target rank is above the adapters' own.

    >>> import optax, lora_jax as lora
    >>> optimizer = lora.adapt_budget(lora.freeze_base(optax.adam(1e-3)), target_rank=4, total_steps=1000, warmup=100)
    """
    check_optimizer("adapt_budget(optimizer, target_rank, total_steps)", optimizer)
    numbers = {"target_rank": target_rank, "total_steps": total_steps, "interval": interval}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LoraError(f"adapt_budget({name}={value!r}): expected a whole number of at least 1.")
    if warmup < 0 or final < 0 or warmup >= total_steps - final:
        raise LoraError(
            f"adapt_budget(total_steps={total_steps}, warmup={warmup}, final={final}) leaves no steps in which the "
            "budget falls: warmup + final has to be below total_steps."
        )
    last = total_steps - final

    def init(params: Any) -> BudgetState:
        nodes = _nodes(params)
        if not nodes:
            raise LoraError("adapt_budget found no adapter of the rule lora.AdaLora in what it is to train.")
        _budgets(nodes, target_rank, warmup, last)  # raises if the target rank is too high

        def zeros() -> list[Any]:  # new arrays each time: a step cannot donate one array twice
            return [jax.tree.map(jnp.zeros_like, node) for node in nodes]

        kept = [jnp.ones(node.e.shape, bool) for node in nodes]
        return BudgetState(optimizer.init(params), jnp.zeros((), jnp.int32), zeros(), zeros(), kept)

    def update(grads: Any, state: BudgetState, params: Any = None, **extra: Any) -> tuple[Any, BudgetState]:
        if params is None:
            raise LoraError("adapt_budget needs the parameters: optimizer.update(grads, state, params).")
        updates, inner = optax.with_extra_args_support(optimizer).update(grads, state.inner, params, **extra)
        t, moved = state.step + 1, _nodes(optax.apply_updates(params, updates))
        moving = t < last

        def scored(i: Any, u: Any, p: Any, g: Any) -> tuple[Any, Any]:
            matters = jnp.abs(p * g)
            new = beta1 * i + (1 - beta1) * matters
            spread = beta2 * u + (1 - beta2) * jnp.abs(matters - new)
            return jnp.where(moving, new, i), jnp.where(moving, spread, u)

        pairs = [
            jax.tree.map(scored, *group)
            for group in zip(state.sensitivity, state.uncertainty, moved, _nodes(grads), strict=True)
        ]
        sensitivity, uncertainty = (
            [_pick(pair, like, i) for pair, like in zip(pairs, moved, strict=True)] for i in (0, 1)
        )
        scores = [_scores(i, u) for i, u in zip(sensitivity, uncertainty, strict=True)]
        budget = _budgets(moved, target_rank, warmup, last)[jnp.minimum(t, last)]
        chooses = (t == last) | (moving & (t > warmup) & (t % interval == 0))
        chosen = [jnp.where(chooses, new, old) for new, old in zip(_largest(scores, budget), state.kept, strict=True)]
        masks = chooses | (t > last)
        left = iter([jnp.where(masks & ~keep, 0, node.e) for keep, node in zip(chosen, moved, strict=True)])

        def masked(node: Any, update: Any) -> Any:
            if not isinstance(node, AdaLoraAdapter):
                return update
            return dataclasses.replace(update, e=(next(left) - node.e).astype(update.e.dtype))

        updates = jax.tree.map(masked, params, updates, is_leaf=is_adapter)
        return updates, BudgetState(inner, t, sensitivity, uncertainty, chosen)

    return optax.GradientTransformationExtraArgs(init, update)


def prune(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Remove the columns of A and rows of B whose e is zero: smaller arrays, the same W'.

    All matrices of a stack keep the same rank, that of the one with the most entries that are not zero. Cannot be
    called under `jax.jit`.

    The last step of AdaLoRA: Zhang et al. 2023, arXiv 2303.10512.

    Args:
        adapters: `{path: adapter}`; those of other kinds are returned as they are.

    Returns:
        `{path: adapter}`.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapter = lora.AdaLoraAdapter(jnp.ones((6, 3)), jnp.array([0.5, 0.0, 0.1]), jnp.ones((3, 4)), axes, None)
    >>> lora.prune({"w": adapter})
    {'w': AdaLoraAdapter(a 6x2, e 2, b 2x4)}
    """
    return {path: _pruned(a) if isinstance(a, AdaLoraAdapter) else a for path, a in adapters.items()}


def _pruned(adapter: AdaLoraAdapter) -> AdaLoraAdapter:
    """Return one adapter without its zero entries."""
    n = len(adapter.axes.stack)
    order = jnp.argsort(adapter.e == 0, axis=-1, stable=True)  # the entries that are not zero first
    order = order[..., : max(1, int(jnp.max(jnp.sum(adapter.e != 0, axis=-1))))]

    def take(array: jax.Array, axis: int) -> jax.Array:
        at = range(array.ndim)
        index = order.reshape(*order.shape[:-1], *[order.shape[-1] if i == axis else 1 for i in at if i >= n])
        return jnp.take_along_axis(array, index, axis)

    a, e, b = take(adapter.a, adapter.a.ndim - 1), take(adapter.e, n), take(adapter.b, n)
    return dataclasses.replace(adapter, a=a, e=e, b=b)


def _nodes(tree: Any) -> list[AdaLoraAdapter]:
    """Return the AdaLoRA adapters of a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_adapter) if isinstance(node, AdaLoraAdapter)]


def _pick(pair: Any, like: AdaLoraAdapter, i: int) -> AdaLoraAdapter:
    """Return an adapter of the i-th items, from an adapter whose arrays are pairs."""
    return dataclasses.replace(like, a=pair.a[i], e=pair.e[i], b=pair.b[i])


def _scores(sensitivity: AdaLoraAdapter, uncertainty: AdaLoraAdapter) -> jax.Array:
    """Return the importance S [*stack, r] of each entry of e."""
    s = jax.tree.map(jnp.multiply, sensitivity, uncertainty)
    n, r = len(s.axes.stack), s.e.shape[-1]
    of_a = s.a.reshape(*s.a.shape[:n], -1, r).mean(-2)
    of_b = s.b.reshape(*s.b.shape[: n + 1], -1).mean(-1)
    return s.e + of_a + of_b


def _budgets(nodes: list[AdaLoraAdapter], target_rank: int, warmup: int, last: int) -> jax.Array:
    """Return the budget b(t), the number of entries that are kept after step t, for t = 0 ... `last`."""
    start = sum(math.prod(node.e.shape) for node in nodes)
    target = target_rank * sum(math.prod(node.e.shape[:-1]) for node in nodes)
    if target > start:
        raise LoraError(
            f"adapt_budget(target_rank={target_rank}) is {target} in all, and the adapters have {start}: start with "
            "a higher rank, lora.AdaLora(rank=...)."
        )
    x = np.clip((np.arange(last + 1) - warmup) / (last - warmup), 0, 1)
    return jnp.asarray((start - target) * (1 - x) ** 3 + target, jnp.int32)


def _largest(scores: list[jax.Array], budget: jax.Array) -> list[jax.Array]:
    """Return booleans: which scores are among the `budget` largest of all; of equal ones the first are."""
    every = jnp.concatenate([s.reshape(-1) for s in scores])
    place = jnp.argsort(jnp.argsort(-every, stable=True), stable=True)
    kept, ends = place < budget, np.cumsum([s.size for s in scores])[:-1]
    return [k.reshape(s.shape) for k, s in zip(jnp.split(kept, ends), scores, strict=True)]
