"""A program of a user of the library, with the types that mypy and pyright find in it. It is checked, and not run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax import bases, checkpoint, initializers, key_maps, starts


class Params(TypedDict):
    up: jax.Array
    down: jax.Array


def model(params: Params, x: jax.Array, *, scale: float = 1.0) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"] * scale


def rules() -> dict[str, lora.Rule | None]:
    assert_type(lora.Lora(rank=8, alpha=16.0, init_a=initializers.gaussian, dtype=jnp.bfloat16, stack=0), lora.Lora)
    assert_type(lora.Lora(rank=8).scale, float)
    return {
        ".*/norm": None,
        "up": lora.RsLora(rank=lambda path, shape: min(8, *shape)),
        "down": lora.Dora(rank=4),
        "table": lora.Rows(indices=(5, 7)),
        ".*bias": lora.Full(),
    }


def plans(params: Params, x: jax.Array) -> lora.Plan:
    plan = lora.plan(model, params, x, rules={".*": lora.Lora(rank=8)}, materialize=".*norm")
    assert_type(plan, lora.Plan)
    assert_type(plan.parameters, int)
    assert_type(plan.fraction, float)
    assert_type(plan.table(grouped=False), str)
    for path, target in plan.items():
        assert_type(path, str)
        assert_type(target.shape, tuple[int, ...])
        assert_type(target.axes, lora.KernelAxes)
    return plan


def applies(params: Params, plan: lora.Plan, x: jax.Array) -> jax.Array:
    adapters = lora.init(jax.random.key(0), params, plan)
    assert_type(adapters, dict[str, lora.Adapter])
    apply = lora.lora_apply(model)
    y = apply(params, adapters, x, scale=2.0)
    assert_type(y, jax.Array)
    assert_type(lora.merge(params, adapters), Params)
    dropped = lora.with_dropout(adapters, jax.random.key(1), rate=0.1)
    assert_type(dropped, dict[str, lora.Adapter])
    assert_type(lora.combine([(adapters, 0.5), (dropped, -0.5)]), dict[str, lora.Adapter])
    q = adapters["up"]
    if isinstance(q, lora.LoraAdapter):
        assert_type(q.a, jax.Array)
    assert_type(q.axes, lora.KernelAxes)
    return apply(params, {"up": q}, x)


def misuse(params: Params, adapters: Mapping[str, lora.Adapter], x: jax.Array) -> None:
    """What a checker has to refuse: each comment would be an error of its own, if it were not needed."""
    apply = lora.lora_apply(model)
    apply(adapters, params, x)  # type: ignore[arg-type]
    apply(params, adapters, x, sclae=2.0)  # type: ignore[call-arg]
    lora.Lora(rank="8")  # type: ignore[arg-type]
    lora.plan(model, params, x, rules=lora.Lora(rank=8))  # type: ignore[arg-type]


def trains(params: Params, adapters: dict[str, lora.Adapter], x: jax.Array) -> dict[str, lora.Adapter]:
    apply = lora.lora_apply(model)

    def loss(trainable: Mapping[str, lora.Adapter], params: Params, x: jax.Array) -> jax.Array:
        return jnp.mean(apply(params, trainable, x) ** 2)

    optimizer = lora.freeze_base(optax.adam(1e-3))
    state = lora.TrainState.create(adapters, optimizer, key=jax.random.key(0))
    assert_type(state, lora.TrainState)
    step = lora.jit_step(loss, optimizer, microbatches=2)
    state, metrics = step(state, params, x)
    assert_type(state, lora.TrainState)
    assert_type(metrics, dict[str, jax.Array])
    step.lower(state, params, x).compile()
    (_, _), gradient = lora.value_and_grad(loss)(adapters, params, x)
    updates: Any = jax.tree.map(jnp.zeros_like, gradient)
    trained: Any = optax.apply_updates(state.trainable, updates)
    assert_type(lora.combine([(adapters, 0.5)]), dict[str, lora.Adapter])
    merged, kept = lora.merge(params, adapters, keep=True)
    assert_type(kept, dict[str, Any])
    assert_type(lora.unmerge(merged, kept), Params)
    return dict(trained)


def saves(folder: Path, params: Params, adapters: dict[str, lora.Adapter], plan: lora.Plan) -> None:
    checkpoint.save(folder / "adapters", adapters, {"head": jnp.zeros(3)})
    loaded, others = checkpoint.load(folder / "adapters")
    assert_type(loaded, dict[str, lora.Adapter])
    assert_type(others, dict[str, Any])
    state = lora.TrainState.create(adapters, optax.sgd(0.1))
    with lora.Checkpoints(folder / "run", params, plan) as run:
        run.save(state)
        restored, _ = run.restore(state)
        assert_type(restored, lora.TrainState)
        assert_type(run.steps, list[int])


MINE = key_maps.KeyMap(
    key_maps.linear("layers_{i}/up", "model.layers.{i}.up_proj"),
    key_maps.array("layers_{i}/norm", "model.layers.{i}.norm.weight"),
)


def exchanges(folder: Path, params: Params, adapters: dict[str, lora.Adapter]) -> None:
    lora.save_peft(folder / "peft", adapters, MINE)
    found, others = lora.load_peft(folder / "peft", params, key_maps.LLAMA.stacked())
    assert_type(found, dict[str, lora.Adapter])
    assert_type(others, dict[str, jax.Array])
    losses = lora.merge_checkpoint(folder / "in", target=folder / "out", adapters=found, key_map=MINE)
    assert_type(losses, dict[str, float])


def packs(params: Params, adapters: dict[str, lora.LoraAdapter]) -> None:
    packed = bases.quantize(params, {"up": bases.Nf4(), "down": bases.Int8(inputs=1)})
    lora.merge(bases.dense(packed), adapters)
    base, start = starts.pissa(params, adapters)
    assert_type(start, dict[str, lora.LoraAdapter])
    del base


def looks(params: Params, adapters: dict[str, lora.Adapter]) -> None:
    report = lora.inspect(adapters)
    for path, weight in report.items():
        assert_type(path, str)
        assert_type(weight.norm, float | None)
    changes = lora.diff(params, lora.merge(params, adapters))
    assert_type(changes["up"].rank, int | None)
    assert_type(changes.mismatches, dict[str, str])


def ranks(plan: lora.Plan, gradients: Any) -> None:
    scores = lora.gradient_scores(plan, gradients)
    assert_type(scores, dict[str, np.ndarray])
    lora.plan(model, gradients, jnp.ones(3), rules={".*": lora.Lora(rank=lora.allocate_ranks(scores, budget=1000))})
