"""A step of N members at once, beside N steps of one member: by turns, in one process.

The model is a stack of scanned layers of two linears, which all have adapters. With few tokens for each member a step
is bound by reading the base: N members read it once.

    python benchmarks/population.py
    python benchmarks/population.py --members 16 --tokens 8

Axes: N members, T tokens, D hidden, L layers.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import lora_jax as lora
from lora_jax.core.text import format_table, size

Tree = Any


@dataclass(frozen=True)
class Config:
    """Time of a population's step over that of its members one by one."""

    members: int = 8
    tokens: int = 16  # of each member
    hidden: int = 512
    layers: int = 6
    rank: int = 8
    rounds: int = 7


def model(params: Tree, x: jax.Array) -> jax.Array:
    """x [T, D] -> [T, D]"""

    def layer(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, params)[0]


def make(config: Config) -> tuple[Any, Any]:
    """Two functions that take one round of steps: all members at once, and one after the other."""
    shapes = {
        "up": (config.layers, config.hidden, 4 * config.hidden),
        "down": (config.layers, 4 * config.hidden, config.hidden),
    }
    params = {n: jax.random.normal(jax.random.key(i), s) / s[1] ** 0.5 for i, (n, s) in enumerate(shapes.items())}
    x = jax.random.normal(jax.random.key(2), (config.members, config.tokens, config.hidden))
    plan = lora.plan(model, params, x[0], rules={".*": lora.Lora(config.rank)})
    adapters = [lora.init(jax.random.key(i), params, plan) for i in range(config.members)]
    apply = lora.lora_apply(model)

    def loss(adapters: Tree, params: Tree, x: jax.Array) -> jax.Array:
        return jnp.mean((apply(params, adapters, x) - 1) ** 2)

    single, together = lora.jit_step(loss, optax.adam(1e-3)), lora.population_step(loss, optax.adam(1e-3))
    states = [lora.TrainState.create(one, optax.adam(1e-3)) for one in adapters]
    population = lora.Population.create(adapters, optax.adam(1e-3))
    for name, lowered in (
        ("one member", single.lower(states[0], params, x[0])),
        (f"{config.members} members", together.lower(population, params, lora.PerMember(x))),
    ):
        memory: Any = lowered.compile().memory_analysis()
        print(f"{name}: {size(memory.temp_size_in_bytes)} while a step runs")
    print(f"the base: {size(sum(w.nbytes for w in jax.tree.leaves(params)))}")

    def at_once() -> None:
        nonlocal population
        population, metrics = together(population, params, lora.PerMember(x))
        jax.block_until_ready(metrics)

    def in_turn() -> None:
        for i, state in enumerate(states):
            states[i], metrics = single(state, params, x[i])
            jax.block_until_ready(metrics)

    return at_once, in_turn


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    functions = make(config)
    seconds: list[list[float]] = [[], []]
    for i in range(config.rounds + 1):
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            if i:  # the first compiles
                times.append(time.perf_counter() - start)
    ratios = np.array(seconds[0]) / np.array(seconds[1])
    rows = [
        [f"{config.members} members at once", f"{np.median(seconds[0]):.3f}"],
        [f"{config.members} steps of one", f"{np.median(seconds[1]):.3f}"],
        ["ratio, median", f"{np.median(ratios):.2f}"],
        ["ratio, least to most", f"{ratios.min():.2f} to {ratios.max():.2f}"],
    ]
    print(format_table(["program", "seconds"], rows, right=1))


if __name__ == "__main__":
    main()
