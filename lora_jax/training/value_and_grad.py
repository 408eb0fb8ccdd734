"""The gradient of a loss over a batch, in microbatches and over devices, with one reduction.

However the batch is cut into parts, the result is the gradient of sum_i w_i L_i / sum_i w_i, where the loss returns L_i
and the weight w_i for part i.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.core._compat import vary
from lora_jax.core.adapter import is_adapter
from lora_jax.core.argument_checks import check_function
from lora_jax.core.arrays import accumulator
from lora_jax.core.errors import LoraError
from lora_jax.sharding.gradient_copies import add_to, add_up, copies_alone, in_the_place_of
from lora_jax.sharding.unbatched import unwrapped
from lora_jax.training.argument_checks import check_microbatches
from lora_jax.training.masks import map_frozen
from lora_jax.training.microbatches import accumulate
from lora_jax.training.model_state import FORM, split_returned, state_from_sum, state_to_sum

RESERVED = {"loss", "grad_norm", "skipped", "loss_scale"}  # metrics of the step itself

# (trainable, params, *batch) -> loss, (loss, metrics) or (loss, metrics, weight); with a keyword `model_state`, a pair
# of that and the next state
Loss = Callable[..., Any]


def value_and_grad(
    loss: Loss,
    *,
    microbatches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
    batch_sharding: NamedSharding | None = None,
    shardings: Any = None,
) -> Callable[..., Any]:
    """Return `f(trainable, params, *batch) -> ((loss, metrics), gradient)`, as `jax.value_and_grad` does for one batch.

    The gradient is taken with respect to `trainable` alone. It is summed over microbatches by a scan, and over devices
    once.

    Args:
        loss: `loss(trainable, params, *batch)` -> a mean over the batch; `(mean, metrics)` to report more; or
            `(mean, metrics, weight)` where parts of a batch may have different weights, as when the mean is over the
            tokens that are not padding: the weight is then their number. Metrics are averaged as the loss is.
        microbatches: how many parts the rows of the batch are cut into. They run one after the other, so that the
            activations of one part are in memory at a time. Part i has the rows i, i + microbatches, and so on. Scalars
            and single random keys in the batch go to each part, and so does what is marked as `lora.Unbatched(...)`.
        axis_name: inside `jax.pmap` or `jax.shard_map`, the axes over which each device has a part of the batch.
        batch_sharding: under `jax.jit` over a mesh, the sharding of the batch: the gradients of adapters are then
            summed over devices once a step, also in scanned layers and with microbatches.
        shardings: beside `batch_sharding`, those of `trainable`, a tree like it: `jax.tree.map(lambda a: a.sharding,
            trainable)`, which is not known inside of `jax.jit`. Adapters of experts that are split over the batch's own
            mesh axes then stay where they are.

    Returns:
        `f`. With a keyword `key`, a random key, it calls the loss with a keyword `key` too, another one for each part.
        With a keyword `scale`, the loss is multiplied by it and the gradient divided by it.

        With a keyword `model_state`, any pytree that the model carries from step to step, such as batch statistics, it
        calls the loss with it, and the loss returns a pair of what it returns otherwise and the next state: `return
        loss, model_state`, or `return (loss, metrics), model_state`. So does `f`: `((loss, metrics), gradient),
        model_state`. Nothing is differentiated with respect to it. Each microbatch gets the state that the one before
        returned. Over `axis_name`, floats of the new state are averaged over devices, each device counting the same;
        all else, such as counts and random keys, is that of the first device.

        The gradient of arrays that an adapter never trains is zero.

    Raises:
        LoraError: `microbatches` is no whole number above 0; (when `f` is called) it does not divide the rows, or
            arrays have different numbers of them; there is nothing to train; the loss does not take `key` or
            `model_state`, or takes one that is not there; it returns something else, a model state of other paths,
            shapes or dtypes, reports a metric with one of the step's own names, or does not use the adapters at all
            (found while it is traced: no gradient could ever reach them; of a tree without adapters, what is in it).

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def model(params, x):
    ...     return x @ params["w"]
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> adapters = lora.init(jax.random.key(0), params, lora.plan(model, params, x, rules={"w": lora.Lora(rank=1)}))
    >>> loss = lambda adapters, params, x: jnp.mean(lora.lora_apply(model)(params, adapters, x) ** 2)
    >>> (value, metrics), gradient = lora.value_and_grad(loss, microbatches=2)(adapters, params, x)
    >>> float(value), gradient["w"].b.shape
    (16.0, (1, 3))
    """
    check_function("value_and_grad(loss)", "loss", loss)
    check_microbatches(microbatches)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())

    def run(
        trainable: Any,
        params: Any,
        *batch: Any,
        scale: Any = 1.0,
        key: jax.Array | None = None,
        model_state: Any = None,
    ) -> Any:
        if not jax.tree.leaves(trainable):
            raise LoraError("there is nothing to train: the first argument of the loss holds no arrays.")
        _check_keywords(loss, {"key": key is not None, "model_state": model_state is not None})
        # In `shard_map`, the gradient of an array that does not vary over devices would be summed at each of its uses.
        trainable, model_state = jax.tree.map(lambda array: vary(array, axes), (trainable, model_state))
        copies = [] if batch_sharding is None else copies_alone(trainable, batch_sharding, shardings)
        if key is not None:
            for name in axes:
                key = jax.random.fold_in(key, lax.axis_index(name))

        whole = microbatches == 1 and not axes

        def part(batch: Sequence[Any], key: jax.Array | None, model_state: Any) -> tuple[Any, Any]:
            keywords = {} if key is None else {"key": key}
            keywords |= {} if model_state is None else {"model_state": model_state}
            return _sums(loss, trainable, copies, params, batch, keywords, scale, weigh=not whole)

        if microbatches == 1:
            sums, model_state = part(unwrapped(batch), key, model_state)
        else:
            sums, model_state = accumulate(part, batch, key, model_state, microbatches, axes)
        if axes:
            parts = sums, state_to_sum(model_state, axes)
            sums, total = lax.psum(jax.tree.map(lambda array: vary(array, axes), parts), axes)
            model_state = state_from_sum(total, model_state, axes)
        grads, values, weight = sums
        grads, of_copies = grads
        if batch_sharding is not None:
            grads = add_to(grads, add_up(of_copies, batch_sharding))
        if not whole:
            values, scale = jax.tree.map(lambda value: value / weight, values), weight * scale
        found = values, jax.tree.map(lambda g: (g / scale).astype(g.dtype), grads)
        return found if model_state is None else (found, model_state)

    return run


def _sums(
    loss: Loss,
    trainable: Any,
    copies: Any,
    params: Any,
    batch: Sequence[Any],
    keywords: dict[str, Any],
    scale: Any,
    weigh: bool,
) -> tuple[Any, Any]:
    """Return what is summed over parts, and the next model state.

    Summed are the gradients, (loss, metrics) and the weight of one part, the first two multiplied by the weight.
    The gradients are those of `trainable` and of `copies`. The loss sees the former alone, so that penalties and
    ensembles mean what they say; the latter are what is applied.
    """

    def weighted(trainable: Any, copies: Any) -> Any:
        trainable, copies = (map_frozen(lax.stop_gradient, tree) for tree in (trainable, copies))
        with in_the_place_of(trainable, copies) if copies else contextlib.nullcontext():
            out = loss(trainable, params, *batch, **keywords)
        out, new_state = split_returned(out, keywords["model_state"]) if "model_state" in keywords else (out, None)
        value, metrics, weight = _parts(out)
        if weigh:
            _check_numbers(metrics)
        if weight is None or not weigh:
            return value * scale, ((value, metrics), jnp.ones((), value.dtype), new_state)
        weight = lax.stop_gradient(weight).astype(value.dtype)
        values = jax.tree.map(lambda m: m.astype(accumulator(m.dtype)) * weight, (value, metrics))
        return value * weight * scale, (values, weight, new_state)

    reached: list[bool] = []
    watched = _watching(weighted, lambda: reached.append(True))
    grads, (values, weight, new_state) = jax.grad(watched, argnums=(0, 1), has_aux=True)(trainable, copies)
    if not reached:
        raise LoraError(
            "the loss does not use what is trained, so that no gradient reaches it: the loss gets it as its first "
            "argument, and applies it as in lora.lora_apply(fn)(params, adapters, ...)."
        )
    return (grads, values, weight), new_state


def _check_keywords(loss: Loss, given: dict[str, bool]) -> None:
    """Check that a loss takes the keywords that it is given, and is given those that it needs.

    Raises:
        LoraError: it does not, or is not.
    """
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return  # not known
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    needed = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    for name, is_given in given.items():
        if is_given and name not in parameters and not takes_any:
            raise LoraError(
                f"the state has a `{name}`, and the loss does not take it: let it be loss(trainable, params, *batch, "
                f"{name}), or leave `{name}` out of lora.TrainState.create."
            )
        if not is_given and name in needed:
            raise LoraError(
                f"the loss takes a keyword `{name}`, and there is none: give it to the state, as in "
                f"lora.TrainState.create(trainable, optimizer, {name}=...)."
            )


def _check_numbers(metrics: dict[str, Any]) -> None:
    """Check that metrics can be averaged over parts of a batch.

    Raises:
        LoraError: one holds a random key, as the state of a model may.
    """
    for name, metric in metrics.items():
        if any(jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended) for leaf in jax.tree.leaves(metric)):
            raise LoraError(
                f"the metric {name!r} holds a random key, and metrics are averaged over the parts of a batch. What a "
                "model carries from step to step is no metric: lora.TrainState.create(trainable, optimizer, "
                "model_state=state), and a loss with a keyword `model_state` that returns the next one beside the "
                f"loss: {FORM}."
            )


def _watching(fn: Callable[[Any, Any], Any], note: Callable[[], None]) -> Callable[[Any, Any], Any]:
    """Return `fn(trainable, copies)`, which calls `note` while its gradient with respect to adapters is traced, if any.

    JAX asks for the derivative of an operation only where the loss depends on it. So this costs nothing when it runs,
    and values do not matter: the gradient of a fresh A is zero, and yet it is one.
    """

    @jax.custom_vjp
    def same(arrays: Any) -> Any:
        return arrays

    def backward(_: None, gradient: Any) -> tuple[Any]:
        note()
        return (gradient,)

    same.defvjp(lambda arrays: (arrays, None), backward)

    def watched(trainable: Any, copies: Any) -> Any:
        nodes, tree = jax.tree.flatten(trainable, is_leaf=is_adapter)
        which = [i for i, node in enumerate(nodes) if is_adapter(node)] or range(len(nodes))
        seen, copies = same(([nodes[i] for i in which], copies))
        for i, node in zip(which, seen, strict=True):
            nodes[i] = node
        return fn(jax.tree.unflatten(tree, nodes), copies)

    return watched


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
