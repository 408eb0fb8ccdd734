"""What devices send each other in a compiled program, array by array, and what it has in memory."""

import math
from collections import Counter
from collections.abc import Callable

import lora_jax as lora
from lora_jax.analysis import hlo
from lora_jax.analysis.hlo_costs import CALLS, collectives

Array = tuple[str, str, tuple[int, ...]]  # kind of collective, dtype, shape on one device


def arrays(report: lora.CompileReport) -> Counter[Array]:
    """Return how often each array is sent in one call, with loops counted."""
    count: Counter[Array] = Counter()
    for one in collectives(hlo.parse(report.text)):
        for dtype, shape, _ in hlo.arrays(one.results):
            count[one.kind, dtype, shape] += one.times
    return count


def of(sent: Counter[Array], fits: Callable[[str, str, tuple[int, ...]], bool]) -> Counter[Array]:
    """Return the arrays of which `fits(kind, dtype, shape)` is true."""
    return Counter({array: n for array, n in sent.items() if fits(*array)})


def numbers(sent: Counter[Array]) -> int:
    """Return how many numbers are sent."""
    return sum(n * math.prod(shape) for (_, _, shape), n in sent.items())


def in_memory(report: lora.CompileReport, dtype: str) -> list[int]:
    """Return the numbers of entries of all arrays of a dtype that a program has in memory, in falling order.

    What is inside of a fusion is not.
    """
    module = hlo.parse(report.text)
    names, todo = [], [module.entry]
    while todo:
        names.append(todo.pop())
        for one in module.computations.get(names[-1], ()):
            if one.operation != "fusion":
                todo += one.called("body", *CALLS)
    results = [one.results for name in names for one in module.computations.get(name, ())]
    found = {math.prod(shape) for result in results for own, shape, _ in hlo.arrays(result) if own == dtype}
    return sorted(found, reverse=True)
