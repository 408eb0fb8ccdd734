"""What is left above the floor on a CPU: the passes that adapters add to a training step, each timed alone.

The thin products are read off the compiled step of benchmarks/train_step.py: their shapes, which axes they contract,
how many there are, and the bytes that they read and write. Each is then run alone, several of a shape with arrays of
their own in one program, and so are the two whole steps, all in turn in one process. Times are those of the processor,
over all threads, and the least of the rounds: other programs of the machine count little. What the thin products do not
explain is elementwise: the sums y + h B and dx + dh A^T, AdamW, and the pages of memory for what is kept for them.

    python benchmarks/passes.py        # the list for docs/benchmarks.md
"""

import collections
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import train_step
import tyro
from jax import lax

from lora_jax.analysis import hlo
from lora_jax.core.text import format_table

FLOOR = "frozen floor"
COPIES = 6  # of a product in one program, which reads as many arrays as the step does: none stays in a cache


@dataclass(frozen=True)
class Config:
    """List the passes that adapters add to a training step."""

    rounds: int = 12  # how often each whole step is run, in turn with the others; thin products, four times as often
    adapted: str = "lora_jax"  # the program that is compared with the floor
    model: train_step.Config = field(default_factory=train_step.Config)


class Thin(NamedTuple):
    """A matrix product with an axis as short as the rank."""

    kind: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    axes: tuple[int, int]  # that are contracted

    def result(self) -> tuple[int, ...]:
        sides = zip((self.x, self.w), self.axes, strict=True)
        return tuple(n for shape, at in sides for n in shape[:at] + shape[at + 1 :])

    def flops(self) -> int:
        return 2 * math.prod(self.result()) * self.x[self.axes[0]]

    def bytes(self) -> int:
        return 4 * (math.prod(self.x) + math.prod(self.w) + math.prod(self.result()))


# Which products there are --------------------------------------------------------------------------------------------


def thin_products(module: hlo.Module, rank: int) -> dict[Thin, int]:
    """How often each thin product is in a compiled program. One that is fused is in a computation of its own."""
    found: dict[Thin, int] = collections.Counter()
    for name, lines in module.computations.items():
        for one in lines:
            shapes = [shape for operand in one.operands if (shape := shape_of(module, name, operand))]
            if one.operation == "dot" and all(len(shape) == 2 for shape in shapes):
                x, w = shapes
                axes = axis_of(one, "lhs"), axis_of(one, "rhs")
                operation = one.field(r'op_name="([^"]*)"') or ""
                if min(*x, *w) in (rank, 3 * rank):  # q, k and v have one product together
                    found[Thin(kind_of(operation, x[axes[0]], rank, Thin("", x, w, axes).result()), x, w, axes)] += 1
    return dict(found)


def shape_of(module: hlo.Module, computation: str, name: str) -> tuple[int, ...]:
    one = module.instruction(computation, name)
    return next((shape for _, shape, _ in hlo.arrays(one.results)), ()) if one else ()


def axis_of(one: hlo.Instruction, side: str) -> int:
    return int(one.field(side + r"_contracting_dims=\{(\d+)\}") or 0)


def kind_of(operation: str, length: int, rank: int, result: tuple[int, ...]) -> str:
    """Which of the six a product is: by the length of its sums, the shape of its result, and the derivative's name."""
    thin, backward = (rank, 3 * rank), "transpose(" in operation
    if length in thin:
        return "dh A^T, which dx is added to" if backward else "h B, which y is added to"
    if result[0] in thin:
        return "dA^T = dh^T x, or dB = h^T dy"
    return "dh = dy B^T" if backward else "h = x A"


# Measuring -----------------------------------------------------------------------------------------------------------


def alone(product: Thin) -> Callable[[], Any]:
    """Run the product, with the arrays of as many weights."""
    dims = (tuple((at,) for at in product.axes), ((), ()))
    pairs = [(jnp.full(product.x, i + 1.0), jnp.full(product.w, i + 2.0)) for i in range(COPIES)]
    run = jax.jit(lambda pairs: [lax.dot_general(x, w, dims) for x, w in pairs])  # type: ignore[arg-type]
    return lambda: jax.block_until_ready(run(pairs))


def prepare(name: str, s: train_step.Setting) -> tuple[Callable[[], Any], hlo.Module]:
    """The step, ready to run, and its compiled text."""
    program = train_step.PROGRAMS[name](s)
    step, state = train_step.make_step(program)
    compiled = step.lower(state, program.frozen, s.ids, s.labels).compile()

    def run() -> None:
        nonlocal state
        new, _ = jax.block_until_ready(compiled(state, program.frozen, s.ids, s.labels))
        state = new if program.updates else state

    text = compiled.as_text()
    assert text is not None
    return run, hlo.parse(text)


def least_times(runs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of the processor that each takes."""
    least = [math.inf] * len(runs)
    for run in runs:
        run()
    for i in range(rounds):
        for j in range(len(runs))[:: 1 if i % 2 else -1]:
            start = time.process_time()
            runs[j]()
            least[j] = min(least[j], 1e3 * (time.process_time() - start))
    return least


def main() -> None:
    c = tyro.cli(Config, description=__doc__)
    s = train_step.setting(c.model)
    (floor, _), (adapted, module) = prepare(FLOOR, s), prepare(c.adapted, s)
    counts = dict(sorted(thin_products(module, c.model.rank).items()))
    times = [t / COPIES for t in least_times([alone(product) for product in counts], 4 * c.rounds)]
    of_floor, of_adapted = least_times([floor, adapted], c.rounds)
    cells, explained = [], 0.0
    for (product, n), each in zip(counts.items(), times, strict=True):
        shapes = " x ".join(str(list(shape)) for shape in (product.x, product.w))
        size = [f"{n * product.flops() / 1e9:.2f}", f"{n * product.bytes() / 1e6:.0f}"]
        figures = [f"{each:.2f}", f"{n * each:.1f}", f"{n * each / of_floor:.3f}"]
        cells.append([product.kind, shapes, str(n), *size, *figures])
        explained += n * each
    more = of_adapted - of_floor
    for name, part in (("thin products", explained), ("the rest", more - explained), ("more than the floor", more)):
        cells.append([name, "", "", "", "", "", f"{part:.1f}", f"{part / of_floor:.3f}"])
    header = ["what adapters add", "of", "times", "GFLOP", "MB", "ms each", "ms", "of the floor"]
    print(format_table(header, cells, right=6))
    print(f"\nthe floor takes {of_floor:.0f} ms of the processor, {c.adapted} {of_adapted:.0f}")
    print(f"{train_step.machine()}, JAX {jax.__version__}, the least of {c.rounds} rounds")


if __name__ == "__main__":
    main()
