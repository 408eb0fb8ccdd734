"""The memory that a training step takes on one device, by its compiled program, and whether it is there."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lora_jax.analysis.abstract_arguments import argument_bytes
from lora_jax.core.errors import LoraError
from lora_jax.core.text import format_table, size

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parts: what is there before the step: the base, adapters, the optimizer's state, a batch.
        step: what the step takes beside these.
        free: what is free now, beside `parts`; None where the device does not say it.
    """

    parts: dict[str, int]
    step: int
    free: int | None

    def __str__(self) -> str:
        """Return a table."""
        rows = [[name, size(n)] for name, n in (*self.parts.items(), ("while a step runs", self.step)) if n]
        if self.free is not None:
            rows.append(["free for it", size(self.free)])
        return format_table(["memory of one device", "bytes"], rows, right=1)


def step_memory(step: Any, state: Any, params: Any, *batch: Any) -> Memory:
    """Compile a step for these arguments, which its first call then does not, and return what it takes."""
    found = step.lower(state, params, *batch).compile().memory_analysis()
    more = found.temp_size_in_bytes + max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    return Memory(argument_bytes((state, params, *batch)), more, free_bytes())


def free_bytes() -> int | None:
    """Return the free bytes of this process's first device; on CPUs those of the machine, shared by its devices."""
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    if device.platform != "cpu" or not MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 // jax.local_device_count()


def peak_bytes() -> int | None:
    """Return the most that was in use at a time: of the first device, or on CPUs of this process where it is known."""
    if stats := jax.local_devices()[0].memory_stats():
        return int(stats.get("peak_bytes_in_use", stats["bytes_in_use"]))
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_memory(memory: Memory) -> None:
    """Raise if a step takes more than is free.

    Raises:
        LoraError: with what to change.
    """
    if memory.free is not None and memory.step > memory.free:
        raise LoraError(
            f"a step takes {size(memory.step)} beside what is there, and {size(memory.free)} are free on one device. "
            "Less is taken with more microbatches, a smaller max_length or batch_tokens; a base of fewer bits leaves "
            f"more free, and so does an fsdp axis over more devices.\n{memory}"
        )
