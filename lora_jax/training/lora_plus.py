"""LoRA+: a higher learning rate for B than for A.

Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
"""

from collections.abc import Callable
from typing import Any

import optax

from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import refuse
from lora_jax.training.argument_checks import check_learning_rate
from lora_jax.training.hyperparameters import LearningRate, check_positive
from lora_jax.training.masks import is_matrix, mark

CALL = "lora_plus(optimizer, learning_rate, ratio)"


def lora_plus(
    optimizer: Callable[[Any], optax.GradientTransformation], learning_rate: LearningRate, ratio: float = 16.0
) -> optax.GradientTransformationExtraArgs:
    """Train B with a learning rate that is `ratio` times that of A: lr_B = ratio * lr_A.

    An update of A's entries changes the output by a sum over all d inputs, an update of B's entries by a sum over r
    only; with one learning rate for both, B learns too slowly. In the fast group are the arrays with W's outputs and
    without its inputs: B itself, and vectors of one entry per output, such as DoRA's magnitudes; beside adapters, the
    arrays of at most one axis, such as biases. All else that is trained learns at `learning_rate`, also A of an
    embedding table (HF PEFT trains both of its factors at 1e-6).
    Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.

    Each of the two groups has an optimizer of its own. A transformation that reads all gradients at once goes before,
    as in `optax.chain(optax.clip_by_global_norm(1.0), lora.lora_plus(optax.adam, 1e-4))`. AdamW multiplies its weight
    decay by the learning rate, so that it also decays B faster.

    Args:
        optimizer: makes an optax transformation from a learning rate: `optax.adamw`, or
            `lambda rate: optax.adamw(rate, weight_decay=0.1, mask=lora.decay_mask)`.
        learning_rate: of A; a number, or a schedule.
        ratio: above 0, usually above 1; the paper advises about 16 for most models.

    Returns:
        An optax transformation.

    Raises:
        LoraError: an argument is none of these; the ratio is not a number above 0.

    >>> optimizer = lora_plus(optax.adamw, optax.cosine_decay_schedule(1e-4, 1000), ratio=16.0)
    """
    if not callable(optimizer):
        refuse(
            CALL, "optimizer", optimizer, "what makes an optax transformation of a learning rate, as optax.adamw does"
        )
    check_learning_rate(CALL, learning_rate)
    check_positive("lora_plus", "ratio", ratio, 16.0)

    def groups(tree: Any) -> Any:
        def group(adapter: Adapter, name: str) -> str:
            layout = adapter.layout[name]
            return "fast" if "outputs" in layout and "inputs" not in layout else "slow"

        return mark(tree, group, lambda leaf: "slow" if is_matrix(leaf) else "fast", frozen="freeze")

    def faster(count: Any) -> Any:
        return learning_rate(count) * ratio  # type: ignore[operator]

    fast = optimizer(faster if callable(learning_rate) else learning_rate * ratio)
    return optax.partition({"slow": optimizer(learning_rate), "fast": fast, "freeze": optax.set_to_zero()}, groups)
