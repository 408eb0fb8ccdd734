"""What the library's own bookkeeping costs: planning a large model, and finding the jitted step of each call.

    python benchmarks/bookkeeping.py               # both
    python benchmarks/bookkeeping.py --rounds 50

To compare two builds, run it with each on PYTHONPATH, in turn. Times are those of the process, not of the clock. With
XLA_FLAGS=--xla_force_host_platform_device_count=8 the step is also timed over a mesh of eight devices.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import lora_jax as lora

NAMES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Config:
    """Time plan and the bookkeeping of jit_step."""

    rounds: int = 5  # plans; a step's bookkeeping is timed a hundred times as often
    blocks: int = 200  # of nine leaves each
    adapters: int = 200  # of the step


def seconds(call: Callable[[], Any], times: int) -> float:
    """Return the median of the process's own seconds."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return float(np.median(taken))


def plan_seconds(c: Config) -> float:
    """Return the seconds to plan a model of 9 leaves a block, 7 of them adapted, by three rules."""

    def model(params: Any, x: jax.Array) -> jax.Array:
        for i in range(c.blocks):
            p = params[f"block_{i}"]
            h = x * p["norm_1"]
            x = x + jnp.tanh((h @ p["q"]) * (h @ p["k"]) * (h @ p["v"])) @ p["o"]
            h = x * p["norm_2"]
            x = x + (jnp.tanh(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return x

    matrix, vector = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.float32)
    block = {**dict.fromkeys(NAMES, matrix), "norm_1": vector, "norm_2": vector}
    params = {f"block_{i}": block for i in range(c.blocks)}
    rules = {".*/[qkv]": lora.Lora(4), ".*/o": lora.Lora(8), r"block_\d+/(gate|up|down)": lora.Lora(2)}
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)

    def planned() -> None:
        jax.clear_caches()
        lora.plan(model, params, x, rules=rules)

    planned()
    return seconds(planned, c.rounds)


def step_seconds(c: Config, mesh: jax.sharding.Mesh | None) -> float:
    """Return the seconds in which a second call of a step finds its jitted function, without calling it."""
    axes = lora.KernelAxes((), (0,), (1,))
    params: Any = {f"w{i}": jnp.ones((4, 4)) for i in range(c.adapters)}
    adapters: Any = {path: lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 4)), axes, 1.0) for path in params}
    x = jnp.ones((8, 4))
    if mesh is not None:
        params, adapters = jax.device_put((params, adapters), jax.NamedSharding(mesh, jax.P()))
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))

    optimizer = optax.adamw(1e-3)
    state: Any = lora.TrainState.create(adapters, optimizer)
    step: Any = lora.jit_step(lambda adapters, params, x: jnp.sum(x), optimizer)
    placed = next(cell.cell_contents for cell in step.__closure__ if cell.cell_contents.__name__ == "placed")
    placed(state, params, (x,))
    return seconds(lambda: placed(state, params, (x,)), 100 * c.rounds)


def main() -> None:
    c = tyro.cli(Config, description=__doc__)
    print(f"plan of {9 * c.blocks} leaves: {plan_seconds(c):.2f} s")
    print(f"step of {c.adapters} adapters on one device: {1e6 * step_seconds(c, None):.0f} us beside the jitted call")
    if jax.device_count() > 1:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        print(f"over {jax.device_count()} devices: {1e6 * step_seconds(c, mesh):.0f} us")


if __name__ == "__main__":
    main()
