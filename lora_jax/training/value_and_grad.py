"""The gradient of a loss over a batch, in microbatches and over devices, with one reduction.

However the batch is cut into parts, the result is the gradient of sum_i w_i L_i / sum_i w_i, where the loss returns L_i
and the weight w_i for part i.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.core._compat import vary
from lora_jax.core.arrays import accumulator
from lora_jax.core.errors import LoraError
from lora_jax.sharding.gradient_copies import add_up, in_the_place_of, make_copies

RESERVED = {"loss", "grad_norm", "skipped", "loss_scale"}  # metrics of the step itself

Loss = Callable[..., Any]  # (trainable, params, *batch) -> loss, (loss, metrics) or (loss, metrics, weight)


def value_and_grad(
    loss: Loss,
    *,
    microbatches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
    batch_sharding: NamedSharding | None = None,
) -> Callable[..., tuple[tuple[jax.Array, dict[str, Any]], Any]]:
    """Return `f(trainable, params, *batch) -> ((loss, metrics), gradient)`, as `jax.value_and_grad` does for one batch.

    The gradient is taken with respect to `trainable` alone. It is summed over microbatches by a scan, and over devices
    once.

    Args:
        loss: `loss(trainable, params, *batch)` -> a mean over the batch; `(mean, metrics)` to report more; or
            `(mean, metrics, weight)` where parts of a batch may have different weights, as when the mean is over the
            tokens that are not padding: the weight is then their number. Metrics are averaged as the loss is.
        microbatches: how many parts the rows of the batch are cut into. They run one after the other, so that the
            activations of one part are in memory at a time. Part i has the rows i, i + microbatches, and so on. Scalars
            and single random keys in the batch go to each part.
        axis_name: inside `jax.pmap` or `jax.shard_map`, the axes over which each device has a part of the batch.
        batch_sharding: under `jax.jit` over a mesh, the sharding of the batch: the gradients of adapters are then
            summed over devices once a step, also in scanned layers and with microbatches.

    Returns:
        `f`. With a keyword `key`, a random key, it calls the loss with a keyword `key` too, another one for each part.
        With a keyword `scale`, the loss is multiplied by it and the gradient divided by it.

    Raises:
        LoraError: `microbatches` is no whole number above 0; (when `f` is called) it does not divide the rows; the loss
            returns something else, or reports a metric with one of the step's own names.
    """
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise LoraError(f"microbatches is {microbatches!r}, expected a whole number of at least 1.")
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())

    def run(trainable: Any, params: Any, *batch: Any, scale: Any = 1.0, key: jax.Array | None = None) -> Any:
        # In `shard_map`, the gradient of an array that does not vary over devices would be summed at each of its uses.
        trainable = jax.tree.map(lambda array: vary(array, axes), trainable)
        copies = None if batch_sharding is None else make_copies(trainable, batch_sharding)
        if key is not None:
            for name in axes:
                key = jax.random.fold_in(key, lax.axis_index(name))

        whole = microbatches == 1 and not axes

        def part(batch: Sequence[Any], key: jax.Array | None) -> Any:
            keys = {} if key is None else {"key": key}
            return _sums(loss, trainable, copies, params, batch, keys, scale, weigh=not whole)

        sums = part(batch, key) if microbatches == 1 else _accumulate(part, batch, key, microbatches, axes)
        if axes:
            sums = lax.psum(jax.tree.map(lambda array: vary(array, axes), sums), axes)
        grads, values, weight = sums
        grads, of_copies = grads
        if batch_sharding is not None:
            grads = jax.tree.map(jnp.add, grads, add_up(of_copies, batch_sharding))
        if not whole:
            values, scale = jax.tree.map(lambda value: value / weight, values), weight * scale
        return values, jax.tree.map(lambda g: (g / scale).astype(g.dtype), grads)

    def in_context(*args: Any, **kwargs: Any) -> Any:
        if batch_sharding is None:
            return run(*args, **kwargs)
        with jax.sharding.use_abstract_mesh(batch_sharding.mesh.abstract_mesh):
            return run(*args, **kwargs)

    return in_context


def _sums(
    loss: Loss,
    trainable: Any,
    copies: Any,
    params: Any,
    batch: Sequence[Any],
    key: dict[str, Any],
    scale: Any,
    weigh: bool,
) -> Any:
    """Return the gradients, (loss, metrics) and the weight of one part, the first two multiplied by the weight.

    The gradients are those of `trainable` and of `copies`. The loss sees the former alone, so that penalties and
    ensembles mean what they say; the latter are what is applied.
    """

    def weighted(trainable: Any, copies: Any) -> Any:
        with contextlib.nullcontext() if copies is None else in_the_place_of(trainable, copies):
            value, metrics, weight = _parts(loss(trainable, params, *batch, **key))
        if weight is None or not weigh:
            return value * scale, ((value, metrics), jnp.ones((), value.dtype))
        weight = lax.stop_gradient(weight).astype(value.dtype)
        values = jax.tree.map(lambda m: m.astype(accumulator(m.dtype)) * weight, (value, metrics))
        return value * weight * scale, (values, weight)

    grads, (values, weight) = jax.grad(weighted, argnums=(0, 1), has_aux=True)(trainable, copies)
    return grads, values, weight


def _parts(out: Any) -> tuple[jax.Array, dict[str, Any], jax.Array | None]:
    """Return the loss, the metrics and the weight (None if there is none) that a loss function returned."""
    parts = out if isinstance(out, tuple) else (out,)
    value, metrics, weight = (*parts, *({}, None)[len(parts) - 1 :]) if 1 <= len(parts) <= 3 else (None, None, None)
    if getattr(value, "shape", None) != () or not isinstance(metrics, dict):
        raise LoraError(
            "the loss returns a scalar, (scalar, {name: array}) or (scalar, {name: array}, weight); found "
            f"{jax.tree.map(lambda leaf: getattr(leaf, 'shape', leaf), out)}."
        )
    if taken := sorted(RESERVED & metrics.keys()):
        raise LoraError(f"the loss reports a metric {taken[0]!r}, which is the step's own: give it another name.")
    return value.astype(accumulator(value.dtype)), metrics, None if weight is None else jnp.asarray(weight)


def _accumulate(
    part: Callable[..., Any], batch: Sequence[Any], key: jax.Array | None, n: int, axes: Sequence[str]
) -> Any:
    """Sum `part` over n microbatches."""
    leaves, tree = jax.tree.flatten(batch)
    rows = [leaf.ndim > 0 for leaf in leaves]
    for leaf in leaves:
        if leaf.ndim and len(leaf) % n:
            raise LoraError(f"a batch of shape {list(leaf.shape)} cannot be cut into {n} microbatches of equal size.")
    # Every n-th row, so that on a mesh that splits the rows each device keeps its own.
    cut = [leaf.reshape(-1, n, *leaf.shape[1:]).swapaxes(0, 1) for leaf in leaves if leaf.ndim]

    def one(i: jax.Array, cut: Sequence[jax.Array]) -> Any:
        rest = iter(cut)
        whole = [next(rest) if has_rows else leaf for has_rows, leaf in zip(rows, leaves, strict=True)]
        return part(jax.tree.unflatten(tree, whole), None if key is None else jax.random.fold_in(key, i))

    def add(total: jax.Array, array: jax.Array) -> jax.Array:
        return vary(total + array.astype(total.dtype), axes)

    def step(sums: Any, xs: Any) -> tuple[Any, None]:
        return jax.tree.map(add, sums, one(*xs)), None

    shapes = jax.eval_shape(lambda: one(jnp.zeros((), jnp.int32), [c[0] for c in cut]))
    zeros = jax.tree.map(lambda s: vary(jnp.zeros(s.shape, accumulator(s.dtype)), axes), shapes)
    return lax.scan(step, zeros, (jnp.arange(n), cut))[0]
