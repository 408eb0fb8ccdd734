"""Which axes of a weight a matrix product contracts, which it gives out, and which it runs in parallel."""

import math
from typing import NamedTuple


class KernelAxes(NamedTuple):
    """The axes of one weight W, as indices into its shape, each group ascending.

    Read off the program by `lora.plan`, and then by everything else: start, product, merge, sharding, export.

    >>> axes = KernelAxes(stack=(0,), inputs=(1,), outputs=(2, 3))      # scanned attention kernels
    >>> axes.sizes((6, 384, 12, 32))
    ((6,), (384,), (12, 32))
    """

    stack: tuple[int, ...]  # one matrix for each index: scanned layers, experts
    inputs: tuple[int, ...]  # contracted with x
    outputs: tuple[int, ...]  # left in y

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The sizes of the three groups of axes, for a weight of this shape."""
        stack, inputs, outputs = (tuple(shape[i] for i in group) for group in self)
        return stack, inputs, outputs

    def fans(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Number of matrices, inputs of each, outputs of each."""
        stack, inputs, outputs = (math.prod(sizes) for sizes in self.sizes(shape))
        return stack, inputs, outputs

    def transpose(self) -> "KernelAxes":
        """The axes of the same weight used the other way round, as in a tied head."""
        return KernelAxes(self.stack, self.outputs, self.inputs)

    def shape(self, stack: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[int, ...]:
        """The weight's shape from the sizes of its groups: the inverse of `sizes`."""
        sizes = dict(zip([*self.stack, *self.inputs, *self.outputs], [*stack, *inputs, *outputs], strict=True))
        return tuple(sizes[i] for i in range(len(sizes)))

    def from_canonical(self) -> tuple[int, ...]:
        """The permutation from `[*stack, *inputs, *outputs]` to the weight's own order of axes."""
        order = [*self.stack, *self.inputs, *self.outputs]
        return tuple(order.index(i) for i in range(len(order)))

    def __str__(self) -> str:
        named = zip(self._fields, self, strict=True)
        return ", ".join(f"{name} {' '.join(map(str, group))}" for name, group in named if group)
