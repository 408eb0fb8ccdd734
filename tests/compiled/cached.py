"""Reports of compiled programs, kept between runs: a compile takes a minute, and most changes leave programs alone.

What is kept is known by a hash of the lowered program, of the machine, and of the versions of the compilers.
"""

import dataclasses
import gzip
import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

import lora_jax as lora
from lora_jax.analysis.abstract_arguments import argument_bytes, check_arguments
from lora_jax.analysis.compile_report import Compiled, compiled_for, lowered, report_on
from lora_jax.analysis.topologies import Topology, find_topology

FOLDER = Path(__file__).parent.parent.parent / ".compiled_cache"
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


def report(step: Any, *args: Any, topology: str, slices: int = 1) -> lora.CompileReport:
    """`lora.compile_report`, with the compiler's work taken from the last time if it was the same program."""
    machine = find_topology(topology, slices)
    check_arguments(args, machine)
    return report_on(machine, argument_bytes(args), compiled(machine, lowered(step, *args), args))


def compiled(machine: Topology, program: Any, args: Any) -> Compiled:
    """Compile a lowered program of these arguments, or take it from the last time."""
    file = FOLDER / f"{_key(program.as_text(), args, machine)}.json.gz"
    if not file.exists():
        found = compiled_for(machine, program)
        FOLDER.mkdir(exist_ok=True)
        there = file.with_suffix(f".{os.getpid()}")
        there.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(found)).encode()))
        there.replace(file)
    return Compiled(**json.loads(gzip.decompress(file.read_bytes())))


def _key(text: str, args: Any, machine: Topology) -> str:
    places = [str(getattr(leaf, "sharding", None)) for leaf in jax.tree.leaves(args)]
    parts = (text, *places, str(machine), str(machine.options), *map(_version, COMPILERS))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not there"
