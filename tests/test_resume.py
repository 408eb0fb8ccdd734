"""What was saved comes back exactly or not at all, whenever the process ended and whatever became of the files."""

import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODELS, RULES, assert_trees_equal

import lora_jax as lora
from lora_jax import LoraError
from lora_jax.checkpoints.manager import Checkpoints

CASE = next(case for case in MODELS if case.name == "two_layers")
PLAN = CASE.plan(RULES["lora"])
WORKER = Path(__file__).parent / "kill_worker.py"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Run:
    """A state with what a training may hold: random keys, thin dtypes, empty arrays, nothing at all."""

    step: Any
    trainable: Any
    opt_state: Any
    key: Any
    skipped: Any = None


def new(key=0, rule="lora", optimizer=None):
    adapters = CASE.adapters(RULES[rule], key=key)
    head = {"kernel": jnp.full((4, 2), key, jnp.bfloat16), "scale": jnp.full(3, key, jnp.float8_e4m3fn)}
    trainable = {"adapters": adapters, "head": head, "empty": jnp.zeros((0, 2))}
    opt_state = (optimizer or optax.adam(1e-2)).init(adapters)
    return Run(jnp.zeros((), jnp.int32), trainable, opt_state, jax.random.key(key))


def at(state, step):
    """The state at a step, no two steps alike."""
    scaled = jax.tree.map(lambda a: a * np.float32(1 + step).astype(a.dtype), state.trainable["adapters"])
    trainable = state.trainable | {"adapters": scaled}
    return dataclasses.replace(state, step=jnp.int32(step), trainable=trainable, key=jax.random.key(step))


def plain(tree):
    return jax.tree.map(lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, tree)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [a.dtype for a in jax.tree.leaves(found)] == [a.dtype for a in jax.tree.leaves(expected)]
    assert_trees_equal(plain(found), plain(expected))


def checkpoints(folder, **options):
    return Checkpoints(folder, CASE.params(), PLAN, **{"every": 1, **options})


def train(folder, steps, state=None, metrics=None, **options):
    """Save at these steps, in a run of its own."""
    with checkpoints(folder, **options) as kept:
        kept.restore(state or new())
        for step in steps:
            kept.save(at(state or new(), step), metrics and metrics(step), position={"next": step})


# What comes back -----------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """Into a state with other numbers: arrays, keys, optimizer state, dtypes and the position of the data."""
    train(tmp_path / "a", [1, 2])
    with checkpoints(tmp_path / "a") as kept:
        found, position = kept.restore(new(key=5))
        assert position == {"next": 2}
        assert_same(found, at(new(), 2))
        assert jax.random.uniform(found.key) == jax.random.uniform(jax.random.key(2))
        assert_same(kept.restore(new(key=5), step=1)[0], at(new(), 1))
        assert not any(leaf.committed for leaf in jax.tree.leaves(found)), "tied to no device, like the given ones"


def test_an_empty_folder_gives_the_state_back(tmp_path):
    state = new()
    with checkpoints(tmp_path / "a" / "b") as kept:
        assert kept.restore(state) == (state, None)
        assert kept.steps == []


def test_a_state_of_the_library_after_donation(tmp_path):
    """What is saved is the state at that step, though its buffers are given to the next step at once."""
    apply, optimizer = lora.lora_apply(CASE.fn), optax.adam(0.1)
    step = lora.jit_step(lambda a, p, x: (apply(p, a, x) ** 2).mean(), optimizer)
    state = lora.TrainState.create(CASE.adapters(RULES["lora"]), optimizer)
    expected = {}
    with checkpoints(tmp_path, keep=10) as kept:
        for i in range(1, 7):
            state, metrics = step(state, CASE.params(), CASE.input())
            expected[i] = jax.tree.map(lambda a: np.array(a, copy=True), state)
            kept.save(state, metrics)
    with checkpoints(tmp_path) as kept:
        for i, state in expected.items():
            assert_trees_equal(
                kept.restore(lora.TrainState.create(CASE.adapters(RULES["lora"]), optimizer), i)[0], state
            )


@pytest.mark.parametrize("position", [None, {"a": [1, 2.5, "x"], "b": None}, 7, b"\x00\xff"])
def test_positions(tmp_path, position):
    with checkpoints(tmp_path) as kept:
        kept.save(at(new(), 1), position=position)
        kept.save(at(new(), 2), position=lambda: position)
    with checkpoints(tmp_path) as kept:
        assert [kept.restore(new(), step)[1] for step in (1, 2)] == [position, position]


MESHES = {"8": (8, 1), "2 x 4": (2, 4), "4 of the devices": (4, 1)}


def on_mesh(state, sizes):
    """Adapters are split over one axis, all else is a copy on each device."""
    mesh = jax.make_mesh(
        sizes, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[: sizes[0] * sizes[1]]
    )

    def place(array):
        split = jax.P("x") if array.ndim == 2 and array.shape[0] % sizes[0] == 0 else jax.P()
        return jax.device_put(array, jax.NamedSharding(mesh, split))

    return jax.tree.map(place, state)


@pytest.mark.parametrize("after", ["one device", *MESHES])
@pytest.mark.parametrize("before", ["one device", *MESHES])
@pytest.mark.sampled(5)
def test_another_mesh(tmp_path, before, after):
    """The same numbers, where the given state is."""
    state, target = at(new(), 1), new(key=5)
    with checkpoints(tmp_path) as kept:
        kept.save(on_mesh(state, MESHES[before]) if before in MESHES else state)
    target = on_mesh(target, MESHES[after]) if after in MESHES else target
    with checkpoints(tmp_path) as kept:
        found, _ = kept.restore(target)
    assert_same(found, state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert a.sharding == b.sharding
        assert a.committed == b.committed


# Which steps ---------------------------------------------------------------------------------------------------------


def test_saves_when_due_and_keeps_the_newest(tmp_path):
    train(tmp_path, range(1, 12), every=3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_6", "step_9"]
    train(tmp_path, range(10, 13), every=3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_12", "step_9"]


def test_steps_that_do_not_count(tmp_path):
    """A step that is skipped leaves the counter where it was: nothing is saved twice, and none is missed."""
    with checkpoints(tmp_path, every=3, keep=9) as kept:
        for step in [1, 1, 2, 3, 3, 3, 4, 4, 5, 6, 7]:
            kept.save(at(new(), step))
        assert kept.steps == [3, 6]


def test_the_device_is_asked_only_when_a_checkpoint_may_be_due(tmp_path):
    class Step:
        """A counter that notes when its value is asked for."""

        shape, dtype = (), np.dtype(np.int32)

        def __init__(self, value):
            self.value = value

        def __array__(self, dtype=None, copy=None):
            asked.append(self.value)
            return np.array(self.value, np.int32)

    asked = []
    with checkpoints(tmp_path, every=10) as kept:
        for step in range(1, 10):
            assert not kept.save(dataclasses.replace(new(), step=Step(step)))
    assert asked == [1]


def test_a_save_by_hand(tmp_path):
    with checkpoints(tmp_path, every=100) as kept:
        kept.save(at(new(), 0), force=True)
        kept.save(at(new(), 4))
        kept.save(at(new(), 5), force=True)
        kept.save(at(new(), 5), force=True)
        assert kept.steps == [0, 5]


ACCURACY = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.1, 6: 0.2, 7: None}


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 5)])
def test_the_best_stays_beside_the_newest(tmp_path, mode, best):
    options = {"keep": 1, "best": ("accuracy", mode)}
    train(tmp_path, range(1, 5), metrics=lambda step: {"accuracy": ACCURACY[step]}, **options)
    train(tmp_path, range(5, 8), metrics=lambda step: {"accuracy": ACCURACY[step], "loss": np.ones(3)}, **options)
    with checkpoints(tmp_path, **options) as kept:
        assert kept.steps == [best, 7]
        assert kept.restore(new(), "best")[0].step == best
        assert kept.restore(new())[0].step == 7


def test_multiples_stay(tmp_path):
    train(tmp_path, range(1, 12), keep=1, keep_every=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_11", "step_4", "step_8"]


def test_going_on_from_an_earlier_step(tmp_path):
    """The later ones are of a run that was left: they go when the new run has something, and not before."""
    train(tmp_path, [2, 4, 6, 8], keep=4)
    with checkpoints(tmp_path, keep=4, every=2) as kept:
        kept.restore(new(), step=4)
        kept.save(at(new(), 5))
        assert kept.steps == [2, 4, 6, 8]
        kept.save(at(new(key=9), 6))
        kept.wait()
        assert kept.steps == [2, 4, 6]
        assert_same(kept.restore(new())[0], at(new(key=9), 6))


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, r"Checkpoints\(every=0\): expected a whole number of at least 1"),
        ({"every": True}, "every=True"),
        ({"keep": 0}, "keep=0"),
        ({"keep_every": 1.5}, "keep_every=1.5"),
        ({"best": "accuracy"}, r'best=\'accuracy\'\): expected a metric and a direction, as \("accuracy", "max"\)'),
        ({"best": ("accuracy", "up")}, "expected a metric and a direction"),
    ],
)
def test_arguments(tmp_path, options, says):
    with pytest.raises(LoraError, match=says):
        checkpoints(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


REFUSED = {
    "no step": (lambda s: {"a": s.key}, None, "the state's step is none, expected a scalar integer"),
    "several steps": (lambda s: dataclasses.replace(s, step=jnp.zeros(2, jnp.int32)), None, r"step is int32\[2\]"),
    "half a step": (lambda s: dataclasses.replace(s, step=1.5), None, r"step is float\(1.5\)"),
    "no array": (lambda s: dataclasses.replace(s, skipped=0.5), None, "skipped of the state is a float, expected an"),
    "no JSON": (lambda s: s, object(), "the position <object .* cannot be saved: .* not JSON serializable"),
    "other JSON": (lambda s: s, {1: 2}, "gives it back as something else"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved(tmp_path, case):
    edit, position, says = REFUSED[case]
    with checkpoints(tmp_path) as kept:
        with pytest.raises(LoraError, match=says):
            kept.save(edit(at(new(), 1)), position=position)
        kept.save(at(new(), 1))
        assert kept.steps == [1]


def test_the_metric_of_the_best_has_to_be_there(tmp_path):
    with (
        checkpoints(tmp_path, best=("accuracy", "max"), every=100) as kept,
        pytest.raises(LoraError, match=r"lacks 'accuracy', .* there are: loss. Give None where it was not measured"),
    ):
        kept.save(at(new(), 1), {"loss": 1.0})


def test_metrics_that_are_no_numbers_are_left_out(tmp_path):
    """A text beside the numbers costs nobody a checkpoint; the metric of the best has to be a number."""
    metrics = {"note": "abc", "loss": jnp.float32(1.5), "table": [[1], [2, 3]], "list": np.ones(3), "on": True, "z": 1j}
    with checkpoints(tmp_path) as kept:
        kept.save(at(new(), 1), metrics)
    description = json.loads((tmp_path / "step_1" / "description" / "metadata").read_text())
    assert description["facts"]["metrics"] == {"loss": 1.5, "on": 1.0}
    for wrong in ("abc", np.ones(3)):
        with (
            checkpoints(tmp_path / "b", best=("note", "max"), every=100) as kept,
            pytest.raises(LoraError, match=r"'note' is a \w+, expected a number, or None if not measured"),
        ):
            kept.save(at(new(), 1), {"note": wrong})


def test_a_kind_that_cannot_be_saved_is_refused_at_the_first_step(tmp_path):
    """And not hours later, when a checkpoint is due."""

    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Mine(lora.LoraAdapter):
        pass

    mine = {path: Mine(a.a, a.b, a.axes, a.scale) for path, a in new().trainable["adapters"].items()}
    state = dataclasses.replace(new(), step=jnp.int32(1), trainable={"adapters": mine})
    with checkpoints(tmp_path, every=100) as kept, pytest.raises(LoraError, match="Mine is no registered kind"):
        kept.save(state)


@pytest.mark.parametrize("name", ["thesis.tex", "step_5/photo.jpg", "step_5"])
def test_a_folder_with_something_else(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(LoraError, match="which is no checkpoint; all is left as it is"):
        checkpoints(tmp_path)
    assert (tmp_path / name).read_text() == "x"


def test_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(LoraError, match=str(folder)):
            checkpoints(folder)


def test_checkpoints_that_were_not_restored_are_not_replaced(tmp_path):
    train(tmp_path, [4])
    with checkpoints(tmp_path) as kept, pytest.raises(LoraError, match=r"up to step 4 and none was restored"):
        kept.save(at(new(), 1))


def test_steps_that_are_not_there(tmp_path):
    train(tmp_path, [1, 2])
    with checkpoints(tmp_path) as kept:
        with pytest.raises(LoraError, match="no checkpoint of step 3; there are the steps 1, 2"):
            kept.restore(new(), step=3)
        with pytest.raises(LoraError, match="no best checkpoint"):
            kept.restore(new(), step="best")
    with checkpoints(tmp_path / "b") as kept, pytest.raises(LoraError, match=r"no checkpoint of step 3; .* none"):
        kept.restore(new(), step=3)


OTHER_BASES = {
    "contents": (lambda p: p | {"w1": p["w1"] + 1}, r"w1: float32\[12, 10\] with other contents"),
    "shape": (lambda p: p | {"b": jnp.ones(7)}, r"b: saved as float32\[10\], float32\[7\] now"),
    "dtype": (lambda p: p | {"b": p["b"].astype(jnp.bfloat16)}, r"b: saved as float32\[10\], bfloat16\[10\] now"),
    "path": (lambda p: {"w0": p["w1"]} | p, r"w0: float32\[12, 10\] now, not saved"),
}


@pytest.mark.parametrize("change", OTHER_BASES)
def test_another_base(tmp_path, change):
    edit, says = OTHER_BASES[change]
    train(tmp_path, [1])
    with Checkpoints(tmp_path, edit(CASE.params()), PLAN) as kept:
        with pytest.raises(LoraError, match=rf"(?s)another base:\n  {says}.*allow_other_base=True"):
            kept.restore(new(key=5))
        assert_same(kept.restore(new(key=5), allow_other_base=True)[0], at(new(), 1))


def other_states():
    wider = lora.plan(CASE.fn, CASE.params(), CASE.input(), rules={"w.*": lora.Lora(rank=5)})
    adapters = lora.init(jax.random.key(3), CASE.params(), wider)
    scaled = {path: dataclasses.replace(a, ratio=9.0) for path, a in new().trainable["adapters"].items()}
    fewer = {"w1": CASE.adapters(RULES["lora"], key=5)["w1"]}
    adam = optax.adam(1e-2)

    def with_adapters(adapters):
        state = new(key=5)
        return dataclasses.replace(
            state, trainable=state.trainable | {"adapters": adapters}, opt_state=adam.init(adapters)
        )

    return {
        "rank": (with_adapters(adapters), r"trainable/adapters/w1/a: saved as float32\[12, \d\], float32\[12, 5\] now"),
        "scale": (with_adapters(scaled), r"adapters/w1: saved with scale \S+, 9.0 now"),
        "fewer": (with_adapters(fewer), r"trainable/adapters/w2/a: saved as .*, missing now"),
        "optimizer": (new(key=5, optimizer=optax.sgd(0.1, momentum=0.9)), "opt_state/0/mu/w1/a: saved as .* missing"),
        "key": (
            dataclasses.replace(new(key=5), key=jax.random.key(0, impl="rbg")),
            r"key: saved as key<fry>\[\], key<rbg>",
        ),
    }


@pytest.mark.parametrize("change", ["rank", "scale", "fewer", "optimizer", "key"])
def test_other_rules(tmp_path, change):
    """Refused with every difference; or what fits is restored, and the rest stays as it was given."""
    state, says = other_states()[change]
    saved = at(new(), 1)
    train(tmp_path, [1])
    with checkpoints(tmp_path) as kept:
        with pytest.raises(LoraError, match=rf"(?s)another state:.*{says}.*Lora\(rank=.*allow_other_rules=True"):
            kept.restore(state)
        found, _ = kept.restore(state, allow_other_rules=True)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    before, given, after = (dict(jax.tree.leaves_with_path(plain(s))) for s in (saved, state, found))
    restored = 0
    for path, array in after.items():
        fits = path in before and (before[path].shape, before[path].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(array, before[path] if fits else given[path], err_msg=str(path))
        restored += fits
    assert restored > 0
    assert found.step == 1


# Damaged files -------------------------------------------------------------------------------------------------------


def damages(data):
    """What may become of a file: cut short, emptied, gone, or with some bytes changed."""
    yield "cut", data[: len(data) // 2]
    yield "empty", b""
    yield "gone", None
    for place in sorted({0, len(data) // 3, len(data) // 2, 2 * len(data) // 3, len(data) - 1}):
        yield f"byte {place}", data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :]


def outcome(kept):
    """The state, or None where there was the error that there should be."""
    try:
        return kept.restore(new(key=5))[0]
    except LoraError as error:
        says = r"step 2 is damaged and cannot be restored: .*restore\(state, step=1\)\. There are 1\."
        return None if re.search(says, str(error)) else pytest.fail(str(error))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the other reads, once one failed
def test_damaged_files(tmp_path):
    """Whichever file it is: an error that says how to go on, or the right numbers."""
    train(tmp_path, [1, 2])
    expected, found = at(new(), 2), {}
    for file in sorted(path for path in (tmp_path / "step_2").rglob("*") if path.is_file()):
        data = file.read_bytes()
        for name, damaged in damages(data):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with checkpoints(tmp_path) as kept:
                found[file.name, name] = outcome(kept)
            if found[file.name, name] is not None:
                assert_same(found[file.name, name], expected)
            file.write_bytes(data)
    assert sum(state is None for state in found.values()) > 20
    with checkpoints(tmp_path) as kept:
        assert_same(kept.restore(new(key=5), step=1)[0], at(new(), 1))


def test_an_edited_description(tmp_path):
    train(tmp_path, [1])
    file = tmp_path / "step_1" / "description" / "metadata"
    text = file.read_text()
    for old, edited in [
        ('"next": 1', '"next": 3'),
        ("[[], [0], [1]]", "[[], [1], [0]]"),
        ('"format": 1', '"format": 2'),
    ]:
        assert old in text
        file.write_text(text.replace(old, edited))
        with (
            checkpoints(tmp_path) as kept,
            pytest.raises(LoraError, match=r"description was edited\. There is no other"),
        ):
            kept.restore(new())


def test_a_newer_format(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_jax.checkpoints.state_codec.FORMAT", 9)
    train(tmp_path, [1])
    monkeypatch.undo()
    with checkpoints(tmp_path) as kept, pytest.raises(LoraError, match=r"format 9 of lora_jax .*reads 1: update"):
        kept.restore(new())


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    train(tmp_path, [1])
    for name in ("step_2.orbax-checkpoint-tmp", "step_1.orbax-checkpoint-tmp-17", ".lora_jax-deleted"):
        (tmp_path / name / "arrays").mkdir(parents=True)
        (tmp_path / name / "arrays" / "d").write_text("half")
    with checkpoints(tmp_path) as kept:
        assert kept.restore(new())[0].step == 1
        kept.save(at(new(), 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


# Errors while saving -------------------------------------------------------------------------------------------------


def save_and_wait(kept, step):
    kept.save(at(new(), step))
    kept.wait()


def test_a_folder_that_cannot_be_written(tmp_path):
    """The error comes from the next save or from the end; after it the training goes on, and saves again."""
    folder, away = tmp_path / "a", tmp_path / "away"
    with checkpoints(folder, keep=5) as kept:
        save_and_wait(kept, 1)
        folder.rename(away)
        folder.write_text("no folder")
        with pytest.raises(LoraError, match=str(folder)):
            save_and_wait(kept, 2)
        folder.unlink()
        away.rename(folder)
        kept.save(at(new(), 3))
    with checkpoints(folder) as kept:
        assert kept.steps == [1, 3]
        assert_same(kept.restore(new(key=5))[0], at(new(), 3))


def run(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        **options,
    )


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """No file may grow beyond 300 bytes for a while. It runs by itself, as the limit is one of the process."""
    done = run(
        """
        import resource, sys
        import numpy as np
        import test_resume as t
        from lora_jax import LoraError

        def limit(n):
            resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))

        problems = 0
        with t.checkpoints(sys.argv[1], keep=5) as kept:
            for step in range(1, 9):
                limit(300 if 2 < step < 6 else resource.RLIM_INFINITY)
                try:
                    kept.save(t.at(t.new(), step), position={"next": step})
                    kept.wait()
                except LoraError as error:
                    print(error, flush=True)
                    problems += 1
            assert problems == 3, problems
            assert kept.steps == [1, 2, 6, 7, 8], kept.steps
            limit(300)
            kept.save(t.at(t.new(), 9))
            while kept._manager.is_saving_in_progress():
                pass
            limit(resource.RLIM_INFINITY)
            try:
                kept.save(t.at(t.new(), 10))  # the error of the one before comes now, and this one is written
            except LoraError as error:
                print(error)
        """,
        tmp_path / "a",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for step in (3, 4, 5, 9):
        assert f"the checkpoint of step {step} was not written to {tmp_path / 'a'}: " in done.stdout
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"step_{i}" for i in (10, 2, 6, 7, 8)]
    with checkpoints(tmp_path / "a") as kept:
        for step in kept.steps:
            assert_same(kept.restore(new(key=5), step)[0], at(new(), step))


def a_run_whose_disk_fills_up(folder, monkeypatch, error=None):
    with checkpoints(folder) as kept:
        kept.save(at(new(), 1))
        wait = kept._manager.wait_until_finished

        def fail():
            wait()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kept._manager, "wait_until_finished", fail)
        if error:
            raise error


def test_the_end_raises_what_was_not_written(tmp_path, monkeypatch):
    with pytest.raises(LoraError, match=r"step 1 was not written .* No space left on device"):
        a_run_whose_disk_fills_up(tmp_path, monkeypatch)


def test_the_end_hides_no_other_error(tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="mine") as caught:
        a_run_whose_disk_fills_up(tmp_path, monkeypatch, KeyError("mine"))
    assert "step 1 was not written" in caught.value.__notes__[0]


# Being told to end ---------------------------------------------------------------------------------------------------


def test_sigterm(tmp_path):
    """The step at hand is on disk when `save` says to end; a second signal finds the handler of before."""
    before = signal.getsignal(signal.SIGTERM)
    with checkpoints(tmp_path, every=100) as kept:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not kept.save(at(new(), 1))
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before
        assert kept.save(at(new(), 2), position={"next": 2})
        assert [path.name for path in tmp_path.iterdir()] == ["step_2"]
    assert signal.getsignal(signal.SIGTERM) == before
    with checkpoints(tmp_path) as kept:
        assert_same(kept.restore(new(key=5))[0], at(new(), 2))


def test_a_signal_that_no_save_reported_is_passed_on(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        with checkpoints(tmp_path):
            signal.raise_signal(signal.SIGTERM)
            assert not seen
        assert seen == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_are_for_the_main_thread(tmp_path):
    def body():
        with checkpoints(tmp_path) as kept:
            results.append(kept.save(at(new(), 1)))

    results = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert results == [False]


# Killed --------------------------------------------------------------------------------------------------------------


def start_worker(folder, steps, pause):
    command = [sys.executable, str(WORKER), str(folder), str(steps), str(pause)]
    path = f"{WORKER.parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(worker, word):
    for line in worker.stdout:
        if line.startswith(word):
            return line.split()[1]
    raise AssertionError(f"the worker ended with {worker.wait()} before it said {word!r}")


@pytest.mark.slow
@pytest.mark.rare
def test_killed_twelve_times(tmp_path):
    """SIGKILL at random moments, some while a checkpoint is written: all ends as in a quiet run, bit by bit."""
    chance, steps = random.Random(0), 241
    starts, unfinished = [], 0
    for _ in range(12):
        with start_worker(tmp_path / "a", steps, 0.01) as worker:
            starts.append(int(wait_for(worker, "from")))
            for _ in range(chance.randint(1, 14)):  # counted in steps, so that a slow machine comes on too
                wait_for(worker, "step")
            time.sleep(chance.uniform(0.0, 0.05))
            worker.kill()
        names = [path.name for path in (tmp_path / "a").iterdir()]
        unfinished += any("tmp" in name for name in names)
        assert len(names) <= 5, "what is left over does not gather"
    assert starts == sorted(starts), "nothing that was on disk is lost"
    assert 12 < starts[-1] < steps, "they come on, and all were killed before the end"
    assert unfinished, "no kill met a save"
    ends = []
    for name in ("a", "undisturbed"):
        with start_worker(tmp_path / name, steps, 0) as worker:
            ends.append(wait_for(worker, "done"))
    assert ends[0] == ends[1]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["step_237", "step_240"]


@pytest.mark.slow
def test_sigterm_ends_a_training(tmp_path):
    with start_worker(tmp_path / "a", 10_000, 0.05) as worker:
        wait_for(worker, "step")
        time.sleep(0.3)
        worker.terminate()
        last = [line for line in worker.stdout.read().splitlines() if line.startswith("step")][-1].split()[1]
    assert worker.returncode == 3
    assert f"step_{last}" in {path.name for path in (tmp_path / "a").iterdir()}


# Several processes ---------------------------------------------------------------------------------------------------


TWO_PROCESSES = """
import os, sys
port, index, folder, action = sys.argv[1:]
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"  # compiled as the tests are, to the last bit
import jax
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
import numpy as np
import test_resume as t
mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def place(array):
    split = jax.P("y") if array.ndim == 2 and array.shape[0] % 4 == 0 else jax.P()
    return jax.make_array_from_callback(array.shape, jax.NamedSharding(mesh, split), lambda i: np.asarray(array)[i])

def spread(state):  # the counter and the key stay what each process has for itself
    return t.dataclasses.replace(state, trainable=jax.tree.map(place, state.trainable))

params = jax.tree.map(place, t.CASE.params())
with t.Checkpoints(folder, params, t.PLAN, every=1) as kept:
    if action == "until told to end":
        kept.restore(spread(t.new()))
        for step in range(1, 10_000):
            state = spread(t.at(t.new(), step))
            if kept.save(state):
                break
            print("step", step, flush=True)
        print("ended at", step, "of", kept.steps)
    elif action == "save":
        kept.save(spread(t.at(t.new(), 1)), position={"next": 1})
        kept.save(spread(t.at(t.new(), 2)), position={"next": 2})
    else:
        state, position = kept.restore(spread(t.new(key=5)))
        assert position == {"next": 2}, position
        expected = spread(t.at(t.new(), 2))
        for a, b in zip(jax.tree.leaves(t.plain(state)), jax.tree.leaves(t.plain(expected)), strict=True):
            assert a.sharding == b.sharding, (a.sharding, b.sharding)
            for mine, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
                np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(theirs.data))
        kept.save(spread(t.at(t.new(), 3)))
print("fine")
"""


def two_processes(folder, action):
    """What each of the two printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{WORKER.parent.parent}{os.pathsep}{WORKER.parent}"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(port), str(i), str(folder), action],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    if action == "until told to end":
        wait_for(workers[1], "step 3")
        workers[1].terminate()
    printed = [worker.communicate(timeout=400)[0] for worker in workers]
    for worker, text in zip(workers, printed, strict=True):
        assert (worker.returncode, text[-5:]) == (0, "fine\n"), text[-4000:]
    return printed


@pytest.mark.slow
def test_two_processes_end_at_the_same_step(tmp_path):
    """One of them is told to end; both save the same step."""
    ends = [
        re.search(r"ended at (\d+) of \[.*\b(\d+)\]", text) for text in two_processes(tmp_path, "until told to end")
    ]
    assert len({step for end in ends for step in end.groups()}) == 1
    assert f"step_{ends[0][1]}" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Saved by two, restored by one; saved by one, restored by two, on other meshes."""
    two_processes(tmp_path / "a", "save")
    with checkpoints(tmp_path / "a") as kept:
        found, position = kept.restore(on_mesh(new(key=5), (8, 1)))
        assert position == {"next": 2}
        assert_same(found, at(new(), 2))
    train(tmp_path / "b", [1, 2])
    two_processes(tmp_path / "b", "restore")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["step_1", "step_2", "step_3"]
