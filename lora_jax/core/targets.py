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
    is_matmul: bool = False  # no convolution, ragged product or lookup: a rule may stack any of its axes


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
        return sum(use.times * self.rule.flops(self.shape, self.axes, self._rows(use)) for use in self.uses)

    def _rows(self, use: Use) -> tuple[int, int]:
        """Return the rows of a use over all matrices of the target, which may be more than the program knows of."""
        more = math.prod(self.shape[axis] for axis in self.axes.stack if axis not in use.axes.stack)
        return use.rows[0] * more, use.rows[1] * more

    def shared(self) -> list[str]:
        """Say in words what several axes have in common, which a rule could give to each index along one of them."""
        if not any(use.is_matmul for use in self.uses) and not self.materialized:
            return []
        groups = [(name, getattr(self.axes, group)) for group, name in self.rule.shares.items()]
        return [f"axes {' and '.join(map(str, group))} share one {name}" for name, group in groups if len(group) > 1]


def abstract_adapters(targets: Mapping[str, Target]) -> dict[str, Adapter]:
    """Return the adapter of each target with shapes in the place of arrays, traced once for all targets alike."""
    made: dict[Any, Adapter] = {}
    found = {}
    for path, target in targets.items():
        alike = target.shape, target.dtype, target.axes, id(target.rule)
        if alike not in made:
            made[alike] = target.abstract()
        found[path] = made[alike]
    return found


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
            adapter = target.abstract()
            arrays = jax.tree.leaves(adapter)
            n = sum(math.prod(array.shape) for name, array in adapter.arrays().items() if name not in adapter.frozen)
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
        return "\n".join([table, summary, *self._shared(), *formed])

    def _shared(self) -> list[str]:
        """Return lines that say which axes share a factor, one for all weights of a shape that do so in one way."""
        alike: dict[tuple[Any, ...], list[str]] = {}
        for target in self.targets.values():
            for words in target.shared():
                alike.setdefault((target.shape, words), []).append(target.path)
        lines = []
        for (shape, words), paths in alike.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"{paths[0]!r}{more} {list(shape)}: {words}.")
        advice = "Where each index along an axis is a matrix of its own (experts, members), name that axis: stack=0."
        return [*lines, advice] if lines else []
