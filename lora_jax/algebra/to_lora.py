"""Adapters of any kind as LoRA: `to_lora`."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.low_rank import LowRank
from lora_jax.algebra.compress import compressed
from lora_jax.algebra.conversion import Conversion, ConvertedWeight, intruder_dimensions
from lora_jax.algebra.truncation import Limit, limit, product_svd, truncated
from lora_jax.core.adapter import Adapter, AdapterWrapper
from lora_jax.core.argument_checks import TAKEN_BY_A_STEP, check_adapter_dict, check_kept, named_arrays
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import KINDS
from lora_jax.core.operand import Operand
from lora_jax.core.packed import unpacked
from lora_jax.core.paths import flatten_with_names, is_array, nearest

CALL = "to_lora(adapters)"
Array = np.ndarray[Any, Any]


def to_lora(
    adapters: Mapping[str, Adapter],
    *,
    rank: int | None = None,
    energy: float | None = None,
    params: Any = None,
    top: int = 10,
    threshold: float = 0.5,
) -> tuple[dict[str, Adapter], Conversion]:
    """Return adapters of any kind as LoRA: exactly, or the nearest of a rank.

    What is W + s A B in another form, as `AdaLora`, `Loha`, `Lokr` and `Vera` are, becomes just that LoRA. With a rank
    or an energy all become the nearest LoRA of that size (Eckart and Young): kinds that are LoRA without anything of
    a weight's size, and others, whose change depends on W, as `Dora` and `Ia3`, of that change, one matrix at a time.
    `Rows` is the LoRA of its rows of W' - W, exactly, where there are parameters. What is of no matrix stays as it is:
    `Full`, and whatever else has no inputs, such as factors of a bias.

    Args:
        adapters: `{path: adapter}`.
        rank: the largest rank; an adapter of a smaller one keeps its own, and is exact.
        energy: or the share of the squared norm of each weight's change that is left, above 0 and at most 1, by as
            small a rank as that takes.
        params: the parameters, for kinds whose change depends on W, and for the search for intruder dimensions: how
            many of the largest singular vectors of W + s A B are like none of W's (Shuttleworth et al. 2024, arXiv
            2410.21228). That takes two decompositions of each weight.
        top: how many of the largest singular vectors of each matrix are looked at; 0 leaves that out.
        threshold: the |cosine| with each singular vector of W below which one is an intruder.

    Returns:
        `(adapters, report)`: `{path: adapter}`, and a `Conversion`, `{path: ConvertedWeight}` with the rank, the loss
        and the intruders of each weight, and a table when printed.

    Raises:
        LoraError: an adapter is no LoRA, and neither a rank nor an energy is given; the parameters that its change
            depends on are missing; both limits are given, or one is out of its range; numbers are traced, not finite,
            or spread over several hosts.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> w = jnp.eye(4, 3)
    >>> adapters = {"w": lora.Ia3Adapter(jnp.array([1.0, 5.0, 4.0]), axes, (4,))}
    >>> found, report = lora.to_lora(adapters, rank=1, params={"w": w})
    >>> print(report)
    weight  from  inputs, outputs  matrices  rank  loss  intruders
    ------  ----  ---------------  --------  ----  ----  ---------
    w       ia3   [4, 3]                  1     1   0.6          0
    >>> found["w"].a.shape, lora.to_lora(adapters, rank=2, params={"w": w})[1].loss < 1e-6
    ((4, 1), True)
    """
    to = None if rank is None and energy is None else limit("to_lora", rank, energy)
    _check(adapters, top, threshold)
    weights = _weights(params)
    found: dict[str, Adapter] = {}
    report: dict[str, ConvertedWeight] = {}
    for path, given in adapters.items():
        adapter = given
        while isinstance(adapter, AdapterWrapper):
            adapter = adapter.asked
        w = _weight(path, adapter, weights)
        lora, loss = _converted(path, adapter, w, to)
        intruders = None
        if isinstance(lora, LoraAdapter) and w is not None and top:
            pairs = zip(_matrices(w, lora), _changes(lora), strict=True)
            intruders = sum(intruder_dimensions(own, change, top, threshold) for own, change in pairs)
        found[path] = lora
        report[path] = _summary(path, adapter, lora, loss, intruders)
    return found, Conversion(report)


def _check(adapters: Mapping[str, Adapter], top: Any, threshold: Any) -> None:
    check_adapter_dict(CALL, adapters)
    if not adapters:
        raise LoraError(f"{CALL}: there are no adapters.")
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise LoraError(f"to_lora(top={top!r}): expected a whole number such as 10, or 0.")
    if not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise LoraError(f"to_lora(threshold={threshold!r}): expected a cosine above 0 and at most 1, such as 0.5.")
    for path, adapter in adapters.items():
        check_kept(named_arrays(path, adapter), TAKEN_BY_A_STEP, "to_lora: ")
        for name, array in adapter.arrays().items():
            if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
                raise LoraError(
                    f"{CALL} looks at numbers, and {name!r} of {path!r} has none: call it outside of jax.jit."
                )
            refuse_spread({path: array})
            if not np.isfinite(np.asarray(array, np.float64)).all():
                raise LoraError(f"{path!r} holds infinity or NaN: take the adapters of an earlier checkpoint.")
        try:
            adapter.kernel_shape()
        except LoraError as error:
            raise LoraError(f"the adapter for {path!r} {error}") from None


def _weights(params: Any) -> dict[str, Any] | None:
    """Return the parameters that are arrays by their paths, None if none are given."""
    if params is None:
        return None
    names, leaves, _ = flatten_with_names(params)
    return {
        name: leaf
        for name, leaf in zip(names, leaves, strict=True)
        if is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer)
    }


def _weight(path: str, adapter: Adapter, weights: Mapping[str, Any] | None) -> Array | None:
    """Return the weight of an adapter in fp32, None if no parameters are given.

    Raises:
        LoraError: it is not among the parameters, or of another shape.
    """
    if weights is None:
        return None
    if path not in weights:
        near = ", ".join(map(repr, nearest(path, weights, n=3))) or "none"
        raise LoraError(f"{CALL}: {path!r} is no array of the parameters; the nearest are {near}.")
    refuse_spread({path: weights[path]})
    w = np.asarray(unpacked(weights[path]), np.float32)
    if w.shape != adapter.kernel_shape():
        raise LoraError(
            f"{CALL}: {path!r} has shape {list(w.shape)}, its adapter is for {list(adapter.kernel_shape())}."
        )
    return w


def _converted(path: str, adapter: Adapter, w: Array | None, to: Limit | None) -> tuple[Adapter, float]:
    """Return an adapter as LoRA, or itself if it is of no matrix; and the loss."""
    if not adapter.axes.inputs or not adapter.axes.outputs:
        return adapter, 0.0
    if (exact := _exact(adapter, w)) is not None:
        return _smaller(path, exact, to)
    what = f"{path!r} is a {type(adapter).__name__}, and no LoRA"
    if w is None:
        call = "to_lora(adapters, rank=16, params=params)"
        raise LoraError(f"{what} but with its weight, which its change depends on: give the parameters, {call}.")
    if to is None:
        raise LoraError(
            f"{what}: say of which rank the nearest one shall be, to_lora(adapters, rank=16, params=params), or of "
            "which energy, or take it out."
        )
    merged = np.asarray(adapter.merge(jnp.asarray(w)), np.float64)
    changes = [*_matrices(merged - w, adapter)]
    a, b, _ = truncated(lambda i: changes[i], len(changes), to)
    stack, inputs, outputs = adapter.axes.sizes(w.shape)
    a, b = a.reshape(*stack, *inputs, -1), b.reshape(*stack, a.shape[-1], *outputs)
    lora = LoraAdapter(jnp.asarray(a), jnp.asarray(b), adapter.axes, 1.0)
    return lora, _share([d - own for d, own in zip(changes, _changes(lora), strict=True)], changes)


def _exact(adapter: Adapter, w: Array | None) -> LoraAdapter | None:
    """Return the LoRA that an adapter is, by itself or for this weight; None if it is none."""
    exact = adapter.to_lora()
    if isinstance(exact, LoraAdapter):
        return LoraAdapter(exact.a, exact.b, exact.axes, exact.ratio)  # also of kinds whose A is frozen
    if w is None:
        return None
    operand = adapter.lower(jnp.asarray(w))
    found = operand.to_lora() if isinstance(operand, Operand) else None
    return LoraAdapter(found.a, found.b, found.axes, 1.0) if isinstance(found, LowRank) else None


def _smaller(path: str, exact: LoraAdapter, to: Limit | None) -> tuple[LoraAdapter, float]:
    """Return a LoRA of the size that is asked for, itself if it is no larger; and the loss."""
    if to is None or (to.rank is not None and exact.a.shape[-1] <= to.rank):
        return exact, 0.0
    lora, _ = compressed(path, exact, to)
    assert isinstance(lora, LoraAdapter)
    if lora.a.shape[-1] >= exact.a.shape[-1]:
        return exact, 0.0
    (a, b), (small_a, small_b) = _factors(exact), _factors(lora)
    rest = np.concatenate([a, -small_a], axis=-1), np.concatenate([b, small_b], axis=-2)
    norms = [float(np.linalg.norm(product_svd(*pair)[1])) for pair in (rest, (a, b))]
    return lora, norms[0] / norms[1] if norms[1] else 0.0


def _factors(lora: LoraAdapter) -> tuple[Array, Array]:
    """Return A [n, d, r] and s B [n, r, k] in fp64."""
    n, d, k = lora.axes.fans(lora.kernel_shape())
    a, b = (np.asarray(array).astype(np.float64) for array in (lora.a, lora.b))
    return a.reshape(n, d, -1), float(lora.scale) * b.reshape(n, -1, k)


def _changes(lora: LoraAdapter) -> Iterator[Array]:
    """Yield s A B [d, k] of each of the stacked matrices."""
    return (a @ b for a, b in zip(*_factors(lora), strict=True))


def _matrices(w: Array, adapter: Adapter) -> Array:
    """Return the matrices of a weight [n, d, k], in fp64."""
    axes = adapter.axes
    return w.transpose([*axes.stack, *axes.inputs, *axes.outputs]).reshape(axes.fans(w.shape)).astype(np.float64)


def _share(rest: list[Array], whole: list[Array]) -> float:
    """Return the norm of some matrices as a share of that of others."""
    norms = [np.sqrt(sum(float(np.square(one).sum()) for one in matrices)) for matrices in (rest, whole)]
    return float(norms[0] / norms[1]) if norms[1] else 0.0


def _summary(path: str, given: Adapter, lora: Adapter, loss: float, intruders: int | None) -> ConvertedWeight:
    shape = given.kernel_shape()
    n, d, k = given.axes.fans(shape)
    is_matrix = bool(given.axes.inputs and given.axes.outputs)
    kind = next((name for name, kind in KINDS.items() if type(given) is kind), type(given).__name__)
    rank = int(lora.a.shape[-1]) if isinstance(lora, LoraAdapter) else None
    return ConvertedWeight(path, kind, (d, k) if is_matrix else tuple(shape), n, rank, loss, intruders)
