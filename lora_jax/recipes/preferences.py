"""Direct preference optimization (DPO): from pairs of answers to the loss.

Of two answers to one prompt the model is to prefer the first, and to stay near a reference, which is the frozen base
without adapters: the same function and parameters, so that no second model is held in memory.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", arXiv
2305.18290.

Axes: P pairs of rows, S pairs of answers in one of these, T tokens.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.argument_checks import refuse
from lora_jax.recipes.packed_rows import Batch, Order, PackedBatches, Rows, checked_order, place
from lora_jax.recipes.tokens import TokenizedPairs


def preference_batches(
    pairs: TokenizedPairs,
    rows: int,
    length: int,
    seed: int,
    epoch: int = 0,
    start: int = 0,
    shard: tuple[int, int] = (0, 1),
    epochs: int = 1,
    most: int = 8,
) -> PackedBatches:
    """Return batches of preferences, packed as by `packed_batches`, with arrays `[rows of this host, 2, length]`.

    Along the second axis the first row has the better answers, and the other one the worse; segment k of both is one
    pair.

    Args:
        pairs: from `tokenized_pairs`.
        rows: of better answers in a batch, on all hosts together.
        length, seed, epoch, start, shard, epochs: as of `packed_batches`.
        most: pairs in a row, S.

    Returns:
        An iterator of the batches, as of `packed_batches`.

    Raises:
        LoraError: as of `packed_batches`.

    >>> import numpy as np, lora_jax as lora
    >>> from lora_jax.recipes.tokens import Tokenized, TokenizedPairs
    >>> tokens = Tokenized(np.arange(6, dtype=np.int32), np.arange(6) % 3 > 0, np.array([0, 3, 6]))
    >>> batch = next(lora.recipes.preference_batches(TokenizedPairs(tokens, tokens), rows=1, length=4, seed=0))
    >>> batch["ids"].shape, int(batch["segments"].max())
    ((1, 2, 4), 2)
    """
    call = "preference_batches(pairs, rows, length, seed)"
    order = checked_order(call, Order(rows, length, seed, epoch, start, shard, epochs), most=most)
    lengths = np.maximum(pairs.chosen.lengths, pairs.rejected.lengths)
    data = f"{pairs.fingerprint} {most}"
    make = partial(_place, pairs, length=length)
    return PackedBatches(lengths, make, data, order, most)


def _place(pairs: TokenizedPairs, rows: Rows, length: int) -> Batch:
    chosen, rejected = place(pairs.chosen, rows, length), place(pairs.rejected, rows, length)
    return {name: np.stack([chosen[name], rejected[name]], 1) for name in chosen}


class PairLogProbs(NamedTuple):
    """Log-probabilities of the two answers of each pair.

    Attributes:
        chosen: [P, S], of the better answers.
        rejected: [P, S], of the worse ones.
        is_pair: [P, S], whether there is a pair at all.
    """

    chosen: jax.Array
    rejected: jax.Array
    is_pair: jax.Array


def pair_log_probs(log_probs: jax.Array, segments: jax.Array, weights: jax.Array, most: int = 8) -> PairLogProbs:
    """Add up the log-probabilities of tokens over each answer.

    Args:
        log_probs: [P, 2, T], of the targets, such as `lora.losses.linear_log_probs` computes.
        segments: [P, 2, T], of the batch.
        weights: [P, 2, T], of the batch: 1 for tokens of answers.
        most: S, as it was given to `preference_batches`.
    """
    counted = jnp.where(weights > 0, log_probs * weights, 0)

    def add_up(values: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, ids, num_segments=most + 1)[1:]  # without the places that hold nothing

    sums = jax.vmap(jax.vmap(add_up))(counted, segments)  # [P, 2, S]
    is_pair = jax.vmap(jax.vmap(add_up))(weights, segments)[:, 0] > 0
    return PairLogProbs(sums[:, 0], sums[:, 1], is_pair)


class DpoLoss(NamedTuple):
    """What DPO says of a batch, as means over its pairs.

    Attributes:
        loss: to be minimized; log 2 where policy and reference are the same.
        accuracy: for how many pairs the better answer has the higher reward.
        margin: by how much its reward is higher.
    """

    loss: jax.Array
    accuracy: jax.Array
    margin: jax.Array


def dpo_loss(policy: PairLogProbs, reference: PairLogProbs, beta: float = 0.1, label_smoothing: float = 0.0) -> DpoLoss:
    """Return the loss of direct preference optimization.

    The reward of an answer y to x is `beta * (log p(y | x) - log p_ref(y | x))`, and the loss of a pair is
    `-log sigmoid(reward of the better one - reward of the worse one)` (equation 7 of the paper).

    Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    arXiv 2305.18290.

    Args:
        policy: of the model that is trained.
        reference: of the model that it began as; no gradient goes there.
        beta: how strongly it is kept near the reference.
        label_smoothing: the share of pairs that are taken to be the other way round, from 0 to 1/2 (Mitchell 2023, "A
            note on DPO with noisy preferences").

    Returns:
        A `DpoLoss`: means over the pairs of the loss, the accuracy and the margin.

    Raises:
        LoraError: `beta` is not above 0, or `label_smoothing` outside of its range.

    >>> import jax.numpy as jnp
    >>> same = PairLogProbs(jnp.array([[-3.0]]), jnp.array([[-2.0]]), jnp.array([[True]]))
    >>> print(f"{dpo_loss(same, same).loss:.4f}")
    0.6931
    """
    call = "dpo_loss(policy, reference, beta, label_smoothing)"
    if isinstance(beta, int | float) and not 0 < beta < math.inf:
        refuse(call, "beta", beta, "a number above 0, such as 0.1")
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        refuse(call, "label_smoothing", label_smoothing, "a number from 0 to below 0.5")
    reference = jax.lax.stop_gradient(reference)
    margins = beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))  # [P, S]
    right, wrong = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    is_pair = policy.is_pair
    count = jnp.maximum(is_pair.sum(), 1)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(is_pair, values, 0).sum() / count

    return DpoLoss(mean(losses), mean((margins > 0).astype(losses.dtype)), mean(margins))
