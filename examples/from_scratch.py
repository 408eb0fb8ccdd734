"""LoRA on a plain function: one base, and three sets of adapters trained at once.

The model is a function and a dict of arrays: a small decoder with a tied embedding, a scan over stacked layers and
remat. It learns to copy a line of digits. Then adapters teach it to reverse the line, to rotate it, and to add one to
each digit: all three in one program, by `vmap` over adapters, beside one base.

    python examples/from_scratch.py

Axes: B lines, N digits, T = 2 N tokens, D hidden, H heads, L layers, V tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora

B, N, D, H, L = 32, 6, 64, 4, 2
V, SEPARATOR = 11, 10  # the digits are tokens 0 to 9
LAYERS = {"qkv": (L, D, 3 * D), "out": (L, D, D), "up": (L, D, 4 * D), "down": (L, 4 * D, D)}
SHAPES = {"embedding": (V, D), "position": (2 * N, D), **LAYERS}
TASKS = {
    "copy": lambda digits: digits,
    "reverse": lambda digits: digits[:, ::-1],
    "rotate": lambda digits: jnp.roll(digits, 1, axis=1),
    "add one": lambda digits: (digits + 1) % 10,
}
Tree = Any


def decoder(params: Tree, ids: jax.Array) -> jax.Array:
    """Ids [B, T] -> logits [B, N, V] of what follows each of the last N."""

    @jax.checkpoint  # the backward pass computes the inside of a layer again
    def layer(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        qkv = (jax.nn.standardize(x) @ w["qkv"]).reshape(*ids.shape, 3, H, D // H)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
        x = x + y.reshape(x.shape) @ w["out"]
        return x + jax.nn.gelu(jax.nn.standardize(x) @ w["up"]) @ w["down"], None

    x = params["embedding"][ids] + params["position"][None]
    x, _ = jax.lax.scan(layer, x, {name: params[name] for name in LAYERS})
    return jax.nn.standardize(x[:, N:]) @ params["embedding"].T


def new_lines(key: jax.Array, tasks: Sequence[Callable[..., jax.Array]], n: int = B) -> tuple[jax.Array, jax.Array]:
    """The same digits for each task: ids [tasks, B, T], in which the answers [tasks, B, N] follow a separator."""
    digits = jax.random.randint(key, (n, N), 0, 10)
    answers = jnp.stack([task(digits) for task in tasks])
    parts = jnp.broadcast_to(digits, answers.shape), jnp.full_like(answers[..., :1], SEPARATOR), answers[..., :-1]
    return jnp.concatenate(parts, axis=-1), answers


def train(logits: Any, tasks: Any, trainable: Tree, frozen: Tree, key: jax.Array, rate: float, steps: int) -> Tree:
    """Adam on `logits(trainable, frozen, ids, key)`: the same loop for a whole model and for adapters."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(trainable: Tree, frozen: Tree, key: jax.Array) -> jax.Array:
        lines_key, dropout_key = jax.random.split(key)
        ids, answers = new_lines(lines_key, tasks)
        z = logits(trainable, frozen, ids, dropout_key)
        return optax.softmax_cross_entropy_with_integer_labels(z, answers).mean()

    @jax.jit
    def step(trainable: Tree, opt_state: Tree, frozen: Tree, key: jax.Array) -> tuple[Tree, Tree]:
        updates, opt_state = optimizer.update(jax.grad(loss)(trainable, frozen, key), opt_state)
        return optax.apply_updates(trainable, updates), opt_state

    opt_state = optimizer.init(trainable)
    for i in range(steps):
        trainable, opt_state = step(trainable, opt_state, frozen, jax.random.fold_in(key, i))
    return trainable


def errors(logits: jax.Array, answers: jax.Array) -> list[float]:
    return jnp.mean(logits.argmax(-1) != answers, axis=(1, 2)).tolist()


def main() -> dict[str, Any]:
    weight_key, copy_key, start_key, lora_key, test_key = jax.random.split(jax.random.key(0), 5)
    copy, *new_tasks = TASKS.values()

    base = jax.vmap(decoder, in_axes=(None, 0))  # over the lines of each task
    keys = dict(zip(SHAPES, jax.random.split(weight_key, len(SHAPES)), strict=True))
    params = {name: jax.random.normal(keys[name], shape) / D**0.5 for name, shape in SHAPES.items()}
    params = train(lambda params, _, ids, key: base(params, ids), [copy], params, None, copy_key, rate=3e-3, steps=150)
    kept = jax.tree.map(np.array, params)

    # That the layers are stacked, and that the embedding serves as rows and as a matrix, is read off the program.
    # Positions are only added: there is no product for an adapter to join.
    ids, answers = new_lines(test_key, [copy, *new_tasks], n=256)
    plan = lora.plan(decoder, params, ids[0], rules={"embedding|qkv|out|up|down": lora.Lora(rank=4, alpha=8)})
    print(plan)

    # A set of adapters for each new task: one pytree with an axis in front. The base has no such axis.
    adapters = jax.vmap(lora.init, in_axes=(0, None, None))(jax.random.split(start_key, 3), params, plan)
    apply = lora.lora_apply(decoder)

    def adapted(adapters: Tree, params: Tree, ids: jax.Array, key: jax.Array) -> jax.Array:
        return jax.vmap(lambda a, ids: apply(params, lora.with_dropout(a, key, 0.05), ids))(adapters, ids)

    adapters = train(adapted, new_tasks, adapters, params, lora_key, rate=1e-2, steps=250)

    # Each set merges into weights for the function as it was.
    logits = jax.vmap(apply, in_axes=(None, 0, 0))(params, adapters, ids[1:])
    merged = jax.vmap(lora.merge, in_axes=(None, 0))(params, adapters)
    difference = float(jnp.abs(logits - jax.vmap(decoder)(merged, ids[1:])).max())
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, params, kept))
    (own, *before), after = errors(base(params, ids), answers), errors(logits, answers[1:])
    print(f"Wrong digits: copy {own:.1%}", end="")
    for task, b, a in zip(list(TASKS)[1:], before, after, strict=True):
        print(f"; {task} {b:.1%} before, {a:.1%} after", end="")
    print(f".\nAdapted and merged logits differ by at most {difference:.0e}; the base is bit-identical: {unchanged}.")
    return {"base": own, "before": before, "after": after, "difference": difference, "unchanged": unchanged}


if __name__ == "__main__":
    main()
