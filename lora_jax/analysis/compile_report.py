"""`compile_report`: what a program takes on a machine that is not there, by that machine's own compiler."""

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax

from lora_jax.analysis.abstract_arguments import argument_bytes, check_arguments
from lora_jax.analysis.failures import compiled_at, first_line, traced_at
from lora_jax.analysis.hlo_costs import Costs, costs
from lora_jax.analysis.topologies import NO_KERNEL, WITHOUT_TRITON, Topology, find_topology
from lora_jax.core.argument_checks import check_function
from lora_jax.core.errors import LoraError
from lora_jax.core.text import count, format_table

CALL = "compile_report(step, *args, topology=...)"
TEMPORARY = "temporary (activations)"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
ADVICE = {
    "base": "The frozen base is the largest part: split it over more devices (an fsdp axis), pack it in 4 bits, "
    "jax.eval_shape(lambda p: lora.bases.quantize(p, rules), params) with lora.bases.Nf4(), or keep its layers in the "
    "memory of the host, lora.bases.to_host(params, patterns).",
    "adapters": "The adapters are the largest part: lower the rank, adapt fewer weights, or split them as the base is, "
    'lora.adapter_shardings(..., policy="inherit"), here lora.abstract_state(..., policy="inherit").',
    "optimizer": "The optimizer's state is the largest part: lower the rank, keep moments in bf16, or split it and the "
    'adapters as the base is, lora.adapter_shardings(..., policy="inherit"), here lora.abstract_state(..., '
    'policy="inherit").',
    "other arguments": "Other arguments are the largest part: split the batch over more devices, or make it smaller.",
    "outputs": "Outputs are the largest part: return the loss and not logits, and let the step donate its state.",
}


@dataclass(frozen=True)
class CompileReport:
    """What a compiled program takes on one device; its text is a table.

    Attributes:
        topology: the machine, in words.
        devices: how many.
        hbm: bytes of one device's memory.
        needed: bytes that the program needs of it: all parts, without what outputs share with donated arguments.
        fits: whether it has them.
        parts: bytes of one device by part: base, adapters, optimizer, other arguments, outputs (those that take memory
            of their own), temporary (activations and copies), program. The padding that the compiler adds to arguments
            is a part too. Of a program that does not fit, the compiler says no more than `needed`; `temporary` is then
            what is left.
        host: bytes in the memory of the host, for one device: arguments (as of `lora.bases.to_host`), outputs, and
            temporary memory (activations that a policy of `jax.checkpoint` offloads). They are not in `needed`. Of a
            program that does not fit, the compiler does not say.
        sent: bytes that one device gets in collectives in one call, by kind, with loops counted.
        launches: how often collectives of a kind run.
        cycles: the compiler's own estimates in one call, by part of the program, with loops counted; without
            collectives and kernels written by hand. Empty for GPUs, whose compiler says none.
        unknown: fusions and kernels without an estimate, and how often each runs.
        unknown_loops: loops of which the compiler does not say how often they run; one turn of them is counted.
        advice: what to change first, or to look after.
        said: the compiler's message, if the program does not fit.
        text: the compiled program; empty if it does not fit.
    """

    topology: str
    devices: int
    hbm: int
    needed: int
    fits: bool
    parts: dict[str, int]
    host: dict[str, int]
    sent: dict[str, int]
    launches: dict[str, int]
    cycles: dict[str, int]
    unknown: dict[str, int]
    unknown_loops: tuple[str, ...]
    advice: tuple[str, ...]
    said: str
    text: str

    def __str__(self) -> str:
        rows: list[list[Any]] = [[name, gib(n), f"{n / self.hbm:.1%}"] for name, n in self.parts.items() if n]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        rows.append([f"together, of {gib(self.hbm)}: {verdict}", gib(self.needed), f"{self.needed / self.hbm:.1%}"])
        tables = [f"{self.topology}, on one device:", format_table(["memory", "GiB", "of HBM"], rows, right=2)]
        if on_host := [[name, gib(n)] for name, n in self.host.items() if n]:
            tables.append(format_table(["on the host", "GiB"], on_host, right=1))
        if self.sent:
            sent = [[kind, f"{self.launches[kind]:,}", f"{n / 1e6:,.1f}"] for kind, n in self.sent.items()]
            tables.append(format_table(["sent in one call", "times", "MB"], sent, right=2))
        if self.cycles:
            total = sum(self.cycles.values())
            cycles = [[part, count(n), f"{n / total:.1%}"] for part, n in self.cycles.items()]
            cycles.append(["together", count(total), ""])
            tables.append(format_table(["estimated cycles", "", ""], cycles, right=2))
        if self.unknown:
            tables.append(f"Without an estimate, and not in these sums: {_some(self.unknown)}.")
        if self.unknown_loops:
            tables.append(f"Loops of unknown length, of which one turn is counted: {_some(self.unknown_loops)}.")
        return "\n\n".join([*tables, *self.advice])

    def __repr__(self) -> str:
        return str(self)


def compile_report(step: Any, *args: Any, topology: str, slices: int = 1, **static: Any) -> CompileReport:
    """Compile a program for a machine that is not there, and return what it takes: will it fit, and what does it send?

    The compilers are the machines' own (libtpu's, the CUDA plugin's), so that what they say of memory and collectives
    is what will run. A step over a whole pod takes from some seconds to minutes; a scan over layers helps.

    Args:
        step: `lora.jit_step(...)`, or any function, jitted or not.
        args: `jax.ShapeDtypeStruct`s with shardings on `lora.topology_mesh(topology, ...)`: `lora.abstract` makes them
            of any tree, `lora.abstract_state` those of a training state. A `TrainState` is known by its parts; adapters
            are where they are; the largest of the other trees is the base. Scalars may be numbers.
        topology: the machine, as for `lora.topology_mesh`.
        slices: how many slices of TPUs.
        static: keyword arguments that `step` takes beside. Those without arrays are static, if it is not jitted.

    Returns:
        `CompileReport`, with a table when printed. A program that needs more memory than there is has one too.

    Raises:
        LoraError: there is no such topology, or its compiler is not installed; an argument has no sharding, is on
            another mesh or on real devices; the program does not compile.

    >>> import lora_jax as lora
    >>> mesh = lora.topology_mesh("v5e:4x4", fsdp=16)  # doctest: +SKIP
    >>> x = lora.abstract(jnp.ones((4096, 4096)), mesh, jax.P("fsdp"))  # doctest: +SKIP
    >>> print(lora.compile_report(jnp.dot, x, x, topology="v5e:4x4"))  # doctest: +SKIP
    """
    check_function(CALL, "step", step)
    machine = find_topology(topology, slices)
    arrays = (*args, *(tree for tree in static.values() if _has_arrays(tree)))
    check_arguments(arrays, machine)
    return report_on(machine, argument_bytes(arrays), compiled_for(machine, lowered(step, *args, **static)))


@dataclass(frozen=True)
class Compiled:
    """What a compiler says of a program: its text, and bytes on one device. Of one that does not fit, `needed`."""

    text: str = ""
    arguments: int = 0
    outputs: int = 0  # that have memory of their own
    temporary: int = 0
    program: int = 0
    needed: int = 0
    said: str = ""
    host: dict[str, int] = field(default_factory=dict)  # bytes in the memory of the host


def compiled_for(machine: Topology, program: Any) -> Compiled:
    """Compile a lowered program.

    Raises:
        LoraError: it does not compile, for another reason than that it is too large.
    """
    try:
        compiled = _compiled(machine, program)
    except Exception as error:
        if (needed := _needed(str(error))) is None:
            said = f"{first_line(error)}{compiled_at(str(error), program)}"
            raise LoraError(f"the program does not compile for {machine}: {said}") from error
        return Compiled(needed=needed, said=str(error))
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    program = memory.generated_code_size_in_bytes
    needed = arguments + outputs + temporary + program
    host = {
        "arguments": memory.host_argument_size_in_bytes,
        "outputs": memory.host_output_size_in_bytes,
        TEMPORARY: memory.host_temp_size_in_bytes,
    }
    return Compiled(compiled.as_text(), arguments, outputs, temporary, program, needed, host=host)


def _compiled(machine: Topology, program: Any) -> Any:
    """Compile a lowered program, the other way where no Triton kernel is known for one of its products.

    On a GPU autotuning would find one, or leave the product to cuBLAS.
    """
    try:
        return program.compile(compiler_options=machine.options or None)
    except Exception as error:
        if NO_KERNEL not in str(error):
            raise
    return program.compile(compiler_options=machine.options | WITHOUT_TRITON)


def lowered(step: Any, *args: Any, **static: Any) -> Any:
    """Lower a function, jitted or not, for the mesh that its arguments are on.

    Raises:
        LoraError: it cannot be traced for them.
    """
    names = [name for name, value in static.items() if not _has_arrays(value)]
    lower = getattr(step, "lower", None) or jax.jit(step, static_argnames=names).lower
    try:
        with _on_its_device(args):
            return lower(*args, **static)
    except LoraError:
        raise
    except Exception as error:
        said = f"{first_line(error)}{traced_at(error)}"
        if "AbstractDevice" in said:  # a kernel asks for a GPU, and outside of a shard_map it is told of none
            said += ". Kernels in a program over several devices go into jax.shard_map"
        raise LoraError(f"{CALL}: the program cannot be traced for these arguments: {said}") from error


def _has_arrays(tree: Any) -> bool:
    return any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(tree))


def _on_its_device(args: Any) -> Any:
    """Tell kernels what device they are for, in a program for one device; over several, `shard_map` does."""
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(args) if getattr(leaf, "sharding", None) is not None]
    if not meshes or meshes[0].size > 1 or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(meshes[0].abstract_mesh)


def report_on(machine: Topology, arguments: dict[str, int], compiled: Compiled) -> CompileReport:
    """Return the report on a compiled program with these bytes of arguments by part."""
    own = sum(arguments.values())
    needed = compiled.needed
    if compiled.said:
        found, parts = Costs(), arguments | {TEMPORARY: max(0, needed - own)}
    else:
        found = costs(compiled.text)
        parts = arguments | {
            "padding of arguments": max(0, compiled.arguments - own),
            "outputs": compiled.outputs,
            TEMPORARY: compiled.temporary,
            "program": compiled.program,
        }
    fits = not compiled.said and needed <= machine.hbm
    return CompileReport(
        topology=str(machine),
        devices=len(machine.devices),
        hbm=machine.hbm,
        needed=needed,
        fits=fits,
        parts=parts,
        host=compiled.host,
        sent=found.sent,
        launches=found.launches,
        cycles=found.cycles,
        unknown=found.unknown,
        unknown_loops=found.unknown_loops,
        advice=_reserved(needed, machine) if fits else advice(parts, machine.hbm),
        said=compiled.said,
        text=compiled.text,
    )


def advice(parts: dict[str, int], hbm: int) -> tuple[str, ...]:
    """Return what to change first, from the largest part on, until what is left would fit."""
    found: list[str] = []
    left = sum(parts.values())
    for name, n in sorted(parts.items(), key=lambda item: -item[1]):
        if left <= hbm:
            break
        left -= n
        if name == TEMPORARY:
            found.append(
                f"Temporary memory ({gib(n)} GiB) is mostly activations: recompute them in the backward pass "
                "(jax.checkpoint around the body of the scan over layers), lora.jit_step(..., microbatches=4), fewer "
                "tokens a device, or a loss that does not keep all logits."
            )
        elif name in ADVICE:
            found.append(ADVICE[name])
    return tuple(found)


def _reserved(needed: int, machine: Topology) -> tuple[str, ...]:
    """Return what to set for a program that fits a device, but not the part of its memory that JAX takes by default."""
    if needed <= machine.share * machine.hbm:
        return ()
    return (
        f"JAX takes {machine.share:.0%} of this memory unless it is told otherwise: set "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment of the run.",
    )


def _some(names: Iterable[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def gib(n: int) -> str:
    """Format bytes in GiB."""
    return f"{n / 2**30:.3f}" if n < 2**30 else f"{n / 2**30:.2f}"


def _needed(said: str) -> int | None:
    """Return the bytes that a compiler says a program needs, if it says that there are not as many."""
    if "RESOURCE_EXHAUSTED" not in said:
        return None
    if found := re.search(r"required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds", said):  # arguments are among them
        return math.ceil(float(found[1]) * UNITS[found[2]])
    return None
