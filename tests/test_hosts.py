"""Law 5 over hosts: real processes of JAX, four simulated devices in each, give what a single device gives.

And what becomes of the others when one of them is killed, or all are told to end.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import host_worker
import jax
import numpy as np
import placements
import pytest

import lora_jax as lora

pytestmark = pytest.mark.xdist_group("hosts")  # what two processes trained is read by several tests

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, str(ROOT / "examples" / "launch.py")]
PATHS = os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))
LIMIT = 400  # seconds for a whole job; with both cores to itself it takes a twentieth


def launch(*arguments, **options):
    """The launcher as it was started; and everything it prints, for the tests to wait on."""
    command = [*LAUNCH, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": PATHS, "PYTHONUNBUFFERED": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **streams, **options)


def finish(job):
    """What a job printed, after it has ended by itself; (exit code, output)."""
    try:
        output, _ = job.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGTERM)
        time.sleep(5)  # or the two are one
        job.send_signal(signal.SIGTERM)  # the second one ends all processes
        pytest.fail(f"the job did not end in {LIMIT} s:\n{job.communicate(timeout=60)[0][-4000:]}")
    return job.returncode, output


def two_processes(*arguments):
    """A job of two processes of host_worker."""
    devices = ["--local", 2, "--devices-per-process", 4, "--heartbeat-seconds", 30]  # starved ones need over 10
    return launch(*devices, *arguments)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The jobs do the same, and what one has compiled the next ones read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder in which two processes left what they trained."""
    folder = tmp_path_factory.mktemp("hosts")
    code, output = finish(two_processes("tests/host_worker.py", "placements", folder))
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def single():
    """The losses and adapters of one device, by the names that the processes give them."""
    state = lora.TrainState.create(
        lora.init(jax.random.key(1), placements.params(), placements.plan()), placements.optimizer()
    )
    found = named(state.trainable, "first")
    step, losses = lora.jit_step(placements.loss, placements.optimizer()), []
    for i in range(host_worker.STEPS):
        state, metrics = step(state, placements.params(), *placements.batch(i))
        losses.append(float(metrics["loss"]))
    return found | named(state.trainable, "last") | {"losses": np.array(losses)}


def named(tree, prefix):
    return {prefix + jax.tree_util.keystr(keys): np.array(leaf) for keys, leaf in jax.tree.leaves_with_path(tree)}


def written(folder, name):
    """What the two processes wrote: the same."""
    one, other = (dict(np.load(folder / f"{name} {i}.npz").items()) for i in range(2))
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key])
    return one


@pytest.mark.slow
@pytest.mark.parametrize("name", host_worker.NAMES)
def test_two_processes_give_what_one_device_gives(trained, single, name):
    found = written(trained, name)
    assert found.keys() == single.keys()
    for key, expected in single.items():
        if key.startswith("first"):
            np.testing.assert_array_equal(found[key], expected)
        elif key == "losses":
            np.testing.assert_allclose(found[key], expected, rtol=1e-6)
        else:
            assert np.linalg.norm(found[key] - expected) <= 1e-6 * np.linalg.norm(expected), key


@pytest.mark.slow
def test_batches_of_different_sizes(trained):
    """All say so where they ask each other; where the rows are known, the one that has too many."""
    unknown, known = ([str(np.load(trained / f"{n} {i}.npz")["said"]) for i in range(2)] for n in ("unknown", "known"))
    assert all("the processes have [8, 9] rows of the batch: every process gives an equal part" in s for s in unknown)
    assert known[0] == ""
    assert "process 1 gives 9 rows of the batch, expected 8" in known[1]


@pytest.mark.slow
def test_one_is_killed_and_all_start_again(trained, tmp_path):
    """At step 7, after the checkpoint of step 6: the other one ends, both go on, and nothing shows in the result."""
    job = two_processes("--restarts", 1, "tests/host_worker.py", "train", tmp_path, 7)
    code, output = finish(job)
    assert code == 0, output
    assert "process 1 was ended by SIGKILL" in output
    assert "all processes start again" in output
    [seconds] = re.findall(r"all processes have ended, ([\d.]+) s after process 1 failed", output)
    assert float(seconds) < 60
    assert re.findall(r"^from \d+", output, re.MULTILINE) == ["from 0", "from 6"]
    check_undisturbed(trained, tmp_path)


@pytest.mark.slow
def test_told_to_end(trained, tmp_path):
    """Both processes save the same step and end; started again, they go on from there."""
    job = two_processes("tests/host_worker.py", "train", tmp_path, -1)
    for line in job.stdout:
        if line.startswith("step 2"):
            break
    job.send_signal(signal.SIGTERM)
    code, output = finish(job)
    assert code == 0, output
    [stopped] = written(tmp_path, "stopped").values()
    assert 2 < stopped < host_worker.STEPS
    assert f"step_{stopped}" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    code, output = finish(two_processes("tests/host_worker.py", "train", tmp_path, -1))
    assert code == 0, output
    assert f"from {stopped}\n" in output
    check_undisturbed(trained, tmp_path)


@pytest.mark.slow
@pytest.mark.rare
def test_a_population_over_two_hosts(tmp_path):
    """Its members are on both. One host is killed at step 7, all start again; what comes of it is as on one device."""
    code, output = finish(two_processes("--restarts", 1, "tests/host_worker.py", "population", tmp_path, 7))
    assert code == 0, output
    assert re.findall(r"^from \d+", output, re.MULTILINE) == ["from 0", "from 6"]
    found = written(tmp_path, "members")
    alone, step = host_worker.members(), lora.population_step(host_worker.keyed, host_worker.rated)
    for i in range(host_worker.STEPS):
        alone, _ = host_worker.halved(step, i, alone, placements.params(), *placements.batch(i))
    np.testing.assert_array_equal(found.pop("steps"), alone.steps)
    assert sorted(alone.steps.tolist()) == [6, 6, 12, 12]
    assert str(found.pop("table")) == alone.table()
    expected = [named(alone.member(i), str(i)) for i in range(4)]
    assert found.keys() == {key for one in expected for key in one}
    for key, value in {key: value for one in expected for key, value in one.items()}.items():
        assert found[key].shape == value.shape
        assert np.linalg.norm(found[key] - value) <= 1e-5 * np.linalg.norm(value), key


@pytest.mark.slow
def test_all_processes_save_at_once(tmp_path):
    """To one place: what is there is whole, whichever was the last; what no process holds whole is refused by name."""
    code, output = finish(two_processes("tests/host_worker.py", "save", tmp_path))
    assert code == 0, output
    for name in ("adapters", "peft"):
        said = str(written(tmp_path, name)["said"])
        assert re.search(r"'\S*w\S*' is spread over several hosts.*jax.jit", said), said
    a, b = np.arange(32, dtype=np.float32).reshape(16, 2), np.ones((2, 3), np.float32)
    keys = lora.key_maps.KeyMap(lora.key_maps.linear("w", "m"))
    own, _ = lora.checkpoint.load(tmp_path / "adapters")
    theirs, _ = lora.load_peft(tmp_path / "peft", {"w": np.ones((16, 3), np.float32)}, keys)
    for found in (own, theirs):
        np.testing.assert_array_equal(found["w"].a, a)
        np.testing.assert_array_equal(found["w"].b, b)
        assert found["w"].scale == 2.0
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.is_dir()] == ["adapters", "peft"]


def check_undisturbed(trained, folder):
    """The adapters are those of the training that nothing happened to, bit for bit."""
    expected, found = written(trained, host_worker.NAMES[0]), written(folder, "end")
    assert found
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key])


# The launcher ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        "import sys, jax\n"
        "assert __name__ == '__main__'\n"
        "if jax.process_index() == 1: sys.exit('what went wrong')\n"
        "print(sys.argv[1:], jax.process_count(), jax.device_count())\n"
    )
    return path


def test_a_process_by_itself(script):
    code, output = finish(launch(script, "--its-own", "3"))
    assert code == 0, output
    assert "A single process: no cluster was found, and JAX_COORDINATOR_ADDRESS is not set." in output
    assert "['--its-own', '3'] 1 8" in output


def test_one_that_fails(script):
    """It does not wait for the others, nor they for it; what it had to say is shown."""
    code, output = finish(launch("--local", 2, "--grace-seconds", 1, "--heartbeat-seconds", 10, script))
    assert code == 1
    assert "process 1 ended with exit code 1:" in output
    assert "what went wrong" in output


@pytest.mark.parametrize(
    ("variables", "arguments", "says"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, [], "Found JAX_NUM_PROCESSES=2; set all of JAX_COORDINATOR_ADDRESS, "),
        ({"JAX_PROCESS_ID": "one"}, [], "error: JAX_PROCESS_ID is 'one', expected a whole number."),
        ({}, ["--restarts", "1"], "--restarts needs --local"),
        ({}, ["--local", "0"], "argument --local: '0', expected a whole number of at least 1"),
    ],
)
def test_wrong_arguments(script, monkeypatch, variables, arguments, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, output = finish(launch(*arguments, script))
    assert code != 0
    assert says in output
