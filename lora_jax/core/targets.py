"""Plans: which weights get an adapter, along which axes and by which rule."""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from lora_jax.core.adapter import Adapter, Rule
from lora_jax.core.axes import KernelAxes
from lora_jax.core.kinds import check_registered
from lora_jax.core.layout import of_weight
from lora_jax.core.plan_table import Row, format_plan


class Kept(NamedTuple):
    """Bytes of a product's x that a derivative keeps for the gradient of A, beside what the frozen model keeps."""

    inputs: int  # with `lora_apply(fn, keep="inputs")`
    thin: int  # with keep="thin"


NOTHING = Kept(0, 0)
MADE_WITHOUT_X = {"stack", "rank", "outputs"}  # axes of arrays of which the gradient takes x A or y alone


@dataclass(frozen=True)
class Use:
    """One product that a weight takes part in, along these axes of the weight as it is stored."""

    axes: KernelAxes
    rows: tuple[int, int]  # of x @ A and of h @ B, each time
    times: int  # that a call runs it
    stopped: bool  # no gradient passes the weight there
    where: str  # the operation and its source line
    is_matmul: bool = False  # no convolution, ragged product or lookup: a rule may stack any of its axes
    x: Kept | None = NOTHING  # each time; None inside a `jax.checkpoint` of the function, whose policy decides


@dataclass(frozen=True, repr=False)
class Target:
    """A weight that is to have an adapter."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: KernelAxes
    rule: Rule
    uses: tuple[Use, ...]
    materialized: tuple[str, ...] = ()  # where it is formed at full size

    def __repr__(self) -> str:
        return f"Target({self.path!r}, {list(self.shape)}, {self.axes}, {self.rule})"

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

    def kept(self, adapter: Adapter | None = None) -> Kept | None:
        """Return the bytes of x that one gradient of the planned batch keeps for this weight's adapter.

        What several weights read is counted for each, and kept once. Of x that the frozen model keeps too, or that the
        caller holds as an argument, nothing is kept for the adapter. Adapters that never train A keep no x.

        Args:
            adapter: as `abstract` returns it, if it is at hand.

        Returns:
            `Kept(inputs, thin)`, by `keep` of `lora_apply`; None if a `jax.checkpoint` of the function decides.
        """
        adapter = adapter or self.abstract()
        arrays = of_weight(adapter.arrays(), adapter.layout)
        trained = [name for name in arrays if name not in adapter.frozen]
        uses = [use for use in self.uses if not use.stopped]
        if all({*adapter.layout[name]} <= MADE_WITHOUT_X for name in trained) or not uses:
            return NOTHING
        found = [[use.times * n for n in use.x] for use in uses if use.x is not None]
        return Kept(*map(sum, zip(*found, strict=True))) if found else None

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


@dataclass(frozen=True, repr=False)
class Plan(Mapping[str, Target]):
    """`{path: Target}` in the parameters' own order; print it to see what will be trained and what it costs.

    Printed, the layers of a model are one row, `layers_*/q`, with their count; `table` has all rows.

    Attributes:
        targets: `{path: Target}` of the adapted weights, in the parameters' order.
        base_leaves: how many arrays the parameters have.
        base_parameters: how many numbers those are.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> params = {f"layer_{i}": jnp.ones((8, 8)) for i in range(3)}
    >>> def model(params, x):
    ...     for i in range(3):
    ...         x = jnp.tanh(x @ params[f"layer_{i}"])
    ...     return x
    >>> plan = lora.plan(model, params, jnp.ones((1, 8)), rules={".*": lora.Lora(rank=2)})
    >>> plan
    Plan(3 of 3 weights adapted, 96 parameters trained)
    >>> print(plan.table().splitlines()[2])
    layer_*  [8, 8]  inputs 0, outputs 1  Lora(rank=2)        3          96  384 B    192  0 B   0 B
    >>> plan.parameters, round(plan.fraction, 2)
    (96, 0.33)
    """

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
        return self.table()

    def __repr__(self) -> str:
        return f"Plan({len(self)} of {self.base_leaves} weights adapted, {self.parameters:,} parameters trained)"

    def table(self, grouped: bool = True, advice: bool = True) -> str:
        """Return what `print(plan)` shows.

        Args:
            grouped: whether weights that differ in the numbers of their layers alone, `layers_0/q`, `layers_1/q` and so
                on, are one row `layers_*/q` with their count and sums; False for a row for each weight.
            advice: whether to add what a program could ask for in another way: what `lora_apply` keeps for a gradient,
                and axes that could have factors of their own.
        """
        return format_plan(self._rows, self.base_leaves, self.base_parameters, grouped, advice)

    @property
    def parameters(self) -> int:
        """The number of parameters that are trained: all entries of the adapters' arrays, but for frozen arrays."""
        return sum(row.trained for row in self._rows)

    @property
    def fraction(self) -> float:
        """The share that the trained parameters have of all, those of the base included: between 0 and 1."""
        total = self.base_parameters + sum(row.parameters for row in self._rows)
        return self.parameters / total if total else 0.0

    @functools.cached_property
    def _rows(self) -> list[Row]:
        """What there is to say of each weight. Weights of one shape and rule have adapters of one size."""
        return [
            Row(target.path, target.shape, target.axes, str(target.rule), *_sizes(adapter), target.flops(),
                tuple(target.shared()), target.materialized, target.kept(adapter))
            for target, adapter in zip(self.targets.values(), abstract_adapters(self.targets).values(), strict=True)
        ]  # fmt: skip


def _sizes(adapter: Adapter) -> tuple[int, int, int]:
    """Return how many parameters an adapter has, how many of them are trained, and their bytes."""
    arrays = of_weight(adapter.arrays(), adapter.layout)
    counts = {name: math.prod(array.shape) for name, array in arrays.items()}
    nbytes = sum(counts[name] * array.dtype.itemsize for name, array in arrays.items())
    return sum(counts.values()), sum(n for name, n in counts.items() if name not in adapter.frozen), nbytes
