"""The weighted sum of the changes of one weight, exactly, by kinds.

Of factors it is [A1 | A2 | ...] [w1 s1 B1; w2 s2 B2; ...], whose rank is the sum of ranks. Adding the factors
themselves would be smaller, and wrong: (A1 + A2)(B1 + B2) has cross terms.

DoRA's change is not linear, but it has a weighted sum: with g = m / n it is (g - 1) W + g s A B, and so the sum of
several is (G - 1) W + [A1 | A2 | ...] [w1 g1 s1 B1; ...] with G = 1 + w1 (g1 - 1) + w2 (g2 - 1) + ...: again DoRA, with
lengths that W and the factors tell.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.dora import DoraAdapter, output_lengths
from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.ia3 import Ia3Adapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.low_rank import LowRank
from lora_jax.adapters.output_scaled import OutputScaled
from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.arrays import accumulator
from lora_jax.core.errors import LoraError
from lora_jax.core.operand import Operand
from lora_jax.core.packed import unpacked

SUMS_TO_ONE = 1e-6  # weights of rows that differ by less from 1 need no W: that is what fp32 holds of them
SMALLEST_GAIN = 1e-6  # of an output of W, below which its length is lost to rounding


class Term(NamedTuple):
    """One adapter of a sum."""

    adapter: Adapter
    weight: Any  # a number, or a traced scalar


def sum_of(path: str, terms: Sequence[Term], w: Any) -> Adapter:
    """Return the adapter whose change is the weighted sum of the terms.

    Args:
        path: for messages.
        terms: adapters of one weight, unwrapped, and their weights.
        w: the weight, packed or not; None if it is not at hand.

    Raises:
        LoraError: a kind has no sums; the adapters do not fit one another; W is needed; numbers overflow.
    """
    kinds = {type(term.adapter): None for term in terms}
    if FullAdapter in kinds:
        return _sum_of_full(path, terms, w)
    if [*kinds] == [Ia3Adapter]:
        return _sum_of_gains(path, terms)
    if [*kinds] == [RowsAdapter]:
        return _sum_of_rows(path, terms, w)
    factors = [term.adapter.to_lora() for term in terms]
    if all(isinstance(one, LoraAdapter) for one in factors):
        return _sum_of_factors(path, [Term(f, t.weight) for f, t in zip(factors, terms, strict=True) if f])
    for term, found in zip(terms, factors, strict=True):
        if not isinstance(found, LoraAdapter) and not isinstance(term.adapter, DoraAdapter | Ia3Adapter):
            raise LoraError(
                f"{path!r} is a {type(term.adapter).__name__}"
                f"{' beside another kind' if isinstance(term.adapter, RowsAdapter) else ''}; sums are of what is LoRA "
                "in some form, of Dora and Ia3, of Full, and of Rows with Rows."
            )
    return _sum_of_scaled(path, terms, w)


# LoRA in any form -----------------------------------------------------------------------------------------------------


def _sum_of_factors(path: str, terms: Sequence[Term]) -> LoraAdapter:
    weighted = [_weighted(path, term.adapter, term.weight) for term in terms]  # type: ignore[arg-type]
    first = weighted[0]
    if len(weighted) == 1:
        return first
    turned = [like(path, first, adapter) for adapter in weighted]
    dtype = _common(*(one.b for one in turned))
    a, b = _side_by_side([LowRank(one.a, one.scaled(one.b, None).astype(dtype), one.axes) for one in turned])
    return LoraAdapter(a, b, first.axes, 1.0)


def _side_by_side(factors: Sequence[LowRank]) -> tuple[jax.Array, jax.Array]:
    """Return A [*stack, *inputs, R] and B [*stack, R, *outputs] of factors that are added up."""
    dtype, n = _common(*(one.a for one in factors)), len(factors[0].axes.stack)
    a = jnp.concatenate([one.a.astype(dtype) for one in factors], axis=-1)
    return a, jnp.concatenate([one.b for one in factors], axis=n)


def _weighted(path: str, adapter: LoraAdapter, weight: Any) -> LoraAdapter:
    """Return an adapter with its scale times the weight, if that has numbers."""
    if isinstance(weight, jax.core.Tracer):  # in B, which passes gradients on, and not in the scale, which does not
        b = adapter.scaled(adapter.b, None)
        return dataclasses.replace(adapter, b=(b * weight.astype(b.dtype)).astype(adapter.b.dtype), ratio=1.0)
    if isinstance(adapter.ratio, jax.core.Tracer):
        return dataclasses.replace(adapter, ratio=adapter.scale * weight)
    scale = float(adapter.scale) * float(weight)
    fits = abs(scale) <= float(jnp.finfo(jnp.float32).max)
    if not fits or _overflows(jnp.asarray(adapter.b) * scale):
        raise LoraError(
            f"{path!r} with the weight {weight} has numbers that {adapter.b.dtype.name} cannot hold: the scale is "
            f"{scale:.3g}. Give a smaller weight, or adapters of a wider dtype."
        )
    return dataclasses.replace(adapter, ratio=scale)


def like(path: str, first: LoraAdapter, other: LoraAdapter) -> LoraAdapter:
    """Return an adapter with the axes of the first one.

    Raises:
        LoraError: it is for another weight.
    """
    for candidate in (other, other.transpose()):
        if candidate.axes == first.axes and _sizes(candidate) == _sizes(first):
            return candidate
    raise LoraError(
        f"{path!r} has adapters for different weights: {first.axes} with A {list(first.a.shape)} and B "
        f"{list(first.b.shape)}, and {other.axes} with {list(other.a.shape)} and {list(other.b.shape)}."
    )


def _sizes(adapter: LoraAdapter) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n = len(adapter.axes.stack)
    return adapter.a.shape[:-1], adapter.b.shape[:n] + adapter.b.shape[n + 1 :]


# Factors on outputs ---------------------------------------------------------------------------------------------------


def _sum_of_gains(path: str, terms: Sequence[Term]) -> Ia3Adapter:
    """Return (IA)^3 with G = 1 + w1 (g1 - 1) + ..."""
    first = terms[0].adapter
    assert isinstance(first, Ia3Adapter)
    total = jnp.ones_like(first.gain, accumulator(first.gain.dtype))
    for adapter, weight in terms:
        _check_same(path, first, adapter)
        assert isinstance(adapter, Ia3Adapter)
        total += _times(adapter.gain.astype(total.dtype) - 1, weight)
    return dataclasses.replace(first, gain=_held(path, total, first.gain.dtype))


def _sum_of_scaled(path: str, terms: Sequence[Term], w: Any) -> DoraAdapter:
    """Return DoRA of the sum of DoRA, (IA)^3 and LoRA."""
    w = _needed(path, w, "the change of Dora, and that of Ia3 beside other kinds, depends on W")
    first = terms[0].adapter
    stack, _, outputs = first.axes.sizes(w.shape)
    gain = jnp.ones((*stack, *outputs), accumulator(w.dtype))  # G
    parts = []
    for adapter, weight in terms:
        _check_same(path, first, adapter)
        operand = adapter.lower(w)
        own, factors = jnp.ones_like(gain), operand
        if isinstance(operand, OutputScaled):
            own, factors = operand.gain.astype(gain.dtype), operand.inner
        factors = factors.to_lora() if isinstance(factors, Operand) else factors
        assert isinstance(factors, LowRank)
        gain += _times(own - 1, weight)
        parts.append(_scale_outputs(factors, _times(own, weight)))
    if not isinstance(gain, jax.core.Tracer) and bool((abs(gain) < SMALLEST_GAIN).any()):
        raise LoraError(
            f"{path!r}: with these weights nothing is left of an output of W, whose direction Dora could not keep. "
            "Give weights that are a little different."
        )
    a, b = _side_by_side([_scale_outputs(part, 1 / gain) for part in parts])
    m = gain * output_lengths(w, LowRank(a, _held(path, b, b.dtype), first.axes))
    return DoraAdapter(a, b, _held(path, m, m.dtype), first.axes, 1.0)


def _scale_outputs(factors: LowRank, gain: jax.Array) -> LowRank:
    """Return factors times a gain [*stack, *outputs]."""
    return dataclasses.replace(factors, b=factors.b.astype(gain.dtype) * jnp.expand_dims(gain, len(factors.axes.stack)))


# Whole arrays and rows of tables --------------------------------------------------------------------------------------


def _sum_of_full(path: str, terms: Sequence[Term], w: Any) -> FullAdapter:
    """Return D of the sum: of W's shape, as that of one part is anyway."""
    first = next(term.adapter for term in terms if isinstance(term.adapter, FullAdapter))
    dtype = accumulator(*(array.dtype for term in terms for array in term.adapter.arrays().values()))
    total = jnp.zeros(first.delta.shape, dtype)
    for adapter, weight in terms:
        if adapter.kernel_shape() != first.delta.shape:
            raise LoraError(
                f"{path!r} has adapters for different weights, of shapes {list(first.delta.shape)} and "
                f"{list(adapter.kernel_shape())}."
            )
        if isinstance(adapter, FullAdapter):
            change = adapter.delta.astype(dtype)
        elif isinstance(adapter.to_lora(), LoraAdapter):
            change = adapter.merge(jnp.zeros_like(total))
        else:
            base = _needed(path, w, f"the change of a {type(adapter).__name__} depends on W").astype(dtype)
            change = adapter.merge(base) - base
        total += _times(change, weight)
    return FullAdapter(_held(path, total, first.delta.dtype), first.axes)


def _sum_of_rows(path: str, terms: Sequence[Term], w: Any) -> RowsAdapter:
    """Return the rows that any part has: W's row and the weighted changes of it, w1 (v1 - W) + ..."""
    first = terms[0].adapter
    assert isinstance(first, RowsAdapter)
    found: dict[int, list[tuple[Any, Any]]] = {}
    for adapter, weight in terms:
        assert isinstance(adapter, RowsAdapter)
        if (adapter.size, adapter.axis, adapter.axes) != (first.size, first.axis, first.axes):
            raise LoraError(
                f"{path!r} has rows of different tables: {first.size} along axis {first.axis}, and {adapter.size} "
                f"along axis {adapter.axis}."
            )
        for i, row in zip(adapter.indices, adapter.values, strict=True):
            found.setdefault(i, []).append((row, weight))
    indices = tuple(sorted(found))
    dtype = accumulator(first.values.dtype)
    rows, base = [], None
    for i in indices:
        rest = 1 - sum(weight for _, weight in found[i])
        row = sum(_times(value.astype(dtype), weight) for value, weight in found[i])
        if isinstance(rest, jax.core.Tracer) or abs(rest) > SUMS_TO_ONE:
            if base is None:
                base = _needed(path, w, f"Rows replace rows, and the weights of row {i} do not add up to 1")
            row = row + _times(base.take(i, first.axis).astype(dtype), rest)
        rows.append(row)
    values = _held(path, jnp.stack(rows), first.values.dtype)
    return dataclasses.replace(first, values=values, indices=indices)


# What they share ------------------------------------------------------------------------------------------------------


def _common(*arrays: jax.Array) -> Any:
    """Return the dtype of the arrays, or fp32 or wider where they have several."""
    dtypes = {array.dtype: None for array in arrays}
    return arrays[0].dtype if len(dtypes) == 1 else accumulator(*dtypes)


def _times(array: jax.Array, weight: Any) -> jax.Array:
    return array * jnp.asarray(weight, array.dtype)


def _needed(path: str, w: Any, why: str) -> jax.Array:
    if w is None:
        raise LoraError(
            f"{path!r}: {why}. Give the parameters, combine(parts, params=params); to the command line --base."
        )
    return jnp.asarray(unpacked(w))


def _check_same(path: str, first: Adapter, other: Adapter) -> None:
    if other.axes != first.axes or other.kernel_shape() != first.kernel_shape():
        raise LoraError(
            f"{path!r} has adapters for different weights: {list(first.kernel_shape())} with {first.axes}, and "
            f"{list(other.kernel_shape())} with {other.axes}."
        )


def _held(path: str, array: jax.Array, dtype: Any) -> jax.Array:
    """Return a sum in the dtype of its parts, if that holds it."""
    found = array.astype(dtype)
    if _overflows(found):
        raise LoraError(
            f"{path!r} has a sum that {np.dtype(dtype).name} cannot hold. Give smaller weights, or adapters of a wider "
            "dtype."
        )
    return found


def _overflows(array: Any) -> bool:
    return not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all())
