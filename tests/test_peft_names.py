"""Names of tensors and keys of configs as other ways of saving leave them: one reading is taken, of several none."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_export import published, tensors_in
from test_peft import DATA, MLP, P, case, config_of, copy, edit_config, edit_tensors, tensors_of

import lora_jax as lora
from lora_jax import key_maps

ROOM = "model.layers.0.self_attn."
Q = f"{ROOM}q_proj"
PATHS = {f"model/layers/0/self_attn/{name}_proj/kernel": jnp.zeros((8, 8)) for name in "qv"}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}


def write(folder, names, config=(), pair=((2, 8), (8, 2))):
    """A folder with A of ones and B of twos of each module, by the names that `{}` gives."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | dict(config)))
    arrays = {x: np.full(shape, i, np.float32) for x, shape, i in zip("AB", pair, (1, 2), strict=True)}
    tensors = {name.format(x): array for name in names for x, array in arrays.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


ONE_READING = {
    "as PEFT": f"{P}{Q}.lora_{{}}.weight",
    "the adapter's name": f"{P}{Q}.lora_{{}}.default.weight",
    "no prefix": f"{Q}.lora_{{}}.weight",
    "the prefix twice": f"{P}{P}{Q}.lora_{{}}.weight",
    "compiled": f"{P}_orig_mod.{Q}.lora_{{}}.weight",
    "compiled outside": f"_orig_mod.{P}{Q}.lora_{{}}.weight",
    "compiled layers": f"{P}{Q.replace('.0.', '.0._orig_mod.')}.lora_{{}}.weight",
    "without a head": f"{P}{Q.removeprefix('model.')}.lora_{{}}.weight",
    "inside a model that sees": f"{P}model.language_model.{Q.removeprefix('model.')}.lora_{{}}.weight",
    "outside": f"{P}language_model.{Q}.lora_{{}}.weight",
    "of many processes": f"module.{Q}.lora_{{}}.default.weight",
}


@pytest.mark.parametrize("name", ONE_READING)
def test_one_reading_is_taken(name, tmp_path):
    folder = write(tmp_path / "in", [ONE_READING[name]], {"rank_pattern": {".*q_proj": 2}, "r": 3})
    adapters, others = lora.load_peft(folder, PATHS, key_maps.LLAMA)
    assert not others
    [(path, adapter)] = adapters.items()
    assert path == "model/layers/0/self_attn/q_proj/kernel"
    np.testing.assert_allclose(adapter.merge(PATHS[path]), np.full((8, 8), 4 / 2 * 2 * 2))


@pytest.mark.parametrize("name", ONE_READING)
def test_one_reading_is_merged_into_files(name, tmp_path):
    folder = write(tmp_path / "peft", [ONE_READING[name]])
    (tmp_path / "in").mkdir()
    save_file({f"{Q}.weight": np.zeros((8, 8), np.float32)}, tmp_path / "in" / "model.safetensors")
    assert [*lora.merge_checkpoint(tmp_path / "in", folder, tmp_path / "out")] == [f"{Q}.weight"]
    [tensor] = tensors_in(tmp_path / "out").values()
    np.testing.assert_allclose(tensor, 8)


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "loha", "lokr", "vera", "lora_lora_bias", "lora_emb"])
def test_every_kind_with_its_names_in_memory(name, tmp_path):
    """As the names are in a model's own state: each array is followed by the name of its adapter."""
    folder = copy(name, tmp_path)
    arrays = r"(lora_[ABE]|lora_embedding_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+|vera_\w+)(?=\.|$)"
    edit_tensors(folder, lambda t: {re.sub(arrays, r"\1.mine", key): tensor for key, tensor in t.items()})
    assert tensors_of(folder).keys() != tensors_of(DATA / name).keys()
    params = case(name)[0]
    found, expected = (lora.load_peft(one, params, MLP) for one in (folder, DATA / name))
    assert found[0].keys() == expected[0].keys()
    for path, adapter in expected[0].items():
        np.testing.assert_array_equal(found[0][path].merge(params[path]), adapter.merge(params[path]))


def test_what_was_trained_whole_with_its_name_in_memory(tmp_path):
    folder = copy("llama_tokens", tmp_path)
    edit_tensors(folder, lambda t: {re.sub(r"(_delta)$", r"\1.default", key): v for key, v in t.items()})
    params = case("llama_tokens")[0]
    found, expected = (lora.load_peft(one, params, key_maps.LLAMA)[0] for one in (folder, DATA / "llama_tokens"))
    assert found.keys() == expected.keys()
    head = write(tmp_path / "head", [ONE_READING["the adapter's name"]], {"modules_to_save": ["lm_head"]})
    edit_tensors(head, lambda t: t | {f"{P}lm_head.modules_to_save.default.weight": np.ones((3, 8), np.float32)})
    _, others = lora.load_peft(head, PATHS | {"lm_head/kernel": jnp.zeros((8, 3))}, key_maps.LLAMA)
    np.testing.assert_array_equal(others["lm_head/kernel"], np.ones((8, 3)))


def test_of_several_readings_none_is_taken_and_each_call_works(tmp_path):
    table = key_maps.KeyMap(
        key_maps.linear("see/{i}/q/kernel", "vision.layers.{i}.q"),
        key_maps.linear("say/{i}/q/kernel", "model.layers.{i}.q"),
    )
    params = {f"{part}/0/q/kernel": jnp.zeros((8, 8)) for part in ("see", "say")}
    folder = write(tmp_path / "in", [P + "layers.0.q.lora_{}.weight"])
    with pytest.raises(lora.LoraError, match="these names only begin with something else") as error:
        lora.load_peft(folder, params, table)
    calls = re.findall(r"(lora\.load_peft\(folder, params, key_map\.renamed\(.*?\)\))", str(error.value))
    assert len(calls) == 2
    scope = {"lora": lora, "folder": folder, "params": params, "key_map": table}
    found = [[*eval(call, scope)[0]] for call in calls]
    assert sorted(found) == [["say/0/q/kernel"], ["see/0/q/kernel"]]


def test_a_beginning_that_says_which_model_it_is_is_not_guessed(tmp_path):
    """Another tower's adapter fits by its shapes too."""
    folder = write(tmp_path / "in", [f"{P}vision_tower.{Q}.lora_{{}}.weight"])
    with pytest.raises(lora.LoraError, match=r"key_map\.under\(name='vision_tower\.'\)"):
        lora.load_peft(folder, PATHS, key_maps.LLAMA)
    assert lora.load_peft(folder, PATHS, key_maps.LLAMA.under(name="vision_tower."))[0]
    (tmp_path / "base").mkdir()
    save_file({f"{Q}.weight": np.zeros((8, 8), np.float32)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(lora.LoraError, match=r"loaded and merged with a key map: lora.load_peft\(folder, params"):
        lora.merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([Q.replace(".0.", ".7.")], "'model.layers.7.self_attn.q_proj'; nearest"),  # numbers are never changed
        ([Q, f"language_model.{ROOM}v_proj"], "'language_model.model.layers.0.self_attn.v_proj'; nearest"),
    ],
)
def test_names_of_no_reading(names, says, tmp_path):
    folder = write(tmp_path / "in", [f"{P}{name}.lora_{{}}.weight" for name in names])
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, PATHS, key_maps.LLAMA)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([f"{P}{Q}.lora_{{}}.one.weight", f"{P}{Q}.lora_{{}}.two.weight"], r"adapters of 2 names, 'one', 'two', and a"),
        ([f"{P}{Q}.lora_{{}}.weight", f"{P}{Q}.lora_{{}}.two.weight"], "are two names of one tensor"),
        ([f"{P}{Q}.lora_{{}}.weight", f"{P}{P}{Q}.lora_{{}}.weight"], "are two names of one tensor"),
        ([f"{P}{Q}.lora_{{}}.weight", f"{ROOM}v_proj.lora_{{}}.weight"], "expected names that begin with 'base_model"),
    ],
)
def test_files_of_several_adapters(names, says, tmp_path):
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(write(tmp_path / "in", names), PATHS, key_maps.LLAMA)


def test_published_files_with_other_names_than_the_folder(tmp_path):
    """Trained rows, biases and heads too: a model that sees, whose files have earlier names than transformers."""
    base = published(tmp_path / "base", "llama_tokens")
    for folder, prefix in (("same", ""), ("other", "language_model.")):
        (tmp_path / folder).mkdir()
        named = {prefix + name: tensor for name, tensor in base.items()}
        save_file(named, tmp_path / folder / "model.safetensors")
        lora.merge_checkpoint(tmp_path / folder, DATA / "llama_tokens", tmp_path / f"{folder} out")
    same, other = (load_file(tmp_path / f"{folder} out" / "model.safetensors") for folder in ("same", "other"))
    assert any(not np.array_equal(same[name], tensor) for name, tensor in base.items())
    for name, tensor in same.items():
        np.testing.assert_array_equal(other[f"language_model.{name}"], tensor)


# Keys of the config ---------------------------------------------------------------------------------------------------

CHANGES_NOTHING = {
    "off": None, "empty": [], "no": False, "none": "none", "nothing": {},
    "trainer_version": "2026.10.9", "module_dropout": 0.1, "velora_config": {"num_groups": 64},
    "megatron_config": {"tp": 2}, "lora_dtype": "float32", "loraplus_lr_ratio": 16, "library_name": "peft",
}  # fmt: skip


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "loha", "lokr", "vera"])
def test_keys_that_change_nothing_are_no_reason_to_refuse(name, tmp_path):
    folder = copy(name, tmp_path)
    edit_config(folder, **{key: v for key, v in CHANGES_NOTHING.items() if key not in config_of(folder)})
    params = case(name)[0]
    found, expected = (lora.load_peft(one, params, MLP)[0] for one in (folder, DATA / name))
    assert found.keys() == expected.keys()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("use_qalora", True, "use_qalora is True, which this version of lora_jax does not have: if it changes what"),
        ("corda_new", {"beta": 1e-4}, r"corda_new is \{'beta': 0.0001\}, .* merge it in PEFT, model.merge_and_unload"),
        ("alora_invocation_tokens", [1], r"alora_invocation_tokens is \[1\], .* use it in PEFT"),
        ("arrow_config", {"top_k": 3}, "chooses among several adapters: load these from their own folders"),
        ("a_new_one", "some", "a_new_one is 'some', .* take it out of adapter_config.json"),
    ],
)
def test_keys_that_may_change_something_are_refused(key, value, says, tmp_path):
    folder = copy("lora", tmp_path)
    edit_config(folder, **{key: value})
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, case("lora")[0], MLP)


def test_tensors_of_training_alone_are_left_out(tmp_path):
    folder = copy("lora", tmp_path)
    edit_config(folder, velora_config={"num_groups": 4}, monteclora_config={"num_samples": 8})
    more = ("lora_velora_embed", "lora_monteclora_sampler.std_prior", "lora_monteclora_sampler.expert_weights")
    edit_tensors(folder, lambda t: t | {f"{P}lin0.{name}": np.ones(3, np.float32) for name in more})
    found, others = lora.load_peft(folder, case("lora")[0], MLP)
    assert found.keys() == lora.load_peft(DATA / "lora", case("lora")[0], MLP)[0].keys()
    assert not [path for path in others if "lin0" in path]
