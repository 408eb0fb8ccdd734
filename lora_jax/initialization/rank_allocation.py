"""Ranks by importance: how a fixed sum of ranks is shared out among weights, before training starts.

Every component that a weight's adapter could have gets a score, and the largest scores win, whoever has them. Scores
are made from a few batches: of the inputs of each weight, or of its gradient.

>>> import jax, jax.numpy as jnp, lora_jax as lora
>>> model = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
>>> params = {"up": jnp.eye(6, 8), "down": jnp.eye(8, 6) / 2}
>>> batches = [jax.random.normal(jax.random.key(i), (4, 6)) for i in range(3)]
>>> loss = lambda params, x: jnp.sum((model(params, x) - x) ** 2)
>>> gradients = jax.tree.map(lambda *g: sum(g) / len(g), *(jax.grad(loss)(params, x) for x in batches))
>>> plan = lora.plan(model, params, batches[0], rules={"up|down": lora.Lora(rank=1)})  # for the weights' axes
>>> ranks = allocate_ranks(gradient_scores(plan, gradients), budget=4 * len(plan))
>>> ranks
{'down': 6, 'up': 2}
>>> plan = lora.plan(model, params, batches[0], rules={"up|down": lora.Lora(rank=ranks)})
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.core.targets import Plan, Target
from lora_jax.initialization.checks import check_data
from lora_jax.initialization.svd import explained, matrices, wide


class Ranks(dict[str, int]):
    """`{path: rank}`, and the rank of a rule: `lora.Lora(rank=ranks)`."""

    def __call__(self, path: str, shape: tuple[int, ...]) -> int:
        if path not in self:
            near = ", ".join(map(repr, nearest(path, self))) or "none at all"
            raise LoraError(
                f"no rank was allocated to {path!r}; the nearest that have one: {near}. Give allocate_ranks scores for "
                "it too, or give it a rule of its own, before this one."
            )
        return self[path]


def allocate_ranks(scores: Mapping[str, Any], budget: int, *, least: int = 1, most: int | None = None) -> Ranks:
    """r_p for each path p with sum_p r_p = budget, for which sum_p (the r_p largest scores of p) is largest.

    Of equal scores, those win that are earlier among their weight's own, and then those of the earlier path, in the
    order of strings. A higher budget takes no rank away: for a budget of parameters, take the highest whose plan has
    few enough.
    The choice is EVA's: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance
    Adaptation", arXiv 2410.07170.

    Args:
        scores: `{path: [n]}`, a number of at least 0 for each component that the adapter may have, in any order, as
            `lora.gradient_scores` and `lora.input_scores` make them: n = min(d, k). No rank is above n.
        budget: the sum of all ranks. A weight of stacked matrices has one rank, which counts once.
        least, most: bounds of each rank.

    Returns:
        A dict that is also what `lora.Lora(rank=ranks)` takes. Its scale is alpha / r of each weight; without alpha, it
        is 1 everywhere.

    Raises:
        LoraError: a budget below `least` for each weight, or above what `most` and the scores allow; bounds that leave
            nothing between them; no scores, or such as are not finite numbers of at least 0.

    >>> allocate_ranks({"query": [5, 3, 1], "value": [4, 1, 0]}, budget=4)
    {'query': 2, 'value': 2}
    """
    falling = _falling(scores)
    for name, value in {"budget": budget, "least": least, "most": 1 if most is None else most}.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise LoraError(f"allocate_ranks({name}={value!r}): expected a whole number of at least 1.")
    if most is not None:
        falling = {path: own[:most] for path, own in falling.items()}
    for path, own in falling.items():
        if len(own) < least:
            raise LoraError(
                f"allocate_ranks(least={least}, most={most}): {path!r} can have a rank of at most {len(own)}: lower "
                "`least`, or leave it out and give it a rule of its own."
            )
    lowest, highest = least * len(falling), sum(map(len, falling.values()))
    if not lowest <= budget <= highest:
        raise LoraError(
            f"allocate_ranks(budget={budget}): {len(falling)} weight(s) with a rank of at least {least} need {lowest} "
            f"in all, and can have {highest}: give a budget from {lowest} to {highest}."
        )
    return allot(falling, budget, least)


def allot(scores: Mapping[str, np.ndarray], budget: int, least: int = 1) -> Ranks:
    """`least` components for each path, and then those of the largest scores. Each path's own scores fall."""
    ranks = Ranks(dict.fromkeys(scores, int(least)))
    rest = [(-score, i, path) for path, own in scores.items() for i, score in enumerate(own.tolist()) if i >= least]
    for *_, path in sorted(rest)[: budget - least * len(ranks)]:
        ranks[path] += 1
    return ranks


def gradient_scores(plan: Plan, gradients: Any) -> dict[str, np.ndarray]:
    """S_i^2 of dL/dW = U S V^T, for each planned weight: its first min(d, k), falling.

    The best change of W of rank r, -U_r S_r V_r^T times a small step, lowers the loss by the step times the sum of the
    first r. So `allocate_ranks` finds the ranks with which all weights together lower it most. Stacked matrices have
    the mean of theirs.

    Args:
        gradients: dL/dW of the full weights, each in the weight's own axes, averaged over some batches:
            `{path: dL/dW}` or a tree like the parameters.

    Raises:
        LoraError: a gradient is missing, not finite or of another shape than its weight.
    """
    targets = _with_factors("gradient_scores", plan)
    found = check_data("gradients", gradients, {path: target.shape for path, target in targets.items()})

    def squares(path: str) -> np.ndarray:
        values = jnp.linalg.svd(matrices(found[path], targets[path].axes), compute_uv=False)
        return np.square(np.asarray(values, np.float64)).mean(0)  # which may be beyond fp32

    return {path: squares(path) for path in targets}


def input_scores(plan: Plan, inputs: Any) -> dict[str, np.ndarray]:
    """S_i^2 / sum S^2 of X = U S V^T, what component i explains of a weight's inputs: the first min(d, k), falling.

    X has rows x. Stacked matrices have the mean of their shares; what no row shows has a score of 0. `lora.starts.eva`
    shares out ranks by the same scores, and starts A with the components.

    Args:
        inputs: `{path: X [*stack, n, d]}`, n rows of what each weight is multiplied with; several inputs flattened to
            d.

    Raises:
        LoraError: inputs are missing, not finite or of another shape.
    """
    targets = _with_factors("input_scores", plan)
    expected: dict[str, tuple[int | None, ...]] = {}
    for path, target in targets.items():
        stack, _, _ = target.axes.sizes(target.shape)
        _, d, _ = target.axes.fans(target.shape)
        expected[path] = (*stack, None, d)
    found = check_data("inputs", inputs, expected)

    def shares(path: str, target: Target) -> np.ndarray:
        _, d, k = target.axes.fans(target.shape)
        x = wide(found[path].reshape(-1, *found[path].shape[-2:]))
        own = explained(jnp.linalg.svd(x, compute_uv=False))[: min(d, k)]
        return np.pad(own, (0, min(d, k) - len(own)))

    return {path: shares(path, target) for path, target in targets.items()}


def _with_factors(call: str, plan: Plan) -> dict[str, Target]:
    """The targets that get low-rank factors: not those that are trained whole."""
    if not isinstance(plan, Plan):
        raise LoraError(f"{call} takes a plan, found a {type(plan).__name__}: make it with lora.plan(fn, params, ...).")
    return {path: target for path, target in plan.items() if not target.rule.whole}


def _falling(scores: Any) -> dict[str, np.ndarray]:
    """The scores of each path, largest first."""
    if not isinstance(scores, Mapping) or not scores:
        raise LoraError(
            f"allocate_ranks takes scores {{path: [n]}} as lora.gradient_scores makes them, found {scores!r}."
        )
    falling = {}
    for path, given in scores.items():
        own = np.asarray(given)
        if own.ndim != 1 or own.dtype.kind not in "iuf" or not (np.isfinite(own) & (own >= 0)).all():
            raise LoraError(
                f"scores[{path!r}] are {own.dtype}{list(own.shape)}, expected one finite number of at least 0 for each "
                "component: make them with lora.gradient_scores or lora.input_scores."
            )
        falling[path] = np.sort(own.astype(np.float64))[::-1]
    return falling
