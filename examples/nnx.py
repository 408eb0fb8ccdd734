"""LoRA on an NNX model: attention with batch statistics and dropout learns to look to the other side.

A line of digits has one marker in it. The base learns to tell the digit after the marker; adapters on its attention
teach it to tell the digit before the marker. `lora.from_nnx` makes a function of the model for that, and `nnx.update`
puts the merged weights back into the model.

    python examples/nnx.py

Axes: B lines, T tokens, D hidden.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_jax as lora

B, T, D, MARKER = 64, 8, 64, 10  # the digits are tokens 0 to 9


def new_lines(key: jax.Array, side: int, n: int = B) -> tuple[jax.Array, jax.Array]:
    """Lines [B, T], and of each the digit [B] on one side of the marker: 1 is after it, -1 before."""
    digits_key, marker_key = jax.random.split(key)
    digits = jax.random.randint(digits_key, (n, T), 0, 10)
    marker = jax.random.randint(marker_key, (n, 1), 1, T - 1)
    ids = jnp.where(jnp.arange(T)[None] == marker, MARKER, digits)
    return ids, jnp.take_along_axis(ids, marker + side, axis=1)[:, 0]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(D, momentum=0.9, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=D, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.attention(self.norm(x, use_running_average=not train))
        return x + self.dropout(y, deterministic=not train)


class Reader(nnx.Module):
    """Ids [B, T] -> logits [B, 10]."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.token, self.position = nnx.Embed(11, D, rngs=rngs), nnx.Embed(T, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(D, 10, rngs=rngs)

    def __call__(self, ids: jax.Array, train: bool = False) -> jax.Array:
        x = self.token(ids) + self.position(jnp.arange(T))[None]
        for block in self.blocks:
            x = block(x, train)
        return self.head(x.mean(axis=1))


def cross_entropy(logits: jax.Array, answers: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()


def error(logits: jax.Array, answers: jax.Array) -> float:
    return float(jnp.mean(logits.argmax(-1) != answers))


@nnx.jit
def base_step(model: Reader, optimizer: nnx.Optimizer[Reader], key: jax.Array) -> None:
    """NNX's own way: model and optimizer are changed in place."""
    ids, answers = new_lines(key, side=1)
    grads = nnx.grad(lambda model: cross_entropy(model(ids, train=True), answers))(model)
    optimizer.update(model, grads)


def main() -> dict[str, Any]:
    model = Reader(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(5e-3, 200)), wrt=nnx.Param)
    for i in range(200):
        base_step(model, optimizer, jax.random.fold_in(jax.random.key(1), i))
    ids, answers = new_lines(jax.random.key(2), side=1, n=1000)
    own = error(model(ids), answers)

    # fn(params, state, ids, train=...) -> (logits, state); in `state` are the statistics and the counters of dropout.
    fn, params, state = lora.from_nnx(model)
    kept = jax.tree.map(np.array, params)
    ids, answers = new_lines(jax.random.key(2), side=-1, n=1000)
    before = error(model(ids), answers)

    # The kernels of attention are [D, heads, D / heads], and the last one [heads, D / heads, D].
    plan = lora.plan(fn, params, state, ids, rules={"blocks/.*/kernel": lora.Lora(rank=8, alpha=16)})
    print(plan)
    adapters = lora.init(jax.random.key(3), params, plan)
    apply = lora.lora_apply(fn)  # apply(params, adapters, state, ids, train=...) -> (logits, state)

    # Here nothing is changed in place: what a call makes of the model's state is returned beside the loss, and the
    # training state takes it to the next step.
    def loss(adapters: Any, params: Any, key: jax.Array, *, model_state: Any) -> tuple[jax.Array, Any]:
        ids, answers = new_lines(key, side=-1)
        logits, model_state = apply(params, adapters, model_state, ids, train=True)
        return cross_entropy(logits, answers), model_state

    adam = lora.freeze_base(optax.adam(optax.cosine_decay_schedule(1e-2, 300)))
    step, train = lora.jit_step(loss, adam), lora.TrainState.create(adapters, adam, model_state=state)
    for i in range(300):
        train, _ = step(train, params, jax.random.fold_in(jax.random.key(4), i))

    # The model with merged weights and the new statistics does what the function with adapters does.
    logits, _ = apply(params, train.trainable, train.model_state, ids)
    nnx.update(model, lora.merge(params, train.trainable), train.model_state)
    after, difference = error(logits, answers), float(jnp.abs(logits - model(ids)).max())
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, params, kept))
    print(
        f"Digits told wrongly: after the marker {own:.1%}; before it {before:.1%} at first, {after:.1%} with adapters."
    )
    print(f"Adapted and merged logits differ by at most {difference:.0e}; the base is bit-identical: {unchanged}.")
    return {"base": own, "before": before, "after": after, "difference": difference, "unchanged": unchanged}


if __name__ == "__main__":
    main()
