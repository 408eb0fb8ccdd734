"""GRPO with one model in memory: what is sampled from and trained is the base with adapters, the reference is the base.

    python examples/grpo.py                # writes runs/grpo/curves.png; some seconds on one core

The base of sums.py adds right half of the time. Here it samples several answers to each of some sums, a rule gives 1
for a right answer and 0 for a wrong one, and what is better than the mean of its own group becomes likelier. That is
GRPO, of Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", arXiv
2402.03300, equation 3. For each token, with the policy p that is trained, p_old that the answers were sampled from, and
the reference p_ref:

    advantage = (reward - mean of the group) / (standard deviation of the group)
    objective = min(r advantage, clip(r, 1 - eps, 1 + eps) advantage) - beta KL,    r = p / p_old

KL is the estimate p_ref / p - log(p_ref / p) - 1, which is never negative and right in the mean: Schulman 2020,
"Approximating KL Divergence", joschu.net/blog/kl-approx.html, where it is called k3.

All these probabilities are of one function of the parameters: the reference is it as it is, and the policy is what
`lora.lora_apply` makes of it. One program computes both from one copy of the base.

Axes: P sums of a step, G answers to each, N = P G, T tokens, A of which are the answer.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sums

import lora_jax as lora

P, G = 16, 16
UPDATES = 2  # with the answers of one step
EPS, BETA = 0.2, 0.02  # how far an update may go; how strongly the policy is kept near the reference
Tree = Any
Batch = dict[str, Any]
Loss = Callable[[Tree, Tree, Batch], tuple[jax.Array, dict[str, jax.Array]]]


def advantages(rewards: np.ndarray) -> np.ndarray:
    """[P, G], by how much each is better than its group, in the group's spread; 0 where all are alike."""
    centred = rewards - rewards.mean(1, keepdims=True)
    return centred / (rewards.std(1, keepdims=True) + 1e-4)


def k3(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """The estimate of KL(p || q) of each sample of p."""
    return jnp.expm1(log_q - log_p) - (log_q - log_p)


def make_loss(model: lora.recipes.Model) -> tuple[Loss, Callable[..., jax.Array]]:
    """loss(adapters, params, batch), and log_probs(adapters, params, batch) [N, A], which `old` in a batch is made by.

    A batch has ids [N, T], labels [N, A], advantages [N] and old [N, A].
    """

    def reference(params: Tree, batch: Batch) -> jax.Array:
        return sums.answer_log_probs(model, params, batch["ids"], batch["labels"])

    policy = lora.lora_apply(reference)

    def loss(adapters: Tree, params: Tree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_p = policy(params, adapters, batch)
        kl = k3(log_p, reference(params, batch))
        ratio, advantage = jnp.exp(log_p - batch["old"]), batch["advantages"][:, None]
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - EPS, 1 + EPS) * advantage)

        is_token = batch["labels"] != sums.NOTHING
        lengths = is_token.sum(1)

        def mean(values: jax.Array) -> jax.Array:  # over the tokens of each answer, then over the answers
            return jnp.mean(jnp.where(is_token, values, 0).sum(1) / lengths)

        return -mean(gain - BETA * kl), {"kl": mean(kl)}

    return loss, jax.jit(lambda adapters, params, batch: policy(params, adapters, batch))


def main(output: Path = Path("runs/grpo"), steps: int = 30) -> dict[str, Any]:
    model = sums.make_base()
    kept = jax.tree.map(np.array, model.params)
    plan = model.plan(lora.Lora(rank=4, alpha=8), rows=P * G, tokens=sums.PROMPT + sums.ANSWER - 1)
    print(plan)
    loss, log_probs = make_loss(model)
    optimizer = lora.freeze_base(optax.adam(2e-3))
    state = lora.TrainState.create(lora.init(jax.random.key(2), model.params, plan), optimizer)
    step, rng = lora.jit_step(loss, optimizer), np.random.default_rng(0)
    chance = sums.make_chance(model)

    curves: dict[str, list[tuple[int, float]]] = {"reward": [], "held out": [], "kl": []}
    for i in range(steps):
        curves["held out"].append((i, chance(state.trainable, sums.HELD_OUT)))
        asked = [sums.TRAINED[n] for n in rng.choice(len(sums.TRAINED), P, replace=False) for _ in range(G)]
        answers = sums.sample(model, state.trainable, asked, jax.random.key(100 + i))
        rewards = np.array([sums.is_right(*pair) for pair in zip(asked, answers, strict=True)], np.float32)
        ids, labels = sums.examples(asked, answers)
        batch: Batch = {"ids": ids, "labels": labels, "advantages": advantages(rewards.reshape(P, G)).ravel()}
        batch["old"] = log_probs(state.trainable, model.params, batch)
        for _ in range(UPDATES):
            state, metrics = step(state, model.params, batch)
        curves["reward"].append((i, float(rewards.mean())))
        curves["kl"].append((i, float(metrics["kl"])))

    curves["held out"].append((steps, chance(state.trainable, sums.HELD_OUT)))
    panels = {"mean reward": ["reward"], "chance of a right answer": ["held out"], "KL to the base, of a token": ["kl"]}
    sums.draw(output / "curves.png", {axis: {name: curves[name] for name in names} for axis, names in panels.items()})
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, model.params, kept))
    first, last = (np.mean([reward for _, reward in part]) for part in (curves["reward"][:3], curves["reward"][-3:]))
    print(f"Mean reward: {first:.2f} in the first three steps, {last:.2f} in the last three.")
    (_, before), *_, (_, after) = curves["held out"]
    print(f"Chance of a right answer, held-out sums: {before:.1%} before, {after:.1%} after.")
    print(f"The base is bit-identical: {unchanged}. The curves are in {output / 'curves.png'}.")
    return {**curves, "unchanged": unchanged, "adapters": state.trainable}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/grpo"))
