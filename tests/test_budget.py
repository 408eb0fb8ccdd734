"""AdaLoRA's budget: HF PEFT's trajectories, the exact target, and the smaller arrays at the end."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODELS, assert_trees_close, trained, trained_leaves
from safetensors.numpy import load_file

import lora_jax as lora

TRAIN = Path(__file__).parent / "data" / "peft" / "train"
AXES = lora.KernelAxes((), (0,), (1,))


def model(p, x):
    x = jnp.tanh(jnp.matmul(x, p["lin0.weight"], precision="highest") + p["lin0.bias"][None])
    return jnp.matmul(x, p["lin1.weight"], precision="highest") + p["lin1.bias"][None]


def from_torch(tensors, prefix):
    def one(name):
        a, b, e = (jnp.asarray(tensors[f"{prefix}.{name}.lora_{x}.default"].T) for x in "ABE")
        return lora.AdaLoraAdapter(a, e[0], b, AXES, 4 / (4 + 1e-5))

    return {f"{name}.weight": one(name) for name in ("lin0", "lin1")}


@pytest.mark.parametrize(
    ("name", "weight", "interval", "first"),
    [("adalora_adamw", 0.5, 1, 0), ("adalora_noreg_adamw", 0.0, 1, 0), ("adalora_full_schedule", 0.5, 2, -1)],
)
def test_training_goes_as_with_hf_peft(name, weight, interval, first):
    """With tinit 2, tfinal 3 and 12 steps in all: the first five, or all and two more, counted from 0 on."""
    tensors = load_file(TRAIN / f"{name}.safetensors")
    base = {key.removeprefix("base."): jnp.asarray(t.T) for key, t in tensors.items() if key.startswith("base.")}
    adapters, apply = from_torch(tensors, "init"), lora.lora_apply(model)
    optimizer = lora.adapt_budget(optax.adamw(0.01, weight_decay=0.01), 2, 12, warmup=2, final=3, interval=interval)

    @jax.jit
    def step(adapters, state, x, y):
        def loss(adapters):
            return jnp.mean(jnp.square(apply(base, adapters, x) - y)) + weight * lora.orthogonality(adapters)

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimizer.init(adapters), []
    state = state._replace(step=state.step + first)
    for x, y in list(zip(tensors["X"], tensors["Y"], strict=True))[: len(tensors["losses"])]:
        adapters, state, value = step(adapters, state, x, y)
        losses.append(value)
    np.testing.assert_allclose(losses, tensors["losses"], atol=1e-5)
    assert_trees_close(*map(trained_leaves, (adapters, from_torch(tensors, "final"))), rtol=1e-5, atol=1e-5)
    pattern = json.loads((TRAIN / f"{name}.rank_pattern.json").read_text())
    for kept, mask in zip(adapters.values(), pattern.values(), strict=True):
        np.testing.assert_array_equal(kept.e != 0, mask)


@pytest.mark.parametrize("name", ["two_layers", "scan_over_remat"])
def test_the_target_is_reached_exactly_and_pruned_adapters_are_the_same(name):
    case = next(c for c in MODELS if c.name == name)
    params, x = case.params(), case.input()
    plan = lora.plan(case.fn, params, x, rules={case.pattern: lora.AdaLora(rank=4)})
    adapters = trained(lora.init(jax.random.key(0), params, plan), 1)
    apply = lora.lora_apply(case.fn)
    optimizer = lora.adapt_budget(lora.freeze_base(optax.adam(1e-2)), 2, 8, warmup=1, final=2)
    step = lora.jit_step(lambda a, p, x: jnp.mean(jnp.square(apply(p, a, x))), optimizer)
    state, left = lora.TrainState.create(adapters, optimizer), []
    for _ in range(8):
        state, _ = step(state, params, x)
        left.append(sum(int((a.e != 0).sum()) for a in state.trainable.values()))
    matrices = sum(a.e.size // a.e.shape[-1] for a in state.trainable.values())
    assert left[0] == 4 * matrices
    assert left == sorted(left, reverse=True)
    assert left[-3:] == [2 * matrices] * 3
    pruned = lora.prune(state.trainable)
    for path, adapter in pruned.items():
        assert adapter.e.shape[-1] == max(1, int((state.trainable[path].e != 0).sum(-1).max()))
    assert_trees_close(lora.merge(params, pruned), lora.merge(params, state.trainable), rtol=1e-6, atol=1e-6)
    assert_trees_close(apply(params, pruned, x), apply(params, state.trainable, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target_rank": 0}, "at least 1"),
        ({"target_rank": 5}, "higher rank"),
        ({"interval": 0}, "at least 1"),
        ({"warmup": 8, "final": 2}, "leaves no steps"),
        ({"final": 10}, "leaves no steps"),
    ],
)
def test_schedules_that_cannot_be(given, says):
    adapters = {"w": lora.AdaLoraAdapter(jnp.ones((6, 4)), jnp.ones(4), jnp.ones((4, 5)), AXES, 1.0)}
    with pytest.raises(lora.LoraError, match=says):
        lora.adapt_budget(optax.sgd(1.0), **({"target_rank": 2, "total_steps": 10} | given)).init(adapters)


def test_what_it_needs():
    optimizer = lora.adapt_budget(optax.sgd(1.0), 2, 10)
    with pytest.raises(lora.LoraError, match="AdaLora"):
        optimizer.init({"w": jnp.ones(3)})
    adapters = {"w": lora.AdaLoraAdapter(jnp.ones((6, 4)), jnp.ones(4), jnp.ones((4, 5)), AXES, 1.0)}
    with pytest.raises(lora.LoraError, match="parameters"):
        optimizer.update(adapters, optimizer.init(adapters))
