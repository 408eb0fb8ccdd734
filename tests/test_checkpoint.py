import dataclasses
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KINDS, MODELS, RULES, assert_trees_equal, eight_devices

import lora_jax as lora
from lora_jax import LoraError, checkpoint

CASE = next(case for case in MODELS if case.name == "scan_over_layers_of_experts")


def test_round_trip(tmp_path):
    """Adapters come back with axes and scale, so that they merge and apply without a plan."""
    adapters = CASE.adapters(RULES["gaussian lora"]) | {"deep/path.with-dots/kernel": CASE.adapters(RULES["lora"])["w"]}
    others = {"head": {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.zeros(())}}
    checkpoint.save(tmp_path / "a", adapters, others)
    found, rest = checkpoint.load(tmp_path / "a")
    assert_trees_equal(found, adapters)
    assert_trees_equal(rest, others)


def test_saving_again_replaces(tmp_path):
    first, second = CASE.adapters(RULES["lora"], key=1), CASE.adapters(RULES["lora"], key=2)
    checkpoint.save(tmp_path / "a", first)
    checkpoint.save(tmp_path / "a", second)
    assert_trees_equal(checkpoint.load(tmp_path / "a")[0], second)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_save_keeps_the_last_good_one(tmp_path, monkeypatch):
    adapters = CASE.adapters(RULES["lora"])
    checkpoint.save(tmp_path / "a", adapters)
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(LoraError, match="disk full"):
        checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"], key=5))
    monkeypatch.undo()
    assert_trees_equal(checkpoint.load(tmp_path / "a")[0], adapters)
    checkpoint.save(tmp_path / "a", adapters)
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "what the failed save left is gone"


def test_a_save_that_was_killed_between_its_renames(tmp_path):
    adapters = CASE.adapters(RULES["lora"])
    (tmp_path / ".a.lora_jax-00000000" / "new").mkdir(parents=True)
    checkpoint.save(tmp_path / "a", adapters)
    (tmp_path / ".a.lora_jax-00000000").mkdir()
    (tmp_path / "a").rename(tmp_path / ".a.lora_jax-00000000" / "old0")
    with pytest.raises(LoraError, match=r"interrupted: rename .*\.a\.lora_jax-00000000/old0 to"):
        checkpoint.load(tmp_path / "a")
    checkpoint.save(tmp_path / "a", adapters)
    assert_trees_equal(checkpoint.load(tmp_path / "a")[0], adapters)


# Out of the checkpoints of a run --------------------------------------------------------------------------------------


def run(folder, trainable, steps=(1,), params=None):
    """A folder of checkpoints, of which each step has other numbers; and what the last of them had."""
    state = lora.TrainState.create(trainable, optax.adam(0.1), key=jax.random.key(0))
    with lora.Checkpoints(folder, CASE.params() if params is None else params, {}, every=1) as kept:
        for step in steps:
            changed = jax.tree.map(lambda a, step=step: a * jnp.asarray(step, a.dtype), trainable)
            kept.save(dataclasses.replace(state, step=jnp.int32(step), trainable=changed))
    return changed


def test_adapters_of_a_run(tmp_path):
    """Without a plan: of the newest step, of another one, of a step's own folder; they merge and apply."""
    adapters = {"w": CASE.adapters(RULES["gaussian lora"])["w"]}
    run(tmp_path, adapters, steps=(2, 9, 10))
    for found, others in (checkpoint.load(tmp_path), checkpoint.load(f"{tmp_path}/step_10")):
        assert_trees_equal(found, jax.tree.map(lambda a: a * 10, adapters))
        assert others == {}
    assert_trees_equal(checkpoint.load(tmp_path, step=9)[0], jax.tree.map(lambda a: a * 9, adapters))
    lora.lora_apply(CASE.fn)(CASE.params(), found, CASE.input())


def test_what_was_trained_beside_adapters_of_a_run(tmp_path):
    """Adapters deep in a tree have the paths of their weights, packed ones too; what is beside them comes along."""
    case = next(case for case in MODELS if case.name == "two_layers")
    adapters = case.adapters(KINDS["dora"])
    head = {"kernel": jnp.ones((3, 2), jnp.bfloat16), "empty": jnp.zeros((0, 2)), "bias": jnp.zeros(())}
    params = lora.bases.quantize(case.params(), {"w1": lora.bases.Int8()})  # w2 is plain
    trained = run(tmp_path / "run", {"deep": [adapters], "head": head}, params=params)
    found, others = checkpoint.load(tmp_path / "run")
    assert_trees_equal(found, trained["deep"][0])
    assert_trees_equal(others, {"head": trained["head"]})
    checkpoint.save(tmp_path / "again", found, {"head": {"bias": others["head"]["bias"]}})


@pytest.mark.slow
def test_all_kinds_of_a_run(tmp_path):
    """Several sets for the same weights have the paths that they have in the tree."""
    case = next(case for case in MODELS if case.name == "two_layers")
    sets = {name: case.adapters(rule) for name, rule in KINDS.items()}
    trained = run(tmp_path, sets, params=case.params())
    expected = {f"{name}/{path}": a for name, adapters in trained.items() for path, a in adapters.items()}
    assert_trees_equal(checkpoint.load(tmp_path)[0], expected)


def test_a_run_with_a_state_of_ones_own(tmp_path):
    adapters = CASE.adapters(RULES["lora"])
    with lora.Checkpoints(tmp_path, CASE.params(), {}, every=1) as kept:
        kept.save(Own(jnp.int32(1), adapters, jnp.ones(3)))
        kept.wait()
        assert_trees_equal(checkpoint.load(tmp_path), (adapters, {}))  # also while the run is alive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own:
    step: Any
    lora: Any
    moments: Any


def test_steps_of_a_run_that_are_not_there(tmp_path):
    run(tmp_path / "run", CASE.adapters(RULES["lora"]), steps=(1, 3))
    with pytest.raises(LoraError, match=r"run has no checkpoint of step 2; there are the steps 1, 3\."):
        checkpoint.load(tmp_path / "run", step=2)
    checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"]))
    with pytest.raises(LoraError, match=r"a holds no checkpoints of lora.Checkpoints, which have steps: leave `step`"):
        checkpoint.load(tmp_path / "a", step=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the other reads, once one failed
@pytest.mark.slow
def test_damaged_files_of_a_run(tmp_path):
    """Whichever file it is: an error that names the other step, or the right numbers."""
    adapters, failed = run(tmp_path, CASE.adapters(RULES["lora"]), steps=(1, 2)), 0
    for damage in damages(tmp_path / "step_2"):
        try:
            found, said = checkpoint.load(tmp_path)[0], ""
        except LoraError as error:
            found, said = adapters, str(error)
        assert_trees_equal(found, adapters)
        assert not said or re.search(r"step 2 is damaged.*lora.checkpoint.load\(folder, step=1\)", said), damage
        failed += bool(said)
    assert failed > 10
    assert_trees_equal(checkpoint.load(tmp_path)[0], adapters)


def test_an_edited_description_of_a_run(tmp_path, monkeypatch):
    run(tmp_path / "a", CASE.adapters(RULES["lora"]), steps=(1, 2))
    file = tmp_path / "a" / "step_2" / "description" / "metadata"
    file.write_text(file.read_text().replace('"scale": 1.5', '"scale": 3.5'))
    with pytest.raises(LoraError, match=r"step 2 is damaged.*description was edited.*load\(folder, step=1\)"):
        checkpoint.load(tmp_path / "a")
    monkeypatch.setattr("lora_jax.checkpoints.state_codec.FORMAT", 9)
    run(tmp_path / "b", CASE.adapters(RULES["lora"]))
    monkeypatch.undo()
    with pytest.raises(LoraError, match=r"step 1 has format 9 of lora_jax .*reads 1: update"):
        checkpoint.load(tmp_path / "b")


# ----------------------------------------------------------------------------------------------------------------------


def test_neighbours_are_left_alone(tmp_path):
    for name in ("a.old", "a.new", "ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("x")
    checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"]))
    checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.new", "a.old", "ab"]


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"head": object()}, "others/head is a object"),
        ({"head": (jnp.ones(2), jnp.ones(2))}, "others/head is a tuple"),
        ({"head": {0: jnp.ones(2)}}, "others/head: the key 0 is a int"),
        ({"head": 3.0}, "others/head is a float"),
        ({"key": jax.random.key(0)}, "others/key is a key<fry>"),
        ({"empty": jnp.ones((0, 2))}, r"others/empty of shape \[0, 2\] is empty"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path, others, says):
    adapters = CASE.adapters(RULES["lora"])
    checkpoint.save(tmp_path / "a", adapters)
    with pytest.raises(LoraError, match=says):
        checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"], key=5), others)
    assert_trees_equal(checkpoint.load(tmp_path / "a")[0], adapters)


def test_loaded_adapters_go_where_the_base_is(tmp_path):
    """They are tied to no device: the base may be on a mesh."""
    checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"]))
    adapters, _ = checkpoint.load(tmp_path / "a")
    mesh = eight_devices()
    params = jax.device_put(CASE.params(), jax.NamedSharding(mesh, jax.P()))
    found = jax.jit(lora.lora_apply(CASE.fn))(params, adapters, CASE.input())
    np.testing.assert_allclose(
        found, lora.lora_apply(CASE.fn)(CASE.params(), adapters, CASE.input()), rtol=1e-5, atol=1e-5
    )
    assert lora.merge(params, adapters)["w"].sharding == params["w"].sharding


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(LoraError, match="holds no saved adapters; it is left as it is"):
        checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"]))
    assert (tmp_path / "a" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("edit", "says"),
    [({"format": 9}, "format 9, this version reads 1"), ({"kind": "future"}, "kind 'future'; this version knows lora")],
)
def test_a_newer_file_is_refused(tmp_path, edit, says):
    checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"]))
    file = tmp_path / "a" / "description" / "metadata"
    description = json.loads(file.read_text())
    if "kind" in edit:
        description["adapters"]["w"] |= edit
    else:
        description |= edit
    file.write_text(json.dumps(description))
    with pytest.raises(LoraError, match=says):
        checkpoint.load(tmp_path / "a")


def test_nothing_there(tmp_path):
    with pytest.raises(LoraError, match=r"there is no folder .*missing, which was to hold adapters saved by"):
        checkpoint.load(tmp_path / "missing")


def damages(folder):
    """What may become of the files of a folder, one at a time."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        for damaged in (None, b"", data[: len(data) // 2], b"[]", b"\xff" + data[1:]):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            yield f"{file.relative_to(folder)} {damaged!r:.20}"
            file.write_bytes(data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the other reads, once one failed
def test_damaged_files(tmp_path):
    """Whichever file it is: an error that says what to do, or the right numbers."""
    adapters, failed = CASE.adapters(RULES["lora"]), 0
    checkpoint.save(tmp_path / "a", adapters, {"head": jnp.ones(3)})
    for damage in damages(tmp_path / "a"):
        try:
            found, said = checkpoint.load(tmp_path / "a")[0], ""
        except LoraError as error:
            found, said = adapters, str(error)
        assert_trees_equal(found, adapters)
        assert not said or any(word in said for word in ("save it again", "holds no adapters", "format")), damage
        failed += bool(said)
    assert failed > 10
    assert_trees_equal(checkpoint.load(tmp_path / "a")[0], adapters)


@pytest.mark.parametrize("gone", ["axes", "kind"])
def test_a_description_that_lacks_something(tmp_path, gone):
    checkpoint.save(tmp_path / "a", CASE.adapters(RULES["lora"]))
    file = tmp_path / "a" / "description" / "metadata"
    description = json.loads(file.read_text())
    del description["adapters"]["w"][gone]
    file.write_text(json.dumps(description))
    with pytest.raises(LoraError, match=rf"a cannot be loaded: .*{gone}.*save it again"):
        checkpoint.load(tmp_path / "a")


def test_what_is_no_adapter_by_itself(tmp_path):
    adapters = CASE.adapters(RULES["lora"])
    with pytest.raises(LoraError, match="is no kind of its own: take the adapters as they were before"):
        checkpoint.save(tmp_path / "a", lora.with_dropout(adapters, jax.random.key(0), 0.1))
    with pytest.raises(LoraError, match=r"adapters\['w'\] is a dict .*, expected an adapter .*others"):
        checkpoint.save(tmp_path / "a", {"w": {"a": jnp.ones(3)}})
    assert not list(tmp_path.iterdir())
