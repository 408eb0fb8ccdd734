"""DPO with one model in memory: the policy is the base with adapters, and the reference is the base without them.

    python examples/dpo.py                 # writes runs/dpo/curves.png; some seconds on one core

The base of sums.py adds right half of the time. It is asked eight times for each sum, a rule says which of its answers
are right, and of each sum with answers of both kinds one pair is made. From these pairs adapters learn to prefer the
right answer, in the loop below, by the loss of Rafailov et al. 2023, "Direct Preference Optimization: Your Language
Model is Secretly a Reward Model", arXiv 2305.18290, equation 7:

    loss = -log sigmoid(reward(chosen) - reward(rejected)),    reward(y) = beta (log p(y | x) - log p_ref(y | x))

Both probabilities are of one function, `log_probs(params, ...)`: the reference is it as it is, and the policy is what
`lora.lora_apply` makes of it. One program computes both from one copy of the parameters. For models of published
folders and files of preferences, `lora-jax train` does the same.

What DPO asks for is a margin, and it may grow while both answers become rarer and others take their place: Razin et al.
2024, "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization", arXiv 2410.08847. It
happens here. So there is a second run, whose loss has -log p(chosen) of a token beside it, as in Pang et al. 2024,
"Iterative Reasoning Preference Optimization", arXiv 2404.19733.

Axes: P pairs, T tokens, A of which are the answer.
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

BETA = 0.5  # how strongly the policy is kept near the reference
ASKED = 8  # times for each sum
ANCHORS = {"DPO": 0.0, "DPO, and the right answer's own loss": 1.0}  # the weight of -log p(chosen) of a token
Tree = Any
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def make_pairs(model: lora.recipes.Model) -> dict[str, np.ndarray]:
    """Of each sum a right answer and a wrong one of the base, in this order: ids [P, 2, T] and labels [P, 2, A]."""
    asked = sums.TRAINED * ASKED
    answers = sums.sample(model, {}, asked, jax.random.key(1))
    pairs = []
    for i, prompt in enumerate(sums.TRAINED):
        own = answers[i :: len(sums.TRAINED)]
        right, wrong = ([a for a in own if sums.is_right(prompt, a) == wanted] for wanted in (True, False))
        if right and wrong:
            pairs += [(prompt, right[0]), (prompt, wrong[0])]
    ids, labels = sums.examples(*zip(*pairs, strict=True))
    return {"ids": ids.reshape(-1, 2, ids.shape[1]), "labels": labels.reshape(-1, 2, labels.shape[1])}


def make_loss(model: lora.recipes.Model) -> Loss:
    """loss(adapters, params, ids [P, 2, T], labels [P, 2, A], anchor) -> the loss, and what else is to be seen."""

    def log_probs(params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        rows = ids.reshape(-1, ids.shape[-1]), labels.reshape(-1, labels.shape[-1])  # of both answers
        return sums.answer_log_probs(model, params, *rows).sum(-1).reshape(ids.shape[:2])  # [P, 2], of whole answers

    policy, reference = lora.lora_apply(log_probs), log_probs

    def loss(
        adapters: Tree, params: Tree, ids: jax.Array, labels: jax.Array, anchor: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_p = policy(params, adapters, ids, labels)
        rewards = BETA * (log_p - reference(params, ids, labels))
        margins = rewards[:, 0] - rewards[:, 1]
        dpo = -jax.nn.log_sigmoid(margins).mean()
        lengths = jnp.sum(labels[:, 0] != sums.NOTHING, axis=-1)
        return dpo - anchor * jnp.mean(log_p[:, 0] / lengths), {"dpo": dpo, "margin": margins.mean()}

    return loss


def main(output: Path = Path("runs/dpo"), steps: int = 40) -> dict[str, Any]:
    model = sums.make_base()
    pairs, chance = make_pairs(model), sums.make_chance(model)
    kept = jax.tree.map(np.array, model.params)
    plan = model.plan(lora.Lora(rank=4, alpha=8), rows=2 * len(pairs["ids"]), tokens=sums.PROMPT + sums.ANSWER - 1)
    print(plan)
    optimizer = lora.freeze_base(optax.adam(1e-3))
    step = lora.jit_step(make_loss(model), optimizer)

    curves: dict[str, dict[str, list[tuple[int, float]]]] = {name: {} for name in ("dpo", "margin", "chance")}
    for name, anchor in ANCHORS.items():
        state = lora.TrainState.create(lora.init(jax.random.key(2), model.params, plan), optimizer)
        for own in curves.values():
            own[name] = []
        for i in range(steps + 1):
            curves["chance"][name].append((i, chance(state.trainable, sums.HELD_OUT)))
            if i < steps:
                state, metrics = step(state, model.params, pairs["ids"], pairs["labels"], jnp.float32(anchor))
                for seen in ("dpo", "margin"):
                    curves[seen][name].append((i, float(metrics[seen])))

    titles = {"dpo": "loss of DPO", "margin": "margin of the rewards", "chance": "chance of a right answer, held out"}
    sums.draw(output / "curves.png", {title: curves[name] for name, title in titles.items()})
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, model.params, kept))
    print(f"{len(pairs['ids'])} pairs; the loss of DPO, and the chance of a right answer to held-out sums:")
    for name in ANCHORS:
        (_, loss), *_, (_, last_loss) = curves["dpo"][name]
        (_, right), *_, (_, last_right) = curves["chance"][name]
        print(f"{name}: {loss:.4f} before and {last_loss:.4f} after, {right:.1%} before and {last_right:.1%} after.")
    print(f"The base is bit-identical: {unchanged}. The curves are in {output / 'curves.png'}.")
    return {**curves, "unchanged": unchanged, "adapters": state.trainable}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/dpo"))
