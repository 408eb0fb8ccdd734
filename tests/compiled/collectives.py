"""What devices send each other in a compiled program: each array, in which dtype, and how often."""

from collections import Counter
from collections.abc import Iterator

import lora_jax as lora
from lora_jax.analysis import hlo
from lora_jax.analysis.hlo_costs import CALLS, KINDS

Array = tuple[str, str, tuple[int, ...]]  # kind of collective, dtype, shape on one device


def arrays(report: lora.CompileReport) -> Counter[Array]:
    """Return how often each array is sent in one call, with loops counted.

    A collective that runs beside computation stands in several fusions under one channel, and sends once.
    """
    module = hlo.parse(report.text)
    found: dict[str, tuple[int, tuple[Array, ...]]] = {}
    for one, times, where in _walk(module, module.entry, 1):
        kind = one.operation.removesuffix("-start")
        if kind in KINDS:
            sent = tuple((kind, dtype, shape) for dtype, shape, _ in hlo.arrays(one.results))
            if one.operation.endswith("-start") and kind != "all-reduce":
                sent = sent[: len(sent) // 2]  # operands and results stand in one type
            channel = one.field(r"channel_id=(\d+)") or f"{where}/{one.name}"
            found[channel] = max((times, sent), found.get(channel, (0, ())))
    count: Counter[Array] = Counter()
    for times, sent in found.values():
        for array in sent:
            count[array] += times
    return count


def _walk(module: hlo.Module, name: str, times: int) -> Iterator[tuple[hlo.Instruction, int, str]]:
    for one in module.computations.get(name, ()):
        yield one, times, name
        turns = (module.trips(one) or 1) if one.operation == "while" else 1
        for inner in one.called("body", *CALLS):
            yield from _walk(module, inner, times * turns)
