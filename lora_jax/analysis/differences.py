"""`diff`: what changed between two trees of parameters, as a table."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.analysis.inspection import number
from lora_jax.analysis.spectrum import Array, effective_rank
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import unpacked
from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.core.text import format_table, printable
from lora_jax.initialization.svd import singular_values


@dataclass(frozen=True)
class WeightChange:
    """How one weight differs.

    Attributes:
        path: of the weight.
        shape: of the weight.
        norm: the Frobenius norm of the change.
        relative: the same beside that of the weight in the base; infinite where that is zero.
        largest: the largest change of one number.
        rank: how many singular values of the change are above what rounding the weight to its dtype makes; of the
            matrices in the last two axes the largest. None for vectors, without `ranks`, and for a NaN or an infinity.
        effective_rank: the exponential of the entropy of the singular values' shares; of the matrices that change the
            mean. Where it is far above `rank`, most of it is rounding.
    """

    path: str
    shape: tuple[int, ...]
    norm: float
    relative: float
    largest: float
    rank: int | None
    effective_rank: float | None


@dataclass(frozen=True, repr=False)
class Differences(Mapping[str, WeightChange]):
    """`{path: WeightChange}` of the weights that changed; its text is a table.

    Attributes:
        changes: the weights that changed, in the order of the base.
        unchanged: the number of weights that are equal.
        mismatches: `{path: what}` of weights that are only in one tree, or have another shape or dtype. Those of
            another dtype are compared all the same.
    """

    changes: dict[str, WeightChange]
    unchanged: int
    mismatches: dict[str, str]

    def __getitem__(self, path: str) -> WeightChange:
        return self.changes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return the header and the cells of the table, of which the last five columns are numbers."""
        header = ["weight", "shape", "norm of change", "relative", "largest", "rank", "effective rank"]
        cells = [
            [c.path, list(c.shape), number(c.norm), f"{c.relative:.2%}", number(c.largest),
             "-" if c.rank is None else c.rank, "-" if c.effective_rank is None else f"{c.effective_rank:.2f}"]
            for c in self.changes.values()
        ]  # fmt: skip
        return header, cells

    def summary(self) -> str:
        """Return the lines below the table."""
        lines = [f"{len(self)} weights changed, {self.unchanged} did not."]
        return "\n".join([*lines, *(printable(f"{path!r}: {what}.") for path, what in self.mismatches.items())])

    def __repr__(self) -> str:
        return f"{format_table(*self.rows(), right=5)}\n{self.summary()}" if self else self.summary()


def diff(base: Any, tuned: Any, *, ranks: bool = True) -> Differences:
    """Compare two trees of parameters: which weights changed, by how much, and with which rank.

    A change of low rank is what a LoRA adapter can hold. It computes in float64 on this host, one weight after another.

    Args:
        base, tuned: trees of arrays, such as `params` and `lora.merge(params, adapters)`. Packed weights are unpacked.
        ranks: whether ranks are computed, which takes a singular value decomposition of each change: some seconds for
            a matrix of a few thousand rows and columns.

    Returns:
        `Differences`: `{path: WeightChange}` of what changed, and a table when printed.

    Raises:
        LoraError: a leaf is no array of numbers; it is traced, or only a shape; it is spread over several hosts.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> base = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3), "old": jnp.zeros(2)}
    >>> tuned = {"w": base["w"].at[0].add(0.5), "b": jnp.zeros(3), "new": jnp.zeros(2)}
    >>> print(lora.diff(base, tuned))
    weight  shape   norm of change  relative  largest  rank  effective rank
    ------  ------  --------------  --------  -------  ----  --------------
    w       [4, 3]           0.866    25.00%      0.5     1            1.00
    1 weights changed, 1 did not.
    'old': only in base.
    'new': only in tuned.
    """
    return compare(_leaves(base), _leaves(tuned), ranks=ranks)


def compare(base: Mapping[str, Any], tuned: Mapping[str, Any], *, ranks: bool = True) -> Differences:
    """Compare two mappings from paths to arrays, of which each is read once, as `diff` does."""
    changes: dict[str, WeightChange] = {}
    wrong: dict[str, str] = {}
    equal, known, shared = 0, dict.fromkeys(base), dict.fromkeys(tuned)  # asking a file for a name would read it
    for path in known:
        if path not in shared:
            wrong[path] = "only in base"
            continue
        one, other = base[path], tuned[path]
        if tuple(one.shape) != tuple(other.shape):
            wrong[path] = f"shape {list(one.shape)} in base and {list(other.shape)} in tuned"
            continue
        if one.dtype != other.dtype:
            wrong[path] = f"{one.dtype} in base and {other.dtype} in tuned"
        before, after = _numbers(one), _numbers(other)
        if np.array_equal(before, after, equal_nan=True):
            equal += 1
        else:
            changes[path] = _change(path, before, after, max(_rounding(one), _rounding(other)), ranks)
    return Differences(changes, equal, wrong | {path: "only in tuned" for path in shared if path not in known})


def _leaves(tree: Any) -> dict[str, Any]:
    names, leaves, _ = flatten_with_names(tree)
    for name, leaf in zip(names, leaves, strict=True):
        if not is_array(leaf) or isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise LoraError(
                f"diff compares trees of arrays, and {name!r} is a {type(leaf).__name__}: call it outside of jax.jit "
                "on parameters, such as diff(params, lora.merge(params, adapters))."
            )
    refuse_spread(tree)
    return dict(zip(names, leaves, strict=True))


def _numbers(leaf: Any) -> Array:
    """Return a weight as an array of float64 on this host."""
    leaf = unpacked(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # random keys
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _rounding(leaf: Any) -> float:
    """Return the largest error of rounding a number near 1 to an array's dtype."""
    return float(jnp.finfo(leaf.dtype).eps) / 2 if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0.0


def _change(path: str, before: Array, after: Array, rounding: float, ranks: bool) -> WeightChange:
    change, length = after - before, float(np.linalg.norm(before))
    norm, largest = float(np.linalg.norm(change)), float(np.abs(change).max())
    relative = norm / length if length else math.inf
    rank = effective = None
    if ranks and change.ndim > 1 and math.isfinite(norm):
        matrices = change.reshape(-1, *change.shape[-2:])
        values = singular_values(matrices)
        noise = rounding * _largest_norm(after.reshape(matrices.shape))
        floor = np.maximum(noise, values[:, 0] * max(change.shape[-2:]) * np.finfo(np.float64).eps)
        rank, effective = int((values > floor[:, None]).sum(-1).max()), effective_rank(values)
    return WeightChange(path, before.shape, norm, relative, largest, rank, effective)


def _largest_norm(sizes: Array) -> Array:
    """Return a bound of the norms of random matrices with entries of zero mean and of these sizes [n, d, k].

    It is about the largest length of a row and that of a column together (Bandeira and van Handel 2016, "Sharp
    nonasymptotic bounds on the norm of random matrices with independent entries").
    """
    return np.asarray(sum(np.linalg.norm(sizes, axis=axis).max(-1) for axis in (-1, -2)))
