"""Adapters that Keras has trained, in the file that keras-hub writes with Keras's own store.

keras-hub itself needs tensorflow-text: `save` and `load` here do what its `Backbone` does (0.32, `models/backbone.py`).
"""

import jax.numpy as jnp
import numpy as np
import pytest
from check import D, tokens
from test_keras import keras, layers

import lora_jax as lora
from lora_jax.interop.keras_lora import load_keras_lora, save_keras_lora

pytest.importorskip("h5py", reason="h5py is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own variables
RANK = 2


def backbone():
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(tokens().shape[1:]),
            layers.LayerNormalization(),
            layers.EinsumDense("btd,dhk->bthk", (None, 2, 3), name="query"),
            layers.EinsumDense("bthk,hkd->btd", (None, D), name="attention_output"),
        ]
    )
    return model, [layer for layer in model._flatten_layers(include_self=False) if layer.weights]


def save(path, own):
    store = keras.src.saving.saving_lib.H5IOStore(path, mode="w")
    store.make("lora")["rank"] = RANK
    for index, layer in enumerate(own):
        if getattr(layer, "lora_enabled", False):
            inner = store.make(f"lora/{index}")
            inner["lora_kernel_a"], inner["lora_kernel_b"] = layer.lora_kernel_a, layer.lora_kernel_b
    store.close()


def load(path, own):
    store = keras.src.saving.saving_lib.H5IOStore(path, mode="r")
    assert int(store.get("lora")["rank"][()]) == RANK
    for index, layer in enumerate(own):
        if getattr(layer, "lora_enabled", False):
            layer.lora_kernel_a.assign(store.get(f"lora/{index}")["lora_kernel_a"])
            layer.lora_kernel_b.assign(store.get(f"lora/{index}")["lora_kernel_b"])
    store.close()


def test_keras_and_back(tmp_path):
    model, own = backbone()
    names = [v.path for v in model.trainable_variables]
    params = {v.path: jnp.asarray(v.value) for v in model.trainable_variables}

    def apply(params, x):
        return model.stateless_call([params[name] for name in names], [], x)[0]

    plan = lora.plan(apply, params, tokens(), rules={".*kernel": lora.Lora(rank=RANK)})
    paths = [layer.path for layer in own]
    with_lora, theirs = backbone()
    for layer in theirs:
        if layer.name in ("query", "attention_output"):
            layer.enable_lora(RANK)
            layer.lora_kernel_b.assign(np.random.default_rng(1).normal(size=layer.lora_kernel_b.shape))
    expected = np.asarray(with_lora(tokens()))
    save(tmp_path / "a.lora.h5", theirs)
    adapters = load_keras_lora(tmp_path / "a.lora.h5", plan, paths)
    found = lora.lora_apply(apply)(params, adapters, tokens())
    assert np.abs(expected - np.asarray(apply(params, tokens()))).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for layer in theirs:
        if getattr(layer, "lora_enabled", False):
            layer.lora_kernel_b.assign(0 * layer.lora_kernel_b)
    save_keras_lora(tmp_path / "b.lora.h5", adapters, paths)
    load(tmp_path / "b.lora.h5", theirs)
    np.testing.assert_allclose(np.asarray(with_lora(tokens())), expected, rtol=1e-5, atol=1e-6)
