"""Rows: some rows of a table of embeddings, trained whole: those of new tokens, for example."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.arguments import check_dtype
from lora_jax.adapters.low_rank import LowRank
from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.arrays import accumulator
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import register_kind
from lora_jax.core.layout import Layout
from lora_jax.core.operand import Leaf, Operand
from lora_jax.core.products import Matmul, Product


@dataclass(frozen=True)
class Rows(Rule):
    """W'[i] = a trained row for each of these i, and W[i] for all others; the table may be the head as well.

    The rows start as W has them. In a program, lookups and the product of a head find the few changes by their indices:
    nothing of the table's size is formed.
    Weight decay draws them to zero, as it would the whole table's.

    Args:
        indices: of the rows, without repetition, such as the ids of new tokens.
        axis: of the table along which the rows are counted: 1 for a head [d, vocabulary].
        dtype: of the trained rows. fp32 by default, also on a bf16 table.

    Raises:
        LoraError: indices that are no whole numbers of at least 0, or repeat; another axis; a dtype that is not a
            floating one.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, ids = {"table": jnp.ones((6, 4))}, jnp.array([2, 5])
    >>> plan = lora.plan(lambda p, ids: p["table"][ids], params, ids, rules={"table": lora.Rows((4, 5))})
    >>> lora.init(jax.random.key(0), params, plan)["table"]
    RowsAdapter(values 2x4, indices (4, 5), size 6, axis 0)
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
    """The trained rows of one table.

    Attributes:
        values: the rows, fp32 [n, d], one for each of `indices`.
        axes: which axes of the table are inputs and outputs.
        indices: of the rows in the table.
        size: how many rows the table has.
        axis: of the table along which the rows are counted.
    """

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

    def lower(self, w: Any) -> "RowsOperand":
        at = np.array(self.indices)
        now = w[at] if self.axis == 0 else w[:, at].T
        slots = np.zeros(self.size, np.int32)
        slots[at] = np.arange(1, len(at) + 1)
        change = self.values - now.astype(self.values.dtype)
        return RowsOperand(jnp.asarray(slots), change, self.axes, self.axes.group(self.axis))

    def specs(self, spec: jax.P) -> "RowsAdapter":
        return self.replace_arrays(lambda *_: jax.P(None, spec[1 - self.axis]))

    def kernel_shape(self) -> tuple[int, ...]:
        if self.values.ndim != 2 or len(self.values) != len(self.indices):
            raise LoraError(f"has values of shape {list(self.values.shape)}, expected {len(self.indices)} rows.")
        d = self.values.shape[1]
        return (self.size, d) if self.axis == 0 else (d, self.size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowsOperand(Leaf):
    """The changes of some rows of a table, and which row of it has which."""

    slots: jax.Array  # i32 [*stack, *rows]: 1 and up, the number of the row's change; 0 for none
    change: jax.Array  # [*stack, n, *others]
    axes: KernelAxes = field(metadata={"static": True})
    side: str = field(metadata={"static": True})  # the group of axes that the rows are counted along

    @property
    def other(self) -> str:
        return "inputs" if self.side == "outputs" else "outputs"

    @property
    def layout(self) -> Mapping[str, Layout]:  # type: ignore[override]
        return {"slots": ("stack", self.side), "change": ("stack", "rank", self.other)}

    def merge(self, w: jax.Array) -> jax.Array:
        if _on_explicit_mesh(w):
            return self.to_lora().merge(w)
        order = (*self.axes.stack, *getattr(self.axes, self.side), *getattr(self.axes, self.other))
        delta = self._picked(self.change.astype(w.dtype), len(self.axes.stack))
        return w + delta.transpose([order.index(i) for i in range(w.ndim)])

    def apply(self, product: Product) -> jax.Array:
        """Return x @ W'. Of a head, each output of a changed row gets that row's product with x."""
        if self.side == "inputs" or type(product) is not Matmul or _on_explicit_mesh(product.y):
            return self.to_lora().apply(product)
        n, y = len(self.axes.stack), product.y
        h = product.contract(jnp.moveaxis(self.change, n, -1))  # [*stack, *T, n]
        delta = self._picked(jnp.moveaxis(h, -1, n), n)  # [*stack, *rows, *T]
        rows = self.slots.ndim - n
        delta = jnp.moveaxis(delta, range(n, n + rows), range(-rows, 0)).reshape(y.shape)
        wide = accumulator(y.dtype, delta.dtype)
        return (y.astype(wide) + delta.astype(wide)).astype(y.dtype)

    def _picked(self, changes: jax.Array, stack: int) -> jax.Array:
        """Return for each row the change with its number, zeros for none; changes are [*stack, n, ...]."""
        padded = jnp.pad(changes, [(int(i == stack), 0) for i in range(changes.ndim)])

        def pick(slots: jax.Array, changes: jax.Array) -> jax.Array:
            return changes[slots]

        for _ in range(stack):
            pick = jax.vmap(pick)
        return pick(self.slots, padded)

    def to_lora(self) -> LowRank:
        """Return it as LoRA with an A, or a B, of zeros and ones."""
        n = len(self.axes.stack)
        which = jax.nn.one_hot(self.slots - 1, self.change.shape[n], dtype=self.change.dtype)
        if self.side == "inputs":
            return LowRank(which, self.change, self.axes)
        return LowRank(jnp.moveaxis(self.change, n, -1), jnp.moveaxis(which, -1, n), self.axes)

    def transpose(self) -> "RowsOperand":
        return dataclasses.replace(self, axes=self.axes.transpose(), side=self.other)

    def scale_by(self, factor: jax.Array) -> "RowsOperand":
        return dataclasses.replace(self, change=self.change * factor.astype(self.change.dtype))

    def concatenate(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> Operand | None:
        return self.to_lora().concatenate([part and part.to_lora() for part in parts], sizes, axis)


def _on_explicit_mesh(array: jax.Array) -> bool:
    """Return whether an array's type says how it is sharded: then that of what is picked by indices is ambiguous."""
    return jax.sharding.AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types
