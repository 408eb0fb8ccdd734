"""Files of HF PEFT of the other kinds, in other layouts: against formulas with torch's tensors, module by module."""

import dataclasses
import json
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from helpers import add
from safetensors.numpy import save_file
from test_export import published, tensors_in
from test_peft import (
    DATA,
    MLP,
    SPLIT,
    P,
    assert_same_config,
    assert_same_tensors,
    case,
    config_of,
    copy,
    edit_config,
    edit_tensors,
    split_params,
    stacked,
    tensors_of,
)

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.adapters.vera import shared_projections
from lora_jax.interop.peft.formats.format import COMMON_OPTIONS, Format
from lora_jax.interop.peft.formats.ranks import alpha_of, ranks_and_alphas
from lora_jax.interop.peft.formats.registry import FORMATS
from lora_jax.interop.peft.load import load_by_module
from lora_jax.key_maps import KeyMap, linear

Q = "model.layers.{}.self_attn.q_proj"
LLAMA, STACKED = key_maps.LLAMA, key_maps.LLAMA.stacked()
QUERY = "model/layers/self_attn/q_proj/kernel"


def folder_of(folder, tensors, **config):
    """A folder of PEFT with these tensors."""
    folder.mkdir()
    save_file(
        {P + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def drawn(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def torch_weight(params, i=0):
    """Of the query of a layer, [out, in]."""
    return np.asarray(params[f"model/layers/{i}/self_attn/q_proj/kernel"], np.float64).T


def round_trip(tmp_path, folder, params, key_map, **options):
    """What was loaded is saved with the same tensors."""
    adapters, others = lora.load_peft(folder, params, key_map)
    lora.save_peft(tmp_path / "again", adapters, key_map, others=others, **options)
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(folder))
    return adapters


# DoRA -----------------------------------------------------------------------------------------------------------------


def dora(w, a, b, m, s):
    """W' [out, in] by the formula."""
    v = w + s * np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    return m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)


def test_dora_of_convolutions():
    """The lengths are over all axes but the outputs."""
    params, tensors = case("conv_dora")[0], tensors_of(DATA / "conv_dora")
    adapters, _ = lora.load_peft(DATA / "conv_dora", params, MLP)
    merged = lora.merge(params, adapters)
    for name, formula in [("conv", "ripq,orxy->oipq"), ("conv1", "rip,orx->oip")]:
        a, b, m = (tensors[f"{P}{name}.lora_{x}"] for x in ("A.weight", "B.weight", "magnitude_vector"))
        w = np.moveaxis(np.asarray(params[f"{name}/kernel"]), (-1, -2), (0, 1)) + 2 * np.einsum(formula, a, b)
        w *= m.reshape(-1, *[1] * (w.ndim - 1)) / np.linalg.norm(w.reshape(len(w), -1), axis=1).reshape(
            -1, *[1] * (w.ndim - 1)
        )
        np.testing.assert_allclose(merged[f"{name}/kernel"], np.moveaxis(w, (0, 1), (-1, -2)), rtol=1e-5, atol=1e-6)


def llama_dora(tmp_path, layers=(0, 1)):
    shapes = {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2), "lora_magnitude_vector": 16}
    tensors = {f"{Q.format(i)}.{name}": tensor for i in layers for name, tensor in drawn(i, **shapes).items()}
    return folder_of(
        tmp_path / "in", tensors, peft_type="LORA", r=2, lora_alpha=6, use_dora=True, target_modules=["q_proj"]
    ), tensors


def test_dora_of_stacked_layers_with_heads_apart(tmp_path):
    params = case("llama")[0]
    folder, tensors = llama_dora(tmp_path)
    adapters = round_trip(tmp_path, folder, stacked(params), STACKED)
    assert adapters[QUERY].m.shape == (2, 4, 4)
    merged = lora.merge(stacked(params), adapters)[QUERY]
    for i in range(2):
        a, b, m = (tensors[f"{Q.format(i)}.lora_{x}"] for x in ("A.weight", "B.weight", "magnitude_vector"))
        expected = dora(torch_weight(params, i), a, b, m, 3).T.reshape(16, 4, 4)
        np.testing.assert_allclose(merged[i], expected, rtol=1e-5, atol=1e-6)


def test_dora_of_some_layers_of_a_stack(tmp_path):
    folder, _ = llama_dora(tmp_path, layers=[1])
    with pytest.raises(lora.LoraError, match=f"'{QUERY}' has layers with DoRA and layers without"):
        lora.load_peft(folder, stacked(case("llama")[0]), STACKED)
    assert len(lora.load_peft(folder, case("llama")[0], LLAMA)[0]) == 1


def test_dora_of_parts_of_a_module(tmp_path):
    """A part without an adapter keeps the lengths that it has, for which its weight is needed."""
    params, fused = split_params(), case("gpt2")[0]
    whole = "transformer/h/0/attn/c_attn/kernel"
    plan = {path: lora.Dora(rank=2, alpha=4) for path in ("q/kernel", "v/kernel")}
    adapters = {
        path: rule.init(jax.random.key(i), params[path], lora.KernelAxes((), (0,), (1, 2)))
        for i, (path, rule) in enumerate(plan.items())
    }
    adapters = {path: dataclasses.replace(a, b=a.b + 0.3, m=1.5 * a.m) for path, a in adapters.items()}
    with pytest.raises(lora.LoraError, match="of which only 'q/kernel', 'v/kernel' are known"):
        lora.save_peft(tmp_path / "out", adapters, SPLIT)
    shapes = {path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in params.items()}
    with pytest.raises(lora.LoraError, match="holds 'k/kernel', which has no adapter, and DoRA writes the length"):
        lora.save_peft(tmp_path / "out", adapters, SPLIT, params=shapes)
    lora.save_peft(tmp_path / "out", adapters, SPLIT, params=params)
    assert config_of(tmp_path / "out")["use_dora"]
    merged = lora.merge(params, adapters)
    expected = np.concatenate([merged[f"{name}/kernel"].reshape(16, -1) for name in "qkv"], axis=1)
    found, _ = lora.load_peft(tmp_path / "out", fused, key_maps.GPT2)
    np.testing.assert_allclose(lora.merge(fused, found)[whole], expected, rtol=1e-5, atol=1e-6)
    again, _ = lora.load_peft(tmp_path / "out", params, SPLIT)
    merged = lora.merge(params, again)
    found = np.concatenate([merged[f"{name}/kernel"].reshape(16, -1) for name in "qkv"], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_dora_beside_others_is_not_one_folder(tmp_path):
    adapters, _ = lora.load_peft(DATA / "dora", case("dora")[0], MLP)
    mixed = adapters | {"lin0/kernel": lora.load_peft(DATA / "lora", case("lora")[0], MLP)[0]["lin0/kernel"]}
    with pytest.raises(
        lora.LoraError, match="'lin0/kernel' is not, and a folder of PEFT is all of one kind: save them"
    ):
        lora.save_peft(tmp_path / "out", mixed, MLP)
    for profile in ("vllm", "loralib"):
        with pytest.raises(lora.LoraError, match=r"is a DoraAdapter.*merge it instead"):
            lora.save_peft(tmp_path / "out", adapters, MLP, profile=profile)
    assert not (tmp_path / "out").exists()


def test_dora_of_a_table_that_is_used_as_the_head(tmp_path):
    """Its lengths are those of the table's columns, and not of its rows."""
    folder, params = copy("dora", tmp_path), case("dora")[0]
    edit_tensors(folder, lambda t: {name: tensor for name, tensor in t.items() if ".emb." in name})
    edit_config(folder, target_modules=["emb"])
    plan = lora.plan(lambda p, x: x @ p["emb/embedding"].T, params, jnp.ones((3, 6)), rules={"emb/.*": lora.Dora(2)})
    with pytest.raises(lora.LoraError, match="has inputs 1, outputs 0 by the plan, but its adapter has inputs 0"):
        lora.load_peft(folder, plan, MLP)


# AdaLoRA --------------------------------------------------------------------------------------------------------------


def adalora_delta(tensors, name, scale):
    a, e, b = (np.asarray(tensors[f"{P}{name}.lora_{x}"], np.float64) for x in "AEB")
    return scale * b @ (a * e)


def test_adalora_after_its_budget(tmp_path):
    """Of ranks by the masks; what divides alpha is the rank at the start."""
    folder, params = DATA / "adalora_trained", case("adalora")[0]
    adapters = round_trip(tmp_path, folder, params, MLP)
    assert_same_config(tmp_path / "again", folder)
    merged, tensors = lora.merge(params, adapters), tensors_of(folder)
    for name in ("lin0", "lin1"):
        assert adapters[f"{name}/kernel"].e.shape == (2,)
        expected = params[f"{name}/kernel"] + adalora_delta(tensors, name, 4 / (4 + 1e-5)).T
        np.testing.assert_allclose(merged[f"{name}/kernel"], expected, rtol=1e-6, atol=1e-6)


def test_adalora_of_modules_with_other_ranks_and_scales(tmp_path):
    """One rank to begin with and masks; one scale, the others go into e."""
    params = case("adalora")[0]
    adapters, _ = lora.load_peft(DATA / "adalora", params, MLP)
    one = adapters["lin1/kernel"]
    adapters["lin1/kernel"] = dataclasses.replace(one, a=one.a[:, :2], e=one.e[:2], b=one.b[:2], ratio=-0.7)
    lora.save_peft(tmp_path / "out", adapters, MLP)
    config = config_of(tmp_path / "out")
    assert config["rank_pattern"] == {"lin0.lora_E": [True] * 3, "lin1.lora_E": [True, True, False]}
    assert (config["init_r"], config["tinit"] < config["total_step"] - config["tfinal"]) == (3, True)
    found, _ = lora.load_peft(tmp_path / "out", params, MLP)
    assert {type(adapter) for adapter in found.values()} == {lora.AdaLoraAdapter}
    for path, w in lora.merge(params, adapters).items():
        np.testing.assert_allclose(lora.merge(params, found)[path], w, rtol=1e-6, atol=1e-6)


def test_adalora_of_which_nothing_is_left(tmp_path):
    folder = copy("adalora", tmp_path)

    def cut(tensors):
        a, e, b = (f"{P}lin1.lora_{x}" for x in "AEB")
        return tensors | {a: tensors[a][:0], e: tensors[e][:0], b: tensors[b][:, :0]}

    edit_tensors(folder, cut)
    edit_config(folder, rank_pattern={"lin0.lora_E": [True] * 3, "lin1.lora_E": [False] * 3})
    params = case("adalora")[0]
    merged = lora.merge(params, lora.load_peft(folder, params, MLP)[0])
    np.testing.assert_array_equal(merged["lin1/kernel"], params["lin1/kernel"])
    assert np.abs(merged["lin0/kernel"] - params["lin0/kernel"]).max() > 1e-4


def test_adalora_for_others_is_the_lora_that_it_is(tmp_path):
    """Beside LoRA in one folder, for vLLM, and of an embedding, which PEFT has no AdaLoRA for."""
    params = case("lora_emb")[0]
    adapters, _ = lora.load_peft(DATA / "adalora", params, MLP)
    plain, _ = lora.load_peft(DATA / "lora_emb", params, MLP)
    fresh = lora.AdaLora(2).init(jax.random.key(0), params["emb/embedding"], lora.KernelAxes((), (0,), (1,)))
    table = dataclasses.replace(fresh, e=fresh.e + 9)
    for i, (some, options) in enumerate(
        [
            (adapters | {"emb/embedding": plain["emb/embedding"]}, {}),
            (adapters | {"emb/embedding": table}, {}),
            (adapters, {"profile": "vllm"}),
        ]
    ):
        lora.save_peft(tmp_path / str(i), some, MLP, **options)
        assert config_of(tmp_path / str(i))["peft_type"] == "LORA"
        found, _ = lora.load_peft(tmp_path / str(i), params, MLP)
        for path, w in lora.merge(params, some).items():
            np.testing.assert_allclose(lora.merge(params, found)[path], w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", [lora.AdaLora(2, 3), lora.Loha(2, 3)])
def test_own_factors_of_parts_are_blocks(rule, tmp_path):
    """q and v of three weights in one module, with factors of their own."""
    params, names = split_params(), ("q", "v")
    key_map = KeyMap(*(linear(f"{name}/kernel", "c_attn", "in out*", part=i) for i, name in enumerate("qkv")))
    fresh = {
        f"{name}/kernel": rule.init(jax.random.key(i), params[f"{name}/kernel"], lora.KernelAxes((), (0,), (1, 2)))
        for i, name in enumerate(names)
    }
    adapters = {path: jax.tree.map(lambda x: x + 0.5, adapter) for path, adapter in fresh.items()}
    lora.save_peft(tmp_path / "out", adapters, key_map, params=params)
    assert config_of(tmp_path / "out")["peft_type"] == type(rule).__name__.upper()
    fused = {"c_attn": jnp.concatenate([params[f"{name}/kernel"].reshape(16, -1) for name in "qkv"], axis=1)}
    found, _ = lora.load_peft(tmp_path / "out", fused, KeyMap(linear("c_attn", "c_attn")))
    merged = lora.merge(params, adapters)
    expected = np.concatenate([merged[f"{name}/kernel"].reshape(16, -1) for name in "qkv"], axis=1)
    np.testing.assert_allclose(lora.merge(fused, found)["c_attn"], expected, rtol=1e-5, atol=1e-5)


# LoHa -----------------------------------------------------------------------------------------------------------------


def test_loha_of_convolutions(tmp_path):
    """PEFT keeps inputs and window as one axis, and its other form is refused."""
    tensors = drawn(0, **{f"conv.hada_w{i}_{x}": s for i in (1, 2) for x, s in (("a", (8, 2)), ("b", (2, 27)))})
    folder = folder_of(tmp_path / "in", tensors, peft_type="LOHA", r=2, alpha=3, target_modules=["conv"])
    params = case("lora")[0]
    adapters = round_trip(tmp_path, folder, params, MLP)
    one, two = (tensors[f"conv.hada_w{i}_a"] @ tensors[f"conv.hada_w{i}_b"] for i in (1, 2))
    expected = params["conv/kernel"] + 1.5 * (one * two).reshape(8, 3, 3, 3).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(lora.merge(params, adapters)["conv/kernel"], expected, rtol=1e-5, atol=1e-5)

    edit_tensors(folder, lambda t: t | {P + "conv.hada_t1": np.zeros((2, 2, 3, 3), np.float32)})
    with pytest.raises(lora.LoraError, match=r"'conv.hada_t1', of a form of LOHA that .*: train it with use_effective"):
        lora.load_peft(folder, params, MLP)


def test_loha_of_stacked_layers_of_different_ranks(tmp_path):
    params, tensors = case("llama")[0], {}
    for i, r in enumerate((2, 3)):
        shapes = {f"hada_w{j}_{x}": s for j in (1, 2) for x, s in (("a", (16, r)), ("b", (r, 16)))}
        tensors |= {f"{Q.format(i)}.{name}": tensor for name, tensor in drawn(i, **shapes).items()}
    folder = folder_of(
        tmp_path / "in",
        tensors,
        peft_type="LOHA",
        r=2,
        alpha=4,
        target_modules=["q_proj"],
        rank_pattern={Q.format(1): 3},
    )
    adapters, _ = lora.load_peft(folder, stacked(params), STACKED)
    merged = lora.merge(stacked(params), adapters)[QUERY]
    for i, r in enumerate((2, 3)):
        one, two = (tensors[f"{Q.format(i)}.hada_w{j}_a"] @ tensors[f"{Q.format(i)}.hada_w{j}_b"] for j in (1, 2))
        expected = (torch_weight(params, i) + 4 / r * one * two).T.reshape(16, 4, 4)
        np.testing.assert_allclose(merged[i], expected, rtol=1e-5, atol=1e-5)


# Biases ---------------------------------------------------------------------------------------------------------------


def gpt2_bias(tmp_path):
    name = "transformer.h.0.attn.c_attn"
    tensors = {f"{name}.{k}": v for k, v in drawn(
        0, **{"lora_A.weight": (2, 16), "lora_B.weight": (48, 2), "lora_B.bias": 48}).items()}  # fmt: skip
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_bias": True, "fan_in_fan_out": True}
    return folder_of(tmp_path / "in", tensors, target_modules=["c_attn"], **options), tensors[f"{name}.lora_B.bias"]


def test_lora_bias_of_parts(tmp_path):
    folder, c = gpt2_bias(tmp_path)
    params = split_params() | {f"{name}/bias": jnp.ones(16) for name in "qkv"}
    adapters = round_trip(tmp_path, folder, params, SPLIT)
    for i, name in enumerate("qkv"):
        np.testing.assert_array_equal(adapters[f"{name}/bias"].delta, 4 * c[16 * i : 16 * i + 16])
    with pytest.raises(lora.LoraError, match=r"'transformer.h.0.attn.c_attn.bias'; nearest"):
        lora.load_peft(folder, split_params(), SPLIT)
    # One of them alone: zeros for the others, whose number has to be known.
    some = {path: adapters[path] for path in ("q/kernel", "k/kernel", "v/kernel", "k/bias")}
    with pytest.raises(lora.LoraError, match="c_attn has 48 outputs, and 16 biases of it are known"):
        lora.save_peft(tmp_path / "some", some, SPLIT)
    lora.save_peft(tmp_path / "some", some, SPLIT, params=params)
    found = tensors_of(tmp_path / "some")[f"{P}transformer.h.0.attn.c_attn.lora_B.bias"]
    np.testing.assert_array_equal(found, np.concatenate([np.zeros(16), c[16:32], np.zeros(16)]))


def test_lora_bias_is_of_all_modules(tmp_path):
    """A module without a trained bias gets zeros; a plan has its biases as it has them."""
    params, ids, _ = case("lora")
    plan = lora.plan(twins.mlp, params, ids, rules={"lin./kernel": lora.Lora(2, 3), "lin0/bias": lora.Full()})
    adapters = add(0.3, lora.init(jax.random.key(0), params, plan))
    lora.save_peft(tmp_path / "out", adapters, MLP)
    tensors = tensors_of(tmp_path / "out")
    np.testing.assert_array_equal(tensors[P + "lin1.lora_B.bias"], np.zeros(4))
    np.testing.assert_allclose(1.5 * tensors[P + "lin0.lora_B.bias"], np.full(10, 0.3), rtol=1e-6)
    found, _ = lora.load_peft(tmp_path / "out", plan, MLP)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for one, other in zip(*map(jax.tree.leaves, (found, adapters)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_other_whole_changes_are_written_with_the_base(tmp_path):
    """Of a head, and of biases beside what has no lora_bias. The head's own bias comes along: PEFT fails without."""
    params, ids, _ = case("dora")
    rules = {"lin./kernel": lora.Dora(2), "head/kernel|lin0/bias": lora.Full()}
    plan = lora.plan(twins.mlp, params, ids, rules=rules)
    adapters = jax.tree.map(lambda a: a + 0.3, lora.init(jax.random.key(0), params, plan))
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    for given in (None, shapes):
        with pytest.raises(lora.LoraError, match=r"which PEFT keeps as W \+ D: give the parameters"):
            lora.save_peft(tmp_path / "out", adapters, MLP, params=given)
    with pytest.raises(lora.LoraError, match="is among the adapters and among the others"):
        lora.save_peft(tmp_path / "out", adapters, MLP, params=params, others={"lin0/bias": params["lin0/bias"]})
    lora.save_peft(tmp_path / "out", adapters, MLP, params=params)
    config, tensors = config_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", ["head"])
    np.testing.assert_array_equal(tensors[P + "head.bias"], params["head/bias"])
    found, others = lora.load_peft(tmp_path / "out", params, MLP)
    merged = lora.merge(params | others, found)
    for path, w in lora.merge(params, adapters).items():
        np.testing.assert_allclose(merged[path], w, rtol=1e-6, atol=1e-6)


def test_whole_changes_that_have_no_place(tmp_path):
    params = case("lora")[0]
    bias = {"lin0/bias": lora.FullAdapter(jnp.ones(10), lora.KernelAxes((), (), (0,)))}
    kinds = {name: lora.load_peft(DATA / name, params, MLP)[0] for name in ("lora", "loha", "lokr")}
    for adapters, options, says in [
        (bias, {}, "PEFT has no folder of such alone: merge it instead"),
        (kinds["lora"] | bias, {"profile": "vllm"}, "profile='vllm' has no place for it: merge it instead"),
        (kinds["loha"] | bias, {"params": params}, "PEFT keeps no biases beside LOHA"),
        (kinds["lokr"] | bias, {"params": params}, "PEFT keeps no biases beside LOKR"),
    ]:
        with pytest.raises(lora.LoraError, match=says):
            lora.save_peft(tmp_path / "out", adapters, MLP, **options)


# What the tensors do not tell -----------------------------------------------------------------------------------------


def test_further_entries_of_the_config(tmp_path):
    adapters, _ = lora.load_peft(DATA / "lora", case("lora")[0], MLP)
    more = {"revision": "main", "lora_dropout": 0.1, "layer_replication": [[0, 1]], "r": 2, "task_type": "CAUSAL_LM"}
    lora.save_peft(tmp_path / "out", adapters, MLP, config=more)
    assert {name: config_of(tmp_path / "out")[name] for name in more} == more
    for wrong, options, says in [
        ({"colour": 1}, {}, r"config\['colour'\] is 1, which LORA does not have"),
        ({"init_r": 1}, {}, r"config\['init_r'\] is 1, which LORA does not have"),
        ({"r": 4}, {}, r"config\['r'\] is 4, but by what is written it is 2: leave it out"),
        ({"use_dora": True}, {}, "is True, but by what is written it is False"),
        ({"lora_bias": True}, {}, "is True, but by what is written it is False"),
        ({"target_parameters": ["a"]}, {}, r"is \['a'\], but by what is written it is None"),
        ({"rank_pattern": {"a": 1}}, {}, "but by what is written it is {}"),
        ({"task_type": "A"}, {"task_type": "B"}, "is 'A', but by what is written it is 'B'"),
        ({"revision": "a"}, {"profile": "loralib"}, "profile='loralib' has no config"),
    ]:
        with pytest.raises(lora.LoraError, match=says):
            lora.save_peft(tmp_path / "wrong", adapters, MLP, config=wrong, **options)
    assert not (tmp_path / "wrong").exists()


def test_a_replicated_model_has_its_own_numbers_of_layers(tmp_path):
    """Without a model at hand it is not known which parameters these are."""
    with pytest.raises(lora.LoraError, match=r"'model.layers.2.self_attn.q_proj'; nearest"):
        lora.load_peft(DATA / "llama_replicate", case("llama")[0], LLAMA)
    with pytest.raises(lora.LoraError, match="layers of its base several times: load it with a key map"):
        load_by_module(DATA / "llama_replicate")


# Starts that change the base ------------------------------------------------------------------------------------------


def truncated(w, r):
    """The nearest of rank r."""
    u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return u[:, :r] * s[:r] @ v[:r]


def first_rows(w, r):
    """Of W [out, in] the projection on its first r columns."""
    q, rest = np.linalg.qr(np.asarray(w, np.float64))
    return q[:, :r] @ rest[:r]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_bases_without_what_the_adapter_began_with(start, tmp_path):
    """Of stacked layers with heads apart."""
    part = first_rows if start == "olora" else truncated
    folder, params = copy("llama", tmp_path), case("llama")[0]
    edit_config(folder, init_lora_weights=start)
    adapters, others = lora.load_peft(folder, stacked(params), STACKED)
    assert others.keys() == adapters.keys()
    scale = adapters[QUERY].scale if start == "olora" else 1
    for i in range(2):
        expected = torch_weight(params, i) - scale * part(torch_weight(params, i), 2)
        np.testing.assert_allclose(others[QUERY][i], expected.T.reshape(16, 4, 4), atol=1e-6)
    lora.save_peft(tmp_path / "out", adapters, STACKED, config={"init_lora_weights": start})
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(folder))
    assert config_of(tmp_path / "out")["init_lora_weights"] == start


def test_the_base_of_one_module_with_several_weights(tmp_path):
    """What PEFT takes apart is the matrix of the module, all of its outputs together."""
    folder, params, fused = copy("gpt2", tmp_path), split_params(), case("gpt2")[0]
    edit_config(folder, init_lora_weights="pissa")
    _, others = lora.load_peft(folder, params, SPLIT)
    w = np.asarray(fused["transformer/h/0/attn/c_attn/kernel"])
    found = np.concatenate([others[f"{name}/kernel"].reshape(16, -1) for name in "qkv"], axis=1)
    np.testing.assert_allclose(found, w - truncated(w, 2), atol=1e-6)
    edit_config(folder, init_lora_weights="olora")
    with pytest.raises(lora.LoraError, match="is of the kind 'conv1d', which PEFT does not start with 'olora'"):
        lora.load_peft(folder, params, SPLIT)


def test_bases_take_the_weights(tmp_path):
    params, ids, _ = case("pissa")
    plan = lora.plan(twins.mlp, params, ids, rules={"lin./kernel": lora.Lora(2)})
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    for given, found in [(plan, "a plan"), (shapes, "shapes")]:
        with pytest.raises(lora.LoraError, match=f"began with 'pissa'.*found {found}: give the parameters themselves"):
            lora.load_peft(DATA / "pissa", given, MLP)
    with pytest.raises(lora.LoraError, match="for a base without what 'pissa' began with: load it with a key map"):
        load_by_module(DATA / "pissa")
    folder = copy("pissa", tmp_path)
    for start in ("corda", "loftq", "lora_ga"):
        edit_config(folder, init_lora_weights=start)
        with pytest.raises(lora.LoraError, match=f"'{start}', which changed the base too. Save it as plain LoRA first"):
            lora.load_peft(folder, params, MLP)


# Rows of tables -------------------------------------------------------------------------------------------------------

TABLE = "model.embed_tokens.token_adapter.trainable_tokens_delta"


def test_rows_by_the_name_of_the_module(tmp_path):
    """Also of a head, [d, entries] here; and they go out by names."""
    folder, params = copy("llama_tokens", tmp_path), case("llama_tokens")[0]
    head = "lm_head.token_adapter.trainable_tokens_delta"
    edit_tensors(folder, lambda t: t | {P + head: 2 * t[P + TABLE]})
    edit_config(folder, trainable_token_indices={"embed_tokens": [1, 3], "lm_head": [4, 2]})
    adapters = round_trip(tmp_path, folder, params, LLAMA)
    indices = {"model.embed_tokens": [1, 3], "lm_head": [4, 2]}
    assert config_of(tmp_path / "again")["trainable_token_indices"] == indices
    merged, rows = lora.merge(params, adapters), tensors_of(folder)[P + TABLE]
    np.testing.assert_array_equal(
        merged["model/embed_tokens/embedding"], params["model/embed_tokens/embedding"].at[jnp.array([1, 3])].set(rows)
    )
    np.testing.assert_array_equal(
        merged["lm_head/kernel"], params["lm_head/kernel"].at[:, jnp.array([4, 2])].set(2 * rows.T)
    )


def test_rows_in_a_plan_that_uses_the_table_as_the_head():
    params = case("llama_tokens")[0]

    def fn(p, x):
        kernels = [p[f"model/layers/{i}/self_attn/q_proj/kernel"] for i in range(2)]
        return x @ kernels[0] @ kernels[1] @ p["model/embed_tokens/embedding"].T

    rules = {"model/embed.*": lora.Rows((1, 3)), ".*/q_proj/kernel": lora.Lora(2)}
    plan = lora.plan(fn, params, jnp.ones((2, 16)), rules=rules)
    adapters, _ = lora.load_peft(DATA / "llama_tokens", plan, LLAMA)
    assert jax.tree.structure(adapters["model/embed_tokens/embedding"]) == jax.tree.structure(
        plan["model/embed_tokens/embedding"].abstract()
    )
    np.testing.assert_allclose(
        lora.lora_apply(fn)(params, adapters, jnp.ones((2, 16))),
        fn(lora.merge(params, adapters), jnp.ones((2, 16))),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1], r"has \[2, 16\] as rows \[1\], expected as many different rows"),
        ([1, 1], "expected as many different rows"),
        ([1, 11], r"of those of 'model/embed_tokens/embedding' of shape \[11, 16\]"),
        ({"other": [1, 3]}, r"as rows \[\]"),
        ([1, -3], r"trainable_token_indices has \[1, -3\], expected a list of numbers of rows"),
        ({"embed_tokens": 3}, "trainable_token_indices has 3"),
        (None, "trainable_tokens_delta', which is not of LORA"),
    ],
)
def test_wrong_rows(tokens, says, tmp_path):
    folder = copy("llama_tokens", tmp_path)
    edit_config(folder, trainable_token_indices=tokens)
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, case("llama_tokens")[0], LLAMA)


def test_rows_that_have_no_place(tmp_path):
    params = case("loha")[0]
    rows = {"emb/embedding": lora.RowsAdapter(jnp.ones((1, 6)), lora.KernelAxes((), (0,), (1,)), (2,), 11)}
    adapters, _ = lora.load_peft(DATA / "loha", params, MLP)
    turned = {"emb/embedding": lora.RowsAdapter(jnp.ones((1, 11)), lora.KernelAxes((), (0,), (1,)), (2,), 6, 1)}
    plain, _ = lora.load_peft(DATA / "lora", params, MLP)
    for some, options, says in [
        (rows, {}, "is a RowsAdapter, and PEFT has no folder of such alone"),
        (plain | rows, {"profile": "vllm"}, "is a RowsAdapter, and profile='vllm' has no place"),
        (adapters | rows, {}, "PEFT keeps no rows of tables beside LOHA"),
        (plain | turned, {}, "'emb/embedding' is no table of which torch has rows by the key map"),
    ]:
        with pytest.raises(lora.LoraError, match=says):
            lora.save_peft(tmp_path / "out", some, MLP, **options)
    with pytest.raises(lora.LoraError, match="do not tell the sizes of these: load it with a key map"):
        load_by_module(DATA / "llama_tokens")


# VeRA -----------------------------------------------------------------------------------------------------------------


def test_vera_of_stacked_layers_with_heads_apart(tmp_path):
    """And of a module that has inputs and outputs flattened: each matrix is cut out of the shared ones."""
    params = case("llama")[0]
    names = [name.format(i) for name in (Q, "model.layers.{}.mlp.up_proj") for i in range(2)]
    outputs = {name: 24 if "up" in name else 16 for name in names}
    tensors = {
        f"{name}.vera_lambda_{x}": array
        for i, name in enumerate(names)
        for x, array in drawn(i, d=3, b=outputs[name]).items()
    }
    options = {"peft_type": "VERA", "r": 3, "projection_prng_key": 7, "save_projection": False}
    folder = folder_of(tmp_path / "in", tensors, target_modules=["q_proj", "up_proj"], **options)
    adapters = round_trip(tmp_path, folder, stacked(params), STACKED, config={"save_projection": False})
    merged = lora.merge(stacked(params), adapters)[QUERY]
    a, b = shared_projections(7, 3, 16, 24)
    for i in range(2):
        d, lengths = (tensors[f"{Q.format(i)}.vera_lambda_{x}"] for x in "db")
        expected = torch_weight(params, i).T + a * d @ b[:, :16] * lengths
        np.testing.assert_allclose(merged[i], expected.reshape(16, 4, 4), rtol=1e-5, atol=1e-5)


def test_projections_that_are_not_those_of_the_key(tmp_path):
    folder, params = copy("vera", tmp_path), case("vera")[0]
    with pytest.raises(lora.LoraError, match="do not tell the inputs of its modules: load it with a key map"):
        load_by_module(folder)
    for change in (
        lambda t: t | {"base_model.vera_A": np.nextafter(t["base_model.vera_A"], np.float32(9))},
        lambda t: t | {"base_model.vera_B": t["base_model.vera_B"][:, :3]},
        lambda t: {name: tensor for name, tensor in t.items() if name != "base_model.vera_B"},
    ):
        edit_tensors(folder, change)
        with pytest.raises(lora.LoraError, match="vera_A and vera_B other than those that projection_prng_key=0"):
            lora.load_peft(folder, params, MLP)
    for seed in (None, -1, 2**32, True, "0"):
        edit_config(folder, projection_prng_key=seed)
        with pytest.raises(lora.LoraError, match=r"projection_prng_key is .*, expected a whole number of 32 bits"):
            lora.load_peft(folder, params, MLP)


def test_vera_that_peft_would_draw_otherwise_is_the_lora_that_it_is(tmp_path):
    """Of one weight alone, which the other one of its plan had wider projections for; and of a part of a module."""
    params = case("vera")[0]
    adapters, _ = lora.load_peft(DATA / "vera", params, MLP)
    some = {"lin0/kernel": adapters["lin0/kernel"]}
    assert some["lin0/kernel"].widths == (10, 10)
    lora.save_peft(tmp_path / "one", some, MLP)
    parts = KeyMap(*(linear(f"lin{i}/kernel", f"x{i}", part=0) for i in range(2)))
    lora.save_peft(tmp_path / "two", adapters, parts)
    for name, expected, key_map in [("one", some, MLP), ("two", adapters, parts)]:
        assert config_of(tmp_path / name)["peft_type"] == "LORA"
        found = lora.merge(params, lora.load_peft(tmp_path / name, params, key_map)[0])
        for path, w in lora.merge(params, expected).items():
            np.testing.assert_allclose(found[path], w, rtol=1e-5, atol=1e-6)


# LoKr -----------------------------------------------------------------------------------------------------------------


def test_lokr_with_a_whole_factor(tmp_path):
    """Which has no rank of its own: what is written for it is one that PEFT keeps it whole with, and the same scale."""
    tensors = drawn(0, **{"lin0.lokr_w1": (2, 2), "lin0.lokr_w2": (5, 3), "lin1.lokr_w1": (2, 2)})
    tensors |= drawn(1, **{"lin1.lokr_w2_a": (2, 1), "lin1.lokr_w2_b": (1, 5)})
    options = {"r": 1, "alpha": 4, "rank_pattern": {"lin0": 7}, "target_modules": ["lin0", "lin1"]}
    folder, params = folder_of(tmp_path / "in", tensors, peft_type="LOKR", **options), case("lokr")[0]
    adapters = round_trip(tmp_path, folder, params, MLP)
    config = config_of(tmp_path / "again")
    assert (config["decompose_factor"], config["decompose_both"]) == (-1, False)
    assert (config["r"], config["rank_pattern"]) in [(3, {"lin1": 1}), (1, {"lin0": 3})]
    again, _ = lora.load_peft(tmp_path / "again", params, MLP)
    second = tensors["lin1.lokr_w2_a"] @ tensors["lin1.lokr_w2_b"]
    for name, w2, scale in [("lin0", tensors["lin0.lokr_w2"], 4 / 7), ("lin1", second, 4)]:
        expected = params[f"{name}/kernel"] + scale * np.kron(tensors[f"{name}.lokr_w1"], w2).T
        for found in (adapters, again):
            np.testing.assert_allclose(lora.merge(params, found)[f"{name}/kernel"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sides", "factor"), [((2, 2), -1), ((1, 2), None), ((5, 2), 5), ((1, 1), 1)])
def test_lokr_that_peft_takes_apart_otherwise(sides, factor, tmp_path):
    """10 outputs and 6 inputs: by the option that does it like this, or as the LoRA that it is."""
    q, p = sides
    adapter = lora.LokrAdapter(
        *map(jnp.asarray, drawn(0, w1=(p, q), a=(6 // p, 10 // q)).values()),
        lora.KernelAxes((), (0,), (1,)),
        0.7,
        (6,),
        (10,),
    )
    params, adapters = case("lokr")[0], {"lin0/kernel": adapter}
    lora.save_peft(tmp_path / "out", adapters, MLP)
    config = config_of(tmp_path / "out")
    assert (config["peft_type"], config.get("decompose_factor")) == (("LOKR", factor) if factor else ("LORA", None))
    found, _ = lora.load_peft(tmp_path / "out", params, MLP)
    expected = lora.merge(params, adapters)["lin0/kernel"]
    np.testing.assert_allclose(lora.merge(params, found)["lin0/kernel"], expected, rtol=1e-5, atol=1e-6)


# A further kind -------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyAdapter(lora.LoraAdapter):
    """A kind that this library does not know: LoRA's product under other names."""


class ToyFormat(Format):
    """Its files: other names of tensors and options, and one option that multiplies the scale."""

    name = peft_type = "TOY"
    adapter = ToyAdapter
    module_kinds = ("linear",)
    options = COMMON_OPTIONS | {"size", "toy_alpha", "strength", "rank_pattern", "alpha_pattern"}
    rank_option = "size"
    alpha_option = "toy_alpha"
    endings = MappingProxyType({"a": "toy_down", "b": "toy_up"})
    pairs = (("a", "b"),)
    scaled = "b"

    def read(self, options):
        return super().read(options)._replace(extra={"strength": options.number("strength", 1)})

    def scale_in(self, config, module):
        return config.extra["strength"] * super().scale_in(config, module)

    def entries(self, modules, matches, bias):
        ranks = {name: self.rank_of(module.arrays) for name, module in modules.items()}
        alphas = {name: alpha_of(module.scale, ranks[name]) for name, module in modules.items()}
        facts = ranks_and_alphas(ranks, alphas, self.alpha_option)
        return {"strength": 1} | {"size" if name == "r" else name: value for name, value in facts.items()}


@pytest.fixture
def toy_folder(tmp_path):
    shapes = {"lin0.toy_down": (2, 6), "lin0.toy_up": (10, 2), "lin1.toy_down": (3, 10), "lin1.toy_up": (4, 3)}
    options = {"size": 2, "toy_alpha": 4, "strength": 0.5, "rank_pattern": {"lin1": 3}}
    tensors = drawn(0, **shapes)
    folder = folder_of(tmp_path / "in", tensors, peft_type="TOY", target_modules=["lin0", "lin1"], **options)
    scales = {"lin0": 0.5 * 4 / 2, "lin1": 0.5 * 4 / 3}
    params = case("lora")[0]
    changed = {
        f"{name}/kernel": params[f"{name}/kernel"] + s * (tensors[f"{name}.toy_up"] @ tensors[f"{name}.toy_down"]).T
        for name, s in scales.items()
    }
    return folder, params, changed


def test_a_further_kind_is_one_entry(toy_folder, tmp_path, monkeypatch):
    """It is read, written, read without a model and merged into published weights by its format alone."""
    folder, params, changed = toy_folder
    monkeypatch.setitem(FORMATS, "TOY", ToyFormat())
    adapters = round_trip(tmp_path, folder, params, MLP)
    assert {type(adapter) for adapter in adapters.values()} == {ToyAdapter}
    again, _ = lora.load_peft(tmp_path / "again", params, MLP)
    by_name, others, key_map = load_by_module(folder)
    lora.save_peft(tmp_path / "by_name", by_name, key_map, others=others)
    assert_same_tensors(tensors_of(tmp_path / "by_name"), tensors_of(folder))
    for found in (adapters, again):
        merged = lora.merge(params, found)
        for path, w in changed.items():
            np.testing.assert_allclose(merged[path], w, rtol=1e-5, atol=1e-5)
    published(tmp_path / "base", "lora")
    lora.merge_checkpoint(tmp_path / "base", folder, tmp_path / "merged")
    found = twins.from_torch(tensors_in(tmp_path / "merged"))
    for path, w in changed.items():
        np.testing.assert_allclose(found[path], w, rtol=1e-5, atol=1e-5)
    edit_config(folder, colour=1)
    with pytest.raises(lora.LoraError, match="colour is 1, which this version of lora_jax does not have"):
        lora.load_peft(folder, params, MLP)


def test_a_kind_without_a_format(toy_folder, tmp_path, monkeypatch):
    """Its files are refused by name; its adapters are written as the LoRA that they are."""
    folder, params, changed = toy_folder
    with monkeypatch.context() as registered:
        registered.setitem(FORMATS, "TOY", ToyFormat())
        adapters, _ = lora.load_peft(folder, params, MLP)
    with pytest.raises(lora.LoraError, match="peft_type is 'TOY'; this version of lora_jax reads LORA, ADALORA, LOHA"):
        lora.load_peft(folder, params, MLP)
    lora.save_peft(tmp_path / "out", adapters, MLP)
    assert config_of(tmp_path / "out")["peft_type"] == "LORA"
    found = lora.merge(params, lora.load_peft(tmp_path / "out", params, MLP)[0])
    for path, w in changed.items():
        np.testing.assert_allclose(found[path], w, rtol=1e-5, atol=1e-5)
    scaled = {"lin0/kernel": lora.Ia3().init(jax.random.key(0), params["lin0/kernel"], lora.KernelAxes((), (0,), (1,)))}
    with pytest.raises(lora.LoraError, match="'lin0/kernel' is a Ia3Adapter; this version writes what is W"):
        lora.save_peft(tmp_path / "none", scaled, MLP, profile="vllm")


# Without a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dora", "conv_dora", "adalora", "adalora_trained", "loha", "lokr", "lora_lora_bias"])
def test_by_torchs_own_names(name, tmp_path):
    adapters, others, key_map = load_by_module(DATA / name)
    lora.save_peft(tmp_path / "out", adapters, key_map, others=others)
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(DATA / name))
    assert_same_config(tmp_path / "out", DATA / name)


@pytest.mark.parametrize("name", ["adalora", "loha", "lokr"])
def test_what_is_a_sum_merges_into_published_weights(name, tmp_path):
    params, adapters = case(name)[0], lora.load_peft(DATA / name, case(name)[0], MLP)[0]
    published(tmp_path / "base", name)
    lora.merge_checkpoint(tmp_path / "base", DATA / name, tmp_path / "one")
    lora.merge_checkpoint(tmp_path / "base", adapters, tmp_path / "two", MLP)
    for folder in ("one", "two"):
        found = twins.from_torch(tensors_in(tmp_path / folder))
        for path, w in lora.merge(params, adapters).items():
            np.testing.assert_allclose(found[path], w, rtol=1e-6, atol=1e-6)


def test_what_is_no_sum_does_not_merge_without_the_model(tmp_path):
    published(tmp_path / "base", "dora")
    with pytest.raises(lora.LoraError, match="lengths run along its columns"):
        lora.merge_checkpoint(tmp_path / "base", DATA / "dora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Wrong tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "dora",
            {"lin0.lora_magnitude_vector": None},
            "'lin0' has only lora_A.weight, lora_B.weight, and not lora_mag",
        ),
        ("dora", {"lin0.lora_magnitude_vector": (9,)}, r"lora_magnitude_vector of shape \[9\], expected \[10\]"),
        ("dora", {"lin0.lora_embedding_A": (2, 6)}, "'lin0.lora_.*', and the same under another name"),
        ("lora_lora_bias", {"lin0.lora_B.bias": (9,)}, r"lin0.bias has shape \[9\], but 'lin0/bias'"),
        ("lora_lora_bias", {"head.lora_B.bias": (3,)}, "holds a lora_B.bias of 'head', and no factors"),
        ("lora", {"lin0.lora_B.bias": (10,)}, "'lin0.lora_B.bias', which is not of LORA"),
        ("adalora", {"lin0.lora_E": (2, 1)}, r"lora_E of shape \[2, 1\], expected \[3, 1\]"),
        ("adalora", {"lin0.lora_E": None}, "and not lora_E"),
        ("loha", {"lin0.hada_w2_b": (3, 6)}, r"has factors \[3, 6\] and \[10, 2\], of no common rank"),
        ("loha", {"lin0.hada_w2_b": (2, 5)}, r"hada_w2_b of shape \[2, 5\], expected \[2, 6\]"),
        ("loha", {"lin0.lora_A.weight": (2, 6)}, "'lin0.lora_A.weight', which is not of LOHA"),
        ("lokr", {"lin0.lokr_w1": (3, 2)}, r"has \[3, 2\] and .* which do not fit 'lin0/kernel'"),
        ("lokr", {"lin0.lokr_w2_a": (5, 3)}, r"lokr_w2_a \[5, 3\], .*, of no common rank"),
        ("lokr", {"lin0.lokr_w1": (4,)}, "expected matrices"),
        ("lokr", {"lin0.lokr_w1_a": (2, 2)}, "and of the first factor neither the whole nor both of its own"),
        ("lokr", {"lin0.lokr_w1": None, "lin0.lokr_w1_a": (2, 2)}, "neither the whole nor both of its own"),
        ("lokr", {"lin0.lokr_w1": None, "lin0.lokr_w1_a": (2, 2), "lin0.lokr_w1_b": (3, 2)}, "of no common rank"),
        ("lokr", {"lin0.lokr_w1": None, "lin0.lokr_w1_a": (2, 1), "lin0.lokr_w1_b": (1, 2)}, "lokr_w1_b of rank 1, by"),
        ("lokr", {"lin0.lokr_t2": (2, 2)}, "train it with use_effective_conv2d=False"),
        ("vera_noproj", {"lin0.vera_lambda_b": (9,)}, r"has \[9\], which do not fit 'lin0/kernel' of shape \[6, 10\]"),
        (
            "vera_noproj",
            {"lin0.vera_lambda_b": (11,)},
            r"has \[11\], which do not fit 'lin0/kernel'",
        ),
        ("vera_noproj", {"lin0.vera_lambda_d": (5,)}, "'lin0' has rank 5, by the config 4"),
        ("vera_noproj", {"lin0.vera_lambda_d": (4, 1)}, r"vera_lambda_d of shape \[4, 1\], expected \[4\]"),
    ],
)
def test_wrong_tensors(name, change, says, tmp_path):
    folder = copy(name, tmp_path)
    new = {P + key: shape and np.ones(shape, np.float32) for key, shape in change.items()}
    edit_tensors(folder, lambda t: {key: tensor for key, tensor in (t | new).items() if tensor is not None})
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, case("lora")[0], MLP)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dora", {"use_dora": False}, "magnitude_vector', which is not of LORA"),
        ("lora", {"use_dora": True}, "'lin0' has only lora_A.weight, lora_B.weight, and not lora_magnitude_vector"),
        ("adalora", {"init_r": 4}, "'lin0' has rank 3, by the config 4"),
        ("adalora", {"rank_pattern": {"lin0.lora_E": [True]}}, "'lin0' has rank 3, by the config 1"),
        (
            "adalora",
            {"rank_pattern": {"lin0.lora_E": 3}},
            r"rank_pattern\['lin0.lora_E'\] is 3, expected a list of true",
        ),
        ("adalora", {"rank_pattern": [True]}, r"rank_pattern is \[True\], expected an object of names and masks"),
        ("loha", {"r": 3}, "'lin0' has rank 2, by the config 3"),
        ("loha", {"alpha": "4"}, "alpha is '4', expected a finite number"),
        ("lokr", {"r": 3}, "'lin0' has rank 2, by the config 3"),
        ("lora", {"lora_bias": True}, "holds none of what its config has lora_bias for"),
        ("lora", {"trainable_token_indices": [1]}, "holds none of what its config has trainable_token_indices for"),
        ("lora", {"peft_type": "BOFT"}, "peft_type is 'BOFT', which is not read: it turns W by .*: merge it in PEFT"),
        ("lora", {"peft_type": "NEW"}, "peft_type is 'NEW'; this version of lora_jax reads LORA, ADALORA, LOHA"),
        ("lora", {"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]"),
    ],
)
def test_wrong_configs(name, options, says, tmp_path):
    folder = copy(name, tmp_path)
    edit_config(folder, **options)
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, case("lora")[0], MLP)


def test_what_saving_refuses_is_heard_without_writing(tmp_path, monkeypatch):
    """`check_peft` raises the same errors, also of zeros that take no memory, and makes no file."""
    from lora_jax.interop.peft.save import check_peft

    params = {"model/layers/0/self_attn/q_proj/kernel": jnp.zeros((8, 8))}
    plan = lora.plan(lambda p, x: x @ p["model/layers/0/self_attn/q_proj/kernel"], params, jnp.ones((2, 8)),
                     rules={".*": lora.Lora(rank=2)})  # fmt: skip
    adapters = jax.eval_shape(lambda key: lora.init(key, params, plan), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), adapters)
    monkeypatch.chdir(tmp_path)
    check_peft(zeros, key_maps.LLAMA)
    wrong = [({"profile": "loralib", "config": {"revision": "a"}}, "has no config"), ({"profile": "x"}, "profile='x'")]
    for options, message in [*wrong, ({"config": {"no_such_entry": 1}}, "no_such_entry")]:
        for call in (lambda **o: check_peft(zeros, key_maps.LLAMA, **o),
                     lambda **o: lora.save_peft(tmp_path / "out", zeros, key_maps.LLAMA, **o)):  # fmt: skip
            with pytest.raises(lora.LoraError, match=message):
                call(**options)
    with pytest.raises(lora.LoraError, match="the key map has no entry for"):
        check_peft(zeros, key_maps.BERT)
    assert not [*tmp_path.iterdir()]
