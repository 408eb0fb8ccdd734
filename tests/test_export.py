"""Merging into published files: what changes is the adapted tensors' bytes, by what `lora.merge` computes."""

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_peft import DATA, MLP, MODELS, SPLIT, P, case, copy, edit_config, edit_tensors

import lora_jax as lora
from lora_jax import key_maps
from lora_jax.interop.merge_checkpoint import read_tensors

METADATA = {"format": "pt", "made": "by hand"}


def published(folder, name, dtype=np.float32, shards=1):
    """A folder as on the hub: shards with an index, and other files; whole tensors in an order that is no name's."""
    tensors = load_file(DATA / name / "case.safetensors")
    base = {key.removeprefix("base."): t.astype(dtype) for key, t in tensors.items() if key.startswith("base.")}
    names = sorted(base, key=lambda name: name[::-1])
    folder.mkdir()
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        index = {"metadata": {"total_size": 1}, "weight_map": {n: files[i % shards] for i, n in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, file in enumerate(files):
        save_file({name: base[name] for name in names[i::shards]}, folder / file, metadata=METADATA)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("a pickle")
    return base


def tensors_in(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize(
    ("name", "key_map", "shards"),
    [("lora_emb", MLP, 1), ("rslora_patterns", MLP, 2), ("llama", key_maps.LLAMA, 3), ("gpt2", key_maps.GPT2, 1),
     ("qwen3moe", key_maps.LLAMA, 2)],
)  # fmt: skip
@pytest.mark.sampled(5)
def test_merging_is_merging(name, key_map, shards, dtype, tmp_path):
    base = published(tmp_path / "in", name, dtype, shards)
    params = twins.from_torch(base, conv1d=name == "gpt2")
    adapters, _ = lora.load_peft(DATA / name, params, key_map)
    losses = lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", key_map)
    expected = {path: np.asarray(leaf) for path, leaf in lora.merge(params, adapters).items()}
    found = twins.from_torch(tensors_in(tmp_path / "out"), conv1d=name == "gpt2")
    matches = key_map.match({path: leaf.shape for path, leaf in params.items()}, strict=False)
    for path, leaf in expected.items():
        if path not in adapters:
            np.testing.assert_array_equal(np.asarray(found[path]), leaf)
            continue
        own = found[path].dtype
        np.testing.assert_allclose(
            found[path].astype(np.float32), leaf.astype(np.float32), rtol=float(jnp.finfo(own).eps), atol=1e-6
        )
        change = np.asarray(found[path], np.float32) - np.asarray(params[path], np.float32)
        loss = losses[matches[path].tensors()[()]]
        assert np.abs(change).max() > 0
        assert 1e-4 < loss < 0.5 if own.itemsize == 2 else loss < 1e-5
    assert len(losses) == len(adapters)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float64])
def test_dora_is_merged_row_by_row(dtype, tmp_path):
    base = published(tmp_path / "in", "dora", dtype)
    params = twins.from_torch(base)
    adapters, _ = lora.load_peft(DATA / "dora", params, MLP)
    table = next(path for path in adapters if "emb" in path)
    with pytest.raises(lora.LoraError, match="lengths run along its columns"):
        lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", MLP)
    assert not (tmp_path / "out").exists()
    del adapters[table]
    losses = lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", MLP)
    expected, found = lora.merge(params, adapters), twins.from_torch(tensors_in(tmp_path / "out"))
    for path in adapters:
        eps = float(jnp.finfo(found[path].dtype).eps)
        np.testing.assert_allclose(
            found[path].astype(np.float32), np.asarray(expected[path], np.float32), rtol=max(eps, 1e-6), atol=1e-6
        )
        assert np.abs(np.asarray(found[path], np.float32) - np.asarray(params[path], np.float32)).max() > 0
    assert len(losses) == len(adapters)
    assert all(1e-4 < loss < 0.5 if dtype == jnp.bfloat16 else loss < 1e-5 for loss in losses.values())


def test_all_else_stays_as_it_was(tmp_path):
    base = published(tmp_path / "in", "llama", jnp.bfloat16, shards=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    adapters, _ = lora.load_peft(DATA / "llama", twins.from_torch(base), key_maps.LLAMA)
    seen = []
    lora.merge_checkpoint(
        tmp_path / "in", adapters, tmp_path / "out", key_maps.LLAMA, progress=lambda *n: seen.append(n)
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(set(before) - {"pytorch_model.bin"})
    assert len(seen) == len(adapters)
    assert seen[-1][0] == seen[-1][1]
    for name, content in before.items():
        if not name.endswith(".safetensors"):
            assert name == "pytorch_model.bin" or (tmp_path / "out" / name).read_bytes() == content
            continue
        header = 8 + int.from_bytes(content[:8], "little")
        assert (tmp_path / "out" / name).read_bytes()[:header] == content[:header]
        with safe_open(tmp_path / "out" / name, "np") as file:
            assert file.metadata() == METADATA


@pytest.mark.parametrize(
    "name", ["lora", "rslora_patterns", "lora_emb", "lora_bias_all", "conv", "llama", "llama_emb_lora", "gpt2"]
)
def test_a_folder_of_peft_needs_no_key_map(name, tmp_path):
    """Its own names say where the factors go, and what it holds whole."""
    base = published(tmp_path / "in", "lora" if name == "conv" else name)
    if name == "llama_emb_lora":  # it holds the embedding, which need not be the published one
        base["model.embed_tokens.weight"] += 1
        save_file(base, tmp_path / "in" / "model.safetensors", metadata=METADATA)
    lora.merge_checkpoint(tmp_path / "in", DATA / name, tmp_path / "out")
    params = twins.from_torch(base, conv1d=name == "gpt2")
    key_map = {"llama": key_maps.LLAMA, "llama_emb_lora": key_maps.LLAMA, "gpt2": key_maps.GPT2}.get(name, MLP)
    adapters, others = lora.load_peft(DATA / name, params, key_map)
    expected = lora.merge(params | others, adapters)
    found = twins.from_torch(tensors_in(tmp_path / "out"), conv1d=name == "gpt2")
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-6, err_msg=path)


OF_A_MODEL = ("vera", "vera_noproj")  # the tensors alone do not tell what these are
NOT_MERGED = ("dora", "llama_replicate")  # refused: lengths along columns, and layers that no file has twice


FIRST = ("pissa", "lora_lora_bias", "llama_tokens")
CASES = [(name, how) for name in MODELS if name not in NOT_MERGED for how in ("folder", "adapters")]


@pytest.mark.parametrize(
    ("name", "how"),
    [pytest.param(*one, marks=[] if one[0] in FIRST else pytest.mark.slow) for one in CASES],
)
def test_merged_files_have_the_outputs_of_peft(name, how, tmp_path):
    """All that the folder holds reaches the files: heads and biases trained whole, trained tokens, and new bases."""
    fn, key_map = MODELS[name]
    params, ids, expected = case(name)
    published(tmp_path / "in", name, shards=2)
    if how == "folder" and name in OF_A_MODEL:
        with pytest.raises(lora.LoraError, match="load it with a key map"):
            lora.merge_checkpoint(tmp_path / "in", DATA / name, tmp_path / "out")
        return
    if how == "folder":
        losses = lora.merge_checkpoint(tmp_path / "in", DATA / name, tmp_path / "out")
    else:
        adapters, others = lora.load_peft(DATA / name, params, key_map)
        losses = lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", key_map, others=others)
        assert len(losses) == len(adapters | others)
    merged = twins.from_torch(tensors_in(tmp_path / "out"), conv1d=name == "gpt2")
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(fn(merged, ids), expected, atol=2e-6, rtol=0)
    assert all(0 <= loss < 1e-4 for loss in losses.values())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_all_kinds_of_changes_are_rounded_once(dtype, tmp_path):
    """A bias that is added to, a table that is replaced, a head with rows of its own: W' in fp32, and then rounded."""
    base = published(tmp_path / "in", "llama", dtype)
    key_map = key_maps.LLAMA
    rng = np.random.default_rng(0)
    table, head, norm = (
        base[name].shape for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    )
    new, rows, delta = (rng.normal(size=shape).astype(np.float32) for shape in (table, (2, head[1]), norm))
    adapters = {
        "lm_head/kernel": lora.RowsAdapter(jnp.asarray(rows), lora.KernelAxes((), (0,), (1,)), (7, 2), head[0], 1),
        "model/norm/scale": lora.FullAdapter(jnp.asarray(delta), lora.KernelAxes((), (), (0,))),
    }
    others = {"model": {"embed_tokens": {"embedding": new}}}
    losses = lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", key_map, others=others)
    found = tensors_in(tmp_path / "out")
    expected = dict(base)
    expected["model.embed_tokens.weight"] = new.astype(dtype)
    expected["model.norm.weight"] = (base["model.norm.weight"].astype(np.float32) + delta).astype(dtype)
    expected["lm_head.weight"] = base["lm_head.weight"].copy()
    expected["lm_head.weight"][[7, 2]] = rows.astype(dtype)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].astype(np.float64), tensor.astype(np.float64), rtol=1e-6, err_msg=name)
    changed = {name: expected[name].astype(np.float64) - base[name].astype(np.float64) for name in losses}
    exact = {"model.embed_tokens.weight": new, "lm_head.weight": base["lm_head.weight"].astype(np.float64)}
    exact["lm_head.weight"][[7, 2]] = rows
    exact["model.norm.weight"] = base["model.norm.weight"].astype(np.float64) + delta
    for name, loss in losses.items():
        lost = np.linalg.norm(expected[name].astype(np.float64) - exact[name]) / np.linalg.norm(changed[name])
        np.testing.assert_allclose(loss, lost if dtype == jnp.bfloat16 else 0, rtol=0.02, atol=1e-6)


def test_the_parts_of_a_tensor_that_are_not_given(tmp_path):
    """A change of one part of a fused bias leaves the others; a part that is replaced needs the others."""
    base = published(tmp_path / "in", "gpt2")
    name = "transformer.h.0.attn.c_attn.bias"
    parts = dict(zip((f"{x}/bias" for x in "qkv"), np.split(base[name], 3), strict=True))
    delta = {"k/bias": lora.FullAdapter(jnp.ones(16), lora.KernelAxes((), (), (0,)))}
    for options in ({}, {"others": {"k/bias": parts["k/bias"] + 1}}):
        adapters = {} if options else delta
        with pytest.raises(
            lora.LoraError, match=f"{name} holds several parameters.*Give all parameters: params=params"
        ):
            lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", SPLIT, **options)
        folder = tmp_path / f"out{len(options)}"
        lora.merge_checkpoint(tmp_path / "in", adapters, folder, SPLIT, params=parts, **options)
        expected = base[name] + np.repeat(np.float32([0, 1, 0]), 16)
        np.testing.assert_allclose(tensors_in(folder)[name], expected, rtol=1e-6)


def test_a_bias_that_the_model_lacks(tmp_path):
    """PEFT has a `lora_bias` of all modules: zeros where there is no bias, and else it is refused."""
    published(tmp_path / "in", "lora_lora_bias")
    folder = copy("lora_lora_bias", tmp_path / "copy")
    zeros = {"lora_A.weight": (2, 10), "lora_B.weight": (4, 2), "lora_B.bias": (4,)}
    edit_tensors(folder, lambda t: t | {f"{P}lin1.{name}": np.zeros(size, np.float32) for name, size in zeros.items()})
    lora.merge_checkpoint(tmp_path / "in", folder, tmp_path / "out")
    edit_tensors(folder, lambda t: t | {P + "lin1.lora_B.bias": np.ones(4, np.float32)})
    with pytest.raises(lora.LoraError, match=r"has no tensor 'lin1.bias'"):
        lora.merge_checkpoint(tmp_path / "in", folder, tmp_path / "again")


def test_rows_that_the_model_lacks(tmp_path):
    published(tmp_path / "in", "lora")
    with pytest.raises(lora.LoraError, match=r"holds rows of 'model.embed_tokens.weight', no tensor of the model; the"):
        lora.merge_checkpoint(tmp_path / "in", DATA / "llama_tokens", tmp_path / "out")


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_is_not_merged(bad, tmp_path):
    """By the path of the adapter, or of the array beside it; nothing is written."""
    base = published(tmp_path / "in", "lora")
    params = twins.from_torch(base)
    adapters, _ = lora.load_peft(DATA / "lora", params, MLP)
    one = adapters["lin1/kernel"]
    wrong = adapters | {"lin1/kernel": dataclasses.replace(one, a=one.a.at[0, 0].set(bad))}
    with pytest.raises(lora.LoraError, match=r"the adapter for 'lin1/kernel' in its array 'a' holds NaN or infinity"):
        lora.merge_checkpoint(tmp_path / "in", wrong, tmp_path / "out", MLP)
    with pytest.raises(lora.LoraError, match=r"others\['lin0/bias'\] holds NaN or infinity"):
        lora.merge_checkpoint(
            tmp_path / "in", adapters, tmp_path / "out", MLP, others={"lin0": {"bias": np.full(10, bad)}}
        )
    folder = copy("lora", tmp_path / "copy")
    edit_tensors(folder, lambda t: t | {P + "lin0.lora_B.weight": np.full((10, 2), bad, np.float32)})
    with pytest.raises(lora.LoraError, match="the adapter for 'lin0' in its array 'b' holds NaN or infinity"):
        lora.merge_checkpoint(tmp_path / "in", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def one_tensor(folder, dtype, value=6e4):
    """A model of one weight."""
    folder.mkdir()
    save_file({"m.weight": np.full((4, 4), value, dtype)}, folder / "model.safetensors")


MATRIX = lora.KernelAxes((), (0,), (1,))
ONES = np.ones((4, 1), np.float32)


@pytest.mark.parametrize(
    "change",
    [
        lambda: ({"w": lora.LoraAdapter(ONES, jnp.full((1, 4), 1e4), MATRIX, 1.0)}, {}),
        lambda: ({"w": lora.FullAdapter(jnp.full((4, 4), 1e4), lora.KernelAxes((), (), (0, 1)))}, {}),
        lambda: ({}, {"w": np.full((4, 4), 1e5, np.float32)}),
        lambda: ({"w": lora.RowsAdapter(jnp.full((1, 4), 1e5), MATRIX, (2,), 4, 1)}, {}),
        lambda: ({"w": lora.DoraAdapter(ONES, ONES.T, jnp.full(4, 1e6), MATRIX, 1.0)}, {}),
    ],
)  # fmt: skip
def test_what_the_dtype_cannot_hold_is_not_written(change, tmp_path):
    """fp16 ends at 65,504: infinity would be written."""
    one_tensor(tmp_path / "in", np.float16)
    adapters, others = change()
    key_map = key_maps.KeyMap(key_maps.linear("w", "m"))
    with pytest.raises(lora.LoraError, match=r"'m.weight' would hold numbers beyond 65504, .* float16.*a wider dtype"):
        lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", key_map, others=others)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    one_tensor(tmp_path / "wide", jnp.bfloat16)
    losses = lora.merge_checkpoint(tmp_path / "wide", adapters, tmp_path / "out", key_map, others=others)
    assert np.isfinite(tensors_in(tmp_path / "out")["m.weight"].astype(np.float32)).all()
    assert 0 <= losses["m.weight"] < 0.1


def test_beyond_fp32(tmp_path):
    one_tensor(tmp_path / "in", np.float32, 1.0)
    key_map = key_maps.KeyMap(key_maps.linear("w", "m"))
    axes = lora.KernelAxes((), (0,), (1,))
    for a, b, scale, says in [
        (1e30, 1e30, 1.0, "'m.weight' would hold numbers beyond 3.4028e"),
        (1.0, 1e30, 1e30, "the adapter for 'w' is beyond fp32 once it has its scale 1e"),
    ]:
        adapters = {"w": lora.LoraAdapter(jnp.full((4, 1), a), jnp.full((1, 4), b), axes, scale)}
        with pytest.raises(lora.LoraError, match=says):
            lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", key_map)


def test_what_is_not_finite_in_the_model_stays(tmp_path):
    """Such as a row of minus infinity: the loss is that of the other numbers."""
    w = np.ones((4, 4), np.float16)
    w[1, 2], w[3, 3] = -np.inf, np.nan
    (tmp_path / "in").mkdir()
    save_file({"m.weight": w}, tmp_path / "in" / "model.safetensors")
    adapters = {"w": lora.LoraAdapter(jnp.ones((4, 1)), jnp.ones((1, 4)) / 3, lora.KernelAxes((), (0,), (1,)), 1.0)}
    losses = lora.merge_checkpoint(
        tmp_path / "in", adapters, tmp_path / "out", key_maps.KeyMap(key_maps.linear("w", "m"))
    )
    expected = (w.astype(np.float32) + np.float32(1 / 3)).astype(np.float16)
    np.testing.assert_array_equal(tensors_in(tmp_path / "out")["m.weight"], expected)
    assert 0 < losses["m.weight"] < 0.01


def test_a_folder_names_its_tensors_itself(tmp_path):
    published(tmp_path / "in", "lora")
    for options in ({"key_map": MLP}, {"others": {}}, {"params": {}}):
        with pytest.raises(lora.LoraError, match="names its tensors itself: leave out key_map, others and params"):
            lora.merge_checkpoint(tmp_path / "in", DATA / "lora", tmp_path / "out", **options)


def test_parts_of_one_module(tmp_path):
    base = published(tmp_path / "in", "gpt2")
    parts = np.split(base["transformer.h.0.attn.c_attn.weight"], 3, axis=1)
    params = {f"{name}/kernel": part.reshape(16, 2, 8) for name, part in zip("qkv", parts, strict=True)}
    plan = {"q/kernel": lora.Lora(2), "v/kernel": lora.Lora(3)}
    axes = lora.KernelAxes((), (0,), (1, 2))
    adapters = {
        path: jax.tree.map(
            lambda a: jax.random.normal(jax.random.key(a.size), a.shape),
            rule.factors(jax.random.key(0), (16, 2, 8), axes),
        )
        for path, rule in plan.items()
    }
    lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out", SPLIT, params=params)
    merged = lora.merge(params, adapters)
    expected = np.concatenate([np.asarray(merged[f"{name}/kernel"]).reshape(16, -1) for name in "qkv"], axis=1)
    found = tensors_in(tmp_path / "out")["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def rewrite(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")


LIN0 = "lin0.weight"


def index(text):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


WRONG_SOURCES = [
    (
        lambda f: rewrite(f, lambda t: t | {LIN0: t[LIN0].astype(np.uint8)}),
        "'lin0.weight' is of U8 .*: quantised weights .*quantise the result: lora.merge_quantized does both",
    ),
    (lambda f: rewrite(f, lambda t: t | {LIN0: t[LIN0][:5]}), r"has shape \[5, 6\] in .*, its adapter \[10, 6\]"),
    (
        lambda f: rewrite(f, lambda t: {f"bert.{k}": v for k, v in t.items()}),
        "has no tensor 'lin0.weight'; the nearest are bert.lin0",
    ),
    (lambda f: (f / "model.safetensors").unlink(), "there is no .*model.safetensors: a model is in"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors cannot be read"),
    (index("{"), "is no index of safetensors"),
    (index('{"weight_map": {"a": "../model.safetensors"}}'), r"names '\.\./model.safetensors', expected names of"),
    (index('{"weight_map": {"a": "b.safetensors"}}'), "there is no .*b.safetensors"),
    (shutil.rmtree, "there is no folder"),
]


@pytest.mark.parametrize(("change", "says"), WRONG_SOURCES)
def test_wrong_sources(change, says, tmp_path):
    published(tmp_path / "in", "lora")
    change(tmp_path / "in")
    with pytest.raises(lora.LoraError, match=says):
        lora.merge_checkpoint(tmp_path / "in", DATA / "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_calls(tmp_path):
    base = published(tmp_path / "in", "lora")
    adapters, _ = lora.load_peft(DATA / "lora", twins.from_torch(base), MLP)
    with pytest.raises(lora.LoraError, match="exists and is not empty; it is left as it is"):
        lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "in", MLP)
    with pytest.raises(lora.LoraError, match=r"merge_checkpoint\(key_map=...\)"):
        lora.merge_checkpoint(tmp_path / "in", adapters, tmp_path / "out")
    with pytest.raises(lora.LoraError, match="its tensors do not tell of which parameter they are"):
        lora.merge_checkpoint(tmp_path / "in", DATA / "qwen3moe", tmp_path / "out")
    shutil.copytree(DATA / "lora", tmp_path / "peft")
    edit_config(tmp_path / "peft", r=3)
    with pytest.raises(lora.LoraError, match="'lin0' has rank 2, by the config 3"):
        lora.merge_checkpoint(tmp_path / "in", tmp_path / "peft", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "peft"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    published(tmp_path / "in", "lora")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("lora_jax.interop.merge_checkpoint._sum", fail)
    with pytest.raises(lora.LoraError, match="No space left"):
        lora.merge_checkpoint(tmp_path / "in", DATA / "lora", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def mutated(random, content):
    content = bytearray(content)
    if random.random() < 0.3:
        return bytes(content[: random.randrange(len(content))])
    for _ in range(random.randrange(1, 4)):
        content[random.randrange(min(len(content), 900))] = random.randrange(256)  # mostly in the header
    return bytes(content)


def check_mutated(cases, tmp_path):
    """An index or a shard with some bytes changed: read as it is, or refused; and no file but these is touched."""
    published(tmp_path / "in", "lora", shards=2)
    paths = [path for path in sorted((tmp_path / "in").iterdir()) if path.suffix in (".json", ".safetensors")]
    originals, random, ends = [path.read_bytes() for path in paths], Random(cases), [0, 0]
    for _ in range(cases):
        i = random.randrange(len(paths))
        paths[i].write_bytes(mutated(random, originals[i]))
        try:
            for tensor in read_tensors(tmp_path / "in").values():
                assert tensor.size >= 0
            ends[0] += 1
        except lora.LoraError:
            ends[1] += 1
        paths[i].write_bytes(originals[i])
    assert min(ends) > cases / 20
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_mutated_sources(tmp_path):
    check_mutated(200, tmp_path)


@pytest.mark.slow
def test_many_mutated_sources(tmp_path, share):
    check_mutated(share(4000), tmp_path)


@pytest.mark.slow
def test_memory_is_that_of_a_few_chunks(tmp_path):
    """A tensor of 512 MiB is merged with less than 300 MiB beyond what was there before."""
    code = """
    import pathlib, resource, sys, jax, jax.numpy as jnp, numpy as np
    from safetensors.numpy import save_file
    import lora_jax as lora
    folder = pathlib.Path(sys.argv[1])
    if sys.argv[2] == "make":
        (folder / "in").mkdir()
        save_file({"w.weight": np.zeros((16384, 16384), jnp.bfloat16)}, folder / "in" / "model.safetensors")
    else:
        adapters = {"w": lora.Lora(4).factors(jax.random.key(0), (16384, 16384), lora.KernelAxes((), (0,), (1,)))}
        jax.block_until_ready(adapters)
        import safetensors.numpy
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        key_map = lora.key_maps.KeyMap(lora.key_maps.linear("w", "w"))
        lora.merge_checkpoint(folder / "in", adapters, folder / "out", key_map)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    for action in ("make", "merge"):
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), action]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300 * 1024


def test_the_order_of_before(tmp_path):
    """The target before the adapters, for a dict and for a folder: done all the same, with a warning."""
    base = published(tmp_path / "in", "lora")
    adapters, others = lora.load_peft(DATA / "lora", twins.from_torch(base), MLP)
    lora.merge_checkpoint(tmp_path / "in", DATA / "lora", tmp_path / "out")
    with pytest.warns(lora.LoraWarning, match=r"the order is merge_checkpoint\(source, adapters, target"):
        lora.merge_checkpoint(tmp_path / "in", tmp_path / "one", DATA / "lora")
    with pytest.warns(lora.LoraWarning, match=r"the order is merge_checkpoint\(source, adapters, target"):
        lora.merge_checkpoint(tmp_path / "in", tmp_path / "two", adapters, MLP, others=others)
    for folder in ("one", "two"):
        for name, tensor in tensors_in(tmp_path / folder).items():
            np.testing.assert_allclose(tensor, tensors_in(tmp_path / "out")[name], rtol=1e-6)
