"""What dpo.py and grpo.py have in common: a tiny decoder that adds two digits, and is wrong half of the time.

It writes `7+5=12.`, and as often `7+5=13.`: the texts that it was trained with have each sum once right, and once one
too many. To prefer the right one is what is left to be learned by adapters, from preferences or from rewards. Of the
hundred sums a fifth are held out: no preference and no reward is for them.

The decoder is that of `lora.recipes`, as of a published folder, but tiny and with random weights.

Axes: N texts, T tokens, A of which are the answer.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import lora_jax as lora
from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.recipes import decoder, loading
from lora_jax.recipes.config import parse_config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SYMBOLS = "0123456789+=."
STOP = SYMBOLS.index(".")
PROMPT, ANSWER = 4, 3  # tokens of "7+5=", and at most of "12."
NOTHING = -100  # the label of what follows the stop
Tree = Any
Prompt = list[int]

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY = {"model_type": "llama", "vocab_size": 16, "tie_word_embeddings": True, "eos_token_id": STOP, **SIZES, **HEADS}


def encode(text: str) -> list[int]:
    return [SYMBOLS.index(symbol) for symbol in text]


PROMPTS = [encode(f"{a}+{b}=") for a, b in itertools.product(range(10), repeat=2)]
_ORDER = np.random.default_rng(0).permutation(len(PROMPTS))
HELD_OUT, TRAINED = [PROMPTS[i] for i in _ORDER[:20]], [PROMPTS[i] for i in _ORDER[20:]]


def is_right(prompt: Prompt, answer: Sequence[int]) -> bool:
    """The rule: whether the answer, without its stop, is the sum."""
    return list(answer) == encode(str(prompt[0] + prompt[2]))


def examples(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with their answers, i32 [N, T], and the labels i32 [N, A]: the answers and the stops behind them."""
    texts = [[*prompt, *answer, STOP][: PROMPT + ANSWER] for prompt, answer in zip(prompts, answers, strict=True)]
    ids = np.array([text + [STOP] * (PROMPT + ANSWER - len(text)) for text in texts], np.int32)
    is_text = np.arange(PROMPT + ANSWER) < np.array([[len(text)] for text in texts])
    return ids, np.where(is_text, ids, NOTHING)[:, PROMPT:]


def answer_log_probs(
    model: lora.recipes.Model, params: Tree, ids: jax.Array, labels: jax.Array, remat: bool = True
) -> jax.Array:
    """log p of each token of the answers [N, A], 0 where there is none; logits of few rows are there at a time."""
    hidden = model.hidden(params, ids[:, :-1], remat=remat)[:, PROMPT - 1 :]  # what an answer is predicted from
    return lora.losses.linear_log_probs(hidden, model.head(params), labels, ignore=NOTHING)


def random_model(**sizes: int) -> lora.recipes.Model:
    """A decoder before any training; as `TINY`, but for these sizes."""
    config = parse_config({**TINY, **sizes})
    shapes = decoder.shapes(config)
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))
    params = {
        path: jnp.ones(shape) if path.endswith("scale") else jax.random.normal(keys[path], shape) / config.hidden**0.5
        for path, shape in shapes.items()
    }
    return lora.recipes.Model(config, loading.nested(params), specs=None)


def make_base(steps: int = 150) -> lora.recipes.Model:
    """A decoder that was trained, all of it, with each sum once right and once one too many."""
    model = random_model()
    sums = [prompt[0] + prompt[2] for prompt in PROMPTS]
    answers = [encode(str(n)) for n in sums] + [encode(str(n + 1)) for n in sums]
    ids, labels = map(jnp.asarray, examples(PROMPTS * 2, answers))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(params: Tree) -> jax.Array:
        return -answer_log_probs(model, params, ids, labels, remat=False).sum() / (labels != NOTHING).sum()

    def step(carry: Tree, _: None) -> tuple[Tree, None]:
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return model.replace(params=train((model.params, optimizer.init(model.params)))[0])


def sample(
    model: lora.recipes.Model, adapters: Mapping[str, lora.Adapter], prompts: Sequence[Prompt], key: jax.Array
) -> list[list[int]]:
    """An answer to each prompt, drawn token by token."""
    return model.generate(prompts, adapters, count=ANSWER, temperature=1.0, key=key)


def make_chance(model: lora.recipes.Model) -> Callable[[Mapping[str, lora.Adapter], Sequence[Prompt]], float]:
    """chance(adapters, prompts): the probability that a sampled answer is right, as a mean over the prompts."""

    def right(params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.exp(answer_log_probs(model, params, ids, labels).sum(-1)).mean()

    apply = jax.jit(lora.lora_apply(right))

    def chance(adapters: Mapping[str, lora.Adapter], prompts: Sequence[Prompt]) -> float:
        ids, labels = examples(prompts, [encode(str(prompt[0] + prompt[2])) for prompt in prompts])
        return float(apply(model.params, adapters, ids, labels))

    return chance


Curve = Sequence[tuple[int, float]]  # values after so many steps


def draw(path: Path, panels: Mapping[str, Mapping[str, Curve]]) -> None:
    """Draw a panel for each quantity, with its curves by their names, into a PNG file."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (quantity, curves) in zip(axes[0], panels.items(), strict=True):
        for name, curve in curves.items():
            axis.plot(*zip(*curve, strict=True), label=name)
        axis.set(xlabel="step", ylabel=quantity)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        if len(curves) > 1 and axis is axes[0, 0]:
            axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_file(path) as new:
        figure.savefig(new, dpi=120, format="png")
    plt.close(figure)
