"""Plans: which weights get an adapter, along which axes and by which rule."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import check_registered
from lora_jax.core.text import count, format_table, size


@dataclass(frozen=True)
class Use:
    """One product that a weight takes part in, along these axes of the weight as it is stored."""

    axes: KernelAxes
    rows: tuple[int, int]  # of x @ A and of h @ B, each time
    times: int  # that a call runs it
    stopped: bool  # no gradient passes the weight there
    where: str  # the operation and its source line


@dataclass(frozen=True)
class Target:
    """A weight that is to have an adapter."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: KernelAxes
    rule: Rule
    uses: tuple[Use, ...]
    materialized: tuple[str, ...] = ()  # where it is formed at full size

    def abstract(self) -> Adapter:
        """Return the adapter with shapes in the place of arrays."""
        weight = jax.ShapeDtypeStruct(self.shape, self.dtype)

        def init(key: jax.Array, w: Any) -> Adapter:
            adapter = self.rule.init(key, w, self.axes)
            check_registered(adapter)
            return adapter

        return jax.eval_shape(init, jax.random.key(0), weight)

    def flops(self) -> int:
        """Return the FLOPs that the adapter adds to a forward pass of the planned batch, a third of a gradient's."""
        return sum(use.times * self.rule.flops(self.shape, self.axes, use.rows) for use in self.uses)


@dataclass(frozen=True)
class Plan(Mapping[str, Target]):
    """`{path: Target}` in the parameters' own order; print it to see what will be trained and what it costs."""

    targets: dict[str, Target]
    base_leaves: int
    base_parameters: int

    def __getitem__(self, path: str) -> Target:
        return self.targets[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __str__(self) -> str:
        rows, parameters, memory = [], 0, 0
        for target in self.targets.values():
            arrays = jax.tree.leaves(target.abstract())
            n = sum(math.prod(a.shape) for a in arrays)
            nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
            parameters, memory = parameters + n, memory + nbytes
            rows.append(
                [
                    target.path,
                    list(target.shape),
                    target.axes,
                    target.rule,
                    f"{n:,}",
                    size(nbytes),
                    count(target.flops()),
                ]
            )
        share = parameters / (self.base_parameters + parameters)
        table = format_table(["path", "shape", "axes", "rule", "parameters", "bytes", "FLOPs"], rows, right=3)
        formed = [f"{t.path!r} is formed at full size: {why}" for t in self.targets.values() for why in t.materialized]
        summary = (
            f"{len(self)} of {self.base_leaves} weights adapted: {parameters:,} parameters beside "
            f"{self.base_parameters:,} ({share:.2%}), {size(memory)}. FLOPs are those added to one forward pass."
        )
        return "\n".join([table, summary, *formed])
