"""The sharded example on eight simulated devices: the single device's losses, and a run that may be interrupted."""

import subprocess
import sys
from pathlib import Path

import assets
import batches
import finetune_sentiment as demo
import finetune_sharded as sharded
import jax
import numpy as np
import pytest
import snippets

import lora_jax as lora
from lora_jax import checkpoint

SETTINGS = {"tiny": True, "epochs": 1, "batch": 64, "rank": 2, "every": 5}  # 13 steps


@pytest.fixture(scope="module")
def task():
    return sharded.tiny_task()


def fine_tune(task, folder, **settings):
    config = sharded.Config(output=folder, **SETTINGS | settings)
    return sharded.fine_tune(task, config, sharded.make_mesh(config))


def on_one_device(task, config, steps):
    """The losses of the single-device example, on the same batches."""
    split = task.splits["train"]
    logits, trainable = demo.make_lora(task, config, config.seed)
    all_steps = len(split) // config.batch * config.epochs
    step, state = demo.make_step(logits, trainable, config.learning_rate, all_steps)
    losses = []
    for batch in batches.training_batches(split, config.batch, config.epochs, config.seed, slice(0, config.batch)):
        state, metrics = step(state, task.params, *batch)
        losses.append(float(metrics["loss"]))
        if len(losses) == steps:
            break
    return losses


@pytest.fixture(scope="module")
def expected(task):
    return on_one_device(task, demo.Config(**{name: SETTINGS[name] for name in ("epochs", "batch", "rank")}), None)


# The mesh changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [{}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 4, "microbatches": 2}],
    ids=["data", "all", "fsdp, in microbatches"],
)
def test_the_losses_are_those_of_one_device(task, expected, axes, tmp_path, capsys):
    run = fine_tune(task, tmp_path, **axes)
    np.testing.assert_allclose(run.losses, expected, rtol=1e-5)
    adapters, others = checkpoint.load(tmp_path / "adapters")
    for saved, trained in zip(
        jax.tree.leaves({"adapters": adapters, **others}), jax.tree.leaves(run.trainable), strict=True
    ):
        np.testing.assert_array_equal(saved, trained)
    assert f"Test accuracy {run.test_accuracy:.1%}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_goes_on(task, expected, tmp_path, monkeypatch, capsys):
    """A fault at step 9, after the checkpoint of step 5; it goes on from there, on another mesh, to the same end."""
    place, calls = lora.shard_batch, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return place(*arguments)

    monkeypatch.setattr(lora, "shard_batch", fail)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(task, tmp_path)
    monkeypatch.undo()
    run = fine_tune(task, tmp_path, fsdp=8)
    assert "Goes on from step 5." in capsys.readouterr().out
    np.testing.assert_allclose(run.losses, expected[5:], rtol=1e-5)
    with pytest.raises(lora.LoraError, match="were trained with --seed 0, found 1: give that, or another --output"):
        fine_tune(task, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.skipif(
    assets.cached(assets.MINILM) is None or assets.cached(assets.VADER) is None, reason="`make assets` brings them"
)
@pytest.mark.rare
def test_the_real_model(tmp_path, monkeypatch):
    """Four steps of MiniLM on a mesh are those of one device."""
    task = demo.load_task()
    task.splits["train"] = snippets.Split(task.splits["train"].tokens[:64], task.splits["train"].labels[:64])
    task.splits["test"] = snippets.Split(task.splits["test"].tokens[:16], task.splits["test"].labels[:16])
    run = fine_tune(task, tmp_path, tiny=False, batch=16, fsdp=2, tensor=2)
    single = on_one_device(task, demo.Config(batch=16, epochs=1, rank=2), None)
    assert len(single) == 4
    np.testing.assert_allclose(run.losses, single, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.rare
def test_two_processes_from_the_command_line(task, tmp_path):
    """`make demo-sharded`, for fewer steps: the adapters are those of one process with all devices."""
    examples = Path(sharded.__file__).parent
    command = [sys.executable, "launch.py", "--local", "2", "--devices-per-process", "4", "finetune_sharded.py"]
    settings = [f"--{name}={value}" for name, value in SETTINGS.items() if name != "tiny"]
    job = subprocess.run(
        [*command, "--tiny", f"--output={tmp_path / 'two'}", *settings],
        cwd=examples,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-4000:]
    run = fine_tune(task, tmp_path / "one")
    assert f"Test accuracy {run.test_accuracy:.1%}" in job.stdout
    saved = [checkpoint.load(tmp_path / name / "adapters") for name in ("two", "one")]
    assert jax.tree.structure(saved[0]) == jax.tree.structure(saved[1])
    for two, one in zip(*map(jax.tree.leaves, saved), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


# Wrong settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data": 3}, "--data 3 --fsdp 1 --tensor 1 do not make a mesh of 8 devices: .* has to be 8"),
        ({"fsdp": 3}, "--fsdp 3 --tensor 1 do not make a mesh of 8 devices"),
        ({"tensor": 16}, "--fsdp 1 --tensor 16 do not make a mesh of 8 devices"),
        ({"tensor": 0}, "--tensor is 0, expected at least 1"),
        ({"every": 0}, "--every is 0, expected at least 1"),
        ({"batch": 30}, "--batch is 30, expected a multiple of 8: data 8 x fsdp 1 x microbatches 1"),
        ({"batch": 8, "fsdp": 4, "microbatches": 2}, "--batch is 8, expected a multiple of 16"),
    ],
)
def test_wrong_meshes(settings, says):
    with pytest.raises(lora.LoraError, match=says):
        sharded.make_mesh(sharded.Config(**settings))


def test_more_rows_than_sentences(task, tmp_path):
    with pytest.raises(lora.LoraError, match="--batch is 8000, but there are only 846 sentences"):
        fine_tune(task, tmp_path, batch=8000)
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_split(task):
    mesh = sharded.make_mesh(sharded.Config(fsdp=8))
    odd = {"layer_0": {"intermediate": {"kernel": np.ones((12, 32), np.float32)}}}
    with pytest.raises(lora.LoraError, match=r"'layer_0/intermediate/kernel' of shape \[12, 32\] cannot be split"):
        sharded.place(odd, mesh)
    with pytest.raises(lora.LoraError, match="no pattern of SPECS matches 'pooler/kernel'"):
        sharded.place({"pooler": {"kernel": np.ones((16, 32), np.float32)}}, mesh)


# Batches on several hosts ---------------------------------------------------------------------------------------------


def hosts(task, count, seed=0):
    """The iterators of all hosts."""
    owns = [slice(32 * i // count, 32 * (i + 1) // count) for i in range(count)]
    return [batches.training_batches(task.splits["train"], 32, 2, seed, own) for own in owns]


def whole(parts):
    """The batch of which these are the hosts' parts."""
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_are_the_same_for_any_number_of_hosts(task):
    expected = list(hosts(task, 1)[0])
    assert len(expected) == 846 // 32 * 2
    for count in (2, 4):
        found = list(zip(*hosts(task, count), strict=True))
        assert len(found) == len(expected)
        for parts, batch in zip(found, expected, strict=True):
            assert_same(whole(parts), batch)


def test_an_epoch_sees_each_sentence_at_most_once_and_each_epoch_has_its_order(task):
    found = list(hosts(task, 1)[0])
    rows = [[tuple(ids[i][mask[i]]) for ids, mask, _ in half for i in range(32)] for half in (found[:26], found[26:])]
    train = [tuple(tokens) for tokens in task.splits["train"].tokens]
    for epoch in rows:
        assert len(epoch) == 846 // 32 * 32
        assert all(epoch.count(row) <= train.count(row) for row in set(epoch))
    assert rows[0] != rows[1]
    assert any((a != b).any() for a, b in zip(next(hosts(task, 1)[0]), next(hosts(task, 1, seed=1)[0]), strict=True))


def test_a_position_holds_on_another_number_of_hosts(task):
    before, after = hosts(task, 2), hosts(task, 4)
    for _ in range(30):  # into the second epoch
        parts = [next(host) for host in before]
    position, *same = [host.get_state() for host in before]
    assert same == [position]
    expected = whole([next(host) for host in before])
    for host in after:
        host.set_state(position)
    assert_same(whole([next(host) for host in after]), expected)
    del parts
