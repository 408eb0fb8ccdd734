"""Folders of mlx-lm, by its own formulas in numpy; tests/interop_mlx has the real one."""

import json
import re
from collections import Counter
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_servers import MAP, PARAMS, SHAPES, E, F, R, adapters_of, assert_same_changes
from test_untrusted import assert_harmless, mutated_json

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.interop.mlx.adapters import load_mlx, read_mlx, save_mlx, write_mlx
from lora_jax.interop.module_adapters import Lazy, by_module, module_adapters
from lora_jax.interop.peft_modules import read_peft

PATTERNS = {"ranks": (3, 1), "scales": (0.5, 2.0)}
Q = "model.layers.0.self_attn.q_proj"
QUERIES = [path for path in SHAPES if "q_proj" in path]


def folder_of(folder):
    return load_file(folder / "adapters.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def write_folder(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 3.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def changes_in(tensors, config):
    """What mlx-lm adds to each weight: `fuse` of its LoRALinear and LoRASwitchLinear; halves of experts in one."""
    scale, rank = config["lora_parameters"]["scale"], config["lora_parameters"]["rank"]
    modules, found = sorted({name.rpartition(".")[0] for name in tensors}), {}
    assert config["lora_parameters"]["keys"] == modules
    for module in modules:
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        assert a.shape[1] == rank == b.shape[-1 if b.ndim == 3 else 0]
        found[module] = (scale * b) @ a if a.ndim == 3 else (scale * b.T) @ a.T
    for name in [name for name in found if ".switch_mlp.gate_proj" in name]:
        up, joined = name.replace("gate", "up"), name.replace("switch_mlp.gate", "experts.gate_up")
        found[joined] = np.concatenate([found.pop(name), found.pop(up)], axis=1)
    return {name.replace("switch_mlp", "experts"): change for name, change in found.items()}


@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["alike", "patterns"])
def test_what_mlx_adds(options, tmp_path):
    adapters = adapters_of(**options)
    save_mlx(tmp_path / "out", adapters, MAP)
    tensors, config = folder_of(tmp_path / "out")
    assert_same_changes(changes_in(tensors, config), adapters)
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 2)
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == ((3, 1.0) if options else (R, 0.5))
    with safe_open(tmp_path / "out/adapters.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx"}
    assert {name: tensors[name].shape for name in tensors if ".1.mlp" in name and "up_proj" in name} == {
        "model.layers.1.mlp.switch_mlp.up_proj.lora_a": (E, parameters["rank"], 8),
        "model.layers.1.mlp.switch_mlp.up_proj.lora_b": (E, F, parameters["rank"]),
    }


def test_ours_and_back(tmp_path):
    """Bit by bit where ranks and scales are alike; else up to zeros, and scales that are multiplied into B."""
    adapters = adapters_of()
    save_mlx(tmp_path / "out", adapters, MAP)
    again = load_mlx(tmp_path / "out", PARAMS, MAP)
    assert sorted(again) == sorted(adapters)
    for path, adapter in adapters.items():
        assert again[path].scale == adapter.scale
        np.testing.assert_array_equal(again[path].a, adapter.a)
        np.testing.assert_array_equal(again[path].b, adapter.b)
    patterns = adapters_of(**PATTERNS)
    save_mlx(tmp_path / "out", patterns, MAP)
    for path, adapter in load_mlx(tmp_path / "out", PARAMS, MAP).items():
        own = patterns[path].a.shape[-1]
        np.testing.assert_array_equal(adapter.a[..., :own], patterns[path].a)
        np.testing.assert_array_equal(adapter.b[..., :own, :], np.asarray(patterns[path].b) * patterns[path].scale)
        assert not adapter.a[..., own:].any()


def test_dora_and_tables(tmp_path):
    table = key_maps.embedding("table", "model.embed_tokens")
    adapters = adapters_of(QUERIES)
    adapters = {path: lora.DoraAdapter(a.a, a.b, jnp.arange(6.0), a.axes, a.scale) for path, a in adapters.items()}
    save_mlx(tmp_path / "dora", adapters, MAP)
    tensors, config = folder_of(tmp_path / "dora")
    assert config["fine_tune_type"] == "dora"
    np.testing.assert_array_equal(tensors[f"{Q}.m"], np.arange(6))
    again = load_mlx(tmp_path / "dora", PARAMS, MAP)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)

    one = lora.LoraAdapter(jnp.ones((7, R)), jnp.ones((R, 8)), lora.KernelAxes((), (0,), (1,)), 1.0)
    save_mlx(tmp_path / "table", {"table": one}, key_maps.KeyMap(table))
    tensors, _ = folder_of(tmp_path / "table")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "model.embed_tokens.lora_a": (7, R),
        "model.embed_tokens.lora_b": (R, 8),
    }
    assert read_mlx(tmp_path / "table").kinds == {"model.embed_tokens": "embedding"}
    dora = {"table": lora.DoraAdapter(one.a, one.b, jnp.ones(8), one.axes, 1.0)}
    with pytest.raises(lora.LoraError, match="is a table with DoRA"):
        save_mlx(tmp_path / "none", dora, key_maps.KeyMap(table))


def test_dtypes(tmp_path):
    adapters = adapters_of(**PATTERNS)
    save_mlx(tmp_path / "out", adapters, MAP, dtype=jnp.bfloat16)
    tensors, _ = folder_of(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(jnp.bfloat16)}
    expected = np.asarray(adapters[QUERIES[0]].b * adapters[QUERIES[0]].scale).astype(jnp.bfloat16)
    np.testing.assert_array_equal(tensors[f"{Q}.lora_b"], expected)
    assert {a.a.dtype for a in load_mlx(tmp_path / "out", PARAMS, MAP).values()} == {jnp.dtype(jnp.float32)}
    assert {a.a.dtype for a in load_mlx(tmp_path / "out", PARAMS, MAP, dtype=None).values()} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_experts_of_mlx_with_an_a_of_their_own(tmp_path):
    """Trained by mlx-lm, gate and up have different A: the joined parameter has both, at twice the rank."""
    save_mlx(tmp_path / "out", adapters_of(), MAP)
    tensors, config = folder_of(tmp_path / "out")
    tensors = {name: tensor + name.count("up_proj.lora_a") for name, tensor in tensors.items()}
    again = load_mlx(write_folder(tmp_path / "in", tensors, **config), PARAMS, MAP)
    assert {adapter.a.shape[-1] for path, adapter in again.items() if "gate_up" in path} == {2 * R}
    assert_same_changes(changes_in(tensors, config), again)
    gates = {name: tensor for name, tensor in tensors.items() if "up_proj" not in name}
    again = load_mlx(write_folder(tmp_path / "in", gates, **config), PARAMS, MAP)
    assert {bool(adapter.b[..., F:].any()) for path, adapter in again.items() if "gate_up" in path} == {False}


def test_experts_that_are_modules_of_their_own(tmp_path):
    lora.save_peft(tmp_path / "peft", adapters_of(), MAP, profile="vllm-by-expert")
    found = read_peft(tmp_path / "peft")
    write_mlx(tmp_path / "mlx", found)
    tensors, config = folder_of(tmp_path / "mlx")
    assert_same_changes(changes_in(tensors, config), adapters_of())
    left = {name: module for name, module in found.modules.items() if "experts.1." not in name}
    with pytest.raises(lora.LoraError, match="give all of them adapters"):
        write_mlx(tmp_path / "none", found._replace(modules=left, outlines=left, kinds=dict.fromkeys(left, "linear")))


def test_without_a_model_and_one_module_at_a_time(tmp_path):
    save_mlx(tmp_path / "first", adapters_of(), MAP)
    found, asked = read_mlx(tmp_path / "first"), Counter()
    for name, module in found.modules.items():
        for field, array in module.arrays.items():
            outline = found.outlines[name].arrays[field]
            assert (outline.shape, outline.dtype, {*outline.strides}) == (array.shape, array.dtype, {0})

    def make(name):
        asked[name] += 1
        return found.modules[name]

    write_mlx(tmp_path / "second", found._replace(modules=Lazy([*found.modules], make)))
    assert asked == Counter(dict.fromkeys(found.modules, 1))
    again = module_adapters("save", *by_module(found))
    write_mlx(tmp_path / "third", again)
    for file in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()
        assert (tmp_path / "third" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_a_folder_that_is_replaced_while_it_is_read(tmp_path):
    save_mlx(tmp_path / "in", adapters_of(), MAP)
    found = read_mlx(tmp_path / "in")
    save_mlx(tmp_path / "in", adapters_of(**PATTERNS), MAP)
    with pytest.raises(lora.LoraError, match="was replaced while it was read"):
        found.modules[Q]


def test_what_mlx_has_no_place_for(tmp_path):
    one = lora.LoraAdapter(jnp.ones((3, 3, 4, R)), jnp.ones((R, 8)), lora.KernelAxes((), (0, 1, 2), (3,)), 1.0)
    with pytest.raises(lora.LoraError, match="no LoRA of convolutions"):
        save_mlx(tmp_path / "none", {"conv": one}, key_maps.KeyMap(key_maps.conv("conv", "m.conv")))
    other = {"w": next(iter(adapters_of([path for path in SHAPES if "gate_up" in path]).values()))}
    transposed = key_maps.experts("w", "m.experts.gate_up_proj", transposed=True)
    with pytest.raises(lora.LoraError, match="not known which outputs are those of the gate"):
        save_mlx(tmp_path / "none", other, key_maps.KeyMap(transposed))
    with pytest.raises(lora.LoraError, match="there are no adapters"):
        save_mlx(tmp_path / "none", {}, MAP)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/other").touch()
    with pytest.raises(lora.LoraError, match="other"):
        save_mlx(tmp_path / "full", adapters_of(), MAP)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


A, B = np.ones((8, 2), np.float32), np.ones((2, 6), np.float32)
GOOD = {f"{Q}.lora_a": A, f"{Q}.lora_b": B}
EXPERTS = "model.layers.0.mlp.switch_mlp"


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (GOOD, {"fine_tune_type": "full"}, "fine_tune_type is 'full', expected 'lora' or 'dora'"),
        (GOOD, {"lora_parameters": {"rank": 2, "alpha": 16}}, "takes no alpha in the place of its scale"),
        (GOOD, {"lora_parameters": {"rank": 3, "scale": 1.0}}, "rank 2, by the config 3"),
        (GOOD, {"lora_parameters": {"rank": "2", "scale": 1.0}}, "rank is '2', expected a whole number"),
        (GOOD, {"lora_parameters": None}, "expected an object with rank and scale"),
        (GOOD, {"fine_tune_type": "dora"}, "has no m"),
        ({f"{Q}.lora_a": A}, {}, "has no lora_b"),
        (GOOD | {f"{Q}.m": np.ones(6)}, {}, "no tensor of LoRA"),
        (GOOD | {"lora_a": A}, {}, "no tensor of LoRA"),
        (GOOD | {f"{Q}.lora_b": B.T}, {}, "of no common rank"),
        (GOOD | {f"{Q}.lora_b": B.astype(np.float16)}, {}, "factors of F32 and of F16"),
        (GOOD | {f"{Q}.lora_b": np.ones((2, 6), np.int8)}, {}, "is of int8"),
        ({f"{Q}.lora_{x}": np.ones((3, 2, 2), np.float32) for x in "ab"}, {}, "is of experts, expected gate_proj"),
        (
            {
                f"{EXPERTS}.{p}.lora_{x}": np.ones((3, 2 + (p > "h"), 2), np.float32)
                for p in ("gate_proj", "up_proj")
                for x in "b"
            }
            | {f"{EXPERTS}.{p}.lora_a": np.ones((3, 2, 4), np.float32) for p in ("gate_proj", "up_proj")},
            {},
            "factors of different shapes",
        ),
        ({}, {}, "holds no factors of any module"),
    ],
)
def test_damaged_folders(tensors, config, says, tmp_path):
    write_folder(tmp_path / "in", tensors, **config)
    with pytest.raises(lora.LoraError, match=re.escape(says)):
        load_mlx(tmp_path / "in", PARAMS, MAP)


def test_a_module_that_the_model_does_not_have(tmp_path):
    write_folder(tmp_path / "in", {name.replace("q_proj", "x_proj"): tensor for name, tensor in GOOD.items()})
    with pytest.raises(lora.LoraError, match="x_proj"):
        load_mlx(tmp_path / "in", PARAMS, MAP)


def mutated(random, folder):
    """A folder with something changed in its config, in the shapes and names of its tensors, or in its bytes."""
    kind = random.randrange(3)
    if kind == 0:
        path = folder / "adapter_config.json"
        path.write_bytes(mutated_json(random, path.read_bytes()))
    elif kind == 1:
        tensors = load_file(folder / "adapters.safetensors")
        name = random.choice(sorted(tensors))
        tensor = tensors.pop(name)
        shape = tuple(random.choices([0, 1, 2, 3], k=random.randrange(4)))
        names = [name, f"{name}.m", "m", "", "..", "a\x1b[2J.lora_a", name.replace("gate", "down"), f"é.{name}"]
        tensors[random.choice(names)] = random.choice([tensor, tensor.T.copy(), np.ones(shape, np.float32)])
        save_file(tensors, folder / "adapters.safetensors")
    else:
        data = bytearray((folder / "adapters.safetensors").read_bytes())
        for _ in range(random.randrange(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        (folder / "adapters.safetensors").write_bytes(data[: random.choice([len(data), random.randrange(len(data))])])


def run_mutations(cases, folder):
    random, ends = Random(cases), [0, 0]
    for _ in range(cases):
        save_mlx(folder, adapters_of(), MAP)
        mutated(random, folder)
        try:
            load_mlx(folder, PARAMS, MAP)
            ends[0] += 1
        except lora.LoraError as error:
            assert_harmless(str(error))
            ends[1] += 1
    assert min(ends) > cases / 20


def test_mutations(tmp_path):
    run_mutations(100, tmp_path / "in")


@pytest.mark.slow
def test_many_mutations(tmp_path, share):
    run_mutations(share(2500), tmp_path / "in")
