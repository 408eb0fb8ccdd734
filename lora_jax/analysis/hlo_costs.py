"""What a compiled program costs: the compiler's own estimates of cycles, and the bytes that devices send.

Loops count as often as they run. Only the compiler for TPUs estimates cycles, of fusions and copies, and not of
collectives or of kernels written by hand.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from lora_jax.analysis.hlo import Instruction, Module, arrays, nbytes, parse

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
CALLS = ("to_apply", "calls", "called_computations", "branch_computations", "true_computation", "false_computation")
FUSED = "fused:"  # marks what is inside of a fusion, whose name follows
BEGUN = f"{FUSED}async-collective-start"  # as the compiler for TPUs calls a fusion that begins a collective
NO_ESTIMATE = 1 << 60  # the compiler writes the largest number where it has none
FORWARD, AGAIN, BACKWARD, OTHER = "forward", "forward again (remat)", "backward", "optimizer and the rest"
WHOLE = "the program"  # which takes no derivative


@dataclass(frozen=True)
class Costs:
    """What one call of a program costs on one device.

    Attributes:
        cycles: by part of the program; empty where the compiler estimates none.
        sent: bytes of the results of collectives, by kind.
        launches: how often collectives run, by kind.
        unknown: how many fusions and kernels without an estimate of cycles run, by name and how often.
        unknown_loops: loops whose number of turns the text does not say; they count once.
    """

    cycles: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    unknown_loops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: as of `KINDS`; what slices send each other has kinds of its own.
        results: the dtypes and shapes that one device gets.
        times: how often it runs in one call.
        depth: loops that it is in.
    """

    kind: str
    results: str
    times: int
    depth: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for _, shape, _ in arrays(self.results))

    @property
    def nbytes(self) -> int:
        """Bytes that one device gets each time."""
        return nbytes(self.results)


def costs(text: str) -> Costs:
    """Add up a compiled program, `jitted.lower(...).compile().as_text()`."""
    module = parse(text)
    cycles: dict[str, int] = {}
    unknown: dict[str, int] = {}
    loops: list[str] = []
    for one, times, path, _ in _walk(module, module.entry, 1, "", loops):
        if path.startswith(FUSED) or _kind(one):
            continue
        if (estimate := _estimate(one)) is not None:
            part = part_of(one)
            cycles[part] = cycles.get(part, 0) + times * estimate
        elif _has_no_estimate(one):
            unknown[one.name] = unknown.get(one.name, 0) + times
    sent: dict[str, int] = {}
    launches: dict[str, int] = {}
    for collective in collectives(module):
        kind, times = collective.kind, collective.times
        sent[kind] = sent.get(kind, 0) + times * collective.nbytes
        launches[kind] = launches.get(kind, 0) + times
    order = [part for part in (FORWARD, AGAIN, BACKWARD, OTHER) if part in cycles]
    if order == [OTHER]:
        return Costs({WHOLE: cycles[OTHER]}, sent, launches, unknown, tuple(dict.fromkeys(loops)))
    return Costs({part: cycles[part] for part in order}, sent, launches, unknown, tuple(dict.fromkeys(loops)))


def collectives(module: Module) -> list[Collective]:
    """Return what devices send each other.

    On TPUs one that runs beside computation stands in several fusions, under one channel, and sends once. Elsewhere a
    channel says little: all that `shard_map` makes have the same.
    """
    found: dict[str, list[tuple[str, Collective]]] = {}
    for one, times, path, depth in _walk(module, module.entry, 1, "", []):
        if kind := _kind(one):
            channel = one.field(r"channel_id=(\d+)")
            where = "" if channel and path.startswith(FUSED) else f"{path} {one.operands}"
            found.setdefault(f"{kind} {channel} {where}", []).append(
                (path, Collective(kind, _received(one), times, depth))
            )
    return [_as_one(places) for places in found.values()]


def _as_one(places: Sequence[tuple[str, Collective]]) -> Collective:
    """Return a collective that stands in several places.

    It sends as often as it is begun. What it runs beside may be the turns of an inner loop, and does not send it again.
    """
    begun = [one for path, one in places if path.startswith(BEGUN)]
    if begun:
        return replace(begun[0], times=sum(one.times for one in begun))
    return max((one for _, one in places), key=lambda one: one.times)


def _kind(one: Instruction) -> str | None:
    """Return the kind of a collective; None of any other instruction.

    What goes over the data centre's network is, in the program of one slice, sent to a host and received from it.
    """
    if one.operation == "recv" and (kind := one.field(r'_xla_megascale_transfer_type="(\w+)"')):
        kind = "collective-permute" if kind == "ONE_TO_ONE" else kind.lower().replace("_", "-")
        return f"{kind} between slices"
    kind = one.operation.removesuffix("-start")
    return kind if kind in KINDS else None


def _received(one: Instruction) -> str:
    """Return the type of what one device gets.

    What is only begun has (operands, results, ...), or of an all-reduce the results; what is received (results, ...).
    """
    if one.operation in KINDS or not one.results.startswith("("):
        return one.results
    depth, parts = 0, [""]
    for character in one.results[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if one.operation == "all-reduce-start" and not parts[0].startswith("("):
        return one.results
    return parts[0 if one.operation == "recv" else 1]


def _walk(
    module: Module, name: str, times: int, fusion: str, loops: list[str], depth: int = 0
) -> Iterator[tuple[Instruction, int, str, int]]:
    """Yield each instruction that runs, how often, where (a fusion's inside has its name), and in how many loops."""
    for one in module.computations.get(name, ()):
        yield one, times, f"{FUSED}{fusion}" if fusion else name, depth
        if one.operation == "while":
            turns = module.trips(one)
            if turns is None:
                loops.append(one.name)
            for body in one.called("body"):
                yield from _walk(module, body, times * (turns or 1), fusion, loops, depth + 1)
        elif one.operation in ("fusion", "call", "conditional", "async-start", "call-start", "custom-call"):
            for inner in one.called(*CALLS):
                outer = fusion or (one.name if one.operation == "fusion" else "")
                yield from _walk(module, inner, times, outer, loops, depth)


def _estimate(one: Instruction) -> int | None:
    found = one.field(r'"estimated_cycles":"(\d+)"')
    return int(found) if found and int(found) < NO_ESTIMATE else None


def _has_no_estimate(one: Instruction) -> bool:
    is_kernel = one.operation == "custom-call" and "tpu_custom_call" in one.rest
    return is_kernel or '"estimated_cycles"' in one.rest


def part_of(one: Instruction) -> str:
    """Return the part of a training step that an instruction belongs to, by the names that JAX's transforms leave.

    A fusion has the name of one of the operations in it: adapters' thin products are fused with others, and have no
    part of their own.
    """
    name = one.field(r'op_name="([^"]*)"') or ""
    if "rematted_computation" in name:
        return AGAIN
    if re.search(r"transpose\(", name) and "jvp(" in name:
        return BACKWARD
    return FORWARD if "jvp(" in name else OTHER
