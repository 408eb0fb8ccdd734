"""Adapters in the trees that the real qwix makes: the same outputs here, and again there.

Needs qwix: `make test-interop`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

qwix = pytest.importorskip("qwix", reason="needs qwix: make test-interop")

import lora_jax as lora  # noqa: E402
from lora_jax.interop.qwix_trees import from_qwix, to_qwix  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flax's, of what qwix calls
X = jax.random.normal(jax.random.key(0), (3, 6))
ALPHA, RANK = 5.0, 2


class Nnx(nnx.Module):
    """Products that flatten, einsums as tunix has them, and experts."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 8, rngs=rngs)
        self.heads = nnx.Einsum("bd,dhs->bhs", (8, 2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=rngs)
        self.experts = nnx.Einsum("bed,edf->bef", (5, 6, 3), rngs=rngs)

    def __call__(self, x):
        y = self.out(self.heads(jax.nn.relu(self.dense(x))))
        return self.experts(jnp.broadcast_to(y[:, None], (len(y), 5, 6)))


class Linen(nn.Module):
    """Layers stacked by a scan along axis 1, as MaxText has them."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.DenseGeneral((2, 4), name="q")(x)
                return x + nn.DenseGeneral(6, axis=(-2, -1), name="o")(jax.nn.relu(y)), None

        layers = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


def randomised(tree):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return treedef.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def test_a_model_of_nnx():
    base = Nnx(nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(base, provider, X, rngs=nnx.Rngs(1))
    tree = randomised(nnx.state(model, nnx.LoRAParam))
    nnx.update(model, tree)
    apply, params, state = lora.from_nnx(Nnx(nnx.Rngs(0)))
    plan = lora.plan(apply, params, state, X, rules={".*kernel": lora.Lora(rank=RANK)})
    assert len(plan) == 4
    adapters = from_qwix(tree, plan, alpha=ALPHA)
    expected = model(X)
    found, _ = lora.lora_apply(apply)(params, adapters, state, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    nnx.update(model, jax.tree.map(jnp.zeros_like, tree))
    again = to_qwix(adapters, nnx.state(model, nnx.LoRAParam), alpha=ALPHA)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), again, tree)
    nnx.update(model, again)
    np.testing.assert_allclose(model(X), expected, rtol=1e-5, atol=1e-5)


def test_a_scanned_model_of_linen():
    model = qwix.apply_lora_to_model(Linen(), qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA))
    variables = model.init(jax.random.key(0), X)
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jax.random.normal(jax.random.key(len(str(path))), leaf.shape) if "lora" in str(path[-1]) else leaf
        ),
        variables,
    )
    assert sum("lora" in str(path[-1]) for path, _ in leaves) == 4
    params = {
        "params": {
            "layers": {
                n: {k: w for k, w in own.items() if "lora" not in k} for n, own in tree["params"]["layers"].items()
            }
        }
    }
    plan = lora.plan(Linen().apply, params, X, rules={".*kernel": lora.Lora(rank=RANK)})
    adapters = from_qwix(tree, plan, alpha=ALPHA)
    found = lora.lora_apply(Linen().apply)(params, adapters, X)
    np.testing.assert_allclose(found, model.apply(tree, X), rtol=1e-4, atol=1e-4)
    again = to_qwix(adapters, tree, alpha=ALPHA)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), again, tree)
