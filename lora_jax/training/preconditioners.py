"""Gradients of A and B, each multiplied by the inverse of what the other factor makes of it.

Transformations of gradients for `optax.chain`. They act on `LoraAdapter`s and leave all else as it is. Below, A [d, r]
and B [r, k] are one matrix of a stack, with several inputs or outputs taken as one axis.
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
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.training.masks import LearningRate, check_positive, decay_mask, mark

Factors = tuple[jax.Array, jax.Array]  # A [*s, d, r] and B [*s, r, k], or their gradients

DAMPING = 1e-8  # of A^T A in LoRA-FA, as in HF PEFT


def riemannian(reg: float = 1e-2) -> optax.GradientTransformation:
    """Riemannian preconditioning: g_A <- g_A (B B^T + reg I)^-1 [d, r], g_B <- (A^T A + reg I)^-1 g_B [r, k].

    The change of A B that a step makes then no longer depends on how A and B share its size between them. In fp32.
    Zhang and Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv 2402.02347.

    Args:
        reg: keeps the inverse finite where a factor is zero, as B is at the start.

    Raises:
        LoraError: `reg` is not a number above 0; `update` is called without parameters, or with one factor masked.

    >>> optimizer = optax.chain(riemannian(), optax.adamw(1e-3))
    """
    check_positive("riemannian", "reg", reg, 1e-2)

    def precondition(gradients: Factors, factors: Factors, scale: float) -> Factors:
        (grad_a, grad_b), (a, b) = gradients, factors
        for_a, for_b = _inverse(_matmul(b, b.mT), reg), _inverse(_matmul(a.mT, a), reg)
        return _matmul(grad_a, for_a), _matmul(for_b, grad_b)

    return _on_pairs("riemannian", precondition)


def lora_fa_gradient(dtype: Any = jnp.float32) -> optax.GradientTransformation:
    """LoRA-FA's gradient for a frozen A: g_A <- 0 [d, r], g_B <- (A^T A + 1e-8 I)^-1 g_B / s^2 [r, k].

    It is the X that brings s A X nearest to the gradient of W, and so undoes A's own scale and correlations.
    A frozen A is that of Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
    Fine-tuning", arXiv 2308.03303; this gradient is the one of HF PEFT's version.

    Before any optimizer, with A kept from its weight decay too:

    >>> import lora_jax as lora
    >>> optimizer = optax.chain(
    ...     lora_fa_gradient(),
    ...     optax.partition(
    ...         {"train": optax.adamw(1e-3), "freeze": optax.set_to_zero()},
    ...         lambda tree: lora.labels(tree, {".*/a": "freeze"}, default="train"),
    ...     ),
    ... )

    Args:
        dtype: of the product of the inverse and g_B. HF PEFT has it in bf16, also where all else is fp32; with
            `jnp.bfloat16` five steps of a small model end 4e-7 from PEFT's, and with fp32, which is nearer to the
            formula, 1e-4.

    Raises:
        LoraError: `dtype` is no floating one; `update` is called without parameters, or with one factor masked.
    """
    check_dtype("lora_fa_gradient", dtype)
    bits = jnp.finfo(dtype)

    def rounded(x: jax.Array) -> jax.Array:  # a compiler may leave out a cast to and fro, but not this
        return jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)

    def precondition(gradients: Factors, factors: Factors, scale: float) -> Factors:
        (grad_a, grad_b), (a, _) = gradients, factors
        inverse = _inverse(_matmul(a.mT, a), DAMPING)
        projected = rounded(_matmul(rounded(inverse), rounded(grad_b)))
        return jnp.zeros_like(grad_a), projected / scale**2

    return _on_pairs("lora_fa_gradient", precondition)


def lora_fa(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA: A frozen, and Adam on the gradient of `lora_fa_gradient` for B, as in HF PEFT.

    PEFT's Adam is m sqrt(1 - b2^t) / ((1 - b1^t) (sqrt(v) + eps)), with eps added before v is corrected; that is
    optax's with eps / sqrt(1 - b2^t). It decays what the step has left, at what `decay_mask` marks:
    B <- (1 - lr weight_decay) (B - lr step). Whatever else is trained gets the same Adam.

    Under `jax.jit` A's gradient is not even computed, unless something reads it, as the norm in `lora.train_step` does.

    Args:
        learning_rate: a number, or a schedule.
        b1, b2, eps, weight_decay: of Adam.
        dtype: as for `lora_fa_gradient`.
    """

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


def _on_pairs(call: str, precondition: Callable[[Factors, Factors, float], Factors]) -> optax.GradientTransformation:
    """`precondition(gradients, factors, scale)` at every pair of factors in a tree, in fp32."""

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
    call: str, precondition: Callable[[Factors, Factors, float], Factors], path: str, gradient: Any, adapter: Any
) -> Any:
    arrays = jax.tree.leaves((gradient.a, gradient.b)) if isinstance(adapter, LoraAdapter) else []
    if not arrays:  # not a pair of factors, or one that optax has masked
        return gradient
    if len(arrays) < 2:
        raise LoraError(
            f"{call} needs both factors of {path!r} and one of them is masked: put it before what masks them, as in "
            f"optax.chain(lora.{call}(), optax.partition(...))."
        )
    try:
        LoraAdapter(adapter.a, adapter.b, adapter.axes, adapter.scale).kernel_shape()
    except LoraError as error:
        raise LoraError(f"{call}: the adapter {path!r} {error}") from None
    found = precondition(_matrices(gradient), _matrices(adapter), adapter.scale)
    a, b = (new.reshape(old.shape).astype(old.dtype) for new, old in zip(found, arrays, strict=True))
    return dataclasses.replace(gradient, a=a, b=b)


def _matrices(adapter: LoraAdapter) -> Factors:
    a, b, n = adapter.a.astype(jnp.float32), adapter.b.astype(jnp.float32), len(adapter.axes.stack)
    return a.reshape(*a.shape[:n], -1, a.shape[-1]), b.reshape(*b.shape[: n + 1], -1)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")


def _inverse(gram: jax.Array, reg: float) -> jax.Array:
    """(G + reg I)^-1 [*s, r, r] for G = X^T X [*s, r, r]."""
    # Anything below the rounding of G itself is lost in the sum, and G may have no inverse.
    least = jnp.finfo(gram.dtype).eps * jnp.trace(gram, axis1=-2, axis2=-1)
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return jnp.linalg.inv(gram + jnp.maximum(reg, least)[..., None, None] * eye)
