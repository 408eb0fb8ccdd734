"""Several sets of adapters as one tree with a leading axis of members, for `jax.vmap` over one base.

Ranks are padded with zeros to the largest: with columns of A and rows of B. Those stay zero in training, as the
gradient of each is a product with the other. How many columns are a member's own is kept with its scale, in `ratio`:
that is data, so that members change places without another program; it is never trained; and it goes wherever the
adapters go, through transformations, optimizers and files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.adalora import AdaLoraAdapter
from lora_jax.adapters.arguments import check_rank
from lora_jax.adapters.dora import DoraAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.lora_fa import LoraFaAdapter
from lora_jax.adapters.scaled import own_columns, with_own_rank
from lora_jax.core.adapter import Adapter, AdapterWrapper
from lora_jax.core.argument_checks import check_adapter_dict, check_is
from lora_jax.core.arrays import concrete, describe
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import spans
from lora_jax.core.text import listed

CALL = "stack([adapters, others, ...])"
# Kinds whose columns of zeros stay zero: what they add is a sum of terms, one for each column.
STACKED = (LoraAdapter, LoraFaAdapter, DoraAdapter, AdaLoraAdapter)


def stack(members: Sequence[Mapping[str, Adapter]], rank: int | None = None) -> dict[str, Adapter]:
    """Return one `{path: adapter}` whose arrays have a leading axis of members, as `jax.vmap` takes them.

    `jax.vmap(apply, in_axes=(None, 0, ...))(params, stack(members), ...)` multiplies once by each weight of the base
    for all members. `unstack` gives each member back bit by bit. Members may differ in rank, scale and numbers; the
    arrays of a rank below the largest of its path end in zeros.

    The zeros stay zero under any optimizer whose update of a number is zero where all its gradients and the number
    itself were: all of optax but noise.

    Args:
        members: `[{path: adapter}, ...]`, all of the same paths: LoRA, rsLoRA, LoRA-FA, DoRA, AdaLoRA, for each path
            one kind and one dtype.
        rank: what all ranks are padded to; None for the largest of each path.

    Returns:
        `{path: adapter}`, with arrays `[members, ...]`.

    Raises:
        LoraError: there are no members; one has other paths than the first, or at a path another kind, other axes,
            another weight or another dtype; a kind is none of these; a member is a stack itself; a rank is above the
            `rank` that is given.

    >>> import jax, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> one, two = ({"w": lora.Lora(r).factors(jax.random.key(r), (6, 5), axes)} for r in (2, 4))
    >>> many = lora.stack([one, two])
    >>> many["w"].a.shape, many["w"].b.shape
    ((2, 6, 4), (2, 4, 5))
    >>> [adapters["w"].a.shape for adapters in lora.unstack(many)]
    [(6, 2), (6, 4)]
    """
    check_is(CALL, "members", members, (list, tuple), "a list of adapters, [adapters, others]")
    if not members:
        raise LoraError(f"{CALL}: there is nothing to stack, expected the adapters of one member at least.")
    if rank is not None:
        check_rank(CALL, rank)
    for i, member in enumerate(members):
        check_adapter_dict(f"stack: member {i}", member)
        _check_paths(i, member, members[0])
    return {path: _stacked(path, [member[path] for member in members], rank) for path in members[0]}


def unstack(stacked: Mapping[str, Adapter]) -> list[dict[str, Adapter]]:
    """Return the members of what `stack` made, trained or not, each with its own rank and scale.

    Adapters of one rank that were stacked by hand, or made by `jax.vmap`, are taken too. Cannot be called under
    `jax.jit`: the ranks are numbers in the arrays.

    Args:
        stacked: `{path: adapter}`, with arrays `[members, ...]`.

    Returns:
        `[{path: adapter}, ...]`.

    Raises:
        LoraError: these are no stacked adapters, or not all of the same number; they are traced.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> def adapters(rank):
    ...     plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=rank)})
    ...     return lora.init(jax.random.key(rank), params, plan)
    >>> lora.unstack(lora.stack([adapters(1), adapters(3)]))
    [{'w': LoraAdapter(a 6x1, b 1x4)}, {'w': LoraAdapter(a 6x3, b 3x4)}]
    """
    counts = {path: member_count(path, adapter) for path, adapter in stacked_items("unstack(stacked)", stacked)}
    if len(set(counts.values())) > 1:
        raise LoraError(f"unstack: adapters have different numbers of members: {counts}.")
    number = next(iter(counts.values()), 0)
    return [{path: _own(path, adapter, i) for path, adapter in stacked.items()} for i in range(number)]


def member_count(path: str, adapter: Adapter) -> int:
    """Return how many adapters are stacked in one.

    Raises:
        LoraError: it is none that `stack` makes.
    """
    _check_kind(path, adapter)
    ratio, sizes = adapter.arrays()["ratio"], {array.shape[:1] for array in adapter.arrays().values()}
    if np.ndim(ratio) != 2 or len(sizes) != 1:
        shapes = ", ".join(f"{name} {describe(array)}" for name, array in adapter.arrays().items())
        raise LoraError(f"{path!r} is no stack of adapters: it has {shapes}. lora.stack([one, other]) makes one.")
    return int(ratio.shape[0])


def stacked_items(call: str, adapters: Any) -> Any:
    """Return the items of `{path: adapter}`, once it is known to be that."""
    check_adapter_dict(call, adapters)
    return adapters.items()


def pad(adapter: Any, rank: int) -> Any:
    """Return an adapter with zeros up to a rank; `own_rank` tells how many columns are its own."""
    missing = rank - rank_of(adapter)

    def padded(name: str, array: Any) -> Any:
        axis = _rank_axis(adapter, name)
        return array if axis is None else jnp.pad(array, [(0, missing * (i == axis)) for i in range(array.ndim)])

    arrays = {name: padded(name, array) for name, array in adapter.arrays().items()} if missing else {}
    ratio = adapter.ratio if own_columns(adapter.ratio) is not None else with_own_rank(adapter.ratio, rank_of(adapter))
    return dataclasses.replace(adapter, **arrays | {"ratio": ratio})


def unpad(path: str, adapter: Any) -> Any:
    """Return an adapter without the zeros that `pad` gave it."""
    own = own_columns(adapter.ratio)
    if own is None:
        return adapter
    if not concrete(own) and not isinstance(own, np.ndarray | np.generic):
        raise LoraError(
            f"{path!r}: ranks are not known where adapters are traced: call lora.unstack outside of jax.jit."
        )
    arrays, rank = adapter.arrays(), int(own)
    for name, array in arrays.items():
        axis = _rank_axis(adapter, name)
        if axis is not None and rank < array.shape[axis]:
            arrays[name] = jax.lax.slice_in_dim(array, 0, rank, axis=axis)
    return dataclasses.replace(adapter, **arrays | {"ratio": adapter.ratio[:2]})


def zero_padding(adapter: Any) -> Any:
    """Return an adapter of one member, which may be traced, with zeros where it is padded."""
    own = own_columns(adapter.ratio)
    if own is None:
        return adapter

    def masked(name: str, array: Any) -> Any:
        axis = _rank_axis(adapter, name)
        if axis is None:
            return array
        is_own = jnp.arange(array.shape[axis]) < own
        return jnp.where(is_own.reshape([-1 if i == axis else 1 for i in range(array.ndim)]), array, 0)

    return dataclasses.replace(adapter, **{name: masked(name, array) for name, array in adapter.arrays().items()})


def rank_of(adapter: Any) -> int:
    """Return the rank of an adapter of one member, zeros among it."""
    return int(adapter.a.shape[-1])


def _rank_axis(adapter: Adapter, name: str) -> int | None:
    """Return the axis of an array of one member that counts the columns of A; None if it has none."""
    return next((start for part, start, _ in spans(adapter.layout[name], adapter.axes) if part == "rank"), None)


def _stacked(path: str, adapters: Sequence[Any], rank: int | None) -> Any:
    """Return the adapters of one path as one."""
    first = adapters[0]
    for i, adapter in enumerate(adapters):
        _check_member(path, i, adapter, first)
    largest = max(map(rank_of, adapters))
    if rank is not None and largest > rank:
        raise LoraError(
            f"stack(rank={rank}): {path!r} has rank {largest} in member {[*map(rank_of, adapters)].index(largest)}: "
            f"give rank={largest} or more, or none."
        )
    padded = [pad(adapter, largest if rank is None else rank) for adapter in adapters]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *padded)


def _own(path: str, adapter: Any, i: int) -> Any:
    return unpad(path, jax.tree.map(lambda array: array[i], adapter))


def _check_paths(i: int, member: Mapping[str, Adapter], first: Mapping[str, Adapter]) -> None:
    """Raise if a member has other paths than the first."""
    if missing := [path for path in first if path not in member]:
        raise LoraError(f"stack: member {i} has no adapter for {len(missing)} path(s) of member 0:\n{listed(missing)}")
    if more := [path for path in member if path not in first]:
        raise LoraError(f"stack: member {i} has adapters for {len(more)} path(s) that member 0 lacks:\n{listed(more)}")


def _check_kind(path: str, adapter: Adapter) -> None:
    """Raise if an adapter is of a kind that is not stacked."""
    if type(adapter) in STACKED:
        return
    name = type(adapter).__name__
    if isinstance(adapter, AdapterWrapper):
        mend = "take the adapters as they were before, without it"
    elif adapter.to_lora() is not None:
        mend = "{path: adapter.to_lora() for path, adapter in adapters.items()} is the same as LoRA"
    else:
        mend = "several of one shape are stacked by jax.tree.map(lambda *arrays: jnp.stack(arrays), one, other)"
    kinds = ", ".join(kind.__name__ for kind in STACKED)
    raise LoraError(f"stack: {path!r} is a {name}, expected one of {kinds}: {mend}.")


def _check_member(path: str, i: int, adapter: Any, first: Any) -> None:
    """Raise if an adapter does not fit the first member's."""
    _check_kind(path, adapter)
    here = f"stack: {path!r} of member {i}"
    if np.ndim(adapter.ratio) > 1:
        raise LoraError(
            f"{here} is a stack of {len(adapter.ratio)} itself: lora.stack([*lora.unstack(one), *lora.unstack(other)])."
        )
    try:
        shape, expected = adapter.kernel_shape(), first.kernel_shape()
    except LoraError as error:
        raise LoraError(f"{here} {error}") from None
    if type(adapter) is not type(first):
        kinds = f"{type(adapter).__name__}, and member 0 has a {type(first).__name__}"
        raise LoraError(f"{here} is a {kinds}: all members have one kind at a path; stack each kind by itself.")
    if (adapter.axes, shape) != (first.axes, expected):
        raise LoraError(
            f"{here} is for a weight {list(shape)} with {adapter.axes}, and member 0 for {list(expected)} with "
            f"{first.axes}: members are adapters of one model."
        )
    dtypes, expected_dtypes = ({name: str(array.dtype) for name, array in a.arrays().items()} for a in (adapter, first))
    if dtypes != expected_dtypes:
        raise LoraError(
            f"{here} has the dtypes {dtypes}, and member 0 {expected_dtypes}: cast it, "
            "jax.tree.map(lambda array: array.astype(jnp.float32), adapters)."
        )
