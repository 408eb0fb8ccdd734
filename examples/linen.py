"""LoRA on a Flax Linen model: a CNN with batch statistics and dropout learns to read digits that lie on their side.

The base reads upright digits, drawn from a bitmap font at any place of a small noisy image. Turned by 90 degrees they
are nearly new to it. Adapters on its convolutions and on its dense layer are trained, and merged into the variables
that `model.apply` takes. The statistics move with each step: they are the model state of a `lora.TrainState`.

    python examples/linen.py

Axes: B images, 14 by 14 pixels, 1 channel.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora

STEPS = 300
# Each digit is 5 rows of 3 pixels.
FONT = (
    "111101101101111 010110010010111 111001111100111 111001111001111 101101111001001 "
    "111100111001111 111100111101111 111001010010010 111101111101111 111101111001111"
)
GLYPHS = np.array([[int(pixel) for pixel in glyph] for glyph in FONT.split()], np.float32).reshape(10, 5, 3)


def new_images(rng: np.random.Generator, n: int, turned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 14, 14, 1] of digits of twice the font's size, and which digits they are [n]."""
    digits = rng.integers(0, 10, n)
    images = rng.normal(0, 0.3, (n, 14, 14, 1)).astype(np.float32)
    for image, digit in zip(images, digits, strict=True):
        glyph = np.kron(GLYPHS[digit], np.ones((2, 2), np.float32))
        glyph = np.rot90(glyph) if turned else glyph
        height, width = glyph.shape
        top, left = rng.integers(0, 15 - height), rng.integers(0, 15 - width)
        image[top : top + height, left : left + width, 0] += glyph * rng.uniform(0.7, 1.3)
    return images, digits


class Reader(nn.Module):
    """Images [B, 14, 14, 1] -> logits [B, 10]."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for features in (16, 32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


def train(
    fn: Any, trained: Any, *frozen: Any, statistics: Any, rate: float, seed: int, turned: bool
) -> lora.TrainState:
    """Trains parameters, or adapters beside frozen parameters: what `fn` takes last before the statistics."""

    def loss(trained: Any, frozen: Any, images: jax.Array, digits: jax.Array, *, key: Any, model_state: Any) -> Any:
        logits, model_state = fn(*frozen, trained, model_state, images, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean(), model_state

    optimizer = lora.freeze_base(optax.adam(optax.cosine_decay_schedule(rate, STEPS)))  # of adapters, what is trained
    state = lora.TrainState.create(trained, optimizer, key=jax.random.key(seed), model_state=statistics)
    step, rng = lora.jit_step(loss, optimizer), np.random.default_rng(seed)
    for _ in range(STEPS):
        state, _ = step(state, frozen, *new_images(rng, 64, turned))
    return state


def error(logits: jax.Array, digits: np.ndarray) -> float:
    return float(np.mean(logits.argmax(-1) != digits))


def main() -> dict[str, Any]:
    upright, which = new_images(np.random.default_rng(0), 1000, turned=False)
    turned, digits = new_images(np.random.default_rng(0), 1000, turned=True)

    # fn(params, statistics, images, train=..., rngs=...) -> (logits, statistics)
    model = Reader()
    fn, params, statistics = lora.from_linen(model, model.init(jax.random.key(1), upright))
    base = train(fn, params, statistics=statistics, rate=5e-3, seed=2, turned=False)
    params, statistics = base.trainable, base.model_state
    kept = jax.tree.map(np.array, params)

    # A convolution is adapted as the matrix that it is, from the pixels and channels of a window to features.
    rule = lora.Lora(rank=4, alpha=8)
    plan = lora.plan(fn, params, statistics, turned, rules={".*/kernel": rule})
    print(plan)

    # apply(params, adapters, statistics, images, train=..., rngs=...) -> (logits, statistics)
    apply = lora.lora_apply(fn)
    adapters = lora.init(jax.random.key(3), params, plan)
    tuned = train(apply, adapters, params, statistics=statistics, rate=1e-2, seed=4, turned=True)

    # The merged weights go where the base's were. The statistics have moved on, and go with them.
    logits, _ = apply(params, tuned.trainable, tuned.model_state, turned)
    merged = model.apply({"params": lora.merge(params, tuned.trainable), **tuned.model_state}, turned)
    own = error(fn(params, statistics, upright)[0], which)
    before, after = error(fn(params, statistics, turned)[0], digits), error(logits, digits)
    difference = float(jnp.abs(logits - merged).max())
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, params, kept))
    print(f"Digits read wrongly: upright {own:.1%}; turned {before:.1%} before, {after:.1%} after.")
    print(f"Adapted and merged logits differ by at most {difference:.0e}; the base is bit-identical: {unchanged}.")
    return {"base": own, "before": before, "after": after, "difference": difference, "unchanged": unchanged}


if __name__ == "__main__":
    main()
