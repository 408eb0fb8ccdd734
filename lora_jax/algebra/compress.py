"""Adapters of smaller rank: `compress`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.dora import DoraAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.algebra.truncation import Limit, Truncation, limit, product_svd, rank_of
from lora_jax.core.adapter import Adapter, AdapterWrapper
from lora_jax.core.argument_checks import TAKEN_BY_A_STEP, check_adapter_dict, check_kept, named_arrays
from lora_jax.core.arrays import accumulator, placed, refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.initialization.svd import balanced_factors

CALL = "compress(adapters, rank=8)"
Report = Callable[[str, Truncation], Any]


def compress(
    adapters: Mapping[str, Adapter],
    *,
    rank: int | None = None,
    energy: float | None = None,
    report: Report | None = None,
) -> dict[str, Adapter]:
    """Return adapters of smaller rank whose changes are the nearest to those of the given ones.

    A rank that `lora.combine` added up becomes small again. A = Q R and B^T = Q' R' are factored, and R R'^T, a matrix
    of the rank's size, is decomposed: nothing of a weight's size is formed. It computes in fp64 on this host, one
    weight after another; under `jax.jit` and other transforms in fp32, and then to a `rank` alone.

    What is W + s A B in any form becomes a `LoraAdapter` with a scale of 1, A and B being of equal size. Of `Dora` the
    factors become smaller, and the lengths of outputs stay. `Full`, `Rows` and `Ia3` stay as they are. Stacked
    matrices, as of layers or experts, keep one rank in common.

    Args:
        adapters: `{path: adapter}`.
        rank: the largest rank; an adapter of a smaller one keeps its own.
        energy: or the share of the squared norm of each weight's change that is left, above 0 and at most 1, by as
            small a rank as that takes.
        report: called with the path and a `Truncation(rank, energy)` of each weight that was compressed: the rank, and
            the share of the squared norm that is left.

    Returns:
        `{path: adapter}` in the dtypes and places of the given ones.

    Raises:
        LoraError: neither or both limits are given, or one is out of its range; the rank is above those of all
            adapters; there is nothing to compress; numbers are not finite; an array is spread over several hosts.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> a, b = jax.random.normal(jax.random.key(0), (6, 2)), jax.random.normal(jax.random.key(1), (2, 5))
    >>> one = {"w": lora.LoraAdapter(a, b, axes, 2.0)}
    >>> twice = lora.combine([(one, 1.0), (one, 1.0)])
    >>> found = {}
    >>> small = lora.compress(twice, energy=1.0, report=found.__setitem__)
    >>> twice["w"].a.shape, small["w"].a.shape, round(found["w"].energy, 6)
    ((6, 4), (6, 2), 1.0)
    """
    to = limit("compress", rank, energy)
    check_adapter_dict(CALL, adapters)
    factors = {path: found for path, adapter in adapters.items() if (found := factors_of(adapter)) is not None}
    _check(factors, to)
    done: dict[str, Adapter] = {}
    for path, adapter in adapters.items():
        done[path] = adapter
        if path in factors:
            done[path], left = compressed(path, factors[path], to)
            if report is not None and left is not None:
                report(path, left)
    return done


def factors_of(adapter: Adapter) -> LoraAdapter | DoraAdapter | None:
    """Return what has the factors of an adapter; None if it has none."""
    while isinstance(adapter, AdapterWrapper):
        adapter = adapter.asked
    if isinstance(adapter, DoraAdapter):
        return adapter
    found = adapter.to_lora()
    return found if isinstance(found, LoraAdapter) else None


def _check(factors: Mapping[str, LoraAdapter | DoraAdapter], to: Limit) -> None:
    if not factors:
        raise LoraError(f"{CALL}: there are no adapters with factors, so there is nothing to compress.")
    for path, adapter in factors.items():
        check_kept(named_arrays(path, adapter), TAKEN_BY_A_STEP, "compress: ")
        try:
            adapter.kernel_shape()
        except LoraError as error:
            raise LoraError(f"the adapter for {path!r} {error}") from None
    ranks = {path: adapter.a.shape[-1] for path, adapter in factors.items()}
    if to.rank is not None and to.rank > max(ranks.values()):
        raise LoraError(
            f"compress(rank={to.rank}): the largest rank is {max(ranks.values())}, so there is nothing to compress."
        )


def compressed(
    path: str, adapter: LoraAdapter | DoraAdapter, to: Limit
) -> tuple[LoraAdapter | DoraAdapter, Truncation | None]:
    """Return an adapter of smaller rank, and what it holds, if that is known."""
    stack, d, k = adapter.axes.fans(adapter.kernel_shape())
    r, n = adapter.a.shape[-1], len(adapter.axes.stack)
    if r == 0:
        return adapter, None
    arrays = adapter.a, adapter.b, adapter.ratio
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if traced and to.energy is not None:
        raise LoraError(
            f"compress(energy={to.energy}) looks at numbers, and those of {path!r} are traced: give a rank, or call it "
            "outside of jax.jit."
        )
    if not traced:
        refuse_spread({path: arrays})
    a, b = (_wide(array, traced) for array in arrays[:2])
    if not traced and not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(adapter.scale)):
        raise LoraError(f"{path!r} holds infinity or NaN: take the adapters of an earlier checkpoint.")
    u, values, vt = product_svd(a.reshape(stack, d, r), (b * _scale(adapter, traced)).reshape(stack, r, k))
    rank = min(int(to.rank or 1), values.shape[-1]) if traced else rank_of(values, to)
    small_a, small_b = balanced_factors(u[..., :rank], values[..., :rank], vt[..., :rank, :], 1.0)
    small_a = _back(small_a.reshape(*adapter.a.shape[:-1], rank), adapter.a)
    small_b = _back(small_b.reshape(*adapter.b.shape[:n], rank, *adapter.b.shape[n + 1 :]), adapter.b)
    left = None
    if not traced:
        total = float(np.square(values).sum())
        left = Truncation(rank, float(np.square(values[..., :rank]).sum()) / total if total else 1.0)
    return dataclasses.replace(adapter, a=small_a, b=small_b, ratio=1.0), left


def _wide(array: Any, traced: bool) -> Any:
    return jnp.asarray(array, accumulator(array.dtype)) if traced else np.asarray(array).astype(np.float64)


def _scale(adapter: LoraAdapter | DoraAdapter, traced: bool) -> Any:
    return jax.lax.stop_gradient(jnp.asarray(adapter.scale)) if traced else float(adapter.scale)


def _back(array: Any, like: Any) -> jax.Array:
    """Return an array in the dtype and the place of another one."""
    return placed(jnp.asarray(array.astype(like.dtype)), like)
