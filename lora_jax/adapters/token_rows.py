"""Rows: some rows of a table of embeddings, trained whole: those of new tokens, for example."""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.arguments import check_dtype
from lora_jax.adapters.low_rank import LowRank
from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import register_kind


@dataclass(frozen=True)
class Rows(Rule):
    """W'[i] = a trained row for each of these i, and W[i] for all others; the table may be the head as well.

    The rows start as W has them. In a program it is LoRA with a fixed A of zeros and ones, so the table is not copied.
    Weight decay draws them to zero, as it would the whole table's.

    Args:
        indices: of the rows, without repetition, such as the ids of new tokens.
        axis: of the table along which the rows are counted: 1 for a head [d, vocabulary].
        dtype: of the trained rows. fp32 by default, also on a bf16 table.

    Raises:
        LoraError: indices that are no whole numbers of at least 0, or repeat; another axis; a dtype that is not a
            floating one.
    """

    indices: tuple[int, ...]
    axis: int = 0
    dtype: Any = jnp.float32

    reads_weight = True

    def __post_init__(self) -> None:
        check_dtype("Rows", self.dtype)
        try:
            indices = tuple(int(i) for i in self.indices)
            whole = indices == tuple(self.indices) and all(i >= 0 for i in indices)
        except (TypeError, ValueError):
            whole = False
        if not whole or not indices or len(set(indices)) < len(indices):
            raise LoraError(f"Rows({self.indices!r}): give different whole numbers of at least 0, such as (5, 7).")
        if self.axis not in (0, 1):
            raise LoraError(f"Rows(axis={self.axis!r}): the rows of a table are along its axis 0 or 1.")
        object.__setattr__(self, "indices", indices)

    def __str__(self) -> str:
        few = ", ".join(map(str, self.indices[:4])) + (", ..." if len(self.indices) > 4 else "")
        return f"Rows([{few}])" if self.axis == 0 else f"Rows([{few}], axis=1)"

    def problem(self, shape: tuple[int, ...], axes: KernelAxes) -> str | None:
        if len(shape) != 2 or axes.stack:
            return "Rows is for a table of two axes"
        if (last := max(self.indices)) >= shape[self.axis]:
            return f"Rows has the index {last}, and the table has {shape[self.axis]} rows along axis {self.axis}"
        return None

    def init(self, key: jax.Array, w: Any, axes: KernelAxes) -> "RowsAdapter":
        rows = jnp.moveaxis(w, self.axis, 0)[np.array(self.indices)].astype(self.dtype)
        return RowsAdapter(rows, axes, self.indices, w.shape[self.axis], self.axis)

    def flops(self, shape: tuple[int, ...], axes: KernelAxes, rows: tuple[int, int]) -> int:
        return 2 * len(self.indices) * sum(n * size for n, size in zip(rows, axes.fans(shape)[1:], strict=True))


@register_kind("rows")
@dataclass(frozen=True)
class RowsAdapter(Adapter):
    """The trained rows of one table."""

    values: jax.Array  # [n, d]
    axes: KernelAxes = field(metadata={"static": True})
    indices: tuple[int, ...] = field(metadata={"static": True})
    size: int = field(metadata={"static": True})  # how many rows the table has
    axis: int = field(default=0, metadata={"static": True})

    reads_weight = True
    layout = MappingProxyType({"values": ("rank", "row")})

    def merge(self, w: jax.Array) -> jax.Array:
        at = np.array(self.indices)
        rows = self.values.astype(w.dtype)
        return w.at[at].set(rows) if self.axis == 0 else w.at[:, at].set(rows.T)

    def lower(self, w: Any) -> LowRank:
        now = jnp.moveaxis(w, self.axis, 0)[np.array(self.indices)]
        change = self.values - now.astype(self.values.dtype)  # [n, d]
        which = jax.nn.one_hot(np.array(self.indices), self.size, dtype=change.dtype)  # [n, size]
        if self.axes.inputs == (self.axis,):
            return LowRank(which.T, change, self.axes)
        return LowRank(change.T, which, self.axes)

    def specs(self, spec: jax.P) -> "RowsAdapter":
        return self.replace_arrays(lambda *_: jax.P(None, spec[1 - self.axis]))

    def kernel_shape(self) -> tuple[int, ...]:
        if self.values.ndim != 2 or len(self.values) != len(self.indices):
            raise LoraError(f"has values of shape {list(self.values.shape)}, expected {len(self.indices)} rows.")
        d = self.values.shape[1]
        return (self.size, d) if self.axis == 0 else (d, self.size)
