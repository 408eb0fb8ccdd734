"""A batch each of whose examples uses its own adapter of a bank."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.adapter import Adapter, AdapterWrapper
from lora_jax.core.argument_checks import check_adapter_dict, refuse
from lora_jax.core.arrays import concrete, describe
from lora_jax.core.errors import LoraError
from lora_jax.core.selected import Axes, SelectedAdapter, one_of

CALL = "select(bank, ids)"
SOME_IDS = "whole numbers, a slot of the bank for each example or -1 for the base: jnp.array([0, 2, -1])"


def select(bank: Mapping[str, Adapter], ids: Any, *, in_axes: Axes = 0, out_axes: Axes = 0) -> dict[str, Adapter]:
    """Return adapters for one batch, each example of which uses its own adapter of a bank.

    `apply(params, lora.select(bank, ids), x)` is for each example i what `apply(params, bank[ids[i]], x[i : i + 1])`
    is, for training and inference: values and gradients. The ids are data, so one compiled program serves any mix. Call
    it inside the loss, and differentiate with respect to the bank: only slots that were used have a gradient that is
    not zero.

    `apply` maps the function over batches of one example, by `jax.vmap`. So the data of each example is followed
    exactly, whatever the function does to its axes, and each frozen weight still takes part in one product for the
    whole batch. What the function does across examples it does for each by itself: statistics of a batch, capacities
    of experts and mean losses are those of one example, and sharding constraints that it states are of batches of one.
    Take the mean of the losses outside of `apply`.

    The factors come in one of three ways, chosen from shapes for each product, with the same numbers up to the order
    of sums. *Gathered*, the factors of each example are copied out of the bank, and all examples are one batched
    product: no FLOPs more than one adapter takes; best where an example has more rows than the rank. In *blocks*,
    examples of one slot lie side by side, for many short examples of few slots. They are brought into that order once,
    before the function, and their results back after it. (The blocks are batched products too. `ragged_dot`, which is
    for sorted rows, computes as many times more as there are slots on backends without a kernel for it, CPUs among
    them.) A *loop*, for decoding on CPUs, reads each factor where it lies. On a mesh that the compiler partitions for,
    all are gathered, so that each device has its own examples alone.

    Call it inside of the function that is jitted: there all adapters are known to have the same ids. Then examples are
    brought into order once for all of them, and weights that read the same x have one thin product.

    Args:
        bank: `{path: adapter}`, every array of which has a leading axis of slots, as `lora.stack` makes it.
        ids: the slot of each example, i32 [examples], or of the only one, []; -1 for the base alone. A number beyond
            the bank is refused where it is known, and stands for the base where it is traced.
        in_axes: where the arguments after the adapters have their examples, as for `jax.vmap`: an int for all, or a
            tuple with an entry for each, in which named tuples may have entries of their own; None for what all
            examples share. Scalars are shared. Keywords have their examples along axis 0.
        out_axes: where the results have them; None for one that is the same for all.

    Returns:
        `{path: adapter}` for `lora_apply`, of the bank's arrays and the ids.

    Raises:
        LoraError: the bank is empty, or no bank; ids are no whole numbers, or known to be beyond the bank. When
            applied: arguments and ids are not of as many examples; a result has no axis of examples.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def model(params, x):
    ...     return x @ params["w"]
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((3, 5, 4))                  # three examples of five tokens
    >>> plan = lora.plan(model, params, x, rules={"w": lora.Lora(rank=2)})
    >>> bank = jax.vmap(lambda key: lora.init(key, params, plan))(jax.random.split(jax.random.key(0), 8))
    >>> apply = jax.jit(lora.lora_apply(model))
    >>> apply(params, lora.select(bank, jnp.array([7, -1, 2])), x).shape
    (3, 5, 3)
    """
    slots = check_bank(CALL, bank)
    ids = _checked(ids, slots)
    _check_axes("in_axes", in_axes)
    _check_axes("out_axes", out_axes)
    return {path: SelectedAdapter(adapter, ids, adapter.axes, in_axes, out_axes) for path, adapter in bank.items()}


def check_bank(call: str, bank: Any) -> int:
    """Return the number of slots of a bank.

    Raises:
        LoraError: it is none: there is nothing in it, or not as many slots in all arrays.
    """
    check_adapter_dict(call, bank)
    if not bank:
        raise LoraError(f"{call}: the bank is empty. lora.stack([adapters, others]) makes one.")
    slots: dict[int, str] = {}
    for path, adapter in bank.items():
        if isinstance(adapter, AdapterWrapper):
            raise LoraError(
                f"{call}: {path!r} is a {type(adapter).__name__}: select first, then "
                "lora.with_dropout(lora.select(bank, ids), key)."
            )
        try:
            one_of(adapter).kernel_shape()
        except (LoraError, IndexError) as error:
            raise LoraError(f"{call}: {path!r} is no stack of adapters, without its first axis it {error}") from None
        for array in jax.tree.leaves(adapter):
            slots.setdefault(array.shape[0], path)
    if len(slots) > 1:
        raise LoraError(f"{call}: adapters have different numbers of slots: {slots}, expected one number for all.")
    return next(iter(slots))


def _checked(ids: Any, slots: int) -> jax.Array:
    if isinstance(ids, int | list | tuple) and not isinstance(ids, bool):
        ids = np.asarray(ids)
    if not isinstance(ids, np.ndarray | np.generic | jax.Array) or not jnp.issubdtype(ids.dtype, jnp.integer):
        refuse(CALL, "ids", ids, SOME_IDS)
    if ids.ndim > 1 or 0 in ids.shape:
        raise LoraError(f"{CALL}: ids are {describe(ids)}, expected {SOME_IDS}.")
    if isinstance(ids, np.ndarray | np.generic) or concrete(ids):
        known = np.atleast_1d(np.asarray(ids))
        beyond = [(i, int(n)) for i, n in enumerate(known) if not -1 <= n < slots]
        if beyond:
            i, n = beyond[0]
            raise LoraError(f"{CALL}: ids[{i}] is {n}, expected one of the slots 0 to {slots - 1}, or -1 for the base.")
    return jnp.asarray(ids, jnp.int32)


def _check_axes(name: str, axes: Any) -> None:
    if isinstance(axes, tuple):
        for axis in axes:
            _check_axes(name, axis)
    elif isinstance(axes, bool) or not isinstance(axes, int | None):
        raise LoraError(f"select({name}=...) has {axes!r} in it, expected an int, None, or a tuple of these.")
