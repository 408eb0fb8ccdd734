"""LoRA on a Haiku or an Equinox model: each becomes a function of its parameters, and all else is the same.

The base learns to tell the three arms of a spiral apart. Then the spiral is turned by a quarter, and adapters teach
the base to read it so.

    pip install dm-haiku equinox
    python examples/haiku_or_equinox.py --library haiku
    python examples/haiku_or_equinox.py --library equinox

Axes: B points.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import lora_jax as lora

Fn = Callable[..., jax.Array]
PACKAGES = {"haiku": "dm-haiku", "equinox": "equinox"}


def haiku_model(key: jax.Array) -> tuple[Fn, Any]:
    """`fn(params, points)` -> logits [B, 3], and its parameters: Haiku's transform gives just that."""
    import haiku as hk

    mlp = hk.transform(lambda points: hk.nets.MLP([64, 64, 3], activation=jnp.tanh)(points))
    model: Any = hk.without_apply_rng(mlp)
    return model.apply, model.init(key, jnp.zeros((1, 2)))


def equinox_model(key: jax.Array) -> tuple[Fn, Any]:
    """The same of a model that is a pytree: its arrays are the parameters, all else stays with the function."""
    import equinox as eqx

    model = eqx.nn.MLP(in_size=2, out_size=3, width_size=64, depth=2, activation=jnp.tanh, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, points: jax.vmap(eqx.combine(params, static))(points), params


def spiral(key: jax.Array, turn: float) -> tuple[jax.Array, jax.Array]:
    """Points [B, 2], and which of three arms each is on [B]. An arm goes once about the centre."""
    arm_key, radius_key, noise_key = jax.random.split(key, 3)
    arm = jax.random.randint(arm_key, (1000,), 0, 3)
    radius = jax.random.uniform(radius_key, (1000,), minval=0.2)
    angle = 2 * np.pi * (radius + arm / 3 + turn)
    points = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return points + 0.02 * jax.random.normal(noise_key, points.shape), arm


def train(logits: Fn, trainable: Any, frozen: Any, points: jax.Array, arm: jax.Array) -> Any:
    """Adam on the cross entropy of `logits(trainable, frozen, points)`, for a whole model and for adapters."""

    def loss(trainable: Any, frozen: Any, points: jax.Array, arm: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(trainable, frozen, points), arm).mean()

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 500))
    step, state = lora.jit_step(loss, optimizer), lora.TrainState.create(trainable, optimizer)
    for _ in range(500):
        state, _ = step(state, frozen, points, arm)
    return state.trainable


def error(logits: jax.Array, arm: jax.Array) -> float:
    return float(jnp.mean(logits.argmax(-1) != arm))


def main(library: Literal["haiku", "equinox"] = "haiku") -> dict[str, Any]:
    if importlib.util.find_spec(library) is None:
        sys.exit(f"error: {library} is not installed: pip install {PACKAGES[library]}")
    model_key, base_key, start_key, lora_key, test_key = jax.random.split(jax.random.key(0), 5)

    fn, params = {"haiku": haiku_model, "equinox": equinox_model}[library](model_key)
    params = train(lambda params, _, points: fn(params, points), params, None, *spiral(base_key, turn=0))
    kept = jax.tree.map(np.array, params)
    points, arm = spiral(test_key, turn=0)
    own = error(fn(params, points), arm)

    # Paths are those of the parameters: Haiku's matrices are `w` [in, out], Equinox's are `weight` [out, in].
    points, arm = spiral(test_key, turn=0.25)
    matrices = {"haiku": "mlp/~/linear_./w", "equinox": "layers/./weight"}[library]
    plan = lora.plan(fn, params, points, rules={matrices: lora.Lora(rank=2, alpha=2)})
    print(plan)
    adapters = lora.init(start_key, params, plan)
    apply = lora.lora_apply(fn)

    def adapted(adapters: Any, params: Any, points: jax.Array) -> jax.Array:
        return apply(params, adapters, points)

    adapters = train(adapted, adapters, params, *spiral(lora_key, turn=0.25))

    logits = apply(params, adapters, points)
    before, after = error(fn(params, points), arm), error(logits, arm)
    difference = float(jnp.abs(logits - fn(lora.merge(params, adapters), points)).max())
    unchanged = jax.tree.all(jax.tree.map(np.array_equal, params, kept))
    print(f"Points told wrongly: upright {own:.1%}; turned {before:.1%} before, {after:.1%} after.")
    print(f"Adapted and merged logits differ by at most {difference:.0e}; the base is bit-identical: {unchanged}.")
    return {"base": own, "before": before, "after": after, "difference": difference, "unchanged": unchanged}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
