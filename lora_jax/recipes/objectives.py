"""What is minimized: the loss of the tokens of answers, or DPO's of pairs of answers.

Each is a loss for `lora.jit_step`, of a batch as `packed_batches` or `preference_batches` makes it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.losses.linear import linear_cross_entropy, linear_log_probs
from lora_jax.recipes.decoder import Remat
from lora_jax.recipes.model import Model
from lora_jax.recipes.options import Options
from lora_jax.recipes.preferences import PairLogProbs, dpo_loss, pair_log_probs
from lora_jax.transform.apply import lora_apply

Batch = dict[str, Any]
# (adapters, params, batch) -> the mean, what else is reported, and of how many tokens or pairs it is the mean.
Loss = Callable[[Any, Any, Batch], tuple[jax.Array, dict[str, jax.Array], jax.Array]]


def make_loss(model: Model, options: Options, pairs: bool) -> Loss:
    """Return the loss that a training run with these options has: of pairs, DPO's; else that of the answers."""
    if pairs:
        return preference_loss(model, options.beta, remat=options.remat)
    return answer_loss(model, remat=options.remat)


def answer_loss(model: Model, *, remat: Remat = True) -> Loss:
    """Return the loss of supervised fine-tuning: the mean cross-entropy over the tokens with weights.

    Args:
        model: the base.
        remat: whether each layer is computed again in the backward pass; or a policy of `jax.checkpoint`.

    Returns:
        `loss(adapters, params, batch)` -> the mean, `{}` and the number of tokens, as `lora.train_step` takes it.

    >>> import json, tempfile, jax, jax.numpy as jnp, numpy as np, lora_jax as lora
    >>> from pathlib import Path
    >>> from lora_jax.recipes.tokens import Tokenized
    >>> facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     model = lora.recipes.abstract(folder, jnp.float32)
    >>> tokens = Tokenized(np.arange(6, dtype=np.int32), np.arange(6) % 3 > 0, np.array([0, 3, 6]))
    >>> batch = next(lora.recipes.packed_batches(tokens, rows=1, length=4, seed=0))
    >>> value, metrics, count = jax.eval_shape(lora.recipes.answer_loss(model), {}, model.params, batch)
    >>> value.shape, metrics, count.shape
    ((), {}, ())
    """

    def total(params: Any, batch: Batch) -> jax.Array:
        hidden = model.hidden(params, batch["ids"], batch["positions"], batch["segments"], remat)
        return linear_cross_entropy(
            hidden,
            model.head(params),
            batch["targets"],
            weights=batch["weights"],
            soft_cap=model.config.logit_cap,
            reduction="sum",
        )

    adapted = lora_apply(total)

    def loss(adapters: Any, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        count = batch["weights"].sum(dtype=jnp.float32)
        return adapted(params, adapters, batch) / jnp.maximum(count, 1), {}, count

    return loss


def preference_loss(model: Model, beta: float = 0.1, most: int = 8, *, remat: Remat = True) -> Loss:
    """Return the loss of DPO, whose reference is the frozen base: the same parameters without the adapters.

    Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv
    2305.18290.

    Args:
        model: the base.
        beta: how strongly the model is kept near it.
        most: pairs in a row, as they were packed by `preference_batches`.
        remat: as of `answer_loss`.

    Returns:
        `loss(adapters, params, batch)` -> the mean, metrics and the number of pairs, as `lora.train_step` takes it.

    >>> import json, tempfile, jax, jax.numpy as jnp, numpy as np, lora_jax as lora
    >>> from pathlib import Path
    >>> from lora_jax.recipes.tokens import Tokenized, TokenizedPairs
    >>> facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 32}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     model = lora.recipes.abstract(folder, jnp.float32)
    >>> tokens = Tokenized(np.arange(6, dtype=np.int32), np.arange(6) % 3 > 0, np.array([0, 3, 6]))
    >>> batch = next(lora.recipes.preference_batches(TokenizedPairs(tokens, tokens), rows=1, length=4, seed=0))
    >>> value, metrics, count = jax.eval_shape(lora.recipes.preference_loss(model), {}, model.params, batch)
    >>> sorted(metrics)
    ['accuracy', 'margin']
    """

    def log_probs(params: Any, batch: Batch) -> jax.Array:
        rows = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}  # [2 P, T]
        hidden = model.hidden(params, rows["ids"], rows["positions"], rows["segments"], remat)
        found = linear_log_probs(hidden, model.head(params), rows["targets"], soft_cap=model.config.logit_cap)
        return found.reshape(batch["ids"].shape)

    adapted = lora_apply(log_probs)

    def loss(adapters: Any, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        def pairs(adapters: Any) -> PairLogProbs:
            return pair_log_probs(adapted(params, adapters, batch), batch["segments"], batch["weights"], most)

        policy = pairs(adapters)
        found = dpo_loss(policy, pairs({}), beta)
        return found.loss, {"accuracy": found.accuracy, "margin": found.margin}, policy.is_pair.sum(dtype=jnp.float32)

    return loss
