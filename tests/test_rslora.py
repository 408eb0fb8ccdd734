"""rsLoRA in a network: how what adapters add, and how their gradients, depend on the rank."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora

WIDTH, RANKS, SEEDS = 256, (4, 16, 64, 256), range(2)


def network(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def sizes(rule, rank, seed):
    """The norms of what the adapters add to the output, and of the gradients of A and B.

    A and B are as training leaves them: independent numbers whose size does not depend on the rank. They are small
    beside W, so that the gradient that reaches them does not depend on it either.
    """
    keys = jax.random.split(jax.random.key(seed), 5)
    params = {
        name: jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for name, k in (("up", keys[0]), ("down", keys[1]))
    }
    x, target = (jax.random.normal(k, (32, WIDTH)) for k in keys[2:4])
    plan = lora.plan(network, params, x, rules={".*": rule(rank=rank, alpha=0.1)})
    fresh = lora.init(keys[4], params, plan)
    draws = (jax.random.fold_in(keys[4], i) for i in itertools.count())
    adapters = jax.tree.map(
        lambda a, moves: jax.random.normal(next(draws), a.shape) / WIDTH**0.5 if moves else a,
        fresh,
        lora.trainable_mask(fresh),
    )
    apply = lora.lora_apply(network)

    @jax.jit
    def measure(adapters):
        grads = jax.grad(lambda a: jnp.sum(target * apply(params, a, x)))(adapters)
        of_a, of_b = ([getattr(g, name) for g in grads.values()] for name in "ab")
        return jnp.linalg.norm(apply(params, adapters, x) - network(params, x)), *map(optax.tree.norm, (of_a, of_b))

    return measure(adapters)


@pytest.mark.parametrize(("rule", "slope"), [(lora.RsLora, 0.0), (lora.Lora, -0.5)], ids=["rslora", "lora"])
def test_outputs_and_gradients_are_as_flat_as_the_scale_makes_them(rule, slope):
    """alpha / sqrt(r): flat. alpha / r: as r^-1/2."""
    found = np.array([[sizes(rule, rank, seed) for rank in RANKS] for seed in SEEDS])  # [seeds, ranks, 3]
    slopes = np.polyfit(np.log(RANKS), np.log(found).mean(0), 1)[0]
    np.testing.assert_allclose(slopes, slope, atol=0.05)
