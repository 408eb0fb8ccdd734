"""Adapters by torchtune's names: what its rotary embedding computes of them, and what transformers' does."""

from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_untrusted import assert_harmless

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.interop.torchtune import load_torchtune, read_torchtune

D, HEADS, KV, SIZE, F, R = 8, 4, 2, 6, 10, 3
AT = "layers.1.attn."
SHAPES = {
    "attn.q_proj": (HEADS * SIZE, D),
    "attn.k_proj": (KV * SIZE, D),
    "attn.v_proj": (KV * SIZE, D),
    "attn.output_proj": (D, HEADS * SIZE),
    "mlp.w1": (F, D),
    "mlp.w2": (D, F),
    "mlp.w3": (F, D),
}
PARAMS = {
    f"model/layers/1/{name}/kernel": jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {
        "self_attn/q_proj": (D, HEADS, SIZE),
        "self_attn/k_proj": (D, KV, SIZE),
        "self_attn/v_proj": (D, KV, SIZE),
        "self_attn/o_proj": (HEADS, SIZE, D),
        "mlp/gate_proj": (D, F),
        "mlp/down_proj": (F, D),
        "mlp/up_proj": (D, F),
    }.items()
}
FACTS = {"alpha": 6.0, "heads": HEADS, "kv_heads": KV, "interleaved": True}


def tensors_of(magnitudes=False):
    rng, found = np.random.default_rng(0), {}
    for name, (out, inputs) in SHAPES.items():
        found[f"layers.1.{name}.lora_a.weight"] = rng.normal(size=(R, inputs)).astype(np.float32)
        found[f"layers.1.{name}.lora_b.weight"] = rng.normal(size=(out, R)).astype(np.float32)
        if magnitudes:
            found[f"layers.1.{name}.magnitude"] = rng.normal(size=out).astype(np.float32)
    return found


def write(folder, tensors):
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def load(path, **changes):
    return load_torchtune(path, PARAMS, key_maps.LLAMA, **FACTS | changes)


def change(tensors, name):
    return FACTS["alpha"] / R * tensors[f"layers.1.{name}.lora_b.weight"] @ tensors[f"layers.1.{name}.lora_a.weight"]


def ours(adapter):
    return np.tensordot(np.asarray(adapter.a), np.asarray(adapter.b), 1) * adapter.scale


def test_scores_are_those_of_torchtune(tmp_path):
    """torchtune turns neighbours of a head's outputs, transformers the two halves: q and k give the same scores."""
    tensors = tensors_of()
    adapters = load(write(tmp_path, tensors))
    rng = np.random.default_rng(1)
    x, angles = rng.normal(size=D), rng.normal(size=SIZE // 2)

    def rotated(pairs):  # [heads, size / 2, 2]
        first, second = pairs[..., 0], pairs[..., 1]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.stack([first * cos - second * sin, second * cos + first * sin], -1)

    q, k = (change(tensors, f"attn.{name}_proj") @ x for name in "qk")
    theirs = np.repeat(rotated(k.reshape(KV, -1, 2)), HEADS // KV, 0) * q.reshape(HEADS, -1, 2)
    q, k = (np.tensordot(x, ours(adapters[f"model/layers/1/self_attn/{name}_proj/kernel"]), 1) for name in "qk")
    halves = np.repeat(rotated(k.reshape(KV, 2, -1).swapaxes(1, 2)), HEADS // KV, 0)
    np.testing.assert_allclose(
        (halves * q.reshape(HEADS, 2, -1).swapaxes(1, 2)).sum((1, 2)), theirs.sum((1, 2)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("interleaved", [True, False])
def test_other_modules_and_models_keep_their_order(interleaved, tmp_path):
    tensors = tensors_of()
    adapters = load(write(tmp_path, tensors), interleaved=interleaved)
    names = {"self_attn/v_proj": "attn.v_proj", "self_attn/o_proj": "attn.output_proj", "mlp/gate_proj": "mlp.w1"}
    names |= {"mlp/down_proj": "mlp.w2", "mlp/up_proj": "mlp.w3"}
    names |= {} if interleaved else {"self_attn/q_proj": "attn.q_proj", "self_attn/k_proj": "attn.k_proj"}
    for name, theirs in names.items():
        found = ours(adapters[f"model/layers/1/{name}/kernel"])
        np.testing.assert_allclose(found.reshape(change(tensors, theirs).T.shape), change(tensors, theirs).T, rtol=1e-5)
    assert {float(adapter.scale) for adapter in adapters.values()} == {2.0}


def test_dora(tmp_path):
    """Magnitudes are in the order of the rows of B."""
    tensors = tensors_of(magnitudes=True)
    adapters = load(write(tmp_path, tensors))
    q = adapters["model/layers/1/self_attn/q_proj/kernel"]
    assert isinstance(q, lora.DoraAdapter)
    m = tensors[f"{AT}q_proj.magnitude"].reshape(HEADS, SIZE // 2, 2)
    np.testing.assert_array_equal(q.m[:, : SIZE // 2], m[..., 0])
    np.testing.assert_array_equal(q.m[:, SIZE // 2 :], m[..., 1])


def test_one_module_at_a_time(tmp_path):
    found = read_torchtune(write(tmp_path, tensors_of(magnitudes=True)), **FACTS)
    for name, module in found.modules.items():
        for field, array in module.arrays.items():
            outline = found.outlines[name].arrays[field]
            assert (outline.shape, outline.dtype, {*outline.strides}) == (array.shape, array.dtype, {0})


@pytest.mark.parametrize(
    ("changes", "facts", "says"),
    [
        ({"layers.1.attn.x_proj.lora_a.weight": np.ones((R, D))}, {}, "is no factor of a module that torchtune adapts"),
        ({f"{AT}q_proj.weight": np.ones((R, D))}, {}, "is no factor of a module that torchtune adapts"),
        ({f"{AT}q_proj.lora_b.weight": np.ones((24, R + 1))}, {}, "of no common rank"),
        ({f"{AT}q_proj.magnitude": np.ones(24)}, {}, "and not lora_magnitude_vector"),
        ({}, {"heads": 5}, "has 24 outputs, which are no 5 heads"),
        ({}, {"heads": 8}, "has 24 outputs, which are no 8 heads of an even size"),
        ({}, {"alpha": 0}, "alpha is 0"),
        (
            {f"{AT}q_proj.lora_b.weight": np.ones((18, R)), f"{AT}q_proj.lora_a.weight": np.ones((R, D))},
            {"heads": 3},
            "q_proj",
        ),
    ],
)
def test_damaged_files(changes, facts, says, tmp_path):
    with pytest.raises(lora.LoraError, match=says) as caught:
        load(write(tmp_path, tensors_of() | changes), **facts)
    assert_harmless(str(caught.value))


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "adapter_model.pt").write_bytes(b"x")
    with pytest.raises(lora.LoraError, match="is a pickle, which may run any code"):
        load(tmp_path / "adapter_model.pt")


def mutated(random, path, tensors):
    """A file with something changed in the names, shapes and dtypes of its tensors, or in its bytes."""
    if random.random() < 0.5:
        name = random.choice(sorted(tensors))
        x = tensors.pop(name)
        shape = tuple(random.choices([0, 1, 2, 3, 12, 24], k=random.randrange(4)))
        names = [
            name,
            f"{name}.magnitude",
            "",
            "..",
            "output.lora_a.weight",
            name.replace("q_proj", "k_proj"),
            f"é{name}",
        ]
        changed = [x, np.ascontiguousarray(x.T), np.ones(shape, np.float32), x.astype(np.float16), x.astype(np.int8)]
        save_file(tensors | {random.choice(names): random.choice(changed)}, path)
        return
    save_file(tensors, path)
    data = bytearray(path.read_bytes())
    for _ in range(random.randrange(1, 4)):
        data[random.randrange(len(data))] = random.choice([0, 255, *b'09{}[]",:_.', random.randrange(256)])
    path.write_bytes(data[: random.choice([len(data), len(data), random.randrange(len(data))])])


def test_mutations(tmp_path):
    random, ends, path = Random(0), [0, 0], tmp_path / "adapter.safetensors"
    for case in range(200):
        mutated(random, path, tensors_of(case % 2 == 0))
        try:
            load(path, interleaved=random.random() < 0.5)
            ends[0] += 1
        except lora.LoraError as error:
            assert_harmless(str(error))
            ends[1] += 1
    assert min(ends) > 10


@pytest.mark.parametrize("heads", [None, 0, -2, 2.0, True, "4"])
def test_heads_that_are_none(heads, tmp_path):
    for name in ("heads", "kv_heads"):
        with pytest.raises(lora.LoraError, match=f"{name} is .+, expected a whole number above 0"):
            load(write(tmp_path, tensors_of()), **{name: heads})
