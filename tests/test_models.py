"""Flax models as functions: parameters apart from all that changes in a call."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_trees_close, trained

import lora_jax as lora

X = jax.random.normal(jax.random.key(1), (5, 6))
RULES = {".*kernel": lora.Lora(rank=2, alpha=3)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(7)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(3)(x)

    def hidden(self, x):
        return 2 * x


class NetX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(6, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(7, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))

    def encode(self, x):
        return self.first(x)


def test_linen_statistics_move_and_parameters_do_not():
    model = Net()
    fn, params, state = lora.from_linen(model, model.init(jax.random.key(0), X))
    rngs = {"dropout": jax.random.key(2)}
    plan = lora.plan(fn, params, state, X, rules=RULES)
    adapters = trained(lora.init(jax.random.key(0), params, plan), key=3)
    apply = lora.lora_apply(fn)
    merged = {"params": lora.merge(params, adapters), **state}

    found, moved = apply(params, adapters, state, X, train=True, rngs=rngs)
    expected, moves = model.apply(merged, X, train=True, rngs=rngs, mutable=["batch_stats"])
    assert_trees_close(found, expected)
    assert_trees_close(moved["batch_stats"], moves["batch_stats"])
    assert not np.allclose(moved["batch_stats"]["BatchNorm_0"]["mean"], state["batch_stats"]["BatchNorm_0"]["mean"])
    assert_trees_close(apply(params, adapters, state, X)[0], model.apply(merged, X))
    assert_trees_close(apply(params, adapters, state, X, method=Net.hidden)[0], 2 * X)


def test_linen_in_a_train_state_of_flax():
    model = Net()
    fn, params, state = lora.from_linen(model, model.init(jax.random.key(0), X))
    adapters = lora.init(jax.random.key(0), params, lora.plan(fn, params, state, X, rules=RULES))
    train = TrainState.create(apply_fn=lora.lora_apply(fn), params=adapters, tx=lora.freeze_base(optax.sgd(0.1)))

    @jax.jit
    def step(train, params, state):
        def loss(adapters):
            out, moved = train.apply_fn(params, adapters, state, X, train=True, rngs={"dropout": jax.random.key(1)})
            return jnp.mean((out - 1) ** 2), moved

        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(train.params)
        return train.apply_gradients(grads=grads), moved, value

    losses = []
    for _ in range(5):
        train, state, value = step(train, params, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]


def test_nnx_statistics_and_random_streams_move():
    model = NetX(nnx.Rngs(0))
    fn, params, state = lora.from_nnx(model)
    plan = lora.plan(fn, params, state, X, rules=RULES)
    assert list(plan) == ["first/kernel", "second/kernel"]
    adapters = trained(lora.init(jax.random.key(0), params, plan), key=3)
    apply = jax.jit(lora.lora_apply(fn), static_argnames="method")

    nnx.update(model, lora.merge(params, adapters))
    for _ in range(2):  # the second call has other masks than the first, as the model's own
        found, state = apply(params, adapters, state, X)
        assert_trees_close(found, model(X))
    others = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    for moved, own in zip(jax.tree.leaves(state), others, strict=True):
        keys = jnp.issubdtype(own.dtype, jax.dtypes.prng_key)
        np.testing.assert_allclose(*(jax.random.key_data(v) if keys else v for v in (moved, own)), rtol=1e-5)
    encoded, _ = apply(params, adapters, state, X, method="encode")
    assert_trees_close(encoded, model.encode(X))


@pytest.mark.parametrize(("variables", "found"), [({"kernel": 1}, "kernel"), ([1], "list")])
def test_linen_takes_all_variables(variables, found):
    with pytest.raises(lora.LoraError, match=f"as model.init gives them, found .*{found}"):
        lora.from_linen(nn.Dense(3), variables)


# Purity ---------------------------------------------------------------------------------------------------------------


def numbers(*trees):
    """Return what is in the trees, in arrays that nothing moves any more."""
    return [
        np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in map(jnp.asarray, jax.tree.leaves(trees))
    ]


class Counts(nn.Module):
    """A model with a collection of its own, which grows by what it sees."""

    @nn.compact
    def __call__(self, x, train=True):
        seen = self.variable("counts", "seen", lambda: {"rows": jnp.zeros(()), "calls": [jnp.zeros(())]})
        rows, [calls] = seen.value["rows"], seen.value["calls"]
        if not self.is_initializing():
            seen.value = {"rows": rows + len(x), "calls": [calls + 1]}
        return nn.Dense(3)(x) + rows


class Cached(nnx.Module):
    """A model that keeps what it saw, and writes into a parameter too."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 3, rngs=rngs)
        self.cache, self.calls = nnx.Cache(jnp.zeros(3)), nnx.Variable(jnp.zeros((), int))

    def __call__(self, x):
        out = self.linear(x) + self.cache[...][None]
        self.cache[...] = out.mean(0)
        self.calls[...] += 1
        self.linear.bias[...] = self.linear.bias[...] + 1
        return out


def of_linen(model):
    return lora.from_linen(model, model.init(jax.random.key(0), X))


PURE = {
    "batch norm and dropout of Linen": lambda: of_linen(Net()),
    "counts of Linen": lambda: of_linen(Counts()),
    "batch norm and dropout of NNX": lambda: lora.from_nnx(NetX(nnx.Rngs(0))),
    "cache of NNX": lambda: lora.from_nnx(Cached(nnx.Rngs(0))),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[] if "cache" in name else pytest.mark.slow)
        for name in PURE
        for how in ("alone", "with adapters")
    ],
)
def test_functions_of_params_and_state_are_pure(name, how):
    """The same call twice gives the same, in each way; and what was passed is what it was."""
    fn, params, state = PURE[name]()
    kwargs = {"train": True} if "Linen" in name else {}
    if "dropout of Linen" in name:
        kwargs["rngs"] = {"dropout": jax.random.key(5)}
    merged = params
    if how == "with adapters":
        plan = lora.plan(fn, params, state, X, rules=RULES, **kwargs)
        adapters = trained(lora.init(jax.random.key(1), params, plan), key=3)
        merged, apply = lora.merge(params, adapters), lora.lora_apply(fn)
        before = numbers(params, state)

        def run(params, state, x):
            return apply(params, adapters, state, x, **kwargs)
    else:
        before = numbers(params, state)

        def run(params, state, x):
            return fn(params, state, x, **kwargs)

    def loss(params, state):
        return run(params, state, X)[0].sum()

    rows = jnp.stack([X, 2 * X])
    ways = {
        "eager": lambda: run(params, state, X),
        "jit": lambda: jax.jit(run)(params, state, X),
        "grad of a closure": lambda: jax.grad(lambda p: loss(p, state))(params),
        "jit of grad": lambda: jax.jit(jax.grad(loss))(params, state),
        "jvp": lambda: jax.jvp(lambda x: run(params, state, x)[0], (X,), (X,)),
        "vmap": lambda: jax.vmap(lambda x: run(params, state, x))(rows),
        "scan of a closure": lambda: jax.lax.scan(lambda c, x: (c, run(params, state, x)[0]), 0, rows),
    }
    for way, call in ways.items():
        first, second = call(), call()
        for a, b in zip(numbers(first), numbers(second), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=way)
        for a, b in zip(numbers(params, state), before, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=way)
    expected, moves = fn(merged, state, X, **kwargs)
    found, moved = run(params, state, X)
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4)
    assert any(np.any(a != b) for a, b in zip(numbers(moved), numbers(state), strict=True)), "the state moves on"
    for a, b in zip(numbers(moved), numbers(moves), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PURE)
def test_a_returned_state_is_pure_too(name):
    """A later call that begins with it leaves it as it is."""
    fn, params, state = PURE[name]()
    kwargs = {"rngs": {"dropout": jax.random.key(5)}, "train": True} if "dropout of Linen" in name else {}
    returned = fn(params, state, X, **kwargs)
    kept = numbers(*returned)
    fn(params, returned[1], X, **kwargs)
    for a, b in zip(numbers(*returned), kept, strict=True):
        np.testing.assert_array_equal(a, b)
