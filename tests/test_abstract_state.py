"""`lora.abstract_state` says what the real state is, and where: before the first step on a mesh, and after it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

import lora_jax as lora

MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"up": P(None, None, "tensor"), "down": P(None, "tensor")}
PARAMS = {
    "up": jax.random.normal(jax.random.key(0), (2, 16, 32)) / 4,
    "down": jax.random.normal(jax.random.key(1), (2, 32, 16)) / 6,
}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "freeze_base": lora.freeze_base(optax.adamw(1e-3)),
    "masked": optax.masked(optax.adam(1e-3), lora.trainable_mask),
    "clipped and masked": optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3, mask=lora.decay_mask), lora.trainable_mask)
    ),
    "groups": optax.multi_transform(
        {"slow": optax.adam(1e-4), "fast": optax.lion(1e-3), "freeze": optax.set_to_zero()},
        lambda tree: lora.labels(tree, {"up/.*": "slow", ".*": "fast"}),
    ),
    "lora_plus": lora.lora_plus(optax.adamw, 1e-3),
    "several steps": optax.MultiSteps(lora.freeze_base(optax.adam(1e-3)), 2).gradient_transformation(),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.constant_schedule(1e-3)),
    "bf16 moments": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-3, 10)),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "adafactor whole": optax.adafactor(1e-3),
    "riemannian": optax.chain(lora.riemannian(), optax.sgd(1e-2, momentum=0.9)),
    "average": optax.chain(optax.adam(1e-3), optax.ema(0.9)),
    "lookahead": optax.contrib.schedule_free_adamw(1e-3),
}


def model(params, x):
    return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None), x, params)[0]


@pytest.fixture(scope="module")
def arguments():
    params = jax.tree.map(lambda w, spec: jax.device_put(w, NamedSharding(MESH, spec)), PARAMS, SPECS)
    x = jax.device_put(jnp.ones((4, 16)), NamedSharding(MESH, P("data")))
    plan = lora.plan(model, params, x, rules={"up": lora.Lora(rank=2), "down": lora.Dora(rank=2)})
    return params, x, plan, lora.init(jax.random.key(0), params, plan)


@pytest.mark.parametrize(
    "policy", ["replicate", "inherit", lambda path, spec: P(*spec[:1])], ids=["replicate", "inherit", "function"]
)
def test_adapters_are_where_a_policy_has_them(policy, arguments):
    params, _, plan, _ = arguments
    adapters = lora.init(jax.random.key(0), params, plan, lora.adapter_shardings(params, plan, policy=policy))
    shapes = lora.abstract(PARAMS, MESH, SPECS)
    found = lora.abstract_state(shapes, plan, OPTIMIZERS["masked"], policy=policy)
    check_alike(found, lora.TrainState.create(adapters, OPTIMIZERS["masked"]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_abstract_state_is_the_real_one(name, arguments):
    _, _, plan, adapters = arguments
    found = lora.abstract_state(lora.abstract(PARAMS, MESH, SPECS), plan, OPTIMIZERS[name])
    check_alike(found, lora.TrainState.create(adapters, OPTIMIZERS[name]))
    is_split = any("tensor" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(found.opt_state))
    assert is_split == (name != "adafactor")  # whose moments are sums over an axis


@pytest.mark.sampled(15)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_stays_where_it_is_in_a_step(name, arguments):
    params, x, plan, adapters = arguments
    apply = lora.lora_apply(model)
    step = lora.jit_step(lambda adapters, params, x: jnp.mean(apply(params, adapters, x) ** 2), OPTIMIZERS[name])
    state, _ = step(lora.TrainState.create(adapters, OPTIMIZERS[name]), params, x)
    check_alike(lora.abstract_state(lora.abstract(PARAMS, MESH, SPECS), plan, OPTIMIZERS[name]), state)


def check_alike(shapes, arrays):
    assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
    for (path, shape), array in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(arrays), strict=True):
        name = jax.tree_util.keystr(path)
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype), name
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim), (name, shape.sharding, array.sharding)
