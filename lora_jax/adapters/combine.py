"""Weighted sums of adapters, exact: `combine`. What a sum is, kind by kind, is in `sums`."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.sums import Term, sum_of
from lora_jax.core.adapter import Adapter, AdapterWrapper
from lora_jax.core.adapter_checks import check_adapters
from lora_jax.core.argument_checks import check_adapter_dict, check_is, refuse
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names

CALL = "combine([(adapters, weight), ...])"
PAIRS = "a list of pairs, [(adapters, 1.0), (others, -0.5)]"


def combine(parts: Sequence[tuple[Mapping[str, Adapter], Any]], *, params: Any = None) -> dict[str, Adapter]:
    """Return the adapters whose change is the weighted sum of those of all parts.

    What is W + s A B in any form becomes one `LoraAdapter` whose rank is the sum of ranks; `Full` and `Ia3` stay what
    they are. A weight that has `Full` in one part becomes `Full`. The changes of `Dora` and of `Rows` depend on W: sums
    of them take `params`, and are `Dora` and `Rows` again. `lora.compress` makes ranks smaller.

    Args:
        parts: `[(adapters, weight), ...]`. A path that a part lacks is one that it does not change. Weights are
            numbers, or traced scalars such as mixing weights that are learned: gradients reach them, and the adapters.
        params: the parameters that the adapters are for, packed or not: needed for sums with `Dora`, with `Rows` whose
            weights do not add up to 1, and of `Ia3` with other kinds.

    Returns:
        `{path: adapter}`, in the order in which the parts have the paths.

    Raises:
        LoraError: there are no parts; a weight is no finite number; an adapter is of a kind without sums, or holds
            infinity or NaN, or does not fit the parameters; two of a path do not fit; `params` are missing; a sum has
            numbers that its dtype cannot hold.

    >>> import jax, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> one = {"w": lora.Lora(2).factors(jax.random.key(0), (4, 3), axes)}
    >>> both = lora.combine([(one, 0.5), (one, -1.5)])["w"]
    >>> both.a.shape, both.b.shape
    ((4, 4), (4, 3))
    """
    check_parts(CALL, parts)
    weights = None if params is None else _weights(params, parts)
    found: dict[str, list[Term]] = {}
    for adapters, weight in parts:
        for path, adapter in adapters.items():
            _check_finite(path, adapter, weight)
            found.setdefault(path, []).append(Term(_inside(adapter), weight))
    return {path: sum_of(path, terms, None if weights is None else weights[path]) for path, terms in found.items()}


def check_parts(call: str, parts: Any) -> None:
    """Raise unless these are pairs of adapters and a weight, one at least."""
    check_is(call, "parts", parts, (list, tuple), PAIRS)
    if not parts:
        raise LoraError(f"{call}: expected one part at least.")
    for part in parts:
        if not isinstance(part, list | tuple) or len(part) != 2:
            refuse(call, "parts", parts if isinstance(part, float | int) else part, PAIRS)
        check_adapter_dict(call, part[0])
        _check_weight(call.partition("(")[0], part[1])


def _check_weight(call: str, weight: Any) -> None:
    if isinstance(weight, jax.core.Tracer):
        if weight.ndim or not jnp.issubdtype(weight.dtype, jnp.floating):
            raise LoraError(
                f"{call}: a weight is {weight.dtype}{list(weight.shape)}, expected a scalar of floats, such as "
                "weights[0]."
            )
        return
    is_number = isinstance(weight, numbers.Real | np.ndarray | jax.Array) and getattr(weight, "ndim", 0) == 0
    if not is_number or not math.isfinite(weight):
        raise LoraError(f"{call}: a weight is {weight!r}, expected a finite number, such as 0.5.")


def _check_finite(path: str, adapter: Adapter, weight: Any) -> None:
    """Raise if an adapter holds what no sum can take: NaN, infinity, or a stack of several adapters."""
    ratio: Any = getattr(adapter, "ratio", None)
    if getattr(ratio, "ndim", 0) > 1:
        raise LoraError(
            f"{path!r} is a stack of {len(ratio)} adapters: add them up one by one, "
            "jax.vmap(lambda a: lora.combine([(a, 0.5)]))(adapters)."
        )
    if not all(map(is_finite, adapter.arrays().values())):
        raise LoraError(
            f"{path!r} holds infinity or NaN, in the part with the weight {weight}: no sum of it has a meaning. "
            "Take the adapters of an earlier checkpoint."
        )


def is_finite(array: Any) -> bool:
    """Return whether all numbers are finite; of traced arrays, which have none yet, True."""
    if isinstance(array, jax.core.Tracer):
        return True
    with jax.ensure_compile_time_eval():
        return bool(jnp.isfinite(array).all())


def _inside(adapter: Adapter) -> Adapter:
    """Return the adapter in what wraps it, such as dropout, which is no part of its change."""
    while isinstance(adapter, AdapterWrapper):
        adapter = adapter.asked
    return adapter


def _weights(params: Any, parts: Sequence[tuple[Mapping[str, Adapter], Any]]) -> dict[str, Any]:
    """Return the weights by their paths, all of which the parts have to fit."""
    names, leaves, _ = flatten_with_names(params)
    for adapters, _ in parts:
        check_adapters(adapters, names, leaves)
    return dict(zip(names, leaves, strict=True))
