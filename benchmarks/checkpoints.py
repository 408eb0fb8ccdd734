"""What checkpoints cost a training: the same steps with `lora.Checkpoints` and without, by turns in one process.

The transformer of `train_step.py` with LoRA on all six linear layers of a block, and AdamW. A checkpoint of adapters
and optimizer state is written every few seconds, far more often than one would: one early in each round. A
round is timed until it is on disk, so that nothing of it is counted for the other loop. The CPU time of the process is
told too: it hardly depends on what else the machine does.

    python benchmarks/checkpoints.py                              # at most 1.05
    python benchmarks/checkpoints.py --model.layers 2 --rounds 3  # smaller
"""

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from train_step import Config as Model
from train_step import Setting, machine, setting, with_lora_jax

import lora_jax as lora
from lora_jax.checkpoints.manager import Checkpoints
from lora_jax.core.text import format_table, size

BOUND = 1.05

Times = tuple[float, float]


@dataclass(frozen=True)
class Config:
    """Time a training loop with and without checkpoints."""

    rounds: int = 15  # of each loop, by turns
    seconds: float = 5.0  # about, between two checkpoints
    every: int = 0  # or as many steps
    model: Model = field(default_factory=Model)


def main() -> None:
    c = tyro.cli(Config, description=__doc__)
    s = setting(c.model)
    optimizer = optax.adamw(1e-4)
    step = lora.jit_step(with_lora_jax(s).loss, optimizer)
    state = lora.TrainState.create(jax.tree.map(jnp.copy, s.adapters), optimizer)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    state, _ = run(step, state, s, 1)  # compiles
    state, (seconds, _) = run(step, state, s, 3)
    every = c.every or max(1, round(3 * c.seconds / seconds))
    times: dict[str, list[Times]] = {"without": [], "with checkpoints": []}
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, s.params, {}, every=every) as checkpoints:
        early = every - max(1, every // 3)  # a round begins so many steps after a checkpoint, so has time to write one
        warm_up = every + (early - int(state.step)) % every  # the first one imports and compiles
        state, _ = run(step, state, s, warm_up, checkpoints)
        for i in range(c.rounds):
            for name in list(times)[:: 1 if i % 2 else -1]:
                state, taken = run(step, state, s, every, checkpoints if name != "without" else None)
                times[name].append(taken)

    medians = {name: np.median(taken, axis=0) for name, taken in times.items()}
    rows = [[name, *(f"{t / every:.3f}" for t in (*medians[name], min(times[name])[0]))] for name in times]
    print(format_table(["loop", "seconds a step", "of the CPU", "least seconds"], rows, right=3))
    wall, cpu = medians["with checkpoints"] / medians["without"]
    print(
        f"\nwith checkpoints takes {wall:.3f} of the time without (bound {BOUND}), {cpu:.3f} of the CPU time: "
        f"{size(nbytes)} every {every} steps.\n{machine()}, JAX {jax.__version__}, {c.rounds} rounds"
    )


def run(
    step: Any, state: lora.TrainState, s: Setting, steps: int, checkpoints: Checkpoints | None = None
) -> tuple[lora.TrainState, Times]:
    """The state after so many steps, and the seconds that they took: on the clock, and of the CPU."""
    start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        state, metrics = step(state, s.params, s.ids, s.labels)
        if checkpoints is not None:
            checkpoints.save(state, metrics)
    jax.block_until_ready(state)
    if checkpoints is not None:
        checkpoints.wait()
    return state, (time.perf_counter() - start[0], time.process_time() - start[1])


if __name__ == "__main__":
    main()
