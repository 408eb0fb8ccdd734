import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODELS, RULES

from lora_jax import LoraError, checkpoint

CASE = next(case for case in MODELS if case.name == "scan_over_layers_of_experts")


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip(tmp_path):
    """Adapters come back with axes and scale, so that they merge and apply without a plan."""
    adapters = CASE.adapters(RULES["gaussian lora"]) | {"deep/path.with-dots/kernel": CASE.adapters(RULES["lora"])["w"]}
    others = {"head": {"kernel": jnp.ones((3, 2), jnp.bfloat16), "bias": jnp.zeros(())}}
    checkpoint.save(tmp_path / "a", adapters, others)
    found, rest = checkpoint.load(tmp_path / "a")
    same(found, adapters)
    same(rest, others)


def test_saving_again_replaces(tmp_path):
    first, second = CASE.adapters(RULES["lora"], key=1), CASE.adapters(RULES["lora"], key=2)
    checkpoint.save(tmp_path / "a", first)
    checkpoint.save(tmp_path / "a", second)
    same(checkpoint.load(tmp_path / "a")[0], second)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_save_keeps_the_last_good_one(tmp_path):
    adapters = CASE.adapters(RULES["lora"])
    checkpoint.save(tmp_path / "a", adapters)
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path / "a", adapters, {"head": object()})
    same(checkpoint.load(tmp_path / "a")[0], adapters)


def test_leftovers_of_a_killed_save_do_no_harm(tmp_path):
    adapters = CASE.adapters(RULES["lora"])
    (tmp_path / "a.new").mkdir()
    checkpoint.save(tmp_path / "a", adapters)
    (tmp_path / "a").rename(tmp_path / "a.old")  # killed between the two renames
    with pytest.raises(LoraError, match=r"interrupted: rename .*a\.old to"):
        checkpoint.load(tmp_path / "a")
    checkpoint.save(tmp_path / "a", adapters)
    same(checkpoint.load(tmp_path / "a")[0], adapters)


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
