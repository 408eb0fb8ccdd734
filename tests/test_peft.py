"""Files of HF PEFT: what it wrote gives its outputs here, and goes out as it came in."""

import dataclasses
import json
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twins
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.interop.peft.config import read_config
from lora_jax.interop.peft.options import value_of_module
from lora_jax.key_maps import KeyMap, array, conv, conv1d, embedding, experts, linear

DATA = Path(__file__).parent / "data" / "peft"
P = "base_model.model."  # what all names in PEFT's files begin with
MLP = KeyMap(
    embedding("emb/embedding", "emb"),
    *(linear(f"{name}/kernel", name) for name in ("lin0", "lin1", "head")),
    *(conv(f"{name}/kernel", name) for name in ("conv", "conv1")),
    *(array(f"{name}/bias", f"{name}.bias") for name in ("lin0", "head", "conv", "conv1")),
)
MODELS = {
    "lora": (twins.mlp, MLP),
    "rslora_patterns": (twins.mlp, MLP),
    "lora_emb": (twins.mlp, MLP),
    "lora_bias_only": (twins.mlp, MLP),
    "lora_bias_all": (twins.mlp, MLP),
    "lora_lora_bias": (twins.mlp, MLP),
    "dora": (twins.mlp, MLP),
    "adalora": (twins.mlp, MLP),
    "loha": (twins.mlp, MLP),
    "lokr": (twins.mlp, MLP),
    "vera": (twins.mlp, MLP),
    "vera_noproj": (twins.mlp, MLP),
    "pissa": (twins.mlp, MLP),
    "llama": (twins.llama, key_maps.LLAMA),
    "llama_emb_full": (twins.llama, key_maps.LLAMA),
    "llama_emb_lora": (twins.llama, key_maps.LLAMA),
    "llama_tokens": (twins.llama, key_maps.LLAMA),
    "llama_replicate": (twins.llama, key_maps.LLAMA),
    "gpt2": (twins.gpt2, key_maps.GPT2),
    "qwen3moe": (twins.llama, key_maps.LLAMA),
}


# What the tensors do not tell, and is said again when they are saved.
MORE = {
    "pissa": {"init_lora_weights": "pissa"},
    "vera_noproj": {"save_projection": False},
    "llama_replicate": {"layer_replication": [[0, 2], [1, 2]]},
}


def case(name):
    """Parameters, input and PEFT's output."""
    tensors = load_file(DATA / {"conv": "lora", "conv_dora": "lora"}.get(name, name) / "case.safetensors")
    base = {key.removeprefix("base."): tensor for key, tensor in tensors.items() if key.startswith("base.")}
    if name == "llama_replicate":  # its layers are 0, 1 and 1 of the published ones
        base |= {key.replace(".layers.1.", ".layers.2."): tensor for key, tensor in base.items()}
    return twins.from_torch(base, conv1d=name == "gpt2"), tensors["input"], tensors["output"]


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_tensors(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


# What PEFT wrote ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sampled(5)
def test_outputs_are_those_of_peft(name):
    fn, key_map = MODELS[name]
    params, ids, expected = case(name)
    adapters, others = lora.load_peft(DATA / name, params, key_map)
    assert adapters
    with jax.default_matmul_precision("highest"):
        applied = lora.lora_apply(fn)(params | others, adapters, ids)
        merged = fn(lora.merge(params | others, adapters), ids)
        assert np.abs(fn(params, ids) - expected).max() > 1e-3, "the adapters change something"
    # PiSSA's base is what an SVD leaves of the weight, and the rounding of an SVD depends on the machine's LAPACK.
    atol = 2e-6 if name == "pissa" else 1e-6
    np.testing.assert_allclose(applied, expected, atol=atol, rtol=0)
    np.testing.assert_allclose(merged, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", [*MODELS, "conv", "conv_dora"])
@pytest.mark.sampled(5)
def test_what_came_in_goes_out(name, tmp_path):
    key_map = MODELS[name][1] if name in MODELS else MLP
    adapters, others = lora.load_peft(DATA / name, case(name)[0], key_map)
    others = {} if name == "pissa" else others  # the bases, which PEFT makes again
    task = config_of(DATA / name)["task_type"]
    lora.save_peft(tmp_path / "out", adapters, key_map, others=others, task_type=task, config=MORE.get(name))
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(DATA / name))
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same_config(tmp_path / "out", DATA / name)


def assert_same_config(found, expected):
    """The same ranks and scales, and the same of all that is not about these."""
    before, after = (read_config(folder / "adapter_config.json") for folder in (expected, found))
    for key in tensors_of(expected):
        ending = r"(?:lora_A\.weight|lora_embedding_A|lora_A|hada_w1_b|lokr_w1|vera_lambda_b)"
        if module := re.fullmatch(rf"base_model\.model\.(.+)\.{ending}", key):
            module = module[1].replace(".base_layer", "")
            assert after.rank_of(module) == before.rank_of(module)
            np.testing.assert_allclose(after.scale_of(module), before.scale_of(module), rtol=1e-7)
        if module := re.fullmatch(r"base_model\.model\.(.+)\.token_adapter\.trainable_tokens_delta", key):
            assert after.tokens_of(module[1]) == before.tokens_of(module[1]) != ()
    before, after = config_of(expected), config_of(found)
    same = (
        "peft_type task_type bias fan_in_fan_out inference_mode init_lora_weights init_weights use_dora lora_bias "
        "layer_replication projection_prng_key save_projection decompose_both decompose_factor"
    )
    for option in same.split():
        assert (after.get(option) or None) == (before.get(option) or None), option
    # Ours are whole names, PEFT's may be ends.
    for option in ("target_modules", "modules_to_save", "target_parameters"):
        names, ends = after.get(option) or [], before.get(option) or []
        assert all(any(f".{name}".endswith(f".{end}") for end in ends) for name in names), option
        assert all(any(f".{name}".endswith(f".{end}") for name in names) for end in ends), option


def test_convolutions():
    """[kh, kw, in, out] of W' = W + s sum_r A[r, in, kh, kw] B[out, r]."""
    params = case("conv")[0]
    adapters, _ = lora.load_peft(DATA / "conv", params, MLP)
    merged, tensors = lora.merge(params, adapters), tensors_of(DATA / "conv")
    for name, formula in [("conv", "ripq,orxy->pqio"), ("conv1", "rip,orx->pio")]:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        expected = params[f"{name}/kernel"] + 2 * np.einsum(formula, a, b)
        np.testing.assert_allclose(merged[f"{name}/kernel"], expected, rtol=1e-6, atol=1e-6)


def peft_folder(folder, tensors, part, rslora):
    """The adapters that torch had at some time, as PEFT would save them: of rank 2, with alpha 4."""
    factors = {
        key.removeprefix(f"{part}.").replace(".default", ""): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{part}.")
    }
    folder.mkdir()
    save_file({P + key: tensor for key, tensor in factors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": rslora, "target_modules": ["lin0", "lin1"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(tree):
    """What is trained: all arrays but the ratios, of which the quotient counts."""
    return jax.tree.map(lambda array, is_trained: array if is_trained else None, tree, lora.trainable_mask(tree))


@pytest.mark.parametrize("name", ["lora_sgd", "lora_adamw", "rslora_adamw", "lora_bias_all_sgd"])
def test_training_is_as_in_peft(name, tmp_path):
    """Five steps from PEFT's start on its batches: losses, adapters and outputs."""
    tensors = load_file(DATA / "train" / f"{name}.safetensors")
    params = twins.from_torch({key[5:]: tensor for key, tensor in tensors.items() if key.startswith("base.")})
    both = KeyMap(*(entry for lin in ("lin0", "lin1") for entry in
                    (linear(f"{lin}/kernel", lin), array(f"{lin}/bias", f"{lin}.bias"))))  # fmt: skip
    start, end = (
        lora.load_peft(peft_folder(tmp_path / part, tensors, part, "rslora" in name), params, both)
        for part in ("init", "final")
    )

    @twins.broadcasting
    def model(p, x):
        return jnp.tanh(x @ p["lin0/kernel"] + p["lin0/bias"]) @ p["lin1/kernel"] + p["lin1/bias"]

    apply = lora.lora_apply(model)
    optimizer = optax.sgd(0.1) if "sgd" in name else optax.adamw(1e-2, weight_decay=1e-2)

    def loss(trainable, params, x, y):
        adapters, others = trainable
        return ((apply(params | others, adapters, x) - y) ** 2).mean()

    with jax.default_matmul_precision("highest"):
        step, state, losses = lora.jit_step(loss, optimizer), lora.TrainState.create(start, optimizer), []
        for x, y in zip(tensors["X"], tensors["Y"], strict=True):
            state, metrics = step(state, params, x, y)
            losses.append(float(metrics["loss"]))
        adapters, others = state.trainable
        out = apply(params | others, adapters, tensors["X"][0])
    np.testing.assert_allclose(losses, tensors["losses"], rtol=1e-5)
    assert jax.tree.structure(state.trainable) == jax.tree.structure(end)
    for one, other in zip(*map(jax.tree.leaves, (factors(state.trainable), factors(end))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(out, tensors["final_out"], atol=1e-5)


# Other layouts --------------------------------------------------------------------------------------------------------


def test_with_a_plan():
    """The adapters of the planned weights, along the plan's axes; the table may be used as the head."""
    params, ids, _ = case("lora_emb")
    plan = lora.plan(twins.mlp, params, ids, rules={"emb/.*|lin0/kernel": lora.Lora(2)})
    adapters, _ = lora.load_peft(DATA / "lora_emb", plan, MLP)
    expected, _ = lora.load_peft(DATA / "lora_emb", params, MLP)
    assert jax.tree.structure(adapters) == jax.tree.structure(expected)

    def head(p, x):
        return x @ p["emb/embedding"].T @ jnp.ones((11, 6)) @ p["lin0/kernel"]

    turned, _ = lora.load_peft(
        DATA / "lora_emb", lora.plan(head, params, jnp.ones((3, 6)), rules={"emb/.*|lin0/kernel": lora.Lora(2)}), MLP
    )
    assert turned["emb/embedding"].axes == expected["emb/embedding"].axes.transpose()
    for one, other in zip(*(jax.tree.leaves(lora.merge(params, a)) for a in (turned, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_a_plan_of_less_than_the_file():
    params, ids, _ = case("lora_emb")
    plan = lora.plan(twins.mlp, params, ids, rules={"lin0/kernel": lora.Lora(2)})
    with pytest.raises(
        lora.LoraError, match=r"gives to none of the planned weights:\n  'emb'; nearest: .*\nPlan these too"
    ):
        lora.load_peft(DATA / "lora_emb", plan, MLP)


def test_a_plan_of_more_than_the_file():
    params, ids, _ = case("lora_emb")
    plan = lora.plan(twins.mlp, params, ids, rules={"emb/.*|lin./kernel": lora.Lora(2)})
    with pytest.raises(lora.LoraError, match="holds no factors for 'lin1/kernel' of the plan"):
        lora.load_peft(DATA / "lora_emb", plan, MLP)


def stacked(params):
    """Layers along a first axis, and heads apart: [layers, d, heads, head_dim] and [layers, heads, head_dim, d]."""
    found = {path: leaf for path, leaf in params.items() if "/layers/" not in path}
    for path in [path for path in params if "/layers/0/" in path]:
        leaf = jnp.stack([params[path.replace("/0/", f"/{i}/")] for i in range(2)])
        if re.search("[qkv]_proj", path):
            leaf = leaf.reshape(*leaf.shape[:2], -1, 4)
        if "o_proj" in path:
            leaf = leaf.reshape(2, -1, 4, leaf.shape[-1])
        found[path.replace("/0/", "/")] = leaf
    return found


def test_stacked_layers_and_heads(tmp_path):
    params, key_map = case("llama")[0], key_maps.LLAMA.stacked()
    expected = stacked(lora.merge(params, lora.load_peft(DATA / "llama", params, key_maps.LLAMA)[0]))
    adapters, _ = lora.load_peft(DATA / "llama", stacked(params), key_map)
    query = adapters["model/layers/self_attn/q_proj/kernel"]
    assert (query.a.shape, query.b.shape) == ((2, 16, 2), (2, 2, 4, 4))
    merged = lora.merge(stacked(params), adapters)
    for path, leaf in expected.items():
        np.testing.assert_allclose(merged[path], leaf, rtol=1e-6, atol=1e-7, err_msg=path)
    lora.save_peft(tmp_path / "out", adapters, key_map)
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(DATA / "llama"))


def test_some_layers_of_a_stack(tmp_path):
    """Only layer 1, with a rank of its own; layer 0 is as it was, and is not written again."""
    folder = copy("llama", tmp_path)
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if ".1.self_attn.q_proj" in k})
    edit_config(folder, target_modules=["q_proj"])
    params = stacked(case("llama")[0])
    adapters, _ = lora.load_peft(folder, params, key_maps.LLAMA.stacked())
    [path] = adapters
    changed = lora.merge(params, adapters)[path] - params[path]
    assert not changed[0].any()
    assert changed[1].any()
    lora.save_peft(tmp_path / "out", adapters, key_maps.LLAMA.stacked())
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(folder))


def test_layers_of_different_ranks_and_scales_in_a_stack(tmp_path):
    folder = copy("llama", tmp_path)
    one = "model.layers.1.self_attn.q_proj"

    def widen(tensors):
        a, b = (f"base_model.model.{one}.lora_{x}.weight" for x in "AB")
        return tensors | {
            a: np.pad(tensors[a], [(0, 1), (0, 0)], constant_values=0.5),
            b: np.pad(tensors[b], [(0, 0), (0, 1)], constant_values=0.5),
        }

    edit_tensors(folder, widen)
    edit_config(folder, rank_pattern={one: 3}, alpha_pattern={one: 7})
    params = case("llama")[0]
    expected = stacked(lora.merge(params, lora.load_peft(folder, params, key_maps.LLAMA)[0]))
    adapters, _ = lora.load_peft(folder, stacked(params), key_maps.LLAMA.stacked())
    path = "model/layers/self_attn/q_proj/kernel"
    assert adapters[path].a.shape == (2, 16, 3)
    np.testing.assert_allclose(lora.merge(stacked(params), adapters)[path], expected[path], rtol=1e-6, atol=1e-7)


SPLIT = KeyMap(
    *(conv1d(f"{name}/kernel", "transformer.h.0.attn.c_attn", "in out*", part=i) for i, name in enumerate("qkv")),
    *(array(f"{name}/bias", "transformer.h.0.attn.c_attn.bias", part=i) for i, name in enumerate("qkv")),
)


def split_params():
    w = case("gpt2")[0]
    parts = np.split(w["transformer/h/0/attn/c_attn/kernel"], 3, axis=1)
    return {f"{name}/kernel": part.reshape(16, 2, 8) for name, part in zip("qkv", parts, strict=True)}


def test_three_weights_in_one_module(tmp_path):
    """Their common A comes back as one; own ones become blocks of a larger rank, with the same product."""
    fused, params = case("gpt2")[0], split_params()
    adapters, _ = lora.load_peft(DATA / "gpt2", params, SPLIT)
    expected = lora.merge(fused, lora.load_peft(DATA / "gpt2", fused, key_maps.GPT2)[0])
    merged = lora.merge(params, adapters)
    whole = np.concatenate([merged[f"{name}/kernel"].reshape(16, -1) for name in "qkv"], axis=1)
    np.testing.assert_allclose(whole, expected["transformer/h/0/attn/c_attn/kernel"], rtol=1e-6, atol=1e-7)
    lora.save_peft(tmp_path / "same", adapters, SPLIT)
    assert_same_tensors(tensors_of(tmp_path / "same"), tensors_of(DATA / "gpt2"))

    own = {
        "q/kernel": adapters["q/kernel"],
        "v/kernel": dataclasses.replace(adapters["v/kernel"], a=-adapters["v/kernel"].a, ratio=0.5),
    }
    with pytest.raises(lora.LoraError, match=r"of which only 'q/kernel', 'v/kernel' are known.*params=params"):
        lora.save_peft(tmp_path / "own", own, SPLIT)
    lora.save_peft(tmp_path / "own", own, SPLIT, params=params)
    assert config_of(tmp_path / "own")["r"] == 4
    fused_again = lora.merge(fused, lora.load_peft(tmp_path / "own", fused, key_maps.GPT2)[0])
    merged = lora.merge(params, own)
    whole = np.concatenate([merged[f"{name}/kernel"].reshape(16, -1) for name in "qkv"], axis=1)
    np.testing.assert_allclose(fused_again["transformer/h/0/attn/c_attn/kernel"], whole, rtol=1e-6, atol=1e-7)


def test_a_part_without_the_others_is_not_known():
    params = {"k/kernel": split_params()["k/kernel"]}
    with pytest.raises(
        lora.LoraError, match="part 1 of a module with 48 outputs, of which these are known: 'k/kernel'"
    ):
        lora.load_peft(DATA / "gpt2", params, SPLIT)


def test_experts_before_layers(tmp_path):
    """[experts, layers, in, out]: the order of the stacked axes is the parameter's own."""
    at = "model/layers/0/mlp/experts/down_proj/kernel"
    both = experts("down", "model.layers.{i}.mlp.experts.down_proj", "expert i in out")
    key_map = KeyMap(both, *SPLIT.entries)
    one = case("qwen3moe")[0][at]
    params = {"down": jnp.stack([one, one, one], axis=1)}
    fresh = lora.Lora(2, 3).factors(jax.random.key(0), params["down"].shape, lora.KernelAxes((0, 1), (2,), (3,)))
    adapters = {"down": dataclasses.replace(fresh, b=jax.random.normal(jax.random.key(1), fresh.b.shape))}
    lora.save_peft(tmp_path / "out", adapters, key_map)
    found, _ = lora.load_peft(tmp_path / "out", params, key_map)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for a, b in zip(*map(jax.tree.leaves, (found, adapters)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gate_and_up_of_experts_apart(tmp_path):
    at, key_map = (
        "model/layers/0/mlp/experts/",
        KeyMap(
            experts("gate", "model.layers.0.mlp.experts.gate_up_proj", part=0),
            experts("up", "model.layers.0.mlp.experts.gate_up_proj", part=1),
            experts("down", "model.layers.0.mlp.experts.down_proj"),
            linear("query", "model.layers.0.self_attn.q_proj"),
        ),
    )
    fused = case("qwen3moe")[0]
    gate, up = jnp.split(fused[at + "gate_up_proj/kernel"], 2, axis=-1)
    params = {
        "gate": gate,
        "up": up,
        "down": fused[at + "down_proj/kernel"],
        "query": fused["model/layers/0/self_attn/q_proj/kernel"],
    }
    adapters, _ = lora.load_peft(DATA / "qwen3moe", params, key_map)
    lora.save_peft(tmp_path / "same", adapters, key_map)
    assert_same_tensors(tensors_of(tmp_path / "same"), tensors_of(DATA / "qwen3moe"))

    own = {"gate": adapters["gate"], "up": dataclasses.replace(adapters["up"], a=2 - adapters["up"].a)}
    lora.save_peft(tmp_path / "own", own, key_map)
    found = lora.merge(fused, lora.load_peft(tmp_path / "own", fused, key_maps.LLAMA)[0])[at + "gate_up_proj/kernel"]
    merged = lora.merge(params, own)
    np.testing.assert_allclose(found, jnp.concatenate([merged["gate"], merged["up"]], axis=-1), rtol=1e-6, atol=1e-7)


# Other readers --------------------------------------------------------------------------------------------------------


def test_for_vllm(tmp_path):
    """One rank, a scale of one, and the same products."""
    params = case("rslora_patterns")[0]
    adapters, _ = lora.load_peft(DATA / "rslora_patterns", params, MLP)
    lora.save_peft(tmp_path / "out", adapters, MLP, profile="vllm")
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 3, {}, {})
    again, _ = lora.load_peft(tmp_path / "out", params, MLP)
    assert {adapter.a.shape[-1] for adapter in again.values()} == {3}
    for one, other in zip(*(jax.tree.leaves(lora.merge(params, a)) for a in (adapters, again)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    with pytest.raises(lora.LoraError, match="profile='vllm' has no place for others, found lin0/bias"):
        lora.save_peft(tmp_path / "out", adapters, MLP, profile="vllm", others={"lin0": {"bias": np.zeros(10)}})


def test_as_loralib_has_it(tmp_path):
    adapters, _ = lora.load_peft(DATA / "lora_emb", case("lora_emb")[0], MLP)
    lora.save_peft(tmp_path / "out", adapters, MLP, profile="loralib")
    lora.save_peft(tmp_path / "out", adapters, MLP, profile="loralib")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora.safetensors"]
    found, tensors = load_file(tmp_path / "out" / "lora.safetensors"), tensors_of(DATA / "lora_emb")
    np.testing.assert_array_equal(found["lin0.lora_A"], tensors["base_model.model.lin0.lora_A.weight"])
    np.testing.assert_array_equal(found["lin0.lora_B"], 2 * tensors["base_model.model.lin0.lora_B.weight"])
    assert sorted(found) == ["emb.lora_A", "emb.lora_B", "lin0.lora_A", "lin0.lora_B"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_thin_dtypes(dtype, tmp_path):
    """Files keep the dtype, or get one; what is loaded is fp32 unless it is asked for otherwise."""
    params = case("lora")[0]
    whole = lora.load_peft(DATA / "lora", params, MLP)
    adapters, others = thin = jax.tree.map(lambda a: a.astype(dtype), whole)
    lora.save_peft(tmp_path / "out", adapters, MLP, others=others)
    lora.save_peft(tmp_path / "cast", whole[0], MLP, others=whole[1], dtype=dtype)
    assert_same_tensors(tensors_of(tmp_path / "cast"), tensors_of(tmp_path / "out"))
    for asked, expected in [({}, jnp.float32), ({"dtype": None}, dtype), ({"dtype": jnp.bfloat16}, jnp.bfloat16)]:
        found = lora.load_peft(tmp_path / "out", params, MLP, **asked)
        assert jax.tree.structure(found) == jax.tree.structure(thin)
        for one, other in zip(*map(jax.tree.leaves, (factors(found), factors(thin))), strict=True):
            assert one.dtype == expected
            np.testing.assert_array_equal(one, other.astype(expected))
    with pytest.raises(lora.LoraError, match=r"load_peft\(dtype=<class 'int'>\): adapters are trained"):
        lora.load_peft(tmp_path / "out", params, MLP, dtype=int)


@pytest.mark.parametrize("name", ["adalora", "dora", "loha", "lokr", "lora_lora_bias", "llama_tokens", "pissa", "vera"])
def test_all_kinds_of_thin_files_are_loaded_in_fp32(name, tmp_path):
    """Projections that all modules share are compared as the file has them; a frozen base keeps its dtype."""
    folder = copy(name, tmp_path)
    edit_tensors(folder, lambda t: {key: tensor.astype(jnp.bfloat16) for key, tensor in t.items()})
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), case(name)[0])
    adapters, others = lora.load_peft(folder, params, MODELS[name][1])
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in others.values()} == ({jnp.dtype(jnp.bfloat16)} if name == "pissa" else set())


@pytest.mark.parametrize("dtype", [jnp.float32, None])
def test_scales_are_folded_in_fp32(dtype, tmp_path):
    """Of layers with scales of their own, and of a scale that vLLM has no place for: rounded once at most."""
    folder = copy("llama", tmp_path)
    edit_tensors(folder, lambda t: {key: tensor.astype(jnp.bfloat16) for key, tensor in t.items()})
    one = "model.layers.1.self_attn.q_proj"
    edit_config(folder, alpha_pattern={one: 7.3})
    adapters, _ = lora.load_peft(folder, stacked(case("llama")[0]), key_maps.LLAMA.stacked(), dtype=dtype)
    found = np.asarray(adapters["model/layers/self_attn/q_proj/kernel"].b[1].reshape(2, -1).T)
    exact = tensors_of(folder)[f"{P}{one}.lora_B.weight"].astype(np.float32) * np.float32(7.3 / 2)
    np.testing.assert_array_equal(found, exact if dtype else exact.astype(jnp.bfloat16))
    plain, _ = lora.load_peft(folder, case("llama")[0], key_maps.LLAMA)
    lora.save_peft(tmp_path / "vllm", plain, key_maps.LLAMA, profile="vllm", dtype=jnp.bfloat16)
    written = tensors_of(tmp_path / "vllm")[f"{P}{one}.lora_B.weight"]
    np.testing.assert_array_equal(written, exact.astype(jnp.bfloat16))


def test_what_a_dtype_cannot_hold_is_not_saved(tmp_path):
    adapters, _ = lora.load_peft(DATA / "lora", case("lora")[0], MLP)
    large = jax.tree.map(lambda a: a * 1e6, adapters)
    with pytest.raises(lora.LoraError, match=r"'lin0.lora_A.weight' holds numbers beyond float16: save it in a wider"):
        lora.save_peft(tmp_path / "out", large, MLP, dtype=jnp.float16)
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_a_thin_file(tmp_path):
    """Adam's small updates move every entry; in bf16 they would vanish."""
    folder = copy("lora", tmp_path)
    edit_tensors(folder, lambda t: {key: tensor.astype(jnp.bfloat16) for key, tensor in t.items()})
    params, ids, _ = case("lora")
    apply, optimizer = lora.lora_apply(twins.mlp), optax.adam(1e-6)
    start, others = lora.load_peft(folder, params, MLP)
    step = lora.jit_step(lambda a, p, ids: (apply(p | a[1], a[0], ids) ** 2).sum(), optimizer)
    state = lora.TrainState.create(jax.tree.map(jnp.copy, (start, others)), optimizer)
    for _ in range(3):
        state, _ = step(state, params, ids)
    for one, other in zip(*map(jax.tree.leaves, (factors(state.trainable), factors((start, others)))), strict=True):
        assert np.mean(one != other) > 0.5


# Patterns of configs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("q_proj", "a.q_proj", True),
        ("q", "a.xq", False),
        ("^q", "a.q", False),
        ("^a.q", "a.q", True),
        ("layers.0", "m.layers.0.q", False),
        (r".*\.0\.q", "m.layers.0.q", True),
        ("a|q", "m.q", True),
        (r"layers\.(0|2)\..*", "m.layers.2.q", True),
        (r"layers\.(0|2)\..*", "m.layers.1.q", False),
    ],
)
def test_patterns_match_as_in_peft(pattern, module, matches):
    assert value_of_module({pattern: 1}, module, 0) == matches


def test_patterns_without_re2(monkeypatch):
    monkeypatch.setitem(sys.modules, "re2", None)
    assert value_of_module({"^model.layers-1": 1}, "model.layers-1", 0) == 1
    with pytest.raises(
        lora.LoraError, match=r"the regular expression 'a\+', for which RE2 is needed: pip install google-re2"
    ):
        value_of_module({"a+": 1}, "a", 0)


# Bad input ------------------------------------------------------------------------------------------------------------


def copy(name, folder):
    shutil.copytree(DATA / name, folder / "in")
    return folder / "in"


def edit_config(folder, **options):
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | options))


def edit_tensors(folder, change):
    save_file(change(tensors_of(folder)), folder / "adapter_model.safetensors")


A, B = P + "lin0.lora_A.weight", P + "lin0.lora_B.weight"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "r is 0, expected a whole number of at least 1"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, expected a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*, expected a finite number of fp32"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": ["a"]}, r"rank_pattern is \['a'\], expected an object"),
        ({"rank_pattern": {"lin0": -1}}, r"rank_pattern\['lin0'\] is -1"),
        ({"rank_pattern": {"lin(": 3}}, r"rank_pattern has 'lin\(', which is no regular expression of RE2"),
        ({"rank_pattern": {r"(a)\1": 3}}, "no regular expression of RE2"),
        ({"rank_pattern": {"lin0": 3}}, "'lin0' has rank 2, by the config 3"),
        ({"r": 4}, "has rank 2, by the config 4"),
        (
            {"target_modules": ["lin0", "lin7"]},
            "holds no factors for 'lin7', which its config has among target_modules",
        ),
        ({"target_modules": [3]}, r"target_modules is \[3\], expected a list of names"),
        ({"target_parameters": "a"}, "target_parameters is 'a', expected a list of names"),
        ({"peft_type": None}, "peft_type is None"),
        ({"a_new_option": {"x": 1}}, r"a_new_option is \{'x': 1\}, which this version of lora_jax does not have"),
    ],
)
def test_wrong_configs(options, says, tmp_path):
    folder = copy("lora", tmp_path)
    edit_config(folder, **options)
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, case("lora")[0], MLP)


WRONG_TENSORS = [
    (lambda t: t, A, "'lin0' has only lora_B.weight, and not lora_A.weight"),
    (lambda t: t | {A: t[A][:1]}, None, r"'lin0' has factors \[1, 6\] and \[10, 2\], of no common rank"),
    (
        lambda t: t | {A: t[A][:, :5]},
        None,
        r"lin0 has factors \[2, 5\] and \[10, 2\], which do not fit 'lin0/kernel' of shape \[6, 10\]",
    ),
    (lambda t: t | {B: np.concatenate([t[B], t[B]])}, None, r"lin0 has factors \[2, 6\] and \[20, 2\]"),
    (lambda t: t | {B: t[B][:9]}, None, r"lin0 has factors \[2, 6\] and \[9, 2\]"),
    (lambda t: t | {A: t[A].astype(np.int32)}, None, "is of int32, expected a floating dtype"),
    (lambda t: t | {A: t[A][None]}, None, "of no common rank"),
    (
        lambda t: t | {A.replace("0", "9"): t[A], B.replace("0", "9"): t[B]},
        None,
        "gives to none of the parameters:\n  'lin9'; nearest: lin",
    ),
    (
        lambda t: t | {A.replace("0", "0.bias"): t[A], B.replace("0", "0.bias"): t[B]},
        None,
        "gives to none of the parameters:\n  'lin0.bias'; nearest",  # an array of the key map, which has no factors
    ),
    (lambda t: t | {P + "extra.weight": t[A]}, None, "'extra.weight'; nearest"),
    (lambda t: t | {"lin0.x": t[A]}, None, "holds 'lin0.x', expected names that begin with 'base_model.model.'"),
    (lambda t: t | {P + "a" * 2000: t[A]}, None, "a name of 2,017 characters"),
    (
        lambda t: t | {P + "lin0.lora_magnitude_vector": t[A]},
        None,
        "magnitude_vector', which is not of LORA, the kind that",
    ),
    (
        lambda t: t | {P + "head.weight": t[A]},
        None,
        r"head.weight has shape \[2, 6\], but 'head/kernel' of shape \[4, 3\] needs \[3, 4\]",
    ),
]


@pytest.mark.parametrize(("change", "lost", "says"), WRONG_TENSORS)
def test_wrong_tensors(change, lost, says, tmp_path):
    folder = copy("lora", tmp_path)
    edit_tensors(folder, lambda t: {key: tensor for key, tensor in change(t).items() if key != lost})
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, case("lora")[0], MLP)


def test_wrong_files(tmp_path):
    folder, params = copy("lora", tmp_path), case("lora")[0]
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole[:8] + b"{" * (len(whole) - 8), b"\xff" * 8 + whole[8:]):
        weights.write_bytes(damaged)
        with pytest.raises(lora.LoraError, match=r"adapter_model.safetensors cannot be read"):
            lora.load_peft(folder, params, MLP)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(lora.LoraError, match=r"there is no .*safetensors. adapter_model.bin is a pickle"):
        lora.load_peft(folder, params, MLP)
    for text in ("", "{", "[1]", '"a"', "[" * 100_000, "\x00"):
        config.write_text(text)
        with pytest.raises(lora.LoraError, match=r"adapter_config.json (is no JSON|holds a (list|str))"):
            lora.load_peft(folder, params, MLP)
    config.write_text(" " * (8 * 2**20 + 1))
    with pytest.raises(lora.LoraError, match="more than 8,388,608 bytes"):
        lora.load_peft(folder, params, MLP)
    config.unlink()
    with pytest.raises(lora.LoraError, match=r"adapter_config.json cannot be read: No such file"):
        lora.load_peft(folder, params, MLP)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "lora_jax.interop._safetensors", raising=False)
    with pytest.raises(
        lora.LoraError, match=r"need safetensors, which is not installed: pip install 'lora_jax\[peft\]'"
    ):
        lora.load_peft(DATA / "lora", case("lora")[0], MLP)


def test_what_cannot_be_saved(tmp_path):
    adapters, _ = lora.load_peft(DATA / "lora", case("lora")[0], MLP)
    with pytest.raises(
        lora.LoraError, match="the key map has no entry for 'lin0/kernel'; the nearest are 'lin1/kernel'"
    ):
        lora.save_peft(tmp_path / "a", adapters, KeyMap(linear("lin1/kernel", "lin1")))
    with pytest.raises(lora.LoraError, match=r"gives 'lin1/kernel' and 'lin0/kernel' the same tensor 'x.weight'"):
        lora.save_peft(tmp_path / "a", adapters, KeyMap(*(linear(path, "x") for path in adapters)))
    with pytest.raises(
        lora.LoraError, match=r"has shape \[6, 10\], but the key map says that its axes are 'in out out'"
    ):
        lora.save_peft(tmp_path / "a", adapters, KeyMap(linear("lin0/kernel", "x", "in out out"), *MLP.entries))
    stack = KeyMap(linear("lin0/kernel", "x.{i}", "i out"), *MLP.entries)
    with pytest.raises(
        lora.LoraError, match="has stack 0, outputs 1 by the key map, but its adapter has inputs 0, outputs 1: plan"
    ):
        lora.save_peft(tmp_path / "a", adapters, stack)
    with pytest.raises(lora.LoraError, match="there are no adapters to save"):
        lora.save_peft(tmp_path / "a", {}, MLP)
    with pytest.raises(
        lora.LoraError, match="profile='hf': expected 'peft', 'vllm', 'vllm-by-expert', 'sglang' or 'loralib'"
    ):
        lora.save_peft(tmp_path / "a", adapters, MLP, profile="hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(lora.LoraError, match="exists and holds no adapters of PEFT; it is left as it is"):
        lora.save_peft(tmp_path / "full", adapters, MLP)
    assert not (tmp_path / "a").exists()


def test_a_failed_save_leaves_the_one_before(tmp_path, monkeypatch):
    adapters, others = lora.load_peft(DATA / "lora", case("lora")[0], MLP)
    lora.save_peft(tmp_path / "out", adapters, MLP, others=others)

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("lora_jax.interop.safetensors_writer._bytes", fail)
    with pytest.raises(lora.LoraError, match="No space left"):
        lora.save_peft(tmp_path / "out", adapters, MLP)
    monkeypatch.undo()
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(DATA / "lora"))
    lora.save_peft(tmp_path / "out", {"lin0/kernel": adapters["lin0/kernel"]}, MLP)
    assert len(tensors_of(tmp_path / "out")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (lambda: linear("a/kernel", "b.{i}"), "unknown are i"),
        (lambda: linear("a/kernel", "b", "in rows"), "unknown are rows"),
        (lambda: linear("a/kernel", "b", "in* out*"), r"one \* at most"),
    ],
)
def test_wrong_entries(entry, says):
    with pytest.raises(lora.LoraError, match=says):
        entry()


# Files that are not to be trusted -------------------------------------------------------------------------------------


def mutated(random, weights, config):
    """One of both files with something changed: bits, lengths, names, numbers, nesting."""
    weights, options = bytearray(weights), json.loads(config)
    size = int.from_bytes(weights[:8], "little")
    kind = random.randrange(8)
    if kind == 0:  # a bit anywhere, the length of the header included
        weights[random.randrange(len(weights))] ^= 1 << random.randrange(8)
    elif kind == 1:  # cut short, or longer
        at = random.randrange(len(weights))
        weights = weights[:at] if random.random() < 0.7 else weights + bytes(at)
    elif kind == 2:  # a character of the header
        weights[8 + random.randrange(size)] = random.randrange(256)
    elif kind == 3:  # a digit of a shape or an offset
        digits = [i for i in range(8, 8 + size) if chr(weights[i]).isdigit()]
        weights[random.choice(digits)] = ord(random.choice("0123456789-e."))
    elif kind == 4:  # the length of the header
        weights[:8] = random.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
    elif kind == 5:  # a value of the config
        odd = [
            None,
            -1,
            0,
            1e308,
            10**400,
            float("nan"),
            2**70,
            "x",
            "(a)\\1",
            [],
            {},
            [[]],
            {"a": {}},
            True,
            "../../x",
        ]
        options[random.choice(sorted(options))] = random.choice(odd)
    elif kind == 6:  # patterns
        options["rank_pattern"] = {"".join(random.choices("lin01.*+?()[]|^$\\a{},", k=12)): random.choice([1, 2, 3])}
    else:  # bytes of the config
        text = bytearray(json.dumps(options).encode())
        text[random.randrange(len(text))] = random.randrange(256)
        return bytes(weights), bytes(text)
    return bytes(weights), json.dumps(options).encode()


SEEDS = [
    "lora",
    "conv_dora",
    "dora",
    "adalora_trained",
    "loha",
    "lokr",
    "lora_lora_bias",
    "pissa",
    "vera",
    "vera_noproj",
]


def load_mutated(cases, seed, folder):
    """Each ends with adapters or with the library's own error; how many did either."""
    random, ends = Random(seed), [0, 0]
    folder.mkdir()
    paths = [folder / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    starts = [(MLP, case("lora")[0], DATA / name) for name in SEEDS]
    starts.append((key_maps.LLAMA, case("llama_tokens")[0], DATA / "llama_tokens"))
    originals = [[(start / path.name).read_bytes() for path in paths] for *_, start in starts]
    for i in range(cases):
        key_map, params, _ = starts[i % len(starts)]
        for path, content in zip(paths, mutated(random, *originals[i % len(starts)]), strict=True):
            path.write_bytes(content)
        start = time.perf_counter()
        try:
            lora.load_peft(folder, params, key_map)
            ends[0] += 1
        except lora.LoraError:
            ends[1] += 1
        assert time.perf_counter() - start < 10, f"case {i} of seed {seed} took too long"
    assert sorted(folder.iterdir()) == sorted(paths)
    return ends


def test_mutated_files(tmp_path):
    loaded, refused = load_mutated(1100, 0, tmp_path / "in")
    assert loaded > 50
    assert refused > 200


@pytest.mark.slow
def test_many_mutated_files(tmp_path, share):
    """20,000 of them, and a fifth of these in CI, in little memory: no header makes it allocate what is not there."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cases = share(20_000)
    loaded, refused = load_mutated(cases, 1, tmp_path / "in")
    assert loaded > cases / 20
    assert refused > cases / 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "kilobytes"


def test_the_scale_of_a_thin_adapter_is_exact(tmp_path):
    """The factors are cast, and alpha / r is not."""
    params = case("lora")[0]
    adapters = {
        path: dataclasses.replace(a, ratio=0.35) for path, a in lora.load_peft(DATA / "lora", params, MLP)[0].items()
    }
    lora.save_peft(tmp_path / "in", adapters, MLP)
    thin, _ = lora.load_peft(tmp_path / "in", params, MLP, dtype=jnp.bfloat16)
    assert {a.a.dtype for a in thin.values()} == {jnp.dtype(jnp.bfloat16)}
    lora.save_peft(tmp_path / "out", thin, MLP)
    before, after = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("in", "out"))
    assert before["lora_alpha"] == after["lora_alpha"] == 0.7


def test_the_files_are_readable_as_new_files_are(tmp_path):
    axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    adapters = {"w": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 0.5)}
    (tmp_path / "another").touch()
    lora.save_peft(tmp_path / "peft", adapters, KeyMap(linear("w", "w", "in out")))
    assert {path.stat().st_mode for path in (tmp_path / "peft").iterdir()} == {(tmp_path / "another").stat().st_mode}
