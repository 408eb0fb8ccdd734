"""An operand that changes nothing and takes notes: how a plan finds out what the program does with a weight."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

import jax

from lora_jax.core._compat import JaxprEqn, describe
from lora_jax.core.axes import KernelAxes
from lora_jax.core.operand import Leaf
from lora_jax.core.products import Matmul, Product
from lora_jax.core.targets import NOTHING, Kept, Use
from lora_jax.transform.adapted_weight import AdaptedWeight
from lora_jax.transform.remakes import Remakes

STATIC = {"static": True}


class Log:
    """Notes of what the program does with each weight, and of what it cannot do with it in factored form."""

    def __init__(self, remakes: Remakes | None = None) -> None:
        self.remakes = remakes
        self.uses: dict[str, list[Use]] = {}
        self.obstacles: dict[str, list[str]] = {}

    def obstacle(self, path: str, why: str) -> None:
        reasons = self.obstacles.setdefault(path, [])
        if why not in reasons:
            reasons.append(why)


@dataclass(frozen=True)
class Member:
    """One of the weights that a value is made of.

    `origin[i]` are the axes of the weight, as it is stored, that the value's axis i comes from.
    """

    path: str
    ndim: int
    origin: tuple[tuple[int, ...], ...]
    looked_up: tuple[int, ...] = ()  # axes that single rows were picked along

    def move(self, origin: Sequence[tuple[int, ...]]) -> "Member":
        return dataclasses.replace(self, origin=tuple(origin))

    def groups(self, axes: KernelAxes) -> KernelAxes | None:
        """Return the axes of a product as axes of the stored weight; None if they are not those of a matrix."""
        inputs, outputs = ({axis for i in group for axis in self.origin[i]} for group in (axes.inputs, axes.outputs))
        return None if not inputs or not outputs or inputs & outputs else self.matrix(inputs, outputs)

    def rows(self) -> KernelAxes | None:
        """Return the axes of a lookup, whose inputs are what single rows were picked along; None if there was none."""
        inputs = set(self.looked_up)
        outputs = {axis for group in self.origin for axis in group} - inputs
        return self.matrix(inputs, outputs) if inputs and outputs else None

    def matrix(self, inputs: set[int], outputs: set[int]) -> KernelAxes:
        stack = set(range(self.ndim)) - inputs - outputs
        return KernelAxes(tuple(sorted(stack)), tuple(sorted(inputs)), tuple(sorted(outputs)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Probe(Leaf):
    """Follow weights by data flow. There are no groups of axes yet: finding them is what a probe is for."""

    members: tuple[Member, ...] = field(metadata=STATIC)
    log: Log = field(metadata=STATIC)
    times: int = field(default=1, metadata=STATIC)
    stopped: bool = field(default=False, metadata=STATIC)
    eqn: Any = field(default=None, metadata=STATIC)  # the operation that multiplies by it
    axes: KernelAxes = field(default=KernelAxes((), (), ()), metadata=STATIC)

    layout = MappingProxyType({})
    shares_traces = False

    @classmethod
    def of(cls, path: str, ndim: int, log: Log) -> "Probe":
        return cls((Member(path, ndim, tuple((i,) for i in range(ndim))),), log)

    def merge(self, w: jax.Array) -> jax.Array:
        return w

    def apply(self, product: Product) -> jax.Array:
        for member in self.members:
            axes = member.groups(product.axes)
            assert axes is not None, "used_as has seen to it"
            x = self.log.remakes.kept(self.eqn, product.x) if self.log.remakes else NOTHING
            self._use(member, axes, product.rows(), describe(self.eqn), isinstance(product, Matmul), x)
        return product.y

    def used_as(self, axes: KernelAxes, eqn: JaxprEqn) -> "Probe | None":
        fits = all(member.groups(axes) for member in self.members)
        return dataclasses.replace(self, eqn=eqn) if fits else None

    def group(self, axis: int) -> str:
        return "unknown"

    def permute(self, permutation: tuple[int, ...]) -> Self:
        return self._move(lambda origin: [origin[i] for i in permutation])

    def replace_axes(self, first: int, count: int, n: int, fn: Callable[..., Any]) -> Self:
        def replaced(origin: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
            merged = tuple(sorted({axis for group in origin[first : first + count] for axis in group}))
            return [*origin[:first], *[merged] * n, *origin[first + count :]]

        return self._move(replaced)

    def rows(self, axis: int, n: int, fn: Callable[..., Any], stack: Sequence[int] = ()) -> Self:
        picked = [dataclasses.replace(m, looked_up=(*m.looked_up, *m.origin[axis])) for m in self.members]
        found = dataclasses.replace(self, members=tuple(picked))
        found = found._move(lambda origin: [() if i in stack else group for i, group in enumerate(origin)])
        return found._move(lambda origin: [*origin[:axis], *[()] * n, *origin[axis + 1 :]])

    def insert_axis(self, axis: int, name: str = "stack") -> Self:
        return self._move(lambda origin: [*origin[:axis], (), *origin[axis:]])

    def concatenate(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> "Probe":
        members = tuple(member for part in parts if part is not None for member in part.members)
        return dataclasses.replace(self, members=members)

    def scale_by(self, factor: jax.Array) -> "Probe":
        return self

    def transpose(self) -> "Probe":
        return self

    def repeat(self, times: int) -> Self:
        return dataclasses.replace(self, times=self.times * times)

    def stop(self) -> Self:
        return dataclasses.replace(self, stopped=True)

    def note(self, weight: AdaptedWeight, why: str) -> None:
        """Note that the program needs a plain array: a use, if these are rows that were looked up; else an obstacle."""
        rows = math.prod(n for i, n in enumerate(weight.shape) if not any(m.origin[i] for m in self.members))
        for member in self.members:
            if axes := member.rows():
                self._use(member, axes, (0, rows), why)
            else:
                self.log.obstacle(member.path, why)

    def _use(
        self,
        member: Member,
        axes: KernelAxes,
        rows: tuple[int, int],
        where: str,
        is_matmul: bool = False,
        x: Kept | None = NOTHING,
    ) -> None:
        use = Use(axes, rows, self.times, self.stopped, where, is_matmul, x)
        self.log.uses.setdefault(member.path, []).append(use)

    def _move(self, change: Callable[[Any], Sequence[tuple[int, ...]]]) -> Self:
        members = tuple(member.move(change(member.origin)) for member in self.members)
        return dataclasses.replace(self, members=members)


def probe(weight: AdaptedWeight, why: str) -> None:
    """Note what the fallback of an adapted weight is asked for; nothing is refused."""
    assert isinstance(weight.operand, Probe)
    weight.operand.note(weight, why)
