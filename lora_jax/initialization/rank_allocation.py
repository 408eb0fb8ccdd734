"""Ranks by importance: distribute a fixed sum of ranks over the weights, before training starts.

Every component that an adapter could have gets a score, and the components with the largest scores are taken, of
whichever weight. Scores are computed from a few batches: from the gradient of each weight, or from its inputs.

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

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.core.targets import Plan, Target
from lora_jax.initialization.checks import check_data, inputs_shape
from lora_jax.initialization.svd import explained_variance_ratio, flatten_stack, singular_values, to_matrices


class Ranks(dict[str, int]):
    """`{path: rank}`, which is also the rank of a rule: `lora.Lora(rank=ranks)`."""

    def __call__(self, path: str, shape: tuple[int, ...]) -> int:
        """Return the rank of one weight, as rules ask for it.

        Raises:
            LoraError: none was allocated to it.
        """
        if path not in self:
            near = ", ".join(map(repr, nearest(path, self))) or "none at all"
            raise LoraError(
                f"no rank was allocated to {path!r}; the nearest that have one: {near}. Give allocate_ranks scores for "
                "it too, or give it a rule of its own, before this one."
            )
        return self[path]


def allocate_ranks(scores: Mapping[str, Any], budget: int, *, least: int = 1, most: int | None = None) -> Ranks:
    """Return ranks r_p with sum_p r_p = budget that maximise the sum over all paths p of the r_p largest scores of p.

    Ties are broken by the place of a score among its weight's own, the earlier first, and then by the path in the order
    of strings. A higher budget takes no rank away: for a budget of parameters, take the highest whose plan has few
    enough.
    The choice is that of EVA: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained
    Variance Adaptation", arXiv 2410.07170.

    Args:
        scores: `{path: [n]}`, a number of at least 0 for each component that the adapter may have, in any order, as
            `lora.gradient_scores` and `lora.input_scores` return them: n = min(d, k). No rank is above n.
        budget: the sum of all ranks. A weight of stacked matrices has one rank, which counts once.
        least, most: bounds of each rank.

    Returns:
        `{path: rank}`, which `lora.Lora(rank=ranks)` takes. The scale of each adapter is then alpha / r with its own r;
        without alpha, it is 1 everywhere.

    Raises:
        LoraError: the budget is below `least` for each weight, or above what `most` and the scores allow; `most` or
            the number of a weight's scores is below `least`; scores are missing, or not finite numbers of at least 0.

    >>> allocate_ranks({"query": [5, 3, 1], "value": [4, 1, 0]}, budget=4)
    {'query': 2, 'value': 2}
    """
    ordered = _sorted_scores(scores)
    for name, value in {"budget": budget, "least": least, "most": 1 if most is None else most}.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise LoraError(f"allocate_ranks({name}={value!r}): expected a whole number of at least 1.")
    if most is not None:
        ordered = {path: own[:most] for path, own in ordered.items()}
    for path, own in ordered.items():
        if len(own) < least:
            raise LoraError(
                f"allocate_ranks(least={least}, most={most}): {path!r} can have a rank of at most {len(own)}: lower "
                "`least`, or leave it out and give it a rule of its own."
            )
    lowest, highest = least * len(ordered), sum(map(len, ordered.values()))
    if not lowest <= budget <= highest:
        raise LoraError(
            f"allocate_ranks(budget={budget}): {len(ordered)} weight(s) with a rank of at least {least} need {lowest} "
            f"in all, and can have {highest}: give a budget from {lowest} to {highest}."
        )
    return allocate_sorted(ordered, budget, least)


def allocate_sorted(scores: Mapping[str, np.ndarray], budget: int, least: int = 1) -> Ranks:
    """Give `least` components to each path, and then those with the largest scores until the budget is used up.

    The scores [n] of each path are sorted, the largest first.
    """
    ranks = Ranks(dict.fromkeys(scores, int(least)))
    rest = [(-score, i, path) for path, own in scores.items() for i, score in enumerate(own.tolist()) if i >= least]
    for *_, path in sorted(rest)[: budget - least * len(ranks)]:
        ranks[path] += 1
    return ranks


def gradient_scores(plan: Plan, gradients: Any) -> dict[str, np.ndarray]:
    """Score the components of each planned weight by its gradient: S_i^2 of dL/dW = U S V^T.

    The best change of W of rank r, -U_r S_r V_r^T times a small step, lowers the loss by the step times the sum of the
    first r scores. So `allocate_ranks` finds the ranks with which all weights together lower it most. Stacked matrices
    have the mean of their scores.

    Args:
        plan: as of `lora.plan`, for the axes of the weights. Weights that are trained whole get no scores.
        gradients: dL/dW of the full weights, each with its weight's own axes, averaged over some batches:
            `{path: dL/dW}` or a tree like the parameters.

    Returns:
        `{path: [min(d, k)]}`, the largest first.

    Raises:
        LoraError: a gradient is missing, not finite or of another shape than its weight.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=1)})
    >>> lora.gradient_scores(plan, {"w": jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])})["w"].round(4).tolist()
    [4.0, 1.0]
    """
    targets = _low_rank_targets("gradient_scores", plan)
    found = check_data("gradients", gradients, {path: target.shape for path, target in targets.items()})

    def squares(path: str) -> np.ndarray:
        values = singular_values(to_matrices(found[path], targets[path].axes))
        return np.square(np.asarray(values, np.float64)).mean(0)  # the squares may be beyond fp32

    return {path: squares(path) for path in targets}


def input_scores(plan: Plan, inputs: Any) -> dict[str, np.ndarray]:
    """Score the components of each planned weight by what they explain of its inputs: S_i^2 / sum S^2 of X = U S V^T.

    The rows of X are inputs x. Stacked matrices have the mean of their shares; components beyond the number of rows
    have a score of 0. `lora.starts.eva` distributes ranks by the same scores, and starts A with the components.

    Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", arXiv
    2410.07170.

    Args:
        plan: as of `lora.plan`, for the axes of the weights. Weights that are trained whole get no scores.
        inputs: `{path: X [*stack, n, d]}`, n rows of what each weight is multiplied with; several input axes flattened
            to d.

    Returns:
        `{path: [min(d, k)]}`, the largest first.

    Raises:
        LoraError: inputs are missing, not finite or of another shape.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=1)})
    >>> [round(float(score), 4) for score in lora.input_scores(plan, {"w": x})["w"]]
    [0.9, 0.1]
    """
    targets = _low_rank_targets("input_scores", plan)
    expected = {path: inputs_shape(target.axes, target.shape) for path, target in targets.items()}
    found = check_data("inputs", inputs, expected)

    def shares(path: str, target: Target) -> np.ndarray:
        _, d, k = target.axes.fans(target.shape)
        own = explained_variance_ratio(singular_values(flatten_stack(found[path])))[: min(d, k)]
        return np.pad(own, (0, min(d, k) - len(own)))

    return {path: shares(path, target) for path, target in targets.items()}


def _low_rank_targets(call: str, plan: Plan) -> dict[str, Target]:
    """Return the targets that get low-rank factors, without those that are trained whole."""
    if not isinstance(plan, Plan):
        raise LoraError(f"{call} takes a plan, found a {type(plan).__name__}: make it with lora.plan(fn, params, ...).")
    return {path: target for path, target in plan.items() if not target.rule.whole}


def _sorted_scores(scores: Any) -> dict[str, np.ndarray]:
    """Check the scores, and sort those of each path, the largest first."""
    if not isinstance(scores, Mapping) or not scores:
        raise LoraError(
            f"allocate_ranks takes scores {{path: [n]}} as lora.gradient_scores makes them, found {scores!r}."
        )
    ordered = {}
    for path, given in scores.items():
        own = np.asarray(given)
        if own.ndim != 1 or own.dtype.kind not in "iuf" or not (np.isfinite(own) & (own >= 0)).all():
            raise LoraError(
                f"scores[{path!r}] are {own.dtype}{list(own.shape)}, expected one finite number of at least 0 for each "
                "component: make them with lora.gradient_scores or lora.input_scores."
            )
        ordered[path] = np.sort(own.astype(np.float64))[::-1]
    return ordered
