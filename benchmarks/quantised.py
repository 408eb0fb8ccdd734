"""What a LoRA step costs over a frozen base in fp32, fp8, int8 and NF4: bytes, temporary memory and time.

The decoder of benchmarks/train_step.py with its layers stacked and scanned, LoRA on all six linear layers, the loss,
its gradient and AdamW's update in one jitted call. All programs run in turn in one process.

    python benchmarks/quantised.py        # the table for docs/quantised.md
"""

import functools
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_step
import tyro

import lora_jax as lora
from lora_jax.core.text import format_table, size

Tree = Any
WEIGHTS = "layers/(" + "|".join(train_step.LINEARS) + ")"


@dataclass(frozen=True)
class Config:
    """Time one training step over several frozen bases."""

    rounds: int = 9  # how often each program is run, in turn with the others
    model: train_step.Config = field(default_factory=train_step.Config)


def logits(c: train_step.Config, params: Tree, ids: jax.Array) -> jax.Array:
    """The scanned decoder: ids [B, T] -> [B, T, V]"""

    def body(x: jax.Array, layer: Tree) -> tuple[jax.Array, None]:
        return train_step.block(c, "layer", layer, x, train_step.plain), None

    x, _ = jax.lax.scan(body, params["embed"][ids], params["layers"])
    return train_step.rms_norm(x, params["norm"]) @ params["head"]


def bases(c: train_step.Config) -> dict[str, Tree]:
    """The same parameters, the weights of the layers kept in several ways and all else in fp32."""
    params = train_step.init_params(c, jax.random.key(0))
    layers = [params.pop(f"layer_{i}") for i in range(c.layers)]
    dense = {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    formats = {
        "fp8": lora.bases.Fp8(),
        "int8": lora.bases.Int8(),
        "NF4, scales in fp32": lora.bases.Nf4(double=False),
        "NF4": lora.bases.Nf4(),
    }
    return {"fp32": dense} | {name: lora.bases.quantize(dense, {WEIGHTS: how}) for name, how in formats.items()}


def make_step(c: train_step.Config, params: Tree, ids: jax.Array) -> tuple[Any, Tree]:
    fn = functools.partial(logits, c)
    apply, optimizer = lora.lora_apply(fn), optax.adamw(1e-4)
    adapters = lora.init(jax.random.key(1), params, lora.plan(fn, params, ids, rules={WEIGHTS: lora.Lora(c.rank)}))

    def loss(adapters: Tree, params: Tree, ids: jax.Array) -> jax.Array:
        return train_step.cross_entropy(apply(params, adapters, ids), jnp.roll(ids, -1, axis=1))

    @jax.jit
    def step(adapters: Tree, state: Tree, params: Tree, ids: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(adapters, params, ids)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    return step, (adapters, optimizer.init(adapters))


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    c = config.model
    ids = jax.random.randint(jax.random.key(2), (c.batch, c.tokens), 0, c.vocabulary)
    programs = {}
    for name, params in bases(c).items():
        step, state = make_step(c, params, ids)
        compiled = step.lower(*state, params, ids).compile()
        memory: Any = compiled.memory_analysis()
        programs[name] = functools.partial(compiled, *state, params, ids), memory.temp_size_in_bytes, params["layers"]
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(config.rounds + 1):
        for name, (run, *_) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:  # the first is to warm up
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, (_, temporary, layers) in programs.items():
        kept = [layers[linear] for linear in train_step.LINEARS]
        a_number = sum(w.nbytes for w in kept) / sum(w.size for w in kept)
        ratio = np.median(np.array(seconds[name]) / np.array(seconds["fp32"]))
        rows.append([name, f"{a_number:.3f}", size(sum(w.nbytes for w in kept)), size(temporary), f"{ratio:.2f}"])
    header = ["base", "bytes a number", "weights", "temporary", "of the dense step"]
    print(format_table(header, rows, right=1))
    print(f"\n{train_step.machine()}, JAX {jax.__version__}, {config.rounds} rounds")


if __name__ == "__main__":
    main()
