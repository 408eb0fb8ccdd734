"""Adapters of all experts together, merged into published files that have a tensor for each expert and projection."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from safetensors.numpy import load_file, save_file
from test_export import published, tensors_in
from test_peft import DATA, P, case, copy, edit_config

import lora_jax as lora
from lora_jax import key_maps

NAMES = {  # of the module of experts, and of gate, up and down, as published files have them
    "qwen": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
}


def apart(base, names="qwen"):
    """The same tensors with each expert's projections by themselves."""
    module, gate, up, down = NAMES[names]
    found = {}
    for name, tensor in base.items():
        layer, at, parameter = name.partition("mlp.experts.")
        if not at:
            found[name] = tensor
            continue
        for e, expert in enumerate(tensor):
            parts = {gate: expert[: len(expert) // 2], up: expert[len(expert) // 2 :]}
            for part, own in (parts if parameter == "gate_up_proj" else {down: expert}).items():
                found[f"{layer}{module}.{e}.{part}.weight"] = np.ascontiguousarray(own)
    return found


def files(folder, names="qwen"):
    """The published model of the fixture with its experts apart; returns the tensors as torch has them."""
    base = published(folder, "qwen3moe")
    save_file(apart(base, names), folder / "model.safetensors")
    return base


@pytest.mark.parametrize("how", ["folder", "adapters"])
@pytest.mark.parametrize("names", NAMES)
def test_experts_are_merged_into_tensors_of_their_own(names, how, tmp_path):
    base = files(tmp_path / "in", names)
    params = case("qwen3moe")[0]
    adapters, _ = lora.load_peft(DATA / "qwen3moe", params, key_maps.LLAMA)
    if how == "folder":
        losses = lora.merge_checkpoint(tmp_path / "in", DATA / "qwen3moe", tmp_path / "out")
    else:
        losses = lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", key_maps.LLAMA)
    merged = lora.merge(twins.from_torch(base), adapters)
    expected = apart(lora.to_torch(merged, key_maps.LLAMA), names)
    found = tensors_in(tmp_path / "out")
    assert found.keys() == expected.keys()
    changed = [name for name, tensor in apart(base, names).items() if not np.array_equal(tensor, found[name])]
    assert sorted(changed) == sorted(losses)
    assert sum("experts" in name for name in changed) == 3 * len(base["model.layers.0.mlp.experts.down_proj"])
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-6, err_msg=name)


def test_arrays_of_all_experts(tmp_path):
    """A `Full` adapter is added expert by expert, and an array that was trained whole takes their places."""
    base = files(tmp_path / "in")
    params = twins.from_torch(base)
    paths = [f"model/layers/0/mlp/experts/{name}/kernel" for name in ("gate_up_proj", "down_proj")]
    full, whole = (jax.random.normal(jax.random.key(i), params[path].shape) for i, path in enumerate(paths))
    adapters = {paths[0]: lora.FullAdapter(full, lora.KernelAxes((), (), (0, 1, 2)))}
    lora.merge_checkpoint(
        tmp_path / "in", adapters, tmp_path / "out", key_maps.LLAMA, others={paths[1]: whole}, params=params
    )
    expected = apart(lora.to_torch(lora.merge(params | {paths[1]: whole}, adapters), key_maps.LLAMA))
    for name, tensor in tensors_in(tmp_path / "out").items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_key_map_that_has_experts_the_other_way_round(tmp_path):
    """A model of one's own may keep experts as [experts, in, out]; the files have [out, in]."""
    w = {f"m.experts.{e}.down_proj.weight": np.full((3, 5), e, np.float32) for e in range(2)}
    (tmp_path / "in").mkdir()
    save_file(w, tmp_path / "in" / "model.safetensors")
    adapter = lora.Lora(rank=2, alpha=2).factors(jax.random.key(0), (2, 5, 3), lora.KernelAxes((0,), (1,), (2,)))
    adapter = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), adapter)
    merged = adapter.merge(jnp.stack([jnp.full((5, 3), e, jnp.float32) for e in range(2)]))
    for transposed in (False, True):
        entry = key_maps.experts("down", "m.experts.down_proj", transposed=transposed)
        out = tmp_path / f"out {transposed}"
        lora.merge_checkpoint(tmp_path / "in", {"down": adapter}, out, key_maps.KeyMap(entry))
        for e in range(2):
            own = load_file(out / "model.safetensors")[f"m.experts.{e}.down_proj.weight"]
            np.testing.assert_allclose(own, merged[e].T, rtol=1e-5, atol=1e-5)


def test_files_of_other_experts_are_refused(tmp_path):
    base = files(tmp_path / "in")
    adapters, _ = lora.load_peft(DATA / "qwen3moe", case("qwen3moe")[0], key_maps.LLAMA)
    tensors = {name: tensor for name, tensor in apart(base).items() if "experts.3." not in name}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    says = r"'model.layers.0.mlp.experts.down_proj' is 3 experts in the files, .* adapter is for \[4, "
    with pytest.raises(lora.LoraError, match=says):
        lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", key_maps.LLAMA)
    with pytest.raises(lora.LoraError, match=r"by their shapes are no way those of .*gate_up_proj \[3, "):
        lora.merge_checkpoint(tmp_path / "in", DATA / "qwen3moe", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def written(folder, shapes, modules, targets):
    """A published model of zeros and an adapter of rank 1 of ones for it, as PEFT names its tensors."""
    (folder / "in").mkdir(parents=True)
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "in/model.safetensors")
    (folder / "peft").mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [], "target_parameters": targets}
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (experts, inputs, outputs) in modules.items():
        tensors[f"{P}{name}.lora_A.weight"] = np.ones((experts, inputs), np.float32)
        tensors[f"{P}{name}.lora_B.weight"] = np.ones((outputs, experts), np.float32)
    save_file(tensors, folder / "peft" / "adapter_model.safetensors")
    return folder / "in", folder / "peft", folder / "out"


FUSED = ["experts.gate_up_proj", "experts.down_proj"]


def test_the_shapes_of_the_files_tell_which_parameter_an_adapter_is_of(tmp_path):
    """All parameters of a module are the same way round; so one that is square is where the others are not."""
    shapes = {"m.experts.gate_up_proj": (2, 4, 8), "m.experts.down_proj": (2, 4, 4)}
    modules = {"m.experts.base_layer": (2, 4, 8), "m.experts": (2, 4, 4)}
    where = written(tmp_path / "turned", shapes, modules, FUSED)
    assert [*lora.merge_checkpoint(*where)] == [*shapes]
    assert all((tensor == 1).all() for tensor in tensors_in(where[2]).values())
    shapes["m.experts.gate_up_proj"] = (2, 4, 4)
    modules["m.experts.base_layer"] = (2, 4, 4)
    where = written(tmp_path / "square", shapes, modules, FUSED)
    with pytest.raises(lora.LoraError, match=r"more than one way those of .*load_peft\(folder, params, key_map\)"):
        lora.merge_checkpoint(*where)
    where = written(tmp_path / "one", {"m.experts.down_proj": (2, 3, 4)}, {"m.experts": (2, 4, 3)}, FUSED)
    assert [*lora.merge_checkpoint(*where)] == ["m.experts.down_proj"]


def test_experts_do_not_begin_with_a_part_of_their_weights(tmp_path):
    files(tmp_path / "in")
    folder = copy("qwen3moe", tmp_path / "peft")
    edit_config(folder, init_lora_weights="pissa")
    with pytest.raises(lora.LoraError, match="experts that began with 'pissa', which PEFT has for layers alone"):
        lora.merge_checkpoint(tmp_path / "in", folder, tmp_path / "out")
