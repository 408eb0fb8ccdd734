"""Key maps of other libraries' trees against those libraries' own readers of published files.

keras-hub 0.32.0 and google-tunix 0.1.7 agree bit by bit. They bring gigabytes, and are not among what is installed for
these tests: whoever has one of them runs it.
"""

import dataclasses
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax import key_maps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within these libraries

D, HEADS, GROUPS, SIZE, HIDDEN, VOCABULARY, LAYERS = 12, 4, 2, 8, 10, 11, 2


def published(d=D, heads=HEADS, groups=GROUPS, gemma=False, norms_of_heads=False):
    """A model's tensors as transformers names them."""
    shapes = {"model.embed_tokens": (VOCABULARY, d), "model.norm": (d,)}
    if not gemma:
        shapes["lm_head"] = (VOCABULARY, d)
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shapes |= {
            f"{attention}.{name}_proj": (n * SIZE, d) for name, n in zip("qkv", (heads, groups, groups), strict=True)
        }
        shapes |= {f"{attention}.o_proj": (d, heads * SIZE), f"{mlp}.down_proj": (d, HIDDEN)}
        shapes |= {f"{mlp}.{name}_proj": (HIDDEN, d) for name in ("gate", "up")}
        shapes |= {f"{attention}.{name}_norm": (SIZE,) for name in ("qk" if norms_of_heads else "")}
        norms = ["input", "post_attention", *(["pre_feedforward", "post_feedforward"] if gemma else [])]
        shapes |= {f"model.layers.{i}.{name}_layernorm": (d,) for name in norms}
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def check(tensors, params, key_map):
    """The library's parameters are torch's tensors by the key map, in both directions."""
    found = lora.to_torch(params, key_map)
    assert {*found} == {*tensors}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    stored = lora.bases.from_torch(tensors, params, key_map)
    for path, leaf in params.items():
        np.testing.assert_array_equal(np.asarray(stored[path].read()), leaf, err_msg=path)


class Loader:
    """What keras-hub's converters ask for tensors."""

    def __init__(self, tensors):
        self.tensors = tensors

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        name = hf_weight_key if hf_weight_key in self.tensors else f"model.{hf_weight_key}"
        tensor = self.tensors[name]
        keras_variable.assign(tensor if hook_fn is None else hook_fn(tensor, list(keras_variable.shape)))


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3"])
def test_keras_hub(family):
    keras_hub = pytest.importorskip("keras_hub", reason="keras-hub is not installed")
    converters = pytest.importorskip("keras_hub.src.utils.transformers")
    __import__(f"{converters.__name__}.convert_{family}")
    options = {"vocabulary_size": VOCABULARY, "num_layers": LAYERS, "intermediate_dim": HIDDEN}
    options |= {"num_query_heads": HEADS, "num_key_value_heads": GROUPS}
    if family == "llama3":
        tensors = published(d=HEADS * SIZE)
        model = keras_hub.models.Llama3Backbone(hidden_dim=HEADS * SIZE, tie_word_embeddings=False, **options)
    elif family == "qwen3":
        tensors, options = published(norms_of_heads=True), options | {"hidden_dim": D, "head_dim": SIZE}
        model = keras_hub.models.Qwen3Backbone(tie_word_embeddings=False, **options)
    else:
        tensors, options = published(gemma=True, norms_of_heads=True), options | {"hidden_dim": D, "head_dim": SIZE}
        norms = {"use_query_key_norm": True, "use_post_ffw_norm": True, "use_post_attention_norm": True}
        model = keras_hub.models.Gemma3Backbone(image_size=16, **norms, **options)
    getattr(converters, f"convert_{family}").convert_weights(model, Loader(tensors), {"model_type": "gemma3_text"})
    params = {variable.path: np.asarray(variable.value) for variable in model.weights}
    check(tensors, params, key_maps.KERAS_GEMMA if family == "gemma3" else key_maps.KERAS_LLAMA)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma3", "gemma3 with as many keys as queries"])
def test_tunix(family, tmp_path):
    models = pytest.importorskip("tunix.models", reason="tunix is not installed")
    nnx = pytest.importorskip("flax.nnx")
    sizes = {"num_layers": LAYERS, "embed_dim": D, "hidden_dim": HIDDEN, "num_heads": HEADS, "head_dim": SIZE}
    name = family.split()[0]
    groups = HEADS if name != family else GROUPS
    model = pytest.importorskip(f"{models.__name__}.{name}.model")
    if name == "gemma3":
        tensors = published(groups=groups, gemma=True, norms_of_heads=True)
        sizes |= {"num_embed": VOCABULARY, "num_kv_heads": groups}
        config = dataclasses.replace(model.ModelConfig.gemma3_270m(), **sizes)
        reader = pytest.importorskip("tunix.models.gemma3.params_safetensors")
    else:
        tensors = published(norms_of_heads=name == "qwen3")
        tied = {"weight_tying": False} if name == "llama3" else {"use_tied_embedding": False}
        sizes |= {"vocab_size": VOCABULARY, "num_kv_heads": groups, "rope_theta": 10_000, "norm_eps": 1e-5}
        config = model.ModelConfig(**sizes, **tied)
        reader = pytest.importorskip(f"tunix.models.{name}.params")
    save_file(tensors, tmp_path / "model.safetensors")
    read = reader.create_model_from_safe_tensors(str(tmp_path), config, dtype=jnp.float32)
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(read, nnx.Param)))[0]
    params = {"/".join(str(getattr(key, "key", key)) for key in path): np.asarray(leaf) for path, leaf in leaves}
    check(tensors, params, key_maps.TUNIX_GEMMA if name == "gemma3" else key_maps.TUNIX)
