"""Adapters for vLLM and SGLang: what their loaders make of the files, written here from their sources, key by key.

vLLM: `lora/model_manager.py`, `lora/lora_model.py` and `lora/peft_helper.py`. SGLang 0.5.23: `srt/lora/lora.py`,
`lora_config.py`, `lora_manager.py` and `mem_pool.py`. Each oracle refuses what that server refuses, and returns the
change of each weight in torch's layout, of experts [experts, out, in].
"""

import json
import re
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_untrusted import assert_harmless

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.cli import main
from lora_jax.interop.peft.load import load_by_module
from lora_jax.interop.peft_modules import read_peft

E, D, F, R = 3, 8, 5, 2
AT = "model/layers/{}/{}/kernel"
SHAPES = {
    AT.format(layer, name): shape
    for layer in range(2)
    for name, shape in {
        "self_attn/q_proj": (D, 6),
        "mlp/experts/gate_up_proj": (E, D, 2 * F),
        "mlp/experts/down_proj": (E, F, D),
    }.items()
}
PARAMS = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
MAP = key_maps.LLAMA
LAYER = "base_model.model.model.layers.{}."


def adapters_of(paths=tuple(SHAPES), ranks=(R, R), scales=(0.5, 0.5), shared=False):
    """Random adapters, of two ranks and scales in turns; with `shared`, the outer factors are those of all experts."""
    rng, found = np.random.default_rng(0), {}
    for i, path in enumerate(paths):
        *stack, inputs, outputs = SHAPES[path]
        axes = lora.KernelAxes(tuple(range(len(stack))), (len(stack),), (len(stack) + 1,))
        a = rng.normal(size=(*stack, inputs, ranks[i % 2]))
        b = rng.normal(size=(*stack, ranks[i % 2], outputs))
        if shared and "gate_up" in path:
            a[:] = a[:1]
        if shared and "down" in path:
            b[:] = b[:1]
        found[path] = lora.LoraAdapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), axes, scales[i % 2])
    return found


def changes_of(adapters):
    """The change of each weight, in torch's layout, by the names of its modules."""
    return {
        match.names[()]: np.swapaxes(
            np.asarray(adapters[path].a, np.float64) @ np.asarray(adapters[path].b, np.float64) * adapters[path].scale,
            -1,
            -2,
        )
        for path, match in MAP.match({path: SHAPES[path] for path in adapters}).items()
    }


def pairs_of(tensors):
    """The factors of each module, by names without PEFT's prefix; all that a loader is given has to be such."""
    pairs = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert found is not None, name
        pairs.setdefault(found[1], {})[found[2]] = tensor
    assert all(sorted(pair) == ["A", "B"] for pair in pairs.values())
    return pairs


def alpha_over_r(config, *, reads_rslora):
    """One scale for all: vLLM reads use_rslora, SGLang does not, and neither reads patterns."""
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert config["peft_type"] == "LORA"
    if reads_rslora and config.get("use_rslora"):
        return config["lora_alpha"] / config["r"] ** 0.5
    return config["lora_alpha"] / config["r"]


def vllm(tensors, config, *, joined):
    """vLLM's view, of a model whose experts it joins (is_3d_moe_weight) or of one with those of each expert."""
    scale, pairs, found = alpha_over_r(config, reads_rslora=True), pairs_of(tensors), {}
    for name in [name for name in pairs if name.endswith(".experts")] if joined else []:
        down, gate_up = pairs.pop(name), pairs.pop(f"{name}.base_layer")
        for last, pair in {"gate_up_proj": gate_up, "down_proj": down}.items():
            a = pair["A"].reshape(E, -1, pair["A"].shape[-1])
            b = pair["B"].reshape(pair["B"].shape[0], -1, E).transpose(2, 0, 1)
            assert a.shape[1] == b.shape[2] == config["r"]
            found[f"{name}.{last}"] = scale * b @ a
    for name, pair in pairs.items():
        assert ".base_layer" not in name
        assert re.search(r"experts(?!\.\d+\.(gate|up|down)_proj$)", name) is None, "unexpected module"
        assert len(pair["A"]) == config["r"]
        found[name] = scale * pair["B"] @ pair["A"]
    return with_experts_stacked(found)


def sglang(tensors, config):
    """SGLang's view: modules of each expert in two axes, or of all of them in three, with a leading 1 where shared."""
    scale, pairs, found = alpha_over_r(config, reads_rslora=False), pairs_of(tensors), {}
    names = {name.rpartition(".")[2] for name in config["target_modules"]}
    for name, pair in pairs.items():
        assert name.rpartition(".")[2] in names
        assert pair["A"].shape[-2] == config["r"] == pair["B"].shape[-1]
        if pair["A"].ndim == 3:
            outer = pair["B" if name.endswith("down_proj") else "A"]
            assert len(outer) == 1
            found[name] = scale * pair["B"] @ pair["A"]
        else:
            found[name] = scale * pair["B"] @ pair["A"]
    return with_experts_stacked(found)


def with_experts_stacked(changes):
    """The changes with those of all experts, and of both halves, in one array."""
    found, experts = {}, {}
    for name, change in changes.items():
        match = re.fullmatch(r"(.+\.experts)(?:\.(\d+))?\.(gate|up|down)_proj", name)
        if match is None:
            found[name] = change
        else:
            experts.setdefault((match[1], match[3]), {})[match[2]] = change
    stacked = {
        key: own[None] if None in own else np.stack([own[str(expert)] for expert in range(len(own))])
        for key, own in experts.items()
    }
    for parent in dict.fromkeys(parent for parent, _ in stacked):
        if (parent, "gate") in stacked:
            halves = stacked[parent, "gate"], stacked[parent, "up"]
            found[f"{parent}.gate_up_proj"] = np.concatenate(halves, axis=1)
        if (parent, "down") in stacked:
            found[f"{parent}.down_proj"] = stacked[parent, "down"]
    return found


def assert_same_changes(found, adapters):
    expected = changes_of(adapters)
    assert sorted(name for name, change in found.items() if change.any()) == sorted(expected)
    for name, change in expected.items():
        np.testing.assert_allclose(found[name], change, rtol=1e-5, atol=1e-6)


def folder_of(folder):
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


PATTERNS = {"ranks": (3, 1), "scales": (0.5, 2.0)}
READERS = {
    "vllm": lambda *files: vllm(*files, joined=True),
    "vllm-by-expert": lambda *files: vllm(*files, joined=False),
    "sglang": sglang,
}


@pytest.mark.parametrize("profile", READERS)
@pytest.mark.parametrize("options", [{}, PATTERNS, {"shared": True}], ids=["alike", "patterns", "shared"])
def test_what_a_server_makes_of_it(profile, options, tmp_path):
    adapters = adapters_of(**options)
    lora.save_peft(tmp_path / "out", adapters, MAP, profile=profile)
    tensors, config = folder_of(tmp_path / "out")
    assert_same_changes(READERS[profile](tensors, config), adapters)
    rank = max(options.get("ranks", (R, R)))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    in_memory, entries = lora.peft_tensors(adapters, MAP, profile=profile)
    assert entries == config
    assert {name: tensor.tolist() for name, tensor in in_memory.items()} == {n: t.tolist() for n, t in tensors.items()}


@pytest.mark.parametrize("profile", READERS)
@pytest.mark.parametrize("options", [{}, PATTERNS, {"shared": True}], ids=["alike", "patterns", "shared"])
def test_ours_and_back(profile, options, tmp_path):
    adapters = adapters_of(**options)
    lora.save_peft(tmp_path / "out", adapters, MAP, profile=profile)
    again, _ = lora.load_peft(tmp_path / "out", PARAMS, MAP)
    rank = max(options.get("ranks", (R, R)))
    assert sorted(again) == sorted(adapters)
    for path, adapter in adapters.items():  # scales are in B, and are powers of two: nothing is rounded
        own = adapter.a.shape[-1]
        assert again[path].a.shape[-1] == rank
        np.testing.assert_array_equal(again[path].a[..., :own], adapter.a)
        np.testing.assert_array_equal(
            again[path].b[..., :own, :] * again[path].scale, np.asarray(adapter.b) * adapter.scale
        )
        assert not again[path].a[..., own:].any()
        assert not again[path].b[..., own:, :].any()


def test_shapes_in_the_file(tmp_path):
    at = LAYER.format(1) + "mlp.experts"
    forms = {}
    for profile, options in {"vllm": {}, "vllm-by-expert": {}, "sglang": {}, "shared": {"shared": True}}.items():
        tensors, _ = lora.peft_tensors(adapters_of(**options), MAP, profile=profile.replace("shared", "sglang"))
        forms[profile] = {n.removeprefix(at): t.shape for n, t in tensors.items() if n.startswith(at)}
    assert forms["vllm"] == {
        ".base_layer.lora_A.weight": (E * R, D),
        ".base_layer.lora_B.weight": (2 * F, E * R),
        ".lora_A.weight": (E * R, F),
        ".lora_B.weight": (D, E * R),
    }
    each = {"gate_proj": ((R, D), (F, R)), "up_proj": ((R, D), (F, R)), "down_proj": ((R, F), (D, R))}
    assert forms["sglang"] == forms["vllm-by-expert"]
    assert forms["sglang"] == {
        f".{expert}.{name}.lora_{x}.weight": shape
        for expert in range(E)
        for name, shapes in each.items()
        for x, shape in zip("AB", shapes, strict=True)
    }
    outer = {
        "gate_proj": ((1, R, D), (E, F, R)),
        "up_proj": ((1, R, D), (E, F, R)),
        "down_proj": ((E, R, F), (1, D, R)),
    }
    assert forms["shared"] == {
        f".{name}.lora_{x}.weight": shape for name, own in outer.items() for x, shape in zip("AB", own, strict=True)
    }


@pytest.mark.parametrize("last", ["gate_up_proj", "down_proj"])
def test_vllm_gets_both_parameters_of_experts(last, tmp_path):
    """It asserts that both are there: the one without an adapter has zeros."""
    adapters = adapters_of([path for path in SHAPES if last in path])
    lora.save_peft(tmp_path / "out", adapters, MAP, profile="vllm")
    tensors, config = folder_of(tmp_path / "out")
    assert_same_changes(vllm(tensors, config, joined=True), adapters)
    again, _ = lora.load_peft(tmp_path / "out", PARAMS, MAP)
    assert [path for path, adapter in again.items() if adapter.b.any()] == list(adapters)


@pytest.mark.parametrize(("to", "joined"), [("vllm", True), ("vllm-by-expert", False)])
def test_the_command_writes_for_both_kinds_of_models(to, joined, tmp_path):
    """From the one kind to the other: modules of each expert tell which they are."""
    adapters = adapters_of()
    lora.save_peft(tmp_path / "in", adapters, MAP, profile="vllm-by-expert")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to]) == 0
    assert_same_changes(vllm(*folder_of(tmp_path / "out"), joined=joined), adapters)


def test_experts_with_factors_of_their_own(tmp_path):
    """As older models have them: gate and up have different A, and the joined parameter both, at twice the rank."""
    lora.save_peft(tmp_path / "in", adapters_of(), MAP, profile="vllm-by-expert")
    tensors, config = folder_of(tmp_path / "in")
    tensors = {name: tensor + name.count("up_proj.lora_A") for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    again, _ = lora.load_peft(tmp_path / "in", PARAMS, MAP)
    assert {adapter.a.shape[-1] for path, adapter in again.items() if "gate_up" in path} == {2 * R}
    assert_same_changes(vllm(tensors, config, joined=False), again)


def test_projections_of_mixtral_and_of_some_only(tmp_path):
    lora.save_peft(tmp_path / "in", adapters_of([path for path in SHAPES if "experts" in path]), MAP, profile="sglang")
    tensors, config = folder_of(tmp_path / "in")
    whole, _ = lora.load_peft(tmp_path / "in", PARAMS, MAP)
    old = {"mlp.experts": "block_sparse_moe.experts", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def renamed(name):
        for new, own in old.items():
            name = name.replace(new, own)
        return name

    save_file({renamed(name): tensor for name, tensor in tensors.items()}, tmp_path / "in/adapter_model.safetensors")
    config["target_modules"] = ["w1", "w2", "w3"]
    (tmp_path / "in/adapter_config.json").write_text(json.dumps(config))
    again, _ = lora.load_peft(tmp_path / "in", PARAMS, MAP)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    gates = {renamed(name): tensor for name, tensor in tensors.items() if "gate_proj" in name}
    save_file(gates, tmp_path / "in/adapter_model.safetensors")
    (tmp_path / "in/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["w1"]}))
    again, _ = lora.load_peft(tmp_path / "in", PARAMS, MAP)
    for path, adapter in again.items():
        np.testing.assert_array_equal(adapter.b[..., :F], whole[path].b[..., :F])
        assert not adapter.b[..., F:].any()


def test_what_servers_have_no_place_for(tmp_path):
    transposed = key_maps.KeyMap(
        *(key_maps.experts(f"{name}", f"m.experts.{name}", transposed=True) for name in ("gate_up_proj", "down_proj"))
    )
    adapter = adapters_of([AT.format(0, "mlp/experts/gate_up_proj")])
    one = {"gate_up_proj": next(iter(adapter.values()))}
    for profile in ("vllm-by-expert", "sglang"):
        with pytest.raises(lora.LoraError, match=r"m\.experts\.gate_up_proj' is \[experts, in, out\], of which"):
            lora.save_peft(tmp_path / "out", one, transposed, profile=profile)
    lora.save_peft(tmp_path / "out", one, transposed, profile="vllm")  # joined as it is, as of gpt-oss
    other = key_maps.KeyMap(key_maps.experts("gate_up_proj", "m.experts.w13"))
    for profile in READERS:
        with pytest.raises(lora.LoraError, match=r"m\.experts\.w13' is none of gate_up_proj, up_proj, down_proj"):
            lora.save_peft(tmp_path / "none", one, other, profile=profile)
    ungated = key_maps.KeyMap(key_maps.experts("gate_up_proj", "m.experts.up_proj"))
    with pytest.raises(lora.LoraError, match="has experts with gates"):
        lora.save_peft(tmp_path / "none", one, ungated, profile="sglang")
    down = adapters_of([AT.format(0, "mlp/experts/down_proj")])
    alone = key_maps.KeyMap(key_maps.experts("down", "m.experts.down_proj"))
    with pytest.raises(lora.LoraError, match="give the key map an entry for gate_up_proj"):
        lora.save_peft(tmp_path / "none", {"down": next(iter(down.values()))}, alone, profile="vllm")
    assert not (tmp_path / "none").exists()


def test_experts_of_which_some_are_missing(tmp_path):
    lora.save_peft(tmp_path / "in", adapters_of(), MAP, profile="sglang")
    tensors, config = folder_of(tmp_path / "in")
    (tmp_path / "in/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    left = {name: tensor for name, tensor in tensors.items() if "experts.1.up_proj" not in name}
    save_file(left, tmp_path / "in/adapter_model.safetensors")
    with pytest.raises(lora.LoraError, match="and none of expert 1"):
        lora.load_peft(tmp_path / "in", PARAMS, MAP)


def test_stacked_experts_do_not_take_more_memory_than_they_may(tmp_path):
    lora.save_peft(tmp_path / "in", adapters_of(shared=True), MAP, profile="sglang")
    tensors, _ = folder_of(tmp_path / "in")
    at = LAYER.format(0) + "mlp.experts.gate_proj.lora_B.weight"
    save_file(tensors | {at: tensors[at][:2]}, tmp_path / "in/adapter_model.safetensors")
    with pytest.raises(lora.LoraError, match=r"experts\.2\.gate_proj', which its config has"):
        lora.load_peft(tmp_path / "in", PARAMS, MAP)
    save_file(tensors | {at: np.ones((2**20, 1, R), np.float16)}, tmp_path / "in/adapter_model.safetensors")
    with pytest.raises(lora.LoraError, match="numbers in 2,0"):
        lora.load_peft(tmp_path / "in", PARAMS, MAP)
    twice = {f"{LAYER.format(0)}mlp.experts.0.gate_proj.lora_A.weight": np.ones((R, D), np.float32)}
    save_file(tensors | twice, tmp_path / "in/adapter_model.safetensors")
    with pytest.raises(lora.LoraError, match="is there twice"):
        lora.load_peft(tmp_path / "in", PARAMS, MAP)


def test_without_a_model(tmp_path):
    """By names alone: the modules of each expert, also where their outer factors are one in the file."""
    lora.save_peft(tmp_path / "in", adapters_of(shared=True), MAP, profile="sglang")
    adapters, _, key_map = load_by_module(tmp_path / "in")
    lora.save_peft(tmp_path / "out", adapters, key_map)
    tensors, config = folder_of(tmp_path / "out")
    assert_same_changes(vllm(tensors, config, joined=False), adapters_of(shared=True))
    assert read_peft(tmp_path / "in") is None


def test_experts_without_gates(tmp_path):
    ungated = key_maps.KeyMap(*(key_maps.experts(name, f"m.experts.{name}") for name in ("up_proj", "down_proj")))
    axes = lora.KernelAxes((0,), (1,), (2,))
    up = lora.LoraAdapter(jnp.ones((E, D, R)), jnp.ones((E, R, F)), axes, 1.0)
    tensors, _ = lora.peft_tensors({"up_proj": up}, ungated, profile="vllm")
    assert {name.removeprefix("base_model.model.m.experts"): tensor.shape for name, tensor in tensors.items()} == {
        ".base_layer.lora_A.weight": (E * R, D),
        ".base_layer.lora_B.weight": (F, E * R),
        ".lora_A.weight": (E * R, F),
        ".lora_B.weight": (D, E * R),
    }
    lora.save_peft(tmp_path / "out", {"up_proj": up}, ungated, profile="vllm-by-expert")
    again, _ = lora.load_peft(tmp_path / "out", {"up_proj": jax.ShapeDtypeStruct((E, D, F), jnp.float32)}, ungated)
    np.testing.assert_array_equal(again["up_proj"].a, up.a)
    np.testing.assert_array_equal(again["up_proj"].b, up.b)


def test_mutations(tmp_path):
    """Names, shapes and configs changed: adapters or the library's own error."""
    random, ends = Random(0), [0, 0]
    lora.save_peft(tmp_path / "in", adapters_of(shared=True), MAP, profile="sglang")
    tensors, config = folder_of(tmp_path / "in")
    for _ in range(100):
        own = dict(tensors)
        name = random.choice(sorted(own))
        shape = tuple(random.choices([0, 1, 2, 3, 8], k=random.randrange(5)))
        names = [name, name, name.replace("experts", "experts.0"), name.replace("gate", "up"), name.replace("A", "B")]
        tensor = own.pop(name)
        own[random.choice(names)] = random.choice([tensor, tensor, np.ones(shape, np.float32)])
        save_file(own, tmp_path / "in/adapter_model.safetensors")
        entries = config | random.choice([{}, {"target_modules": []}, {"r": 3}, {"rank_pattern": {"experts": 1}}])
        (tmp_path / "in/adapter_config.json").write_text(json.dumps(entries))
        try:
            lora.load_peft(tmp_path / "in", PARAMS, MAP)
            ends[0] += 1
        except lora.LoraError as error:
            assert_harmless(str(error))
            ends[1] += 1
    assert min(ends) > 5


def test_adapters_of_a_bank_are_for_servers_too():
    bank = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), adapters_of(shared=True))
    slot = jax.tree.map(lambda leaf: leaf[1], bank)
    tensors, config = lora.peft_tensors(slot, MAP, profile="sglang")
    assert_same_changes(sglang(tensors, config), slot)
