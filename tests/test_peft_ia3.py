"""(IA)^3 in files of HF PEFT: factors on outputs, biases among them, and on inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from test_export import published
from test_peft import (
    MLP,
    SPLIT,
    assert_same_tensors,
    case,
    config_of,
    edit_config,
    edit_tensors,
    split_params,
    stacked,
    tensors_of,
)
from test_peft_kinds import LLAMA, QUERY, STACKED, P, Q, drawn, folder_of, round_trip, torch_weight

import lora_jax as lora
from lora_jax.adapters.ia3 import Ia3InputsAdapter
from lora_jax.interop.peft.load import load_by_module
from lora_jax.key_maps import KeyMap, array, linear

SHAPES = {"lin0": (10, 1), "lin1": (1, 10), "head": (3, 1)}  # lin0 and the head have biases
INPUTS = {"target_modules": [*SHAPES], "feedforward_modules": ["lin1"]}


def ia3_folder(folder, shapes=SHAPES, **config):
    tensors = drawn(0, **{f"{name}.ia3_l": shape for name, shape in shapes.items()})
    return folder_of(folder, tensors, peft_type="IA3", **(INPUTS | config)), tensors


def of_mlp():
    """Parameters whose biases are not zero."""
    params = case("lora")[0]
    return {path: leaf + 0.5 if path.endswith("bias") else leaf for path, leaf in params.items()}


def test_outputs_biases_and_inputs(tmp_path):
    """The outputs are scaled after the bias is added, and inputs before the product."""
    params = of_mlp()
    shapes = {name: (params[f"{name}/kernel"].shape[1], 1) for name in SHAPES}
    shapes["lin1"] = (1, params["lin1/kernel"].shape[0])
    folder, tensors = ia3_folder(tmp_path / "in", shapes)
    adapters = round_trip(tmp_path, folder, params, MLP)
    kinds = {path: type(adapter) for path, adapter in adapters.items()}
    assert kinds["lin1/kernel"] is Ia3InputsAdapter
    assert [path for path, kind in kinds.items() if kind is lora.Ia3Adapter] == [
        path for path in kinds if path != "lin1/kernel"
    ]
    assert {"lin0/bias", "head/bias"} <= kinds.keys()
    assert "lin1/bias" not in kinds
    merged = lora.merge(params, adapters)
    for name in ("lin0", "head"):
        g = tensors[f"{name}.ia3_l"][:, 0]
        np.testing.assert_allclose(merged[f"{name}/kernel"], params[f"{name}/kernel"] * g[None], rtol=1e-6)
        np.testing.assert_allclose(merged[f"{name}/bias"], params[f"{name}/bias"] * g, rtol=1e-6)
    g = tensors["lin1.ia3_l"].T
    np.testing.assert_allclose(merged["lin1/kernel"], params["lin1/kernel"] * g, rtol=1e-6)
    config = config_of(tmp_path / "again")
    assert (config["peft_type"], config["feedforward_modules"]) == ("IA3", ["lin1"])
    # In the program: factors on inputs are those of another product, and are formed where that is asked for.
    ids = case("lora")[1]
    apply = lora.lora_apply(twins.mlp, materialize="lin1/kernel")
    np.testing.assert_allclose(apply(params, adapters, ids), twins.mlp(merged, ids), rtol=1e-5, atol=1e-6)
    with pytest.raises(lora.LoraError, match="'lin1/kernel'"):
        lora.lora_apply(twins.mlp)(params, adapters, ids)


def test_inputs_used_the_other_way_round():
    """x @ W^T scales its outputs, for which nothing is formed."""
    w, g = drawn(0, w=(4, 3), g=(4,)).values()
    adapters = {"w": Ia3InputsAdapter(jnp.asarray(g), lora.KernelAxes((), (0,), (1,)), (3,))}
    x = jnp.ones((2, 3))
    y = lora.lora_apply(lambda p, x: x @ p["w"].T)({"w": jnp.asarray(w)}, adapters, x)
    np.testing.assert_allclose(y, x @ (g[:, None] * w).T, rtol=1e-5)
    assert adapters["w"].kernel_shape() == (4, 3)


def test_heads_apart_and_stacked_layers(tmp_path):
    params = case("llama")[0]
    tensors = {f"{Q.format(i)}.ia3_l": t for i in (0, 1) for t in drawn(i, g=(16, 1)).values()}
    folder = folder_of(tmp_path / "in", tensors, peft_type="IA3", target_modules=["q_proj"], feedforward_modules=[])
    adapters, _ = lora.load_peft(folder, stacked(params), STACKED)
    lora.save_peft(tmp_path / "again", adapters, STACKED, params=stacked(params))
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(folder))
    assert adapters[QUERY].gain.shape == (2, 4, 4)
    merged = lora.merge(stacked(params), adapters)[QUERY]
    for i in range(2):
        expected = (torch_weight(params, i) * tensors[f"{Q.format(i)}.ia3_l"]).T.reshape(16, 4, 4)
        np.testing.assert_allclose(merged[i], expected, rtol=1e-5)
    edit_tensors(folder, lambda t: {name: tensor for name, tensor in t.items() if ".1." in name})
    edit_config(folder, target_modules=[Q.format(1)])
    with pytest.raises(lora.LoraError, match=f"'{QUERY}' has layers with .* and layers without"):
        lora.load_peft(folder, stacked(params), STACKED)
    assert len(lora.load_peft(folder, params, LLAMA)[0]) == 1


def test_inputs_of_several_axes(tmp_path):
    """Heads and their size, as of an output projection."""
    params = {"o/kernel": jnp.ones((2, 3, 5))}
    key_map = KeyMap(linear("o/kernel", "o_proj", "in* out"))
    tensors = drawn(0, **{"o_proj.ia3_l": (1, 6)})
    config = {"target_modules": ["o_proj"], "feedforward_modules": ".*o_proj"}
    folder = folder_of(tmp_path / "in", tensors, peft_type="IA3", **config)
    adapters = round_trip(tmp_path, folder, params, key_map)
    np.testing.assert_array_equal(adapters["o/kernel"].input_gain, tensors["o_proj.ia3_l"].reshape(2, 3))


def test_parts_of_a_module(tmp_path):
    """Queries and values have factors, and keys have ones."""
    params = split_params()
    axes = lora.KernelAxes((), (0,), (1, 2))
    adapters = {
        f"{name}/kernel": lora.Ia3Adapter(jnp.asarray(g), axes, (16,))
        for name, g in drawn(0, q=(2, 8), v=(2, 8)).items()
    }
    lora.save_peft(tmp_path / "out", adapters, SPLIT, params=params)
    [vector] = tensors_of(tmp_path / "out").values()
    np.testing.assert_array_equal(vector[16:32], np.ones((16, 1)))
    again, _ = lora.load_peft(tmp_path / "out", params, SPLIT)
    for path, w in lora.merge(params, adapters).items():
        np.testing.assert_allclose(lora.merge(params, again)[path], w, rtol=1e-6)


def test_checkpoints_and_published_files(tmp_path):
    """Checkpoints keep both sides; into published files such factors do not go, which is said."""
    params = of_mlp()
    axes = lora.KernelAxes((), (0,), (1,))
    adapters = {
        "lin1/kernel": Ia3InputsAdapter(2 * jnp.ones(10), axes, (4,)),
        "lin0/bias": lora.Ia3Adapter(3 * jnp.ones(10), lora.KernelAxes((), (), (0,)), ()),
    }
    lora.checkpoint.save(tmp_path / "saved", adapters)
    found, _ = lora.checkpoint.load(tmp_path / "saved")
    for path, w in lora.merge(params, adapters).items():
        np.testing.assert_array_equal(lora.merge(params, found)[path], w)
    published(tmp_path / "base", "lora")
    with pytest.raises(lora.LoraError, match=r"'lin1/kernel' has factors of W itself.*lora.to_torch\(lora.merge"):
        lora.merge_checkpoint(tmp_path / "base", adapters, tmp_path / "out", MLP)


def test_parts_with_biases(tmp_path):
    """Factors of one module of torch's are those of three weights here, and of three biases."""
    params = {f"{x}/{leaf}": jnp.ones((3, 4) if leaf == "kernel" else 4) for x in "qkv" for leaf in ("kernel", "bias")}
    key_map = KeyMap(
        *(linear(f"{x}/kernel", "qkv", part=i) for i, x in enumerate("qkv")),
        *(array(f"{x}/bias", "qkv.bias", part=i) for i, x in enumerate("qkv")),
    )
    tensors = drawn(0, **{"qkv.ia3_l": (12, 1)})
    config = {"target_modules": ["qkv"], "feedforward_modules": []}
    folder = folder_of(tmp_path / "in", tensors, peft_type="IA3", **config)
    adapters = round_trip(tmp_path, folder, params, key_map)
    merged = lora.merge(params, adapters)
    found = np.concatenate([merged[f"{x}/bias"] for x in "qkv"])
    np.testing.assert_array_equal(found, tensors["qkv.ia3_l"][:, 0])
    del adapters["k/bias"]
    with pytest.raises(lora.LoraError, match="'qkv' have other factors than its bias, 'q/bias'"):
        lora.save_peft(tmp_path / "out", adapters, key_map, params=params)


def test_names_that_end_like_others_are_told_by_an_expression(tmp_path):
    key_map = KeyMap(linear("a/kernel", "up"), linear("b/kernel", "mlp.up"))
    params = {path: jnp.ones((3, 3)) for path in ("a/kernel", "b/kernel")}
    axes = lora.KernelAxes((), (0,), (1,))
    adapters = {
        "a/kernel": Ia3InputsAdapter(2 * jnp.ones(3), axes, (3,)),
        "b/kernel": lora.Ia3Adapter(jnp.ones(3), axes, (3,)),
    }
    lora.save_peft(tmp_path / "out", adapters, key_map)
    assert config_of(tmp_path / "out")["feedforward_modules"] == "up"
    found, _ = lora.load_peft(tmp_path / "out", params, key_map)
    assert {path: type(adapter) for path, adapter in found.items()} == {p: type(a) for p, a in adapters.items()}


def test_what_a_bias_needs(tmp_path):
    params = of_mlp()
    shapes = {"lin0": (params["lin0/kernel"].shape[1], 1)}
    folder, _ = ia3_folder(tmp_path / "in", shapes, target_modules=["lin0"], feedforward_modules=None)
    adapters, _ = lora.load_peft(folder, params, MLP)
    kernel = {"lin0/kernel": adapters["lin0/kernel"]}
    with pytest.raises(lora.LoraError, match=r"PEFT scales its bias too, if it has one: .*save_peft\(..., params=par"):
        lora.save_peft(tmp_path / "out", kernel, MLP)
    with pytest.raises(lora.LoraError, match="of 'lin0' have other factors than its bias, 'lin0/bias', and PEFT"):
        lora.save_peft(tmp_path / "out", kernel, MLP, params=params)
    other = dataclasses.replace(adapters["lin0/bias"], gain=adapters["lin0/bias"].gain + 1)
    with pytest.raises(lora.LoraError, match="of 'lin0' have other factors than its bias, 'lin0/bias', and PEFT"):
        lora.save_peft(tmp_path / "out", kernel | {"lin0/bias": other}, MLP)
    with pytest.raises(lora.LoraError, match="PEFT has no folder of such alone"):
        lora.save_peft(tmp_path / "out", {"lin0/bias": other}, MLP)
    plain = lora.Lora(2).init(jax.random.key(0), params["lin1/kernel"], lora.KernelAxes((), (0,), (1,)))
    with pytest.raises(lora.LoraError, match=r"has factors of a bias, which PEFT has beside .* alone"):
        lora.save_peft(tmp_path / "out", {"lin1/kernel": plain, "lin0/bias": other}, MLP)
    with pytest.raises(
        lora.LoraError, match="'lin0/kernel' is of IA3; 'lin1/kernel' is not, and a folder of PEFT is all"
    ):
        lora.save_peft(tmp_path / "out", kernel | {"lin1/kernel": plain}, MLP)
    assert not (tmp_path / "out").exists()
    plan = lora.plan(lambda p, x: x @ p["lin0/kernel"], params, jnp.ones((2, 6)), rules={"lin0/kernel": lora.Ia3()})
    with pytest.raises(lora.LoraError, match=r"of 'lin0' scales its bias too, if it has one, which the plan does not"):
        lora.load_peft(folder, plan, MLP)
    with pytest.raises(lora.LoraError, match="its tensors do not tell the other side: load it with a key map"):
        load_by_module(folder)


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"feedforward_modules": []}, {}, r"'lin1' has ia3_l of shape \[1, 10\], by the config one on its outputs"),
        ({"feedforward_modules": "lin.*"}, {}, r"'lin0' has ia3_l of .* on its inputs, since it is among feedforward"),
        ({"feedforward_modules": 3}, {}, "feedforward_modules is 3, expected a list of names"),
        ({"feedforward_modules": "("}, {}, "which is no regular expression of RE2"),
        ({}, {"lin0.ia3_l": (10, 2)}, r"has ia3_l of shape \[10, 2\], expected"),
        ({}, {"lin0.ia3_l": (10,)}, r"has ia3_l of shape \[10\], expected"),
        ({}, {"lin0.ia3_l": (9, 1)}, r"has \[9\], which do not fit 'lin0/kernel'"),
        ({}, {"lin1.ia3_l": (1, 9)}, r"do not fit 'lin1/kernel'"),
        ({"r": 8}, {}, "r is 8, which this version of lora_jax does not have"),
    ],
)
def test_what_does_not_fit_is_named(config, tensors, says, tmp_path):
    folder, _ = ia3_folder(tmp_path / "in")
    edit_config(folder, **config)
    edit_tensors(folder, lambda t: t | {P + key: np.ones(shape, np.float32) for key, shape in tensors.items()})
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, of_mlp(), MLP)
