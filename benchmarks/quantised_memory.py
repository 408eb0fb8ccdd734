"""Where the memory of a training step goes: full fine-tuning, LoRA over a base in bf16, and over 8 and 4 bits.

The whole step of examples/finetune_decoder.py: SmolLM2-135M, 2 rows of 512 tokens, a scan over layers that are each
recomputed in the backward pass, AdamW; full fine-tuning is all in fp32. What the compiled step takes is what XLA says
of it. What a process takes is the peak of its resident memory over two steps: each program runs in a process of its
own, which forgets its peak (Linux: /proc/self/clear_refs) when the model is loaded and the step compiled; so loading,
which unpacks the file in fp32, does not count.

XLA's CPU backend multiplies in fp32. It casts a whole stack of bf16 weights before the loop over the layers, which
undoes what bf16 saves; that pass of XLA is switched off in one more program.

    python benchmarks/quantised_memory.py        # the table for docs/quantised.md
    python benchmarks/quantised_memory.py --tiny
"""

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import train_step
import tyro

import lora_jax as lora
from lora_jax.core.text import format_table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune_decoder as headlines

Tree = Any
FULL, LAYER_BY_LAYER = "full fine-tuning, fp32", "LoRA, bf16, cast layer by layer"
PROGRAMS: dict[str, Literal[4, 8, 16]] = {  # bits of the base
    FULL: 16,
    "LoRA, bf16": 16,
    LAYER_BY_LAYER: 16,
    "QLoRA, int8": 8,
    "QLoRA, NF4": 4,
}
FLAGS = {LAYER_BY_LAYER: "--xla_disable_hlo_passes=while-loop-invariant-code-motion"}


@dataclass(frozen=True)
class Config:
    """Measure the memory of one training step over several frozen bases."""

    tiny: bool = False  # a random tiny model, to see that all works
    only: str = ""  # one program, in this process; its numbers as JSON


def measure(name: str, tiny: bool) -> dict[str, int | None]:
    """Bytes of one program."""
    imported = resident("VmRSS")
    config = headlines.Config(bits=PROGRAMS[name], tiny=tiny)
    task = headlines.load_task(config)
    batch = next(headlines.training_batches(headlines.make_examples(task.train, task.tokenizer), config))
    step: Any
    if name == FULL:
        trained, frozen = jax.tree.map(lambda w: w.astype(jnp.float32), task.params), {}
        task = replace(task, params=None)  # the loss keeps its task
        loss, optimizer = headlines.make_loss(task), headlines.make_optimizer(config)
        step = lora.jit_step(lambda params, _, *batch: loss({}, params, *batch), optimizer)
        state = lora.TrainState.create(trained, optimizer)
        del trained
    else:
        frozen = task.params
        adapters = headlines.make_adapters(task, config, batch)
        step, state = headlines.make_step(headlines.make_loss(task), adapters, config)
        del adapters
    compiled = step.lower(state, frozen, *batch).compile()
    memory = compiled.memory_analysis()
    found = {
        "frozen": headlines.tree_bytes(frozen),
        "trained": headlines.tree_bytes(state),
        "temporary": memory.temp_size_in_bytes,
        "sum": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "imported": imported,
        "loaded": forget_peak(),
    }
    for _ in range(2):
        state, metrics = compiled(state, frozen, *batch)
    jax.block_until_ready((state, metrics))
    return found | {"peak": found["loaded"] and resident("VmHWM")}


def resident(what: str) -> int | None:
    """Memory of this process that is in use (VmRSS), or that was at its peak (VmHWM); None where it is not told."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith(what)]
    return found[0] if found else None


def forget_peak() -> int | None:
    """What is in use now, the peak from here on; None where a process may not say so."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what loading and compiling took is free by now, but glibc keeps some of it
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def in_a_process(name: str, tiny: bool) -> dict[str, int | None]:
    """`measure`, in a process that does nothing else."""
    flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), FLAGS.get(name)]))
    command = [sys.executable, __file__, "--only", name, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, dict[str, int | None]]) -> str:
    columns = {
        "frozen": "frozen",
        "trained": "trained, with AdamW's",
        "temporary": "temporary",
        "sum": "sum",
        "loaded": "process before",
        "peak": "its peak",
    }
    rows = [[name, *(megabytes(of[key]) for key in columns)] for name, of in found.items()]
    return format_table(["MB", *columns.values()], rows, right=len(columns))


def megabytes(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e6:,.1f}"


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if config.only:
        print(json.dumps(measure(config.only, config.tiny)))
        return
    found = {name: in_a_process(name, config.tiny) for name in PROGRAMS}
    print(table(found))
    imported = [of["imported"] for of in found.values() if of["imported"] is not None]
    if imported:
        print(f"\nOf a process, {megabytes(max(imported))} MB are Python, JAX and the other libraries.")
    print(f"\n{train_step.machine()}, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
