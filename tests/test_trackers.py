"""The log of a training run in TensorBoard's files and at Weights & Biases, also where a run was broken off."""

import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lora_jax as lora
from lora_jax.recipes import options
from lora_jax.recipes.records import Log, read_log
from lora_jax.recipes.trackers import Trackers

STEPS = [{"step": n, "loss": 1 / n, "lr": 0.5, "memory": None} for n in range(1, 8)]
SETTINGS = {"rank": 4}


def tell(folder, names, begun, lines):
    """Take part of a run, from a checkpoint on, as `finetune` does."""
    with Log(folder, begun) as log, Trackers(names, folder, log, SETTINGS) as trackers:
        for line in lines:
            log.add(line)
            trackers.add(line)


def broken_off(folder, names):
    """A run that was killed after step 5, and goes on from the checkpoint of step 3."""
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        tell(folder, names, 0, interrupted([{"step": 0, "eval_loss": 2.0}, *STEPS[:5]]))
    tell(folder, names, 3, [*STEPS[3:], {"step": 7, "eval_loss": 1.0}])


def interrupted(lines):
    yield from lines
    raise KeyboardInterrupt


# TensorBoard ----------------------------------------------------------------------------------------------------------


def events(folder):
    """The events of all files, in the order in which TensorBoard reads these."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: its length, a checksum of that, what it holds, a checksum of that
            (length,) = struct.unpack_from("<Q", data, at)
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def shown(folder):
    """What TensorBoard shows, (step, name, value): where a session starts, it forgets what it had from that step on."""
    found = []
    for event in events(folder):
        if event.HasField("session_log"):
            found = [entry for entry in found if entry[0] < event.step]
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_shows_each_line_once(tmp_path):
    pytest.importorskip("tensorboardX")
    broken_off(tmp_path / "run", ["tensorboard"])
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    expected = [
        (line["step"], *entry) for line in lines for entry in line.items() if entry[0] not in ("step", "memory")
    ]
    assert [(step, name, pytest.approx(value)) for step, name, value in shown(tmp_path / "run")] == expected
    assert len([*events(tmp_path / "run")]) == 2 + 6 + 1 + 5, "files, lines, a session, lines"


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    pytest.importorskip("tensorboardX")
    tell(tmp_path, ["tensorboard"], 0, [{"step": 0, "eval_loss": 2.0}, *STEPS[:2]])
    tell(tmp_path, ["tensorboard"], 0, [{"step": 0, "eval_loss": 2.0}, *STEPS[:1]])
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [0, 1]
    assert [(step, name) for step, name, _ in shown(tmp_path)] == [(0, "eval_loss"), (1, "loss"), (1, "lr")]


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    """What a checkpoint is saved after, a run that goes on from it does not say again."""
    pytest.importorskip("tensorboardX")
    with Log(tmp_path) as log, Trackers(["tensorboard"], tmp_path, log, SETTINGS) as trackers:
        trackers.add(STEPS[0])
        assert [step for step, *_ in shown(tmp_path)] == [1, 1]


# Weights & Biases -----------------------------------------------------------------------------------------------------


class Site:
    """Takes the place of `wandb`, and notes what it is told."""

    Error = type("Error", (Exception,), {})
    Settings = dict

    def __init__(self):
        self.begun, self.lines, self.ends = [], [], []

    def init(self, **given):
        self.begun.append((given["id"], given["name"], given["resume"], given["config"]))
        return types.SimpleNamespace(
            id=given["id"] or "a1",
            log=lambda line, step: self.lines.append({"step": step, **line}),
            finish=lambda exit_code: self.ends.append(exit_code),
        )


def test_wandb_is_told_each_line_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", site := Site())
    broken_off(tmp_path / "run", ["wandb"])
    assert site.begun == [(None, "run", "allow", SETTINGS), ("a1", "run", "allow", SETTINGS)]
    without = [{name: value for name, value in line.items() if value is not None} for line in STEPS]
    assert site.lines == [{"step": 0, "eval_loss": 2.0}, *without, {"step": 7, "eval_loss": 1.0}]
    assert site.ends == [1, 0]


def test_wandb_that_is_asked_for_later_is_told_all_that_is_to_come(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", site := Site())
    tell(tmp_path, [], 0, STEPS[:5])
    tell(tmp_path, ["wandb"], 3, STEPS[3:])
    assert [line["step"] for line in site.lines] == [4, 5, 6, 7]


def test_wandb_that_does_not_take_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", site := Site())

    def init(**_):
        raise site.Error("no API key configured.")

    site.init = init
    with pytest.raises(lora.LoraError, match=r"no API key configured. Log in by `wandb login`, or set WANDB_MODE=off"):
        tell(tmp_path, ["wandb"], 0, [])


def records(data):
    """The records of a `.wandb` file: seven bytes, then blocks of 32 KiB with parts of records, as LevelDB has them."""
    at, record = 7, b""
    while at < len(data):
        room = -at % 2**15
        if 0 < room < 7:  # too little for the head of a part: its checksum, length and kind
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_itself_without_a_network(tmp_path):
    """In a process of its own, at whose end all is on disk."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    run = "import pathlib, sys, test_trackers; test_trackers.broken_off(pathlib.Path(sys.argv[1]), ['wandb'])"
    here = Path(__file__).parent
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    subprocess.run([sys.executable, "-c", run, str(tmp_path / "run")], env=environment, cwd=here, check=True)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert files[0].name == files[1].name, "one run"
    found = {}
    for path in files:
        for record in map(messages.Record.FromString, records(path.read_bytes())):
            if record.HasField("history"):
                names = ["/".join(item.nested_key) or item.key for item in record.history.item]
                found.setdefault(record.history.step.num, []).extend(n for n in names if not n.startswith("_"))
    learned = {step: ["loss", "lr"] for step in range(1, 7)}
    assert {step: sorted(names) for step, names in found.items()} == {
        0: ["eval_loss"],
        **learned,
        7: ["eval_loss", "loss", "lr"],
    }


# What is asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorbord", "log_to has the part 'tensorbord', expected tensorboard or wandb, each once"),
        ("tensorboard,tensorboard", "log_to has the part 'tensorboard'"),
        ("tensorboard, wandb", r"wandb is not installed: pip install 'lora_jax\[wandb\]'"),
    ],
)
def test_trackers_that_are_not_there(text, said, monkeypatch):
    """Said before any work: the options are checked first."""
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(lora.LoraError, match=said):
        lora.recipes.Options(log_to=text).check()
