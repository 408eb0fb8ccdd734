"""Cross-entropy and log-probabilities of hidden states and a head, without their product, the logits.

The gradient in the forward pass is that of Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989; that logits need not be
formed is also the subject of Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", arXiv
2411.09009. Here a head that is frozen, packed or adapted costs no gradient of its size.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.argument_checks import refuse
from lora_jax.core.arrays import accumulator, concrete, describe
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.packed_parts import InParts
from lora_jax.core.paths import is_array
from lora_jax.core.row_losses import RowLoss, in_blocks, number_of_blocks, row_losses
from lora_jax.losses.cross_entropy import IGNORED, CrossEntropy

BLOCK_BYTES = 2**27  # of the logits of a block in fp32, on each device
FEWEST_ROWS = 512  # of a block, on each device: for fewer, reading the head takes longer than multiplying by it
FEWEST_ROWS_ON_CPU = 128  # which read as fast as they multiply, and keep two arrays of the logits of a block
Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    hidden: jax.Array,
    head: Any,
    labels: jax.Array,
    *,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    ignore: int | None = -100,
    reduction: Reduction = "mean",
    tied: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    chunk_rows: int | None = None,
) -> jax.Array:
    """Return the cross-entropy of `softmax(hidden @ head)` and labels, without forming the logits.

    It is `optax.softmax_cross_entropy_with_integer_labels(hidden @ head, labels)`, computed some rows at a time, each
    with its gradient while its logits are there. With a frozen head, forward and backward pass take 4 T D V operations
    and one block of logits; nothing of the head's size is computed. Inside `lora.lora_apply` the head may be packed or
    have an adapter, whose gradients are found likewise; with a head that is trained itself, 6 T D V, or 8 where
    `reduction` is "none" and each row's loss is wanted first.

    Products have operands of the dtype that hidden states and head have together, and are accumulated in fp32; logits,
    softmax and sums over rows are in fp32 (fp64 where the inputs are), and so is the result. The gradient of the hidden
    states has their dtype.

    Hsu et al. 2024, "Liger Kernel", arXiv 2410.10989, for the gradient in the forward pass; Wijmans et al. 2024, "Cut
    Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009, for logits that are not formed.

    Args:
        hidden: [..., T, D], the states after the last norm.
        head: [D, V], an array or a packed weight (which is dequantized in parts); [V, D] if `tied`.
        labels: integers [..., T], from 0 to V - 1. Outside of `jax.jit` others are refused; under it their rows, and
            sums with them, are NaN.
        weights: [..., T], of each row; by default 1.
        label_smoothing: the share of the target that is spread evenly over all V, as `optax.smooth_labels` does.
        z_loss: adds z_loss * logsumexp(logits)^2 to the loss of each row.
        soft_cap: takes soft_cap * tanh(logits / soft_cap) for the logits.
        ignore: the label of rows that have a loss of 0 and count for no mean; None if there is none.
        reduction: "mean", the sum of weighted losses over the sum of weights of the rows that count (0 if none does);
            "sum"; or "none", the weighted losses [..., T].
        tied: whether the head is an embedding table [V, D]; `head=table.T` says the same.
        axis_name: in a `jax.shard_map`, the mesh axes that split V: the head is this device's part [D, V / n], of
            equal ones. Rows split over other axes are as in any function there: a mean is of this device's rows.
        chunk_rows: how many rows are computed at a time, at most, over all devices; by default as many as have 128 MiB
            of logits, and at least 512 (128 on CPUs), for each device of the mesh that `hidden` is on. More are faster
            on accelerators where there is memory.

    Returns:
        A scalar, or [..., T].

    Raises:
        LoraError: shapes or dtypes that do not fit, labels out of range, settings of another kind; in
            `lora.lora_apply`, an adapter of the head that draws random numbers for each row.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> hidden, head = jax.random.normal(jax.random.key(0), (2, 5, 8)), jnp.eye(8, 30)
    >>> labels = jnp.array([[1, 2, 3, 4, -100], [5, 6, -100, -100, -100]])
    >>> loss = lora.losses.linear_cross_entropy(hidden, head, labels)
    >>> logits = jax.nn.log_softmax(hidden @ head)
    >>> plain = -sum(logits[i, j, labels[i, j]] for i, j in zip(*jnp.nonzero(labels != -100))) / 6
    >>> bool(jnp.allclose(loss, plain))
    True
    """
    call = "linear_cross_entropy(hidden, head, labels)"
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    _check_settings(call, label_smoothing, z_loss, soft_cap, reduction, chunk_rows)
    kind = CrossEntropy(float(label_smoothing), float(z_loss), soft_cap, axes)
    return _losses(call, kind, hidden, head, labels, weights, ignore, reduction, tied, chunk_rows)


def linear_log_probs(
    hidden: jax.Array,
    head: Any,
    labels: jax.Array,
    *,
    soft_cap: float | None = None,
    ignore: int | None = -100,
    tied: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    chunk_rows: int | None = None,
) -> jax.Array:
    """Return the log-probabilities of labels under `softmax(hidden @ head)`, without forming the logits.

    For objectives such as DPO and GRPO. Costs are those of `linear_cross_entropy` with `reduction="none"`: with a
    frozen head 4 T D V operations for values and gradients. For a temperature, divide the hidden states by it.

    Args:
        hidden, head, labels, soft_cap, tied, axis_name, chunk_rows: as of `linear_cross_entropy`.
        ignore: the label of rows whose result is 0; None if there is none.

    Returns:
        [..., T], in fp32 (fp64 where the inputs are).

    Raises:
        LoraError: as of `linear_cross_entropy`.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> log_probs = lora.losses.linear_log_probs(jnp.zeros((3, 8)), jnp.ones((8, 4)), jnp.array([0, 3, -100]))
    >>> [round(float(p), 3) for p in log_probs]
    [-1.386, -1.386, 0.0]
    """
    call = "linear_log_probs(hidden, head, labels)"
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    _check_settings(call, 0.0, 0.0, soft_cap, "none", chunk_rows)
    kind = CrossEntropy(soft_cap=soft_cap, axis=axes)
    return 0 - _losses(call, kind, hidden, head, labels, None, ignore, "none", tied, chunk_rows)


@dataclass(frozen=True)
class Project:
    """x @ W for x [..., D] and W [D, V], or W [V, D] if tied, in the dtype of both; in fp32 if wide."""

    tied: bool

    def __call__(self, x: jax.Array, head: Any, wide: bool) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(x.dtype, head.dtype)
        out, inputs = accumulator(dtype) if wide else dtype, (int(self.tied),)
        x = x.astype(dtype)
        if is_packed(head):
            return InParts(head.with_deferred("cast", dtype), out).dot(x, inputs, None)
        dims = ((x.ndim - 1,), inputs), ((), ())
        return lax.dot_general(x, head.astype(dtype), dims, preferred_element_type=out)


def _losses(
    call: str,
    kind: CrossEntropy,
    hidden: jax.Array,
    head: Any,
    labels: jax.Array,
    weights: jax.Array | None,
    ignore: int | None,
    reduction: Reduction,
    tied: bool,
    chunk_rows: int | None,
) -> jax.Array:
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    classes = _check_shapes(call, hidden, head, labels, weights, tied)
    if kind.axis:
        classes *= lax.axis_size(kind.axis)
    _check_labels(call, labels, classes, ignore)
    if chunk_rows is None:
        fewest = FEWEST_ROWS_ON_CPU if _is_on_cpu(hidden) else FEWEST_ROWS
        chunk_rows = max(fewest, BLOCK_BYTES // (4 * classes)) * (_devices(hidden) or 1)
    parts = _devices(hidden) or jax.device_count()  # without a mesh in its type, it may be placed by `in_shardings`
    return _compute(kind, ignore, reduction, tied, chunk_rows, parts, classes, hidden, head, labels, weights)


def _devices(hidden: jax.Array) -> int:
    """Return over how many devices the compiler may split the rows, or the words; 0 if the type names no mesh.

    Which axes split them is not known where axes are not explicit. Most meshes have none that splits neither.
    """
    mesh = jax.typeof(hidden).sharding.mesh
    split = [size for name, size in mesh.shape.items() if name not in mesh.manual_axes]
    return math.prod(split) if mesh.axis_names else 0


def _is_on_cpu(hidden: jax.Array) -> bool:
    """Return whether the mesh is of CPUs; without one, whether that is where JAX computes."""
    device = jax.typeof(hidden).sharding.mesh.abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6), inline=True)
def _compute(
    kind: CrossEntropy,
    ignore: int | None,
    reduction: Reduction,
    tied: bool,
    chunk_rows: int,
    parts: int,
    classes: int,
    hidden: jax.Array,
    head: Any,
    labels: jax.Array,
    weights: jax.Array | None,
) -> jax.Array:
    wide, shape = accumulator(hidden.dtype, head.dtype), labels.shape
    counts = jnp.ones(shape, bool) if ignore is None else labels != ignore
    is_class = (labels >= 0) & (labels < classes)
    labels = jnp.where(counts, jnp.where(is_class, labels, classes), IGNORED).astype(jnp.int32)
    weights = jnp.ones_like(labels, wide) if weights is None else jnp.asarray(weights, wide)
    total = jnp.sum(jnp.where(counts, weights, 0))
    total = jnp.where(total == 0, 1, total)
    divide_first = reduction == "mean" and jnp.finfo(hidden.dtype).minexp <= jnp.finfo(jnp.bfloat16).minexp
    if divide_first:  # the gradient of `hidden` is whole then, with no pass after the blocks; fp16 would underflow
        weights = weights / total

    rows = shape if shape and math.prod(shape[:-1]) <= chunk_rows else (math.prod(shape),)
    n = number_of_blocks(rows[-1], max(1, chunk_rows // max(1, math.prod(rows[:-1]))))
    x, labels, each = hidden.reshape(*rows, hidden.shape[-1]), labels.reshape(rows), weights.reshape(rows)
    x = in_blocks(x, n, parts, 0, -2)
    labels, each = in_blocks(labels, n, parts, IGNORED), in_blocks(each, n, parts, 0)
    how = RowLoss(Project(tied), kind, summed=reduction != "none")
    losses = row_losses(how, x, labels, each, head.gathered().with_whole_scales() if is_packed(head) else head)
    if kind.axis:
        losses = lax.psum(losses, kind.axis)
    if reduction == "none":
        return losses.reshape(*losses.shape[:-3], -1)[..., : rows[-1]].reshape(shape)
    return losses if reduction == "sum" or divide_first else losses / total


def _check_settings(
    call: str, label_smoothing: Any, z_loss: Any, soft_cap: Any, reduction: Any, chunk_rows: Any
) -> None:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)

    if not is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
        refuse(call, "label_smoothing", label_smoothing, "a number from 0 to 1, such as 0.1")
    if not is_number(z_loss):
        refuse(call, "z_loss", z_loss, "a number, such as 1e-4")
    if soft_cap is not None and (not is_number(soft_cap) or soft_cap <= 0):
        refuse(call, "soft_cap", soft_cap, "a number above 0, such as 30.0, or None")
    if reduction not in ("mean", "sum", "none"):
        refuse(call, "reduction", reduction, '"mean", "sum" or "none"')
    if chunk_rows is not None and (
        isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int | np.integer) or chunk_rows < 1
    ):
        refuse(call, "chunk_rows", chunk_rows, "a whole number of at least 1, such as 512, or None")


def _check_shapes(call: str, hidden: Any, head: Any, labels: Any, weights: Any, tied: bool) -> int:
    """Return V, or this device's part of it."""
    if not is_packed(head) and not is_array(head):
        refuse(call, "head", head, "an array or a packed weight; of an adapted one, the weight inside lora.lora_apply")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        refuse(call, "labels", labels, "integers")
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        refuse(call, "hidden", hidden, "floats")
    if 0 in head.shape:
        refuse(call, "head", head, "at least one class")
    if labels.shape != hidden.shape[:-1] or hidden.ndim == 0:
        raise LoraError(
            f"{call}: `hidden` is {describe(hidden)} and `labels` {describe(labels)}, expected hidden states [..., D] "
            "and a label for each."
        )
    inputs = head.shape[int(tied)] if len(head.shape) == 2 else None
    if inputs != hidden.shape[-1]:
        wanted = f"[V, {hidden.shape[-1]}], for it is tied" if tied else f"[{hidden.shape[-1]}, V]"
        other = "" if len(head.shape) != 2 or hidden.shape[-1] not in head.shape else f": say tied={not tied}"
        raise LoraError(
            f"{call}: `head` has the shape {list(head.shape)} and `hidden` {list(hidden.shape)}, expected a head "
            f"{wanted}{other}."
        )
    if weights is not None and np.shape(weights) != labels.shape:
        raise LoraError(
            f"{call}: `weights` have the shape {list(np.shape(weights))}, expected one for each label, "
            f"{list(labels.shape)}."
        )
    return int(head.shape[1 - int(tied)])


def _check_labels(call: str, labels: Any, classes: int, ignore: int | None) -> None:
    """Refuse labels that are no class; of traced ones nothing is known."""
    if not concrete(labels) or labels.size == 0:
        return
    found = np.asarray(labels)
    wrong = ((found < 0) | (found >= classes)) & (True if ignore is None else found != ignore)
    if wrong.any():
        raise LoraError(
            f"{call}: `labels` have {int(found[wrong][0])}, expected 0 to {classes - 1}"
            f"{'' if ignore is None else f', or {ignore} for rows without a label'}. `ignore` says which one that is."
        )
