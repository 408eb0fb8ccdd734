"""JAX's strict promotion mode: what the plain model can do in it, the adapted one can too, and as the same program.

In it jax.numpy takes no two dtypes together that are not the same, so that every cast has to be asked for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KINDS, MODELS, RULES, normal, total

import lora_jax as lora

RULE = RULES["lora"]
ALL = RULES | KINDS | {"rows": lora.Rows((1, 3))}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
PLAIN = [case for case in MODELS if case.name not in ("bf16_activations", "integer_activations")]  # they mix dtypes
strict = jax.numpy_dtype_promotion("strict")


def traced(apply, case, adapters, params, x):
    """The programs of a call, of its gradient and of a call with dropout, as text."""

    def dropped(a, p, x):
        return apply(p, lora.with_dropout(a, jax.random.key(0), 0.5), x)

    programs = [lambda a, p, x: apply(p, a, x), dropped]
    if case.name != "while_loop":
        programs.append(jax.grad(lambda a, p, x: total(apply(p, a, x))))
    return [str(jax.make_jaxpr(program)(adapters, params, x)) for program in programs]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
@pytest.mark.sampled(5)
def test_every_program_is_the_same_one(case):
    params, x, adapters = case.params(), case.input(), case.adapters(RULE)
    expected = traced(lora.lora_apply(case.fn), case, adapters, params, x)
    with strict:
        assert list(lora.plan(case.fn, params, x, rules={case.pattern: RULE})) == list(adapters)
        assert traced(lora.lora_apply(case.fn), case, adapters, params, x) == expected
        jax.eval_shape(lora.merge, params, adapters)


def model(p, x):
    y = jnp.tanh(p["table"][jnp.array([0, 3, 1])] + jnp.tanh(x @ p["w"]))
    return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, p["layers"])[0] @ p["table"].T


SHAPES = {"w": (64, 64), "table": (5, 64), "layers": (2, 64, 64)}


def base(dtype):
    params = {name: jnp.asarray(normal((i,), s) / 8, dtype) for i, (name, s) in enumerate(SHAPES.items())}
    return params, jnp.asarray(normal((9,), (3, 64)), dtype)


def loss(adapters, params, x):
    return jnp.mean(lora.lora_apply(model)(params, adapters, x).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("rule", ALL)
@pytest.mark.sampled(8)
def test_every_kind_over_every_dtype(rule, dtype):
    """It plans, starts, applies, differentiates, drops and merges, with the numbers of the standard mode."""
    params, x = base(dtype)
    pattern = "table" if rule == "rows" else ".*" if rule in RULES else "w|layers"
    rules = {pattern: ALL[rule]}

    @jax.jit
    def run(params, x):
        plan = lora.plan(model, params, x, rules=rules)
        adapters = jax.tree.map(lambda a: a + jnp.asarray(0.01, a.dtype), lora.init(jax.random.key(0), params, plan))
        dropped = lora.lora_apply(model)(params, lora.with_dropout(adapters, jax.random.key(1), 0.5), x)
        return jax.value_and_grad(loss)(adapters, params, x), dropped, lora.merge(params, adapters)

    expected = run(params, x)
    with strict:
        found = run(params, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


FORMATS = [lora.bases.Nf4(), lora.bases.Nf4(double=False), lora.bases.Int8(), lora.bases.Fp8()]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("packing", FORMATS, ids=lambda packing: packing.__class__.__name__)
@pytest.mark.sampled(6)
def test_packed_bases(packing, dtype):
    params, x = base(dtype)
    adapters = lora.init(jax.random.key(0), params, lora.plan(model, params, x, rules={"w|layers": RULE}))
    with strict:
        packed = lora.bases.quantize(params, {"w|layers": packing})
        lora.plan(model, packed, x, rules={"w|layers": RULE})
        assert lora.lora_apply(model)(packed, {}, x).dtype == dtype
        value, gradient = jax.jit(jax.value_and_grad(loss))(adapters, packed, x)
        merged, _ = lora.bases.merge(packed, adapters)
        dense = lora.bases.dense(packed)
    assert jnp.isfinite(value)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
    assert merged["w"].shape == dense["w"].shape == params["w"].shape


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adamw": lora.freeze_base(optax.adamw(1e-3, mask=lora.decay_mask)),
    "lora_plus": lora.lora_plus(optax.adam, 1e-3),
    "lora_fa": lora.lora_fa(1e-3, weight_decay=0.1),
    "riemannian": optax.chain(lora.riemannian(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sampled(5)
def test_steps(name):
    params, x = base(jnp.bfloat16)
    adapters = lora.init(jax.random.key(0), params, lora.plan(model, params, x, rules={"w|layers": RULE}))
    optimizer = OPTIMIZERS[name]
    with strict:
        state = lora.TrainState.create(jax.tree.map(jnp.copy, adapters), optimizer, loss_scale=lora.LossScale.create())
        state, metrics = lora.jit_step(loss, optimizer, microbatches=3)(state, params, x)
    assert jnp.isfinite(metrics["loss"])


def test_starts_and_sums():
    params, x = base(jnp.bfloat16)
    fresh = lora.init(jax.random.key(0), params, lora.plan(model, params, x, rules={"w": RULE}))
    rows = {"w": jnp.ones((6, 64), jnp.bfloat16) + jnp.eye(6, 64, dtype=jnp.bfloat16)}
    with strict:
        for start in (lora.starts.pissa, lora.starts.olora):
            changed, started = start(params, fresh)
            assert changed["w"].dtype == jnp.bfloat16
        lora.starts.orthogonal(jax.random.key(0), fresh)
        lora.starts.eva(fresh, rows)
        lora.starts.lora_ga(params, fresh, {"w": params["w"]})
        lora.starts.loftq(params, fresh, lora.bases.Nf4())
        both = lora.combine([(fresh, 0.5), (started, -1.0)])
    assert both["w"].a.shape == (64, 4)
