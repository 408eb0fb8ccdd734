"""Which axes of a weight are inputs, outputs and stacked matrices."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class KernelAxes(NamedTuple):
    """The axes of one weight W, as indices into its shape, each group ascending.

    Read off the program by `lora.plan`, and then by everything else: start, product, merge, sharding, export.

    Attributes:
        stack: axes with one matrix for each index: scanned layers, experts.
        inputs: axes that are contracted with x.
        outputs: axes that are left in y.

    >>> axes = KernelAxes(stack=(0,), inputs=(1,), outputs=(2, 3))      # scanned attention kernels
    >>> axes.sizes((6, 384, 12, 32))
    ((6,), (384,), (12, 32))
    """

    stack: tuple[int, ...]  # one matrix for each index: scanned layers, experts
    inputs: tuple[int, ...]  # contracted with x
    outputs: tuple[int, ...]  # left in y

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the sizes of the three groups of axes, for a weight of this shape.

        Args:
            shape: of the weight.
        """
        stack, inputs, outputs = (tuple(shape[i] for i in group) for group in self)
        return stack, inputs, outputs

    def fans(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the number of stacked matrices, and the inputs and outputs of each.

        Args:
            shape: of the weight.
        """
        stack, inputs, outputs = (math.prod(sizes) for sizes in self.sizes(shape))
        return stack, inputs, outputs

    def group(self, axis: int) -> str:
        """Return the name of the group that an axis is in.

        Args:
            axis: of the weight, counted from the first.
        """
        return next(name for name, group in zip(self._fields, self, strict=True) if axis in group)

    def transpose(self) -> "KernelAxes":
        """Return the axes of the same weight used the other way round, as in a tied head."""
        return KernelAxes(self.stack, self.outputs, self.inputs)

    def permute(self, permutation: tuple[int, ...]) -> "KernelAxes":
        """Return the same groups for the transposed weight.

        Args:
            permutation: for each axis of the transposed weight the axis that it was, as for `jnp.transpose`.

        >>> KernelAxes((0,), (1,), (2, 3)).permute((0, 3, 1, 2))
        KernelAxes(stack=(0,), inputs=(2,), outputs=(1, 3))
        """
        return KernelAxes(*(tuple(sorted(permutation.index(i) for i in group)) for group in self))

    def with_stack(self, axes: Iterable[int]) -> "KernelAxes":
        """Return the groups with these axes stacked, whichever group they were in.

        Args:
            axes: of the weight.

        >>> KernelAxes((), (1,), (0, 2)).with_stack([0])
        KernelAxes(stack=(0,), inputs=(1,), outputs=(2,))
        """
        stack = tuple(sorted({*self.stack, *axes}))
        inputs, outputs = (tuple(i for i in group if i not in stack) for group in (self.inputs, self.outputs))
        return KernelAxes(stack, inputs, outputs)

    def drop(self, axis: int) -> "KernelAxes":
        """Return the groups without one axis; later axes move up.

        Args:
            axis: of the weight, which is gone.
        """
        return KernelAxes(*(tuple(i - (i > axis) for i in group if i != axis) for group in self))

    def insert(self, axis: int, name: str) -> "KernelAxes":
        """Return the groups with a new axis; later axes move down.

        Args:
            axis: where the new one is, in the new weight.
            name: of its group: "stack", "inputs" or "outputs".
        """
        moved = {n: [i + (i >= axis) for i in g] for n, g in self._asdict().items()}
        return KernelAxes(**{n: tuple(sorted([*g, axis] if n == name else g)) for n, g in moved.items()})

    def without_units(self, shape: tuple[int, ...]) -> "KernelAxes":
        """Return the groups without the axes of size 1, which may belong to any of them.

        Args:
            shape: of the weight.
        """
        return KernelAxes(*(tuple(i for i in group if shape[i] != 1) for group in self))

    def from_canonical(self) -> tuple[int, ...]:
        """Return the permutation from `[*stack, *inputs, *outputs]` to the weight's own order of axes."""
        order = [*self.stack, *self.inputs, *self.outputs]
        return tuple(order.index(i) for i in range(len(order)))

    def __str__(self) -> str:
        named = zip(self._fields, self, strict=True)
        return ", ".join(f"{name} {' '.join(map(str, group))}" for name, group in named if group)
