import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, RULES, assert_trees_equal, eight_devices

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
    with pytest.raises(LoraError, match="holds no adapters saved by"):
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


@pytest.mark.parametrize("gone", ["scale", "axes", "kind"])
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
