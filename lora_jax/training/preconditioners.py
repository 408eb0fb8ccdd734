"""Preconditioners for A and B: each gradient is multiplied by the inverse Gram matrix [r, r] of a factor.

They are gradient transformations for `optax.chain`, which act on `LoraAdapter`s and leave all else as it is. Below,
A [d, r] and B [r, k] are one matrix of a stack, with several axes of inputs or outputs flattened to one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.arguments import check_dtype
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.adapter import Adapter, is_adapter
from lora_jax.core.arrays import matmul_highest
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.training.argument_checks import check_learning_rate
from lora_jax.training.hyperparameters import LearningRate, check_positive
from lora_jax.training.masks import decay_mask, mark

Factors = tuple[jax.Array, jax.Array]  # A [*s, d, r] and B [*s, r, k], or their gradients

DAMPING = 1e-8  # added to A^T A in LoRA-FA, as in HF PEFT


def riemannian(reg: float = 1e-2) -> optax.GradientTransformation:
    """Precondition both gradients: g_A <- g_A (B B^T + reg I)^-1 [d, r], g_B <- (A^T A + reg I)^-1 g_B [r, k].

    The change of A B in a step then does not depend on how its norm is divided between A and B. Computed in fp32.
    Zhang and Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv 2402.02347.

    Args:
        reg: a positive multiple of I that keeps the Gram matrices invertible where a factor is zero, as B is at first.

    Returns:
        An optax transformation, whose `update` needs the parameters.

    Raises:
        LoraError: `reg` is not a number above 0; `update` is called without parameters, or with one factor masked.

    >>> optimizer = optax.chain(riemannian(), optax.adamw(1e-3))
    """
    check_positive("riemannian", "reg", reg, 1e-2)

    def precondition(gradients: Factors, factors: Factors, ratio: Any) -> Factors:
        (grad_a, grad_b), (a, b) = gradients, factors
        for_a, for_b = _inverse(matmul_highest(b, b.mT), reg), _inverse(matmul_highest(a.mT, a), reg)
        return matmul_highest(grad_a, for_a), matmul_highest(for_b, grad_b)

    return _on_pairs("riemannian", precondition)


def lora_fa_gradient(dtype: Any = jnp.float32) -> optax.GradientTransformation:
    """Precondition B's gradient for a frozen A: g_A <- 0 [d, r], g_B <- (A^T A + 1e-8 I)^-1 g_B / s^2 [r, k].

    The new g_B is the X for which s A X is nearest to the gradient of W, so that it does not depend on the scale of A
    and the correlations of its columns. The frozen A is that of Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank
    Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303; this gradient is the one of HF PEFT's version.

    It goes before any optimizer, whose weight decay must not reach A:

    >>> import lora_jax as lora
    >>> optimizer = optax.chain(
    ...     lora_fa_gradient(),
    ...     optax.partition(
    ...         {"train": optax.adamw(1e-3), "freeze": optax.set_to_zero()},
    ...         lambda tree: lora.labels(tree, {".*/a": "freeze"}, default="train"),
    ...     ),
    ... )

    Args:
        dtype: of the product of the inverse and g_B. HF PEFT computes it in bf16, also where all else is fp32: with
            `jnp.bfloat16`, five steps of a small model end 4e-7 from PEFT's; with fp32, which is nearer to the formula,
            1e-4.

    Returns:
        An optax transformation, whose `update` needs the parameters.

    Raises:
        LoraError: `dtype` is no floating one; `update` is called without parameters, or with one factor masked.
    """
    check_dtype("lora_fa_gradient", dtype)
    bits = jnp.finfo(dtype)

    def rounded(x: jax.Array) -> jax.Array:  # a compiler may remove a cast there and back, but not this
        return jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)

    def precondition(gradients: Factors, factors: Factors, ratio: Any) -> Factors:
        (grad_a, grad_b), (a, _) = gradients, factors
        if isinstance(ratio, optax.MaskedNode):
            raise LoraError(
                "lora_fa_gradient needs the scale of the adapters, which is masked here: put it before what masks, as "
                "in optax.chain(lora.lora_fa_gradient(), lora.freeze_base(...)). lora.lora_fa(...) freezes the base "
                "itself, and needs no lora.freeze_base."
            )
        inverse = _inverse(matmul_highest(a.mT, a), DAMPING)
        projected = rounded(matmul_highest(rounded(inverse), rounded(grad_b)))
        return jnp.zeros_like(grad_a), projected * (ratio[1] / ratio[0]) ** 2

    return _on_pairs("lora_fa_gradient", precondition)


def lora_fa(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """Train B by Adam on the gradient of `lora_fa_gradient`, and keep A frozen: LoRA-FA, as in HF PEFT.

    PEFT's Adam is m sqrt(1 - b2^t) / ((1 - b1^t) (sqrt(v) + eps)), with eps added before the bias correction of v; this
    is optax's with eps / sqrt(1 - b2^t). Weight decay is applied after the step, to what `decay_mask` marks:
    B <- (1 - lr weight_decay) (B - lr step). All else that is trained gets the same Adam.

    Under `jax.jit`, A's gradient is computed only if something reads it, as the norm in `lora.train_step` does.

    Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
    arXiv 2308.03303.

    Args:
        learning_rate: a number, or a schedule.
        b1, b2, eps, weight_decay: of Adam.
        dtype: as for `lora_fa_gradient`.

    Returns:
        An optax transformation, whose `update` needs the parameters.

    Raises:
        LoraError: `learning_rate` is neither; `dtype` is no floating one.

    >>> import lora_jax as lora
    >>> optimizer = lora.lora_fa(1e-3, weight_decay=1e-2)
    """
    check_learning_rate("lora_fa(learning_rate, ...)", learning_rate)

    def groups(tree: Any) -> Any:
        def group(adapter: Adapter, name: str) -> str:
            return "freeze" if isinstance(adapter, LoraAdapter) and name == "a" else "train"

        return mark(tree, group, lambda _: "train", frozen="freeze")

    def epsilon(count: Any) -> Any:
        return eps / jnp.sqrt(1 - b2 ** (count + 1))

    def left_by_decay(count: Any) -> Any:
        return 1 - weight_decay * (learning_rate(count) if callable(learning_rate) else learning_rate)

    others = ("b1", "b2", "eps_root", "mu_dtype", "nesterov")
    adam = optax.inject_hyperparams(optax.scale_by_adam, static_args=others, hyperparam_dtype=jnp.float32)
    train = optax.chain(
        adam(b1=b1, b2=b2, eps=epsilon),
        optax.masked(optax.scale_by_schedule(left_by_decay), decay_mask),  # of the step, as well as of B
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.chain(
        lora_fa_gradient(dtype), optax.partition({"train": train, "freeze": optax.set_to_zero()}, groups)
    )


def _on_pairs(call: str, precondition: Callable[[Factors, Factors, Any], Factors]) -> optax.GradientTransformation:
    """Make a transformation that maps `precondition(gradients, factors, ratio)` over every pair of factors, in fp32."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise LoraError(
                f"{call} needs the factors, not their gradients alone: pass params to update, "
                "as in optimizer.update(grads, state, params)."
            )
        names, nodes, treedef = flatten_with_names(params, is_leaf=is_adapter)
        pairs = zip(names, treedef.flatten_up_to(updates), nodes, strict=True)
        return treedef.unflatten([_update(call, precondition, *pair) for pair in pairs]), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _update(
    call: str, precondition: Callable[[Factors, Factors, Any], Factors], path: str, gradient: Any, adapter: Any
) -> Any:
    """Return the preconditioned gradient of one leaf; of what is no pair of factors, its gradient as it is."""
    arrays = jax.tree.leaves((gradient.a, gradient.b)) if isinstance(adapter, LoraAdapter) else []
    if not arrays:  # no pair of factors, or masked by optax
        return gradient
    if len(arrays) < 2:
        raise LoraError(
            f"{call} needs both factors of {path!r} and one of them is masked: put it before what masks them, as in "
            f"optax.chain(lora.{call}(), optax.partition(...))."
        )
    try:
        LoraAdapter(adapter.a, adapter.b, adapter.axes, 1.0).kernel_shape()
    except LoraError as error:
        raise LoraError(f"{call}: the adapter {path!r} {error}") from None
    found = precondition(_matrices(gradient), _matrices(adapter), adapter.ratio)
    a, b = (new.reshape(old.shape).astype(old.dtype) for new, old in zip(found, arrays, strict=True))
    return dataclasses.replace(gradient, a=a, b=b)


def _matrices(adapter: LoraAdapter) -> Factors:
    """Return A [*s, d, r] and B [*s, r, k] in fp32."""
    a, b, n = adapter.a.astype(jnp.float32), adapter.b.astype(jnp.float32), len(adapter.axes.stack)
    return a.reshape(*a.shape[:n], -1, a.shape[-1]), b.reshape(*b.shape[: n + 1], -1)


def _inverse(gram: jax.Array, reg: float) -> jax.Array:
    """Return (G + reg I)^-1 [*s, r, r] for a Gram matrix G = X^T X [*s, r, r]."""
    # A reg below the rounding error of G would be lost in the sum, and G itself may be singular.
    least = jnp.finfo(gram.dtype).eps * jnp.trace(gram, axis1=-2, axis2=-1)
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return jnp.linalg.inv(gram + jnp.maximum(reg, least)[..., None, None] * eye)
