"""`lora-jax`: what it prints, what it writes, and how it exits."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twins
from safetensors.numpy import load_file, save_file
from test_export import published, tensors_in
from test_peft import DATA, MLP, assert_same_tensors, case, stacked, tensors_of

import lora_jax as lora
from lora_jax.analysis.spectrum import low_rank, spectrum
from lora_jax.cli import main
from lora_jax.cli.commands import COMMANDS
from lora_jax.cli.folders import KNOWN
from lora_jax.cli.output import print_table
from lora_jax.interop.peft.load import load_by_module


def run(capsys, *arguments):
    """The exit code, and what was printed."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_spectrum_is_that_of_the_change():
    """Of a stack of matrices, against their singular values."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 7, 4)).astype(np.float32), rng.normal(size=(3, 4, 5)).astype(np.float32)
    b[1] = 0
    found = spectrum(a, b, -0.5)
    delta = -0.5 * np.einsum("sdr,srk->sdk", a.astype(np.float64), b)
    np.testing.assert_allclose(found.norm, np.linalg.norm(delta), rtol=1e-12)
    ranks = []
    for matrix in delta[[0, 2]]:
        values = np.linalg.svd(matrix, compute_uv=False)[:4]
        shares = values / values.sum()
        ranks.append(np.exp(-(shares * np.log(shares)).sum()))
    np.testing.assert_allclose(found.effective_rank, np.mean(ranks), rtol=1e-9)
    assert spectrum(a, 0 * b, 1.0) == (0, 0, True)
    assert not spectrum(a * np.nan, b, 1.0).finite


@pytest.mark.parametrize(("d", "r", "k"), [(3, 4, 8), (8, 4, 3), (3, 7, 4), (2, 6, 2), (1, 3, 5), (5, 5, 5)])
@pytest.mark.parametrize("stack", [(), (4,), (2, 3)])
def test_spectrum_where_the_rank_is_above_the_inputs_or_the_outputs(d, r, k, stack):
    """Against the singular values of each change, formed."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(*stack, d, r)).astype(np.float32), rng.normal(size=(*stack, r, k)).astype(np.float32)
    found, ranks, squares = spectrum(a, b, -2.0), [], 0.0
    for one, other in zip(a.reshape(-1, d, r), b.reshape(-1, r, k), strict=True):
        values = np.linalg.svd(-2.0 * one.astype(np.float64) @ other, compute_uv=False)
        shares = values / values.sum()
        ranks.append(np.exp(-(shares * np.log(shares)).sum()))
        squares += (values**2).sum()
    np.testing.assert_allclose(found, (np.sqrt(squares), np.mean(ranks), True), rtol=1e-9)


def test_inspect_of_what_is_wide_and_stacked(capsys, tmp_path):
    """Several input axes, stacked layers, and a rank above the inputs; of adapters in bf16."""
    shapes = {
        "wide": ((3, 8), lora.KernelAxes((), (0,), (1,)), 4),
        "heads": ((2, 2, 3, 5), lora.KernelAxes((0,), (1, 3), (2,)), 7),
    }
    rng, adapters = np.random.default_rng(0), {}
    for path, (shape, axes, r) in shapes.items():
        stack, inputs, outputs = axes.sizes(shape)
        a, b = rng.normal(size=(*stack, *inputs, r)), rng.normal(size=(*stack, r, *outputs))
        adapters[path] = lora.LoraAdapter(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16), axes, 0.5)
    lora.checkpoint.save(tmp_path / "own", adapters)
    code, out, _ = run(capsys, "inspect", tmp_path / "own", "--json")
    assert code == 0
    rows = {row["weight"]: row for row in json.loads(out)}
    for path, (shape, axes, r) in shapes.items():
        change = np.asarray(lora.merge({path: np.zeros(shape, np.float32)}, {path: adapters[path]})[path], np.float64)
        matrices = change.transpose([*axes.stack, *axes.inputs, *axes.outputs]).reshape(axes.fans(shape))
        values = np.linalg.svd(matrices, compute_uv=False)
        shares = values / values.sum(-1, keepdims=True)
        assert (rows[path]["shape"], rows[path]["rank"]) == (list(axes.fans(shape)[1:]), r)
        np.testing.assert_allclose(rows[path]["spectrum"]["norm"], np.linalg.norm(change), rtol=1e-5)
        rank = np.exp(-(shares * np.log(shares)).sum(-1)).mean()
        np.testing.assert_allclose(rows[path]["spectrum"]["effective_rank"], rank, rtol=1e-5)
    assert run(capsys, "verify", tmp_path / "own")[0] == 0


@pytest.mark.parametrize("what", ["a", "b"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_said(what, number, capsys, tmp_path):
    sound = lora.LoraAdapter(jnp.ones((3, 4)), jnp.ones((4, 8)), lora.KernelAxes((), (0,), (1,)), 1.0)
    broken = dataclasses.replace(sound, **{what: getattr(sound, what).at[0, 0].set(number)})
    lora.checkpoint.save(tmp_path / "own", {"sound": sound, "w": broken})
    code, out, _ = run(capsys, "inspect", tmp_path / "own", "--json")
    assert code == 0
    assert [row["spectrum"]["finite"] for row in json.loads(out)] == [True, False]
    assert run(capsys, "verify", tmp_path / "own")[:2] == (1, "w: holds a NaN or an infinity\n")
    assert not spectrum(np.ones((3, 4)), np.ones((4, 8)), number).finite


def test_inspect(capsys, tmp_path):
    code, out, _ = run(capsys, "inspect", DATA / "rslora_patterns", "--plot", tmp_path / "plots" / "a.png")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[2:4]] == [["lin0", "linear"], ["lin1", "linear"]]
    assert out.splitlines()[-1] == "2 weights adapted, 74 parameters."
    assert (tmp_path / "plots" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_that_does_not_go_to_a_terminal_is_plain_text(capsys, monkeypatch):
    """A line for each row, however long its name is and whatever the terminal around it may be."""
    monkeypatch.setenv("COLUMNS", "20")
    name = "[bold]model.layers.0[/bold]" * 10
    print_table(["module", "shape", "n"], [[name, [8, 16], "1,096"], ["b", [3], 5]], right=1)
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["module", "shape", "n"]
    assert rows == [f"{name}  [8, 16]  1,096", f"{'b':{len(name)}}  [3]          5"]


def test_inspect_says_the_same_of_both_formats(capsys, tmp_path):
    adapters, _ = lora.load_peft(DATA / "lora_emb", case("lora_emb")[0], MLP)
    lora.checkpoint.save(tmp_path / "own", adapters)
    own, theirs = (json.loads(run(capsys, "inspect", f, "--json")[1]) for f in (tmp_path / "own", DATA / "lora_emb"))
    assert [row["weight"] for row in own] == ["emb/embedding", "lin0/kernel"]
    for a, b in zip(own, theirs, strict=True):
        assert [a[key] for key in ("shape", "rank", "scale", "matrices")] == [
            b[key] for key in ("shape", "rank", "scale", "matrices")
        ]
        np.testing.assert_allclose(a["spectrum"]["norm"], b["spectrum"]["norm"], rtol=1e-12)


def test_verify(capsys, tmp_path):
    published(tmp_path / "base", "lora")
    assert run(capsys, "verify", DATA / "lora", "--base", tmp_path / "base")[:2] == (0, f"{DATA / 'lora'} is sound.\n")
    shutil.copytree(DATA / "lora", tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    zero, nan = (f"base_model.model.lin{i}.lora_B.weight" for i in (0, 1))
    save_file(tensors | {zero: 0 * tensors[zero], nan: math.nan * tensors[nan]}, file)
    code, out, _ = run(capsys, "verify", tmp_path / "bad")
    assert code == 1
    assert out == "lin0: does not change anything\nlin1: holds a NaN or an infinity\n"
    code, out, _ = run(capsys, "verify", DATA / "llama", "--base", tmp_path / "base", "--json")
    assert code == 1
    assert json.loads(out)["problems"][0].startswith(f"{tmp_path / 'base'} has no tensor 'model.layers.0.mlp.down_proj")


def test_merge(capsys, tmp_path):
    base = published(tmp_path / "base", "llama", shards=2)
    code, out, err = run(capsys, "merge", tmp_path / "base", DATA / "llama", tmp_path / "out")
    assert code == 0
    assert "most is lost to rounding in" in out
    assert f"14 tensors merged into {tmp_path / 'out'}." in out
    assert "merging" in err
    adapters, _ = lora.load_peft(DATA / "llama", twins.from_torch(base), lora.key_maps.LLAMA)
    expected = lora.merge(twins.from_torch(base), adapters)
    found = twins.from_torch(tensors_in(tmp_path / "out"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    code, out, err = run(capsys, "merge", tmp_path / "base", DATA / "llama", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"error: {tmp_path / 'out'} exists and is not empty")


@pytest.mark.parametrize("name", ["lora", "lora_emb", "conv", "gpt2", "llama_emb_lora", "lora_bias_all"])
def test_convert(name, capsys, tmp_path):
    """From PEFT to PEFT, and to orbax by module names; the same tensors."""
    run(capsys, "convert", DATA / name, tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(DATA / name))
    code, out, _ = run(capsys, "convert", DATA / name, tmp_path / "json", "--json")
    assert (code, set(json.loads(out)["ranks"].values())) == (0, {2})
    code, out, _ = run(capsys, "convert", DATA / name, tmp_path / "orbax", "--to", "orbax")
    assert code == 0
    assert out.endswith(f"adapters written to {tmp_path / 'orbax'}.\n")
    adapters, others, _ = load_by_module(DATA / name)
    found, found_others = lora.checkpoint.load(tmp_path / "orbax")
    for one, other in zip(*map(jax.tree.leaves, ((found, found_others), (adapters, others))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_convert_with_a_key_map(capsys, tmp_path):
    params = stacked(case("llama")[0])
    adapters, _ = lora.load_peft(DATA / "llama", params, lora.key_maps.LLAMA.stacked())
    lora.checkpoint.save(tmp_path / "own", adapters)
    assert run(capsys, "convert", tmp_path / "own", tmp_path / "out", "--key-map", "llama", "--stacked")[0] == 0
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(DATA / "llama"))
    code, _, err = run(capsys, "convert", tmp_path / "own", tmp_path / "other")
    assert code == 1
    assert "say which torch modules they are, such as --key-map llama" in err
    assert not (tmp_path / "other").exists()
    assert "is not empty" in run(capsys, "convert", DATA / "llama", tmp_path / "out")[2]


def test_convert_for_vllm(capsys, tmp_path):
    assert run(capsys, "convert", DATA / "rslora_patterns", tmp_path / "out", "--to", "vllm")[0] == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)


def test_compose(capsys, tmp_path):
    """The change is the weighted sum of the changes."""
    a, b = DATA / "rslora_patterns", DATA / "lora_emb"
    code, out, _ = run(capsys, "compose", f"{a}:0.7", f"{b}:-0.3", a, tmp_path / "sum")
    assert (code, out) == (0, f"3 adapters written to {tmp_path / 'sum'}.\n")
    params = case("lora_emb")[0]

    def change(folder):
        merged = lora.merge(params, lora.load_peft(folder, params, MLP)[0])
        return jax.tree.map(lambda one, other: one - other, merged, params)

    expected = jax.tree.map(lambda one, other: 1.7 * one - 0.3 * other, change(a), change(b))
    for found, leaf in zip(*map(jax.tree.leaves, (change(tmp_path / "sum"), expected)), strict=True):
        np.testing.assert_allclose(found, leaf, atol=1e-5)
    for parts, says in [
        ([f"{a}:x"], "expected a folder and a weight, such as"),
        ([f"{a}:nan"], "a weight is nan, expected a finite number"),
        ([DATA / "lora"], "whole, which no sum of adapters expresses"),
        ([a, tmp_path / "none"], "there is no folder"),
    ]:
        code, _, err = run(capsys, "compose", *parts, tmp_path / "other")
        assert code == 1
        assert says in err
    assert not (tmp_path / "other").exists()


def test_the_output_of_a_sum_comes_last(capsys, tmp_path):
    """Also for those who remember it as the first: nothing is written."""
    a = DATA / "rslora_patterns"
    code, _, err = run(capsys, "compose", tmp_path / "out", a, f"{a}:0.5")
    assert (code, err) == (1, f"error: the output comes last, and {a}:0.5 is a part: lora-jax compose style:0.7 "
                           "facts:-0.3 both.\n")  # fmt: skip
    assert run(capsys, "compose", tmp_path / "out")[2].startswith("error: give the folders that are")
    assert not list(tmp_path.iterdir())


def test_kinds_that_are_no_lora(capsys, tmp_path):
    """Shown without the numbers that depend on the weight; said to be sound, or not."""
    axes = lora.KernelAxes((), (0,), (1,))
    adapters = {
        "dora": lora.DoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.ones(3), axes, 2.0),
        "full": lora.FullAdapter(jnp.full((3,), 2.0), lora.KernelAxes((), (), (0,))),
        "loha": lora.LohaAdapter(*(jnp.ones(s) for s in ((4, 2), (2, 3)) * 2), axes, 1.0),
    }
    lora.checkpoint.save(tmp_path / "own", adapters)
    code, out, _ = run(capsys, "inspect", tmp_path / "own", "--plot", tmp_path / "a.png")
    assert code == 0
    dora, full, loha = (line.split() for line in out.splitlines()[2:5])
    assert dora == ["dora", "dora", "[4,", "3]", "1", "-", "-", "-", "-"]
    assert full == ["full", "full", "[3]", "1", "-", "-", "3.464", "-"]
    assert loha == ["loha", "loha", "[4,", "3]", "1", "4", "1", "13.86", "1.00"]  # 4 everywhere, on 12 entries
    assert out.splitlines()[-1] == "3 weights adapted, 48 parameters."
    assert run(capsys, "verify", tmp_path / "own")[0] == 0
    lora.checkpoint.save(tmp_path / "own", {"full": lora.FullAdapter(jnp.zeros(3), adapters["full"].axes)})
    assert run(capsys, "verify", tmp_path / "own")[:2] == (1, "full: does not change anything\n")
    lora.checkpoint.save(tmp_path / "own", {"d": dataclasses.replace(adapters["dora"], m=jnp.full(3, jnp.nan))})
    assert run(capsys, "verify", tmp_path / "own")[:2] == (1, "d: holds a NaN or an infinity\n")


MAPS = """
from lora_jax.key_maps import LLAMA, KeyMap, linear
MY_MAP = LLAMA.stacked()
NO_MAP = {"a": "b"}
"""


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder of this library's, with stacked layers; and a module with key maps in the current directory."""
    params = stacked(case("llama")[0])
    adapters, _ = lora.load_peft(DATA / "llama", params, lora.key_maps.LLAMA.stacked())
    lora.checkpoint.save(tmp_path / "own", adapters)
    (tmp_path / "h6_maps.py").write_text(MAPS)
    (tmp_path / "h6_broken.py").write_text("import there_is_no_such_module")
    (tmp_path / "h6_raises.py").write_text("raise RuntimeError('x')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = [*sys.path]
    yield tmp_path / "own"
    assert sys.path == before
    for name in ("h6_maps", "h6_broken", "h6_raises"):
        sys.modules.pop(name, None)


def test_a_key_map_of_ones_own(own_folder, capsys, tmp_path):
    """By every command that needs names: the same as with the library's own."""
    mine, theirs = ["--key-map", "h6_maps:MY_MAP"], ["--key-map", "llama", "--stacked"]
    base = published(tmp_path / "base", "llama", shards=2)
    for i, names in enumerate((mine, theirs)):
        assert run(capsys, "convert", own_folder, tmp_path / f"out{i}", *names)[0] == 0
        assert_same_tensors(tensors_of(tmp_path / f"out{i}"), tensors_of(DATA / "llama"))
        assert run(capsys, "verify", own_folder, "--base", tmp_path / "base", *names)[0] == 0
        assert run(capsys, "merge", tmp_path / "base", own_folder, tmp_path / f"merged{i}", *names)[0] == 0
        assert run(capsys, "compose", f"{own_folder}:0.5", own_folder, tmp_path / f"sum{i}", *names)[0] == 0
    assert run(capsys, "merge", tmp_path / "base", DATA / "llama", tmp_path / "merged")[0] == 0
    expected = tensors_in(tmp_path / "merged")
    assert any((expected[name] != tensor).any() for name, tensor in base.items())
    for i in (0, 1):
        assert_same_tensors(tensors_in(tmp_path / f"merged{i}"), expected)
    assert_same_tensors(tensors_of(tmp_path / "sum0"), tensors_of(tmp_path / "sum1"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lama", "there is no key map 'lama': expected one of bert, gemma, .*, vit_4, or"),
        ("h6_none:MAP", r"--key-map h6_none:MAP: there is no module 'h6_none', neither in .* nor among the packages"),
        ("h6_maps.inner:MAP", "h6_maps.inner cannot be imported|there is no module 'h6_maps.inner'"),
        ("h6_maps:MYMAP", "the module h6_maps has no 'MYMAP'; its key maps are MY_MAP"),
        ("h6_maps:NO_MAP", "that is a dict, expected a lora_jax.key_maps.KeyMap"),
        ("h6_maps:linear", "that is a function, expected"),
        (
            "h6_broken:MAP",
            "h6_broken cannot be imported: ModuleNotFoundError: No module named 'there_is_no_such_module'",
        ),
        ("h6_raises:MAP", "h6_raises cannot be imported: RuntimeError: x"),
        (":MAP", "there is no module ''|cannot be imported"),
    ],
)
def test_key_maps_that_are_not_there(name, says, own_folder, capsys, tmp_path):
    code, out, err = run(capsys, "convert", own_folder, tmp_path / "out", "--key-map", name)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(says, err), err
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together(own_folder, capsys, tmp_path):
    for arguments, says in [
        (["convert", DATA / "llama", tmp_path / "out", "--key-map", "llama"], "names the modules itself"),
        (["inspect", DATA / "llama", "--step", "3"], "is of peft, which has no steps"),
        (["compose", DATA / "llama", own_folder, tmp_path / "out"], "is of another format than the parts before it"),
        (["merge", tmp_path, own_folder, tmp_path / "out"], "say which torch modules they are"),
    ]:
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert says in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys, monkeypatch):
    """Each has an example of itself, in which what is written comes last, and names what it takes."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert f"Example: lora-jax {command} " in out
    assert "PATH" not in out  # but BASE, ADAPTERS and OUTPUT
    taken = {"merge": "BASE ADAPTERS OUTPUT", "convert": "ADAPTERS OUTPUT", "plan": "BASE"}
    taken |= {"compose": "FOLDER:WEIGHT ... OUTPUT", "diff": "BASE TUNED [OUTPUT]"}
    taken |= {"train": "BASE DATA OUTPUT", "generate": "BASE [ADAPTERS] PROMPT", "eval": "BASE [ADAPTERS] DATA"}
    usage = re.escape(taken.get(command, "ADAPTERS"))
    assert re.search(rf"\] {usage}( \[?--.*)?$", out.splitlines()[0])
    assert "--key-map" not in out or all(name in out for name in KNOWN)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"lora-jax {lora.__version__}\n", "")


def test_folders_of_runs(capsys, tmp_path):
    """Inspected, verified and converted as a folder of adapters is: the newest step, or the one that is asked for."""
    params = {"w": jnp.ones((4, 3))}
    plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((2, 4)), rules={"w": lora.Lora(2)})
    start = lora.TrainState.create(lora.init(jax.random.key(0), params, plan), optax.sgd(0.1))
    with lora.Checkpoints(tmp_path / "run", params, plan, every=1) as checkpoints:
        for step in (1, 2):
            trainable = jax.tree.map(lambda array, step=step: array + step, start.trainable)
            state = dataclasses.replace(start, step=jnp.int32(step), trainable=trainable)
            checkpoints.save(state)
    newest, first = (
        json.loads(run(capsys, "inspect", tmp_path / "run", "--json", *more)[1]) for more in ([], ["--step", "1"])
    )
    assert newest[0]["spectrum"]["norm"] > first[0]["spectrum"]["norm"] > 0
    assert run(capsys, "verify", tmp_path / "run", "--step", "1")[0] == 0
    assert run(capsys, "convert", tmp_path / "run", tmp_path / "out", "--to", "orbax", "--step", "1")[0] == 0
    found = lora.checkpoint.load(tmp_path / "out")[0]["w"]
    np.testing.assert_array_equal(found.b, start.trainable["w"].b + 1)
    assert run(capsys, "inspect", tmp_path / "run", "--step", "7")[0] == 1


def thin(name, folder, dtype):
    """A folder of PEFT in another dtype."""
    shutil.copytree(DATA / name, folder)
    tensors = {key: tensor.astype(dtype) for key, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_dtypes_of_thin_files(capsys, tmp_path):
    """Kept by conversions, the widest of a sum, which is computed in fp32; and fp32 where training goes on from it."""
    a = thin("rslora_patterns", tmp_path / "a", jnp.bfloat16)
    b = thin("rslora_patterns", tmp_path / "b", jnp.float16)
    run(capsys, "convert", a, tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(a))
    run(capsys, "convert", a, tmp_path / "orbax", "--to", "orbax")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lora.checkpoint.load(tmp_path / "orbax"))} == {"float32"}
    for name, parts, dtype in [("same", [f"{a}:0.7", f"{a}:-0.3"], "bfloat16"), ("wide", [a, b], "float32")]:
        assert run(capsys, "compose", *parts, tmp_path / name)[0] == 0
        assert {tensor.dtype.name for tensor in tensors_of(tmp_path / name).values()} == {dtype}
    key = "base_model.model.lin0.lora_B.weight"
    scale = load_by_module(a)[0]["lin0"].scale
    exact = tensors_of(a)[key].astype(np.float32)
    expected = np.concatenate([exact * np.float32(scale * weight) for weight in (0.7, -0.3)], axis=1)
    np.testing.assert_array_equal(tensors_of(tmp_path / "same")[key], expected.astype(jnp.bfloat16))


def test_tied_tables(capsys, tmp_path):
    """Refused with the choices, which are options here too."""
    published(tmp_path / "base", "lora_emb")
    tensors = tensors_in(tmp_path / "base")
    save_file(
        {"model.emb.weight": tensors["emb.weight"], "model.lin0.weight": tensors["lin0.weight"]},
        tmp_path / "base" / "model.safetensors",
    )
    facts = {"tie_word_embeddings": True, "vocab_size": 11, "model_type": "llama"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(facts))
    shutil.copytree(DATA / "lora_emb", tmp_path / "peft")
    renamed = {key.replace(".model.", ".model.model."): t for key, t in tensors_of(tmp_path / "peft").items()}
    save_file(renamed, tmp_path / "peft" / "adapter_model.safetensors")
    code, _, err = run(capsys, "merge", tmp_path / "base", tmp_path / "peft", tmp_path / "out")
    assert code == 1
    assert "tied='untie'" in err
    assert run(capsys, "verify", tmp_path / "peft", "--base", tmp_path / "base")[0] == 1
    assert run(capsys, "verify", tmp_path / "peft", "--base", tmp_path / "base", "--tied", "untie")[0] == 0
    assert run(capsys, "merge", tmp_path / "base", tmp_path / "peft", tmp_path / "out", "--tied", "untie")[0] == 0
    np.testing.assert_array_equal(tensors_in(tmp_path / "out")["lm_head.weight"], tensors["emb.weight"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere"],
        ["verify", "nowhere"],
        ["merge", "a", "b", "c"],
        ["convert", "a", "b"],
        ["compose", "a", "b"],
    ],
)
def test_what_is_missing_is_named(arguments, capsys):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_as_a_program():
    """The installed command: help with an example, and the exit codes."""
    program = Path(sys.executable).with_name("lora-jax")
    done = subprocess.run([program, "merge", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Example: lora-jax merge MiniLM-L6 runs/sentiment/peft merged" in done.stdout
    assert subprocess.run([program, "nothing"], capture_output=True).returncode == 2
    assert subprocess.run([program, "inspect", "nowhere"], capture_output=True).returncode == 1


@pytest.mark.slow
def test_the_library_imports_nothing_of_the_command_line():
    """`lora.inspect` and `lora.diff` are the library's own; tables in a terminal and pictures are the commands'."""
    shown = "print([name for name in ('tyro', 'matplotlib', 'safetensors') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"import sys, lora_jax; {shown}"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


# Planning, and extracting ---------------------------------------------------------------------------------------------


def test_plan(capsys, tmp_path):
    published(tmp_path / "base", "llama", shards=2)
    code, out, _ = run(capsys, "plan", tmp_path / "base", "--modules", ".*self_attn.[qv]_proj", "--rank", "4")
    assert code == 0
    assert len(out.splitlines()) == 2 + 4 + 1
    assert re.search(r"model.layers.0.self_attn.v_proj +\[8, 16\] +96 +384 B +192", out)
    assert out.splitlines()[-1].startswith("4 modules: 448 parameters beside ")
    rows = json.loads(run(capsys, "plan", tmp_path / "base", "--modules", ".*q_proj", "--json")[1])
    assert [row["flops"] for row in rows] == [2 * 8 * 32] * 2
    for arguments, says in [
        (["--modules", "q_proj"], "'q_proj' matches no module of .* with a matrix; .* the nearest are .*q_proj"),
        (["--modules", "("], r"'\(' is no regular expression"),
        (["--modules", ".*v_proj", "--rank", "9"], r"v_proj of shape \[8, 16\]: rank 9 is above 8"),
    ]:
        code, _, err = run(capsys, "plan", tmp_path / "base", *arguments)
        assert code == 1
        assert re.search(says, err)


@pytest.mark.parametrize("name", ["llama", "gpt2", "rslora_patterns"])
def test_diff(name, capsys, tmp_path):
    """What was merged comes out again: of the rank that it had, and with the same effect."""
    published(tmp_path / "base", name)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt2"} if name == "gpt2" else {}))
    lora.merge_checkpoint(tmp_path / "base", DATA / name, tmp_path / "tuned")
    code, *_ = run(capsys, "diff", tmp_path / "base", tmp_path / "tuned", tmp_path / "out", "--energy", "0.999999")
    assert code == 0
    before, after = load_by_module(DATA / name)[0], load_by_module(tmp_path / "out")[0]
    assert before.keys() == after.keys()
    for module, adapter in before.items():
        assert after[module].a.shape == adapter.a.shape
        change, again = (np.asarray(x.a) @ np.asarray(x.b) * x.scale for x in (adapter, after[module]))
        np.testing.assert_allclose(again, change, atol=1e-5)
    lora.merge_checkpoint(tmp_path / "base", tmp_path / "out", tmp_path / "again")
    tuned, again = tensors_in(tmp_path / "tuned"), tensors_in(tmp_path / "again")
    assert tuned.keys() == again.keys()
    for key, tensor in tuned.items():
        np.testing.assert_allclose(again[key], tensor, atol=1e-5)


def test_diff_without_an_output_shows_the_changes(capsys, tmp_path):
    published(tmp_path / "base", "rslora_patterns")
    lora.merge_checkpoint(tmp_path / "base", target=tmp_path / "tuned", adapters=DATA / "rslora_patterns")
    folders = [tmp_path / "base", tmp_path / "tuned"]
    code, out, _ = run(capsys, "diff", *folders)
    assert code == 0
    found = lora.diff(tensors_in(folders[0]), tensors_in(folders[1]))
    assert [line.split()[0] for line in out.splitlines()[2 : 2 + len(found)]] == sorted(found)
    assert out.splitlines()[-1] == found.summary()
    shown = json.loads(run(capsys, "diff", *folders, "--json")[1])
    assert {name: change["rank"] for name, change in shown["changes"].items()} == {
        f"{module}.weight": adapter.a.shape[-1]
        for module, adapter in load_by_module(DATA / "rslora_patterns")[0].items()
    }
    assert list(json.loads(run(capsys, "diff", *folders, "--modules", "lin0", "--json")[1])["changes"]) == [
        "lin0.weight"
    ]
    for wrong, says in [
        (["--rank", "1"], "give the folder to write them to"),
        (["--modules", "x"], "matches no module"),
    ]:
        code, _, err = run(capsys, "diff", *folders, *wrong)
        assert code == 1
        assert says in err
    assert run(capsys, "diff", folders[0], folders[0])[1].startswith("0 weights changed, ")


def test_diff_of_less_than_all(capsys, tmp_path):
    published(tmp_path / "base", "lora")
    lora.merge_checkpoint(tmp_path / "base", DATA / "lora", tmp_path / "tuned")  # also changes the head
    arguments = ["diff", tmp_path / "base", tmp_path / "tuned", tmp_path / "out", "--modules", "lin."]
    code, _, err = run(capsys, *arguments, "--rank", "1")
    assert code == 1
    assert "2 other tensors changed too, 'head." in err
    assert "give one of them" in run(capsys, *arguments, "--rest")[2]
    code, out, _ = run(capsys, *arguments, "--rank", "1", "--rest")
    assert code == 0
    assert sorted(line.split()[0] for line in out.splitlines()[2:4]) == ["lin0", "lin1"]
    code, _, err = run(capsys, "diff", tmp_path / "base", tmp_path / "base", tmp_path / "none", "--rank", "1")
    assert code == 1
    assert "no module that '.*' matches has changed" in err


def test_the_nearest_of_a_rank():
    """Against the singular values, and with the smallest rank for a share."""
    change = np.random.default_rng(0).normal(size=(7, 5))
    values = np.linalg.svd(change, compute_uv=False)
    for rank in (1, 3, 5, 9):
        a, b, share = low_rank(change, rank)
        np.testing.assert_allclose(np.linalg.norm(change - a @ b) ** 2, (values[rank:] ** 2).sum(), atol=1e-6)
        np.testing.assert_allclose(share, (values[:rank] ** 2).sum() / (values**2).sum(), rtol=1e-12)
    for count in range(1, 6):
        energy = (values[:count] ** 2).sum() / (values**2).sum()
        assert low_rank(change, energy=energy)[0].shape == (7, count)
    assert low_rank(0 * change, energy=0.5)[2] == 0
    for wrong, says in [({"rank": 0}, "expected at least 1"), ({"energy": 1.5}, "above 0 and at most 1")]:
        with pytest.raises(lora.LoraError, match=says):
            low_rank(change, **wrong)
    with pytest.raises(lora.LoraError, match="holds a NaN"):
        low_rank(change * np.nan, 1)
