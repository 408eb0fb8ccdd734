"""Kinds of HF PEFT that are read as the LoRA that they are: against their formulas, entry by entry, in float64."""

from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest
import twins
from test_export import published, tensors_in
from test_peft import MLP, case, config_of, edit_config, edit_tensors, mutated, split_params
from test_peft_ia3 import ia3_folder
from test_peft_kinds import P, drawn, folder_of

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.interop.peft.formats.refused import REFUSED
from lora_jax.interop.peft.formats.registry import FORMATS
from lora_jax.interop.peft.load import load_by_module

FANS = {"lin0": (6, 10), "lin1": (10, 4)}


# Each kind: the tensors of a module of so many inputs and outputs, the config, and the change [outputs, inputs] of it.


def miss(inputs, outputs, r=3):
    def change(t, w):
        return np.array([[t["miss_block"][i % r, o] for i in range(inputs)] for o in range(outputs)])

    return {"miss_block": (r, outputs)}, {"peft_type": "MISS", "r": r, "bias": "none"}, change


def miss_mini(inputs, outputs, r=2):
    def change(t, w):
        return np.array([[t["miss_block"][i % r, o % 2] for i in range(inputs)] for o in range(outputs)])

    return {"miss_block": (r, 2)}, {"peft_type": "MISS", "r": r, "mini_r": 2, "init_weights": "mini"}, change


def gralora(inputs, outputs, r=4, n=2, hybrid=0):
    def change(t, w):
        d, k, s = inputs // n, outputs // n, r // n
        whole = np.zeros((outputs, inputs))
        for i in range(n):
            for o in range(n):
                a = t["gralora_A"][i][:, o * s : (o + 1) * s]
                b = t["gralora_B"][o][i * s : (i + 1) * s]
                whole[o * k : (o + 1) * k, i * d : (i + 1) * d] = (a @ b).T
        if hybrid:
            whole += t["gralora_B_general.weight"] @ t["gralora_A_general.weight"]
        return 5 / (r + hybrid) * whole

    shapes = {"gralora_A": (n, inputs // n, r), "gralora_B": (n, r, outputs // n)}
    if hybrid:
        shapes |= {"gralora_A_general.weight": (hybrid, inputs), "gralora_B_general.weight": (outputs, hybrid)}
    return shapes, {"peft_type": "GRALORA", "r": r, "alpha": 5, "gralora_k": n, "hybrid_r": hybrid}, change


def gralora_hybrid(inputs, outputs):
    return gralora(inputs, outputs, hybrid=3)


def delora(inputs, outputs, r=3):
    def change(t, w):
        a, b = t["delora_A"], t["delora_B"]
        total = np.zeros((outputs, inputs))
        for i in range(r):
            total += t["delora_lambda"] / r * np.outer(b[:, i], a[i]) / np.linalg.norm(a[i]) / np.linalg.norm(b[:, i])
        return total * t["delora_w_norm"]

    shapes = {"delora_A": (r, inputs), "delora_B": (outputs, r), "delora_lambda": (1,), "delora_w_norm": (inputs,)}
    return shapes, {"peft_type": "DELORA", "r": r, "delora_lambda": 15}, change


def bdlora(inputs, outputs, r=4, n=2):
    """A of lin0 and B of lin1 have blocks, by the number of their inputs."""
    of_a = inputs == FANS["lin0"][0]

    def blocks(packed):
        rows, columns = packed.shape
        whole = np.zeros((rows, n * columns))
        for i in range(n):
            part = slice(i * rows // n, (i + 1) * rows // n)
            whole[part, i * columns : (i + 1) * columns] = packed[part]
        return whole

    def change(t, w):
        a, b = t["lora_A.weight"], t["lora_B.weight"]
        return 6 / r * (b @ blocks(a) if of_a else blocks(b) @ a)

    shapes = {"lora_A.weight": (r, inputs // n if of_a else inputs), "lora_B.weight": (outputs, r if of_a else r // n)}
    inside = {"target_modules_bd_a": ["in0"], "target_modules_bd_b": ["lin1"], "nblocks": n, "match_strict": True}
    return shapes, {"peft_type": "LORA", "r": r, "lora_alpha": 6, "use_bdlora": inside}, change


def kasa(inputs, outputs, r=2):
    def change(t, w):
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        return 6 / r * t["lora_B.weight"] @ np.diag(t["lora_diag"]) @ t["lora_A.weight"] - u[:, -r:] * s[-r:] @ vt[-r:]

    shapes = {"lora_A.weight": (r, inputs), "lora_B.weight": (outputs, r), "lora_diag": (r,)}
    return shapes, {"peft_type": "LORA", "r": r, "lora_alpha": 6, "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, change


KINDS = [miss, miss_mini, gralora, gralora_hybrid, delora, bdlora, kasa]


def written(kind, folder, fans=FANS):
    """A folder of a kind, and the change of each module by its formula."""
    tensors, changes, config = {}, {}, {}
    for i, (name, (inputs, outputs)) in enumerate(fans.items()):
        shapes, config, change = kind(inputs, outputs)
        own = drawn(i, **shapes)
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        wide = {key: np.asarray(tensor, np.float64) for key, tensor in own.items()}
        changes[name] = lambda w, change=change, wide=wide: change(wide, w)
    return folder_of(folder, tensors, target_modules=[*fans], **config), changes


def expected(params, changes):
    """The merged kernels [inputs, outputs] by the formulas."""
    w = {name: np.asarray(params[f"{name}/kernel"], np.float64) for name in changes}
    return {f"{name}/kernel": w[name] + change(w[name].T).T for name, change in changes.items()}


def assert_close(merged, wanted):
    for path, w in wanted.items():
        np.testing.assert_allclose(merged[path], w, rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_the_formula(kind, tmp_path):
    """Loaded, written as LoRA, and merged into published weights."""
    params = case("lora")[0]
    folder, changes = written(kind, tmp_path / "in")
    wanted = expected(params, changes)
    adapters, others = lora.load_peft(folder, params, MLP)
    assert not others
    assert {type(adapter) for adapter in adapters.values()} == {lora.LoraAdapter}
    assert_close(lora.merge(params, adapters), wanted)
    lora.save_peft(tmp_path / "out", adapters, MLP)
    assert config_of(tmp_path / "out")["peft_type"] == "LORA"
    assert not config_of(tmp_path / "out").get("use_bdlora")
    assert_close(lora.merge(params, lora.load_peft(tmp_path / "out", params, MLP)[0]), wanted)
    published(tmp_path / "base", "lora")
    lora.merge_checkpoint(tmp_path / "base", folder, tmp_path / "merged")
    assert_close(twins.from_torch(tensors_in(tmp_path / "merged")), wanted)


@pytest.mark.parametrize("kind", [miss, gralora, kasa])
def test_of_several_parameters(kind, tmp_path):
    """Queries, keys and values of one module of torch, each with its part of the outputs."""
    params = split_params()
    names = [f"{name}/kernel" for name in "qkv"]
    whole = np.concatenate([np.asarray(params[name], np.float64).reshape(16, -1) for name in names], axis=1)
    key_map = key_maps.KeyMap(
        *(key_maps.linear(f"{name}/kernel", "c_attn", "in out*", part=i) for i, name in enumerate("qkv"))
    )
    folder, changes = written(kind, tmp_path / "in", {"c_attn": (16, whole.shape[1])})
    adapters, _ = lora.load_peft(folder, params, key_map)
    merged = lora.merge(params, adapters)
    found = np.concatenate([np.asarray(merged[name]).reshape(16, -1) for name in names], axis=1)
    np.testing.assert_allclose(found, whole + changes["c_attn"](whole.T).T, rtol=1e-5, atol=1e-5)


def test_without_a_model(tmp_path):
    """By torch's own names, where the tensors tell it all."""
    for kind in (gralora, delora, bdlora):
        adapters, _, key_map = load_by_module(written(kind, tmp_path / kind.__name__)[0])
        assert [adapter.kernel_shape() for adapter in adapters.values()] == [(6, 10), (10, 4)]
        assert len(key_map.entries) == 2
    for kind, says in [(miss, "do not tell the inputs of its modules"), (kasa, "without what 'kasa' began with")]:
        with pytest.raises(lora.LoraError, match=says):
            load_by_module(written(kind, tmp_path / kind.__name__)[0])


def test_kasa_needs_the_numbers_of_the_weights(tmp_path):
    params = case("lora")[0]
    folder, _ = written(kasa, tmp_path / "in")
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    with pytest.raises(lora.LoraError, match=r"began with 'kasa' as a part of the weights.*found shapes"):
        lora.load_peft(folder, shapes, MLP)
    edit_config(folder, init_lora_weights="pissa")
    with pytest.raises(lora.LoraError, match="has kasa_config, and began with 'pissa' too"):
        lora.load_peft(folder, params, MLP)


@pytest.mark.parametrize(
    ("kind", "options", "tensors", "says"),
    [
        (miss, {"r": 4}, {}, "'lin0' has rank 3, by the config 4"),
        (miss, {"init_weights": "bat"}, {}, "'bat', with which MiSS multiplies blocks"),
        (miss, {"init_weights": ["mini"]}, {}, "MiSS multiplies blocks"),
        (miss, {}, {"lin0.miss_block": (3, 9)}, r"miss_block \[3, 9\], which does not fit 6 inputs, 10 outputs"),
        (miss, {}, {"lin0.miss_block": (3, 2)}, r"miss_block \[3, 2\], which does not fit"),
        (miss, {}, {"lin0.miss_block": (3, 5, 2)}, r"miss_block of shape \[3, 5, 2\], expected 2 axes"),
        (miss, {"r": 7}, {"lin0.miss_block": (7, 10)}, r"\[7, 10\], which does not fit 6 inputs"),
        (miss, {}, {"lin0.lora_A.weight": (3, 6)}, "lora_A.weight', which is not of MISS"),
        (gralora, {"gralora_k": 4}, {}, "expected gralora_k=4 blocks"),
        (gralora, {"hybrid_r": 2}, {}, r"a plain LoRA of \[\], by the config of rank 2"),
        (gralora, {"hybrid_r": -1}, {}, "hybrid_r is -1, expected a whole number"),
        (gralora, {}, {"lin0.gralora_B": (2, 4, 4)}, "which do not fit 'lin0/kernel'"),
        (gralora, {}, {"lin0.gralora_B": (2, 2, 5)}, "which they divide"),
        (delora, {}, {"lin0.delora_w_norm": None}, "and not delora_w_norm"),
        (delora, {}, {"lin0.delora_w_norm": (5,)}, r"delora_w_norm \[5\], which do not fit one another"),
        (bdlora, {"use_bdlora": {"nblocks": 0}}, {}, "nblocks 0, expected a whole number"),
        (bdlora, {"use_bdlora": {"blocks": 2}}, {}, r"use_bdlora is .*, expected an object of target_modules_bd_a"),
        (bdlora, {"use_bdlora": {"target_modules_bd_a": "lin0"}}, {}, "expected a list of at most 1,000 names"),
        (bdlora, {"use_bdlora": {"target_modules_bd_a": ["lin0"], "nblocks": 3}}, {}, "are not nblocks=3 blocks"),
        (bdlora, {"use_bdlora": {"target_modules_bd_a": ["lin0"], "nblocks": 2**40}}, {}, "expected at most 4,294,967"),
        (bdlora, {"use_dora": True}, {}, "use_dora is True, which this version of lora_jax does not have"),
        (kasa, {}, {"lin0.lora_diag": (3,)}, "of no common rank"),
        (kasa, {}, {"lin0.lora_diag": None}, "and not lora_diag"),
        (kasa, {"lora_bias": True}, {}, "lora_bias is True"),
    ],
)
def test_what_does_not_fit_is_named(kind, options, tensors, says, tmp_path):
    folder, _ = written(kind, tmp_path / "in")
    edit_config(folder, **options)
    new = {P + key: shape and np.ones(shape, np.float32) for key, shape in tensors.items()}
    edit_tensors(folder, lambda t: {key: tensor for key, tensor in (t | new).items() if tensor is not None})
    with pytest.raises(lora.LoraError, match=says):
        lora.load_peft(folder, case("lora")[0], MLP)


def test_every_kind_has_one_answer():
    read = {format.peft_type for format in FORMATS.values()}
    assert not read & {*REFUSED}
    assert all(": " in why and not why.endswith(".") for why in REFUSED.values())
    page = (Path(__file__).parents[1] / "docs" / "peft_kinds.md").read_text(encoding="utf-8")
    assert not [kind for kind in (*read, *REFUSED) if f"`{kind}`" not in page and f"`{kind}`," not in page]


def load_mutated(cases, seed, folder):
    """Folders of all these kinds with damage: each ends with adapters or with the library's own error; how many."""
    random, ends, params = Random(seed), [0, 0], case("lora")[0]
    starts = [written(kind, folder / kind.__name__)[0] for kind in KINDS]
    sides = {"lin0": (10, 1), "lin1": (1, 10)}
    starts.append(ia3_folder(folder / "ia3", sides, target_modules=[*sides])[0])
    names = ("adapter_model.safetensors", "adapter_config.json")
    originals = [[(start / name).read_bytes() for name in names] for start in starts]
    (folder / "in").mkdir()
    for i in range(cases):
        for name, content in zip(names, mutated(random, *originals[i % len(starts)]), strict=True):
            (folder / "in" / name).write_bytes(content)
        try:
            lora.load_peft(folder / "in", params, MLP)
            ends[0] += 1
        except lora.LoraError:
            ends[1] += 1
    return ends


def test_mutated_files(tmp_path):
    loaded, refused = load_mutated(350, 0, tmp_path)
    assert loaded > 20
    assert refused > 70


@pytest.mark.slow
def test_many_mutated_files(tmp_path, share):
    cases = share(5_000)
    loaded, refused = load_mutated(cases, 1, tmp_path)
    assert loaded > cases / 20
    assert refused > cases / 4
