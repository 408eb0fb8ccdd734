"""What becomes of the other processes of a command when something goes wrong in one of them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.cli.hosts import check_same, ending_together

ROOT = Path(__file__).parent.parent
RARE = pytest.mark.rare
LIMIT = 240  # seconds; with a core to itself a pair of processes takes 5
PROCESS = """
import os, signal, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from lora_jax.cli.hosts import check_same, ending_together
from lora_jax.core.errors import LoraError

what, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
with ending_together():
    if what == "different":
        check_same("the options", f"rank {index}")
    if what == "early" and index == 1:
        raise LoraError("there is no data.jsonl\\x1b[2J.\\nGive another.")
    if what == "fault" and index == 1:
        raise ZeroDivisionError("a fault")
    if what == "stopped" and index == 1:
        signal.raise_signal(signal.SIGINT)
    assert multihost_utils.process_allgather(np.int32(index)).tolist() == [0, 1]
    if what == "last" and index == 0:
        raise OSError(28, "No space left on device", "runs/peft")
    if index == 0:
        time.sleep(1)
print("left", what)
"""


def finished(what):
    """The exit codes and the output of two processes, neither of which is ended from outside."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    jobs = [
        subprocess.Popen([sys.executable, "-c", PROCESS, what, port, str(i)], env=environment, **streams)
        for i in range(2)
    ]
    try:
        outputs = [job.communicate(timeout=LIMIT)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "process", "said"),
    [
        ("early", 1, 1, ": there is no data.jsonl\\x1b[2J.\nGive another.\n"),
        ("last", 1, 0, ": OSError: [Errno 28] No space left on device: 'runs/peft'\n"),
        pytest.param("different", 1, 1, ": the options differ from those of process 0: give the same", marks=RARE),
        pytest.param("fault", 1, 1, ": ZeroDivisionError: a fault. Its own output has more", marks=RARE),
        ("stopped", 128 + signal.SIGINT, 1, ", was stopped by Ctrl-C.\n"),
    ],
)
def test_both_end_with_the_same_line(what, code, process, said):
    """Whether the other one waits in a computation of both, or for the end of the first."""
    codes, outputs = finished(what)
    assert codes == [code, code], outputs
    for i, output in enumerate(outputs):
        assert f"error: process {process} of 2, on {socket.gethostname()}{said}" in output
        assert f"left {what}" not in output
        assert ("Traceback" in output) == (what == "fault" and i == 1)


@pytest.mark.slow
def test_both_leave_together():
    codes, outputs = finished("nothing")
    assert codes == [0, 0], outputs
    assert all("left nothing" in output for output in outputs)


def test_a_process_by_itself_is_left_alone():
    with ending_together():
        check_same("the options", "rank 8")
    with pytest.raises(ZeroDivisionError), ending_together():
        raise ZeroDivisionError
