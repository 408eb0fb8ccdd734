"""A kind of adapter of one's own: LoRA-XS, which the library does not have, in forty lines.

W' = W + s A R B, with A = U_r S_r and B = V_r^T frozen from the singular value decomposition W = U S V^T, and only R
[r, r] trained: 16 numbers a weight at rank 4, whatever its size. Bałazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with
Extremely Small Number of Parameters", arXiv 2405.17604.

A kind is a rule, which makes fresh adapters, and an adapter, which says which LoRA it is. Registered with one call, it
is planned, applied, sharded, trained, saved, restored, inspected and exported as the kinds of the library are.

    python examples/own_kind.py
"""

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora


@dataclass(frozen=True)
class LoraXs(lora.Rule):
    """W' = W + A R B, with R [rank, rank] trained from zero between frozen factors of W."""

    rank: int

    reads_weight = True  # `init` looks at the numbers in W

    def init(self, key: jax.Array, w: jax.Array, axes: lora.KernelAxes) -> "LoraXsAdapter":
        stack, inputs, outputs = axes.sizes(w.shape)
        matrix = w.transpose((*axes.stack, *axes.inputs, *axes.outputs))
        matrix = matrix.reshape(*stack, math.prod(inputs), math.prod(outputs))
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        a = (u * s[..., None, :])[..., : self.rank].reshape(*stack, *inputs, self.rank)
        b = vt[..., : self.rank, :].reshape(*stack, self.rank, *outputs)
        return LoraXsAdapter(a, jnp.zeros((*stack, self.rank, self.rank)), b, axes)

    def flops(self, shape: tuple[int, ...], axes: lora.KernelAxes, rows: tuple[int, int]) -> int:
        _, d, k = axes.fans(shape)
        return 2 * self.rank * (rows[0] * d + rows[1] * k)


@lora.register_kind("lora_xs")
@dataclass(frozen=True)
class LoraXsAdapter(lora.Factored):
    """The frozen factors and the trained matrix of one weight."""

    a: jax.Array  # [*stack, *inputs, r]
    r: jax.Array  # [*stack, r, r]
    b: jax.Array  # [*stack, r, *outputs]
    axes: lora.KernelAxes = field(metadata={"static": True})

    # The groups of W's axes that each array has; "left" is an axis of R's own.
    layout = {"a": ("stack", "inputs", "rank"), "r": ("stack", "left", "rank"), "b": ("stack", "rank", "outputs")}  # noqa: RUF012
    frozen = ("a", "b")

    def to_lora(self) -> lora.LoraAdapter:
        n = len(self.axes.stack)
        b = jnp.matmul(self.r, self.b.reshape(*self.b.shape[: n + 1], -1)).reshape(self.b.shape)
        return lora.LoraAdapter(jax.lax.stop_gradient(self.a), b, self.axes, 1.0)


def model(params: Any, x: jax.Array) -> jax.Array:
    """Scanned layers and a head: [B, D] -> [B, K]."""
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["head"]


def main() -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 5))
    layers, head = (jax.random.normal(next(keys), shape) / 5 for shape in ((2, 24, 24), (24, 3)))
    params, x = {"layers": layers, "head": head}, jax.random.normal(next(keys), (256, 24))
    kept = jax.tree.map(np.array, params)
    plan = lora.plan(model, params, x, rules={"layers": LoraXs(rank=4), "head": lora.Lora(rank=2)})
    print(plan)

    # What is to be learned: the answers of another model, whose weights differ by a small change.
    changed = jax.tree.map(lambda w: w + jax.random.normal(next(keys), w.shape) / 50, params)
    apply, answers = lora.lora_apply(model), model(changed, x)

    def loss(adapters: Any, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((apply(params, adapters, x) - y) ** 2) / jnp.mean((model(params, x) - y) ** 2)

    optimizer = lora.freeze_base(optax.adam(3e-2))  # A and B of LoRA-XS are frozen arrays of the adapter
    state = lora.TrainState.create(lora.init(jax.random.key(1), params, plan), optimizer)
    step = lora.jit_step(loss, optimizer)
    before = float(loss(state.trainable, params, x, answers))
    for _ in range(200):
        state, metrics = step(state, params, x, answers)
    adapters, after = state.trainable, float(metrics["loss"])

    with tempfile.TemporaryDirectory() as folder:
        lora.checkpoint.save(Path(folder) / "adapters", adapters)
        restored, _ = lora.checkpoint.load(Path(folder) / "adapters")
    outputs = apply(params, adapters, x)
    difference = float(jnp.abs(outputs - model(lora.merge(params, restored), x)).max())
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, params, kept))
    print(f"Error, as a share of the base's: {before:.0%} before, {after:.0%} after {int(state.step)} steps.")
    print(f"Outputs of the adapters and of what was saved, restored and merged differ by at most {difference:.0e}.")
    return {"before": before, "after": after, "difference": difference, "unchanged": unchanged, "adapters": adapters}


if __name__ == "__main__":
    main()
