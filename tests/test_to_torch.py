"""A whole model as torch's tensors: the way of `lora.bases.from_torch` back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from safetensors.numpy import load_file, save_file
from test_peft import DATA, MLP, MODELS, case

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.core.paths import flatten_with_names

BASES = ["lora", "llama", "gpt2", "qwen3moe", "llama_replicate"]


def again(tensors, params, key_map):
    """The parameters that are read from tensors."""
    stored = lora.bases.from_torch(tensors, params, key_map)
    return jax.tree.map(lambda leaf: leaf.read(), stored, is_leaf=lambda leaf: isinstance(leaf, lora.bases.Stored))


def assert_round_trip(params, key_map):
    tensors = lora.to_torch(params, key_map)
    found = again(tensors, params, key_map)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for name, one, other in zip(
        flatten_with_names(params)[0], jax.tree.leaves(found), jax.tree.leaves(params), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=name)
    return tensors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", BASES)
def test_published_tensors_come_back(name, dtype):
    """torch's tensors as they were, with their dtypes, names and bits; and the parameters of these again."""
    base = load_file(DATA / name / "case.safetensors")
    base = {key.removeprefix("base."): t.astype(dtype) for key, t in base.items() if key.startswith("base.")}
    key_map = MODELS[name][1]
    params = twins.from_torch(base, conv1d=name == "gpt2")
    tensors = assert_round_trip(params, key_map)
    assert tensors.keys() == base.keys()
    for key, tensor in tensors.items():
        assert type(tensor) is np.ndarray
        assert tensor.flags.c_contiguous
        assert tensor.flags.writeable
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor, base[key], err_msg=key)


def random(shapes):
    return {
        path: jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16 if i % 2 else jnp.float32)
        for i, (path, shape) in enumerate(shapes.items())
    }


PARTS = key_maps.KeyMap(*(key_maps.linear(f"{name}/w", "qkv", "in out*", part=i) for i, name in enumerate("qkv")))
TREES = {
    "stacked": (
        key_maps.LLAMA.stacked(),
        {"model/layers/self_attn/q_proj/kernel": (3, 8, 2, 4), "model/layers/self_attn/o_proj/kernel": (3, 2, 4, 8)},
    ),
    "stacked second": (
        key_maps.KeyMap(key_maps.linear("w", "layers.{i}.w", "in i out")),
        {"w": (4, 3, 5)},
    ),
    "parts": (PARTS, {"q/w": (4, 3, 2), "k/w": (4, 1, 2), "v/w": (4, 2)}),
    "experts": (
        key_maps.KeyMap(
            key_maps.experts("gate", "m.gate_up_proj", "expert in out", part=0),
            key_maps.experts("up", "m.gate_up_proj", "expert in out", part=1),
            key_maps.experts("down", "m.down_proj", "expert in out", transposed=True),
        ),
        {"gate": (3, 4, 5), "up": (3, 4, 5), "down": (3, 5, 4)},
    ),
    "layers of experts": (
        key_maps.KeyMap(key_maps.linear("w", "layers.{i}.experts.{e}.w", "i e in out")),
        {"w": (2, 3, 4, 5)},
    ),
    "convolutions": (
        key_maps.KeyMap(key_maps.conv("a", "a"), key_maps.conv("b", "b"), key_maps.array("c", "c", "keep*")),
        {"a": (3, 2, 4, 5), "b": (3, 4, 5), "c": (1, 2, 3)},
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_from_torch_is_the_inverse(name):
    key_map, shapes = TREES[name]
    assert_round_trip(random(shapes), key_map)


def test_each_number_is_where_torch_has_it():
    """Written out by hand: heads, layers and parts of one module."""
    w = jnp.arange(2 * 4 * 3 * 2).reshape(2, 4, 3, 2)  # layers, inputs, heads, size of a head
    k = -jnp.arange(2 * 4 * 2).reshape(2, 4, 1, 2)
    key_map = key_maps.KeyMap(
        key_maps.linear("q", "h.{i}.qk", "i in out*", part=0), key_maps.linear("k", "h.{i}.qk", "i in out*", part=1)
    )
    tensors = lora.to_torch({"q": w, "k": k}, key_map)
    assert [*tensors] == ["h.0.qk.weight", "h.1.qk.weight"]
    for layer in range(2):
        tensor = tensors[f"h.{layer}.qk.weight"]
        assert tensor.shape == (3 * 2 + 1 * 2, 4)
        assert tensor.dtype == np.int32
        for head in range(3):
            for i in range(2):
                np.testing.assert_array_equal(tensor[head * 2 + i], w[layer, :, head, i])
        np.testing.assert_array_equal(tensor[6:], k[layer, :, 0].T)


def test_a_merged_model_becomes_a_file(tmp_path):
    params = case("llama")[0]
    adapters, _ = lora.load_peft(DATA / "llama", params, key_maps.LLAMA)
    merged = lora.merge(params, adapters)
    save_file(lora.to_torch(merged, key_maps.LLAMA), tmp_path / "model.safetensors")
    found = again(load_file(tmp_path / "model.safetensors"), params, key_maps.LLAMA)
    for path, leaf in merged.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_the_arrays_are_copies():
    params = {"emb": {"embedding": np.zeros((2, 3), np.float32)}}
    tensor = lora.to_torch(params, MLP)["emb.weight"]
    tensor += 1
    assert not params["emb"]["embedding"].any()


W = jnp.zeros((6, 10))
KERNEL = "lin0/kernel"


def packed():
    return lora.bases.quantize({KERNEL: W + 1}, {".*": lora.bases.Int8()})[KERNEL]


WRONG = [
    ({KERNEL: W, "cache/x": W, "step": W}, {}, r"no entry for 'cache/x', nor for 1 more .* ignore='cache/x'"),
    ({KERNEL: W, "cache.x": W}, {}, r"ignore='cache\\\\.x'"),
    ({KERNEL: packed}, {}, r"'lin0/kernel' is packed, a EightBits.*lora.to_torch\(lora.bases.dense\(params\), key_map"),
    ({KERNEL: jax.ShapeDtypeStruct((6, 10), jnp.float32)}, {}, "'lin0/kernel' is a shape alone, expected an array"),
    ({KERNEL: "w"}, {}, "'lin0/kernel' is a str, expected an array"),
    ({KERNEL: lambda: jax.random.key(0)}, {}, r"'lin0/kernel' is a random key"),
    ({KERNEL: W}, {"ignore": "("}, r"ignore='\(' is not a regular expression"),
    ({KERNEL: W}, {"ignore": 3}, "ignore=3 is not a regular expression"),
    ({KERNEL: W[None]}, {}, r"'lin0/kernel' has shape \[1, 6, 10\]"),
]


@pytest.mark.parametrize(("params", "options", "says"), WRONG)
def test_what_torch_does_not_have(params, options, says):
    params = {path: leaf() if callable(leaf) else leaf for path, leaf in params.items()}
    with pytest.raises(lora.LoraError, match=says):
        lora.to_torch(params, MLP, **options)


def test_the_calls_that_messages_name():
    left = {KERNEL: W, "cache/x": W, "cache/y": W}
    assert [*lora.to_torch(left, MLP, ignore="cache/.*")] == ["lin0.weight"]
    base = {KERNEL: packed()}
    [tensor] = lora.to_torch(lora.bases.dense(base), MLP).values()
    np.testing.assert_array_equal(tensor, base[KERNEL].dense().T)
    with pytest.raises(lora.LoraError, match=r"'lin0/kernel' is traced, .* outside jax.jit"):
        jax.jit(lambda p: lora.to_torch(p, MLP))({KERNEL: W})
    with pytest.raises(lora.LoraError, match=r"'qkv.weight' holds several parameters, of which 'v/w' is missing"):
        lora.to_torch({"q/w": W, "k/w": W}, PARTS)
    whole = PARTS + key_maps.KeyMap(key_maps.linear("c_attn", "qkv"))
    assert [*lora.to_torch({"c_attn": W}, whole)] == ["qkv.weight"]
