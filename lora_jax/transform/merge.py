"""Merge adapters into weights, so that they cost nothing at inference."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.adapter import Adapter, is_adapter
from lora_jax.core.adapter_checks import check_adapters
from lora_jax.core.aliases import Uses, same
from lora_jax.core.argument_checks import is_taken, refuse
from lora_jax.core.arrays import accumulator, concrete, describe, placed
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import as_given, is_packed, unpacked
from lora_jax.core.paths import flatten_with_names, nearest

Params = TypeVar("Params")


@overload
def merge(
    params: Params, adapters: Mapping[str, Adapter], *, donate: bool = False, keep: Literal[False] = False
) -> Params: ...


@overload
def merge(
    params: Params, adapters: Mapping[str, Adapter], *, donate: bool = False, keep: Literal[True]
) -> tuple[Params, dict[str, Any]]: ...


def merge(params: Any, adapters: Mapping[str, Adapter], *, donate: bool = False, keep: bool = False) -> Any:
    """Return the parameters with W' in the place of each adapted W: same tree, dtypes and shardings.

    A packed weight that is adapted becomes an array; `lora.bases.merge` packs it again.
    Computed in fp32 (or better) and cast once to W's dtype. `params` are left as they are: keep them, and there is
    no need to ever take a merge back. Subtracting the change again would be inexact, for W' was rounded; `lora.unmerge`
    puts back what `keep` kept. Two leaves that are one array, with adapters that are one too, are merged once and stay
    one array.

    Args:
        params: a tree of arrays and packed weights.
        adapters: `{path: adapter}`.
        donate: each merged weight takes the memory of the weight itself, one after the other on its own devices: for
            models of which there is no room for two. The adapted leaves of `params` are gone afterwards, except where
            another leaf lies in the same memory and is still needed, as a tied weight of which one name is adapted.
        keep: return `(merged, kept)`, the latter for `lora.unmerge`: `{path: W}` of the adapted weights, bit by bit.
            They are the very arrays of `params`; with `donate`, which reuses these, copies in the memory of the host.

    Returns:
        The parameters; with `keep` a pair.

    Raises:
        LoraError: an adapter has no weight, or does not fit it; `donate` of what is no array on a device; `keep` and
            `donate` of arrays that are spread over several hosts.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapter = lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 3)), axes, 0.5)
    >>> lora.merge({"w": jnp.ones((4, 3)), "bias": jnp.zeros(3)}, {"w": adapter})["w"][0].tolist()
    [1.5, 1.5, 1.5]
    """
    names, leaves, treedef = flatten_with_names(params)
    check_adapters(adapters, names, leaves)
    for name, leaf in zip(names, leaves, strict=True):
        if donate and name in adapters and not concrete(leaf):
            raise LoraError(
                f"merge(donate=True) takes the memory of arrays on devices, but {name!r} is a {type(leaf).__name__}: "
                "leave donate out."
            )
    kept, copies = {}, dict[Any, Any]()  # of tied weights one copy
    for name, leaf in zip(names, leaves, strict=True) if keep else ():
        if name in adapters:
            if donate and same(leaf) not in copies:
                copies[same(leaf)] = _on_host(name, leaf)
            kept[name] = copies[same(leaf)] if donate else leaf
    work = {
        name: (same(leaf), same(adapters[name])) for name, leaf in zip(names, leaves, strict=True) if name in adapters
    }
    uses = Uses(names, leaves, work, dict(adapters)) if donate else None
    done: dict[Any, jax.Array] = {}

    def merged(name: str, leaf: Any) -> Any:
        if name not in work:
            return as_given(leaf)
        if work[name] not in done:
            change = _merge_in_place if uses is not None and uses.last(leaf) else _merge
            done[work[name]] = change(leaf, adapters[name])
        return done[work[name]]

    result = treedef.unflatten([merged(name, leaf) for name, leaf in zip(names, leaves, strict=True)])
    return (result, kept) if keep else result


def unmerge(merged: Params, kept: Mapping[str, Any]) -> Params:
    """Return the parameters before `lora.merge(params, adapters, keep=True)`, bit by bit.

    Args:
        merged, kept: what that returned. `merged` may be on other devices by now: weights go where theirs are.

    Returns:
        The parameters, in the tree of `merged`.

    Raises:
        LoraError: `merged` has no such path, or another shape or dtype there: it is not what was merged.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.full((4, 4), 0.3, jnp.bfloat16)}
    >>> x = jnp.ones((1, 4), jnp.bfloat16)
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, x, rules={"w": lora.Lora(rank=2)})
    >>> adapters = jax.tree.map(lambda array: array + 0.1, lora.init(jax.random.key(0), params, plan))
    >>> merged, kept = lora.merge(params, adapters, keep=True)
    >>> bool((lora.unmerge(merged, kept)["w"] == params["w"]).all())
    True
    """
    if not isinstance(kept, Mapping) or any(map(is_adapter, kept.values())):
        refuse("unmerge(merged, kept)", "kept", kept, "the second result of lora.merge(params, adapters, keep=True)")
    names, leaves, treedef = flatten_with_names(merged)
    found = dict(zip(names, leaves, strict=True))
    for path, w in kept.items():
        if path not in found:
            near = ", ".join(map(repr, nearest(path, names)))
            raise LoraError(f"{path!r} was kept, but `merged` has no such path; the nearest are {near}.")
        _check_kept(path, w, found[path])
    done: dict[int, Any] = {}  # what was one array is one again

    def back(name: str, leaf: Any) -> Any:
        if name not in kept:
            return as_given(leaf)
        w = kept[name]
        if id(w) not in done:
            done[id(w)] = _where(leaf, w)
        return done[id(w)]

    return treedef.unflatten([back(name, leaf) for name, leaf in zip(names, leaves, strict=True)])


def _where(leaf: Any, w: Any) -> Any:
    """Return a weight that was kept where a leaf is."""
    if is_packed(w) or not concrete(leaf):
        return as_given(w)
    if isinstance(w, np.ndarray):
        return jax.device_put(w, leaf.sharding) if leaf.committed else jnp.asarray(w)
    return placed(w, leaf)


def _check_kept(path: str, w: Any, leaf: Any) -> None:
    """Raise unless a weight that was kept can take the place of a leaf."""
    if is_taken(w):
        raise LoraError(f"{path!r} was kept, and its memory was donated since then: keep it anew at each such merge.")
    same_dtype = is_packed(w) or leaf.dtype == jax.dtypes.canonicalize_dtype(w.dtype)
    if tuple(leaf.shape) != tuple(w.shape) or not same_dtype:
        raise LoraError(
            f"{path!r} was kept as {describe(w)}, but `merged` has {describe(leaf)} there: give what "
            "lora.merge(..., keep=True) returned."
        )


def _on_host(name: str, w: jax.Array) -> np.ndarray:
    if not w.is_fully_addressable:
        raise LoraError(
            f"merge(donate=True, keep=True) copies weights to this host, but {name!r} is spread over several: leave "
            "donate out."
        )
    return np.array(w)  # a copy: on the CPU the array itself would be given away


def _merge(leaf: Any, adapter: Adapter) -> jax.Array:
    w = jnp.asarray(unpacked(leaf))  # numpy's float64 is JAX's default float, as it would be in the function itself
    return placed(_merged(w, adapter), leaf if is_packed(leaf) else w)


def _merged(w: jax.Array, adapter: Adapter) -> jax.Array:
    return adapter.merge(w.astype(accumulator(w.dtype))).astype(w.dtype)


def _merge_in_place(w: jax.Array, adapter: Adapter) -> jax.Array:
    return _in_place(w.sharding)(w, adapter)


@functools.lru_cache(maxsize=256)
def _in_place(sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(_merged, donate_argnums=0, out_shardings=sharding)
