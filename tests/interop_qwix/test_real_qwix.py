"""The real qwix: its packed weights are read as it reads them, and what is packed again is packed as it does it.

Needs qwix: `make test-interop`.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

qwix = pytest.importorskip("qwix", reason="needs qwix: make test-interop")

import lora_jax as lora  # noqa: E402
from lora_jax import bases  # noqa: E402
from lora_jax.core.paths import flatten_with_names  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")

QTYPES = [jnp.int8, jnp.int4, "int3", "nf4", jnp.float8_e4m3fn]
SMALL = [("mxfp8", "tiles"), ("mxfp4", "tiles"), ("nvfp4", "small tiles")]  # are made of tiles of one size only
WAYS = {
    "channels": {"channelwise_axes": (2,)},
    "stack": {"channelwise_axes": (0, 2)},
    "tiles": {"channelwise_axes": (0, 2), "tiled_axes": {1: 32}},
    "whole": {},
}


def packed(qtype, way, dtype=jnp.float32, **rest):
    w = jax.random.normal(jax.random.key(0), (3, 64, 20), dtype)
    how = {"channelwise_axes": (0, 2), "tiled_axes": {1: 16}} if way == "small tiles" else WAYS[way]
    return w, qwix.quantize(w, qtype, **how, **rest)


def ours(array):
    return flatten_with_names({"w": array})[1][0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("qtype", "way"), [*itertools.product(QTYPES, WAYS), *SMALL], ids=str)
def test_values_are_those_of_qwix(qtype, way, dtype):
    _, array = packed(qtype, way, dtype)
    weight = ours(array)
    assert (weight.dtype, weight.shape) == (dtype, (3, 64, 20))
    assert weight.stack == (() if way in ("channels", "whole") else (3,))
    np.testing.assert_array_equal(weight.dense().astype(jnp.float32), qwix.dequantize(array).astype(jnp.float32))


@pytest.mark.parametrize(
    ("qtype", "way", "method"),
    [
        *((*case, "absmax") for case in [*itertools.product(QTYPES, WAYS), *SMALL]),
        *((*case, "minmax") for case in itertools.product([jnp.int8, jnp.int4], WAYS)),
    ],
    ids=str,
)
def test_a_weight_is_packed_again_as_qwix_packs_it(qtype, way, method):
    w, array = packed(qtype, way, calibration_method=method)
    again = ours(jax.tree.map(jnp.zeros_like, array)).repack_like(w)
    found, expected = jax.tree.leaves(again), jax.tree.leaves(array)
    assert len(found) == (3 if method == "minmax" else 2)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, name="in")(x))
        x = nn.DenseGeneral((4, 16), name="heads")(x)
        return nn.DenseGeneral(8, axis=(-2, -1), name="out")(x)


@pytest.mark.parametrize("qtype", ["nf4", "int8"])
def test_parameters_that_qwix_quantised(qtype):
    """They go where the model's own parameters went; merged, they run in qwix's own model."""
    model, x = Model(), jax.random.normal(jax.random.key(1), (5, 32))
    params = model.init(jax.random.key(0), x)
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=qtype, tile_size=16 if qtype == "nf4" else None)
    served = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    abstract = jax.eval_shape(served.init, jax.random.key(0), x)
    base = {"params": qwix.quantize_params(params["params"], abstract["params"])}
    plan = lora.plan(model.apply, base, x, rules={".*/kernel": lora.Lora(rank=2)})
    assert list(plan) == ["params/heads/kernel", "params/in/kernel", "params/out/kernel"]
    adapters = lora.init(jax.random.key(2), base, plan)
    apply = jax.jit(lora.lora_apply(model.apply))
    np.testing.assert_allclose(apply(base, adapters, x), served.apply(base, x), rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda array: array + 0.3 * jax.random.normal(jax.random.key(3), array.shape), adapters)
    whole = apply(base, moved, x)
    np.testing.assert_allclose(model.apply(lora.merge(base, moved), x), whole, rtol=1e-3, atol=1e-3)
    merged, losses = bases.merge(base, moved)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert max(losses.values()) < (0.5 if qtype == "nf4" else 0.05)
    gap = jnp.linalg.norm(served.apply(merged, x) - whole) / jnp.linalg.norm(whole)
    assert gap < (0.3 if qtype == "nf4" else 0.03)
