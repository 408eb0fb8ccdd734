"""Some rows of a merged weight at a time, and what of its change is left once they are rounded."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.tensor_changes import Change, with_start

NUMBERS = 2**20  # of a weight that are merged at a time, at least one block of rows


class Survival(NamedTuple):
    """What of the change of a tensor is left once it is rounded.

    Args:
        kept: <Q(W') - Q(W), W' - W> / |W' - W|^2, where Q rounds: 1 if what the change does is still done, on average,
            0 if nothing of it is.
        loss: |Q(W') - W'| / |W' - W|, as of `merge_checkpoint`. In 8 bits it is mostly the noise of rounding W itself,
            which `lora.bases.quantize` would add to the unchanged model too.
    """

    kept: float
    loss: float


class Sums:
    """Adds up what a `Survival` is made of, over parts of a tensor."""

    def __init__(self) -> None:
        self.kept = self.lost = self.changed = 0.0

    def add(self, before: Array, after: Array, rounded_before: Array, rounded: Array) -> None:
        """Add a part: W, W', Q(W) and Q(W')."""
        delta, moved, errors = after - before, rounded - rounded_before, rounded - after
        self.kept += _dot(moved, delta)
        self.lost += _dot(errors, errors)
        self.changed += _dot(delta, delta)

    def survival(self) -> Survival:
        """Return what is left of the change; all, where there is none."""
        if not self.changed:
            return Survival(1.0, 0.0)
        return Survival(self.kept / self.changed, math.sqrt(self.lost / self.changed))


def _dot(one: Array, other: Array) -> float:
    """Return the sum of products in fp64."""
    return float(np.einsum("ij,ij->", one, other, dtype=np.float64))


def merged_in_rows(name: str, w: Array, change: Change | None, block: int = 1) -> Iterator[tuple[Array, Array]]:
    """Yield some rows of W and of W', [rows, columns], in fp32, or in fp64 where W is.

    A vector has rows of one number; of several matrices, the rows of one follow those of the other.

    Args:
        name: of the tensor.
        w: the tensor.
        change: what becomes of it; None for nothing.
        block: how many rows belong together.

    Raises:
        LoraError: some of W' is not finite.
    """
    change = None if change is None else with_start(name, change, lambda: w)
    pairs = change.factors if change is not None else ()
    w = w.reshape(sum(len(left) for left, _ in pairs) or w.size // (w.shape[-1] if w.ndim > 1 else 1), -1)
    wide = np.float64 if w.dtype == np.float64 else np.float32
    height = len(w) // max(len(pairs), 1)
    step = max(1, NUMBERS // w.shape[1] // block) * block
    for i, pair in enumerate(pairs or (None,)):
        for start in range(0, height, step):
            own = slice(start, min(start + step, height))
            part = slice(i * height + own.start, i * height + own.stop)
            before = w[part].astype(wide)
            after = before if change is None else _merged(change, before, w.shape, pair, own, part, wide)
            if not np.isfinite(after).all():
                raise LoraError(
                    f"{name!r} holds NaN or infinity once it is merged: the source has them, or the adapters are of a "
                    "training that diverged."
                )
            yield before, after


def _merged(
    change: Change,
    before: Array,
    shape: tuple[int, ...],
    pair: tuple[Array, Array] | None,
    own: slice,
    part: slice,
    wide: Any,
) -> Array:
    """Return some rows of W'.

    Args:
        before: of W.
        shape: of all of W.
        pair: the factors of the matrix that the rows are in.
        own: the rows in their matrix.
        part: the rows in all of W.
        wide: the dtype to compute in.
    """
    base, delta = (None if array is None else array.reshape(shape)[part] for array in (change.base, change.delta))
    lengths = None if change.lengths is None else change.lengths[own]
    with np.errstate(all="ignore"):  # what is not finite is refused
        product = None if pair is None else pair[0][own].astype(wide) @ pair[1].astype(wide)
        start = before if base is None else base.astype(wide)
        after = np.array(merged_rows(np, start, product, delta, lengths), wide)
    for row in (row for row in change.rows if part.start <= row < part.stop):
        after[row - part.start] = change.rows[row]
    return after


def merged_rows(xp: Any, start: Any, product: Any, delta: Any, lengths: Any) -> Any:
    """Return some rows of W' before they are rounded; `xp` is NumPy or jax.numpy."""
    exact = start if product is None else start + product
    exact = exact if delta is None else exact + delta
    return exact if lengths is None else exact * _gain(xp, exact, lengths)[:, None]


def _gain(xp: Any, rows: Any, lengths: Any) -> Any:
    """Return the factor that scales each row to its length, 1 for a row of zeros; `xp` is NumPy or jax.numpy."""
    norms = xp.linalg.norm(rows, axis=-1)
    return xp.where(norms == 0, 1.0, lengths / xp.where(norms == 0, 1.0, norms))
