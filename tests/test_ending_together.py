"""What becomes of the other processes of a command when something goes wrong in one of them."""

import signal
import socket

import pytest
from pairs import ended

from lora_jax.cli.hosts import check_same, ending_together

RARE = pytest.mark.rare
PROCESS = """
import os, signal, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from lora_jax.cli.hosts import check_same, ending_together
from lora_jax.core.errors import LoraError

port, index, what, *more = sys.argv[1:]
index = int(index)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, heartbeat_timeout_seconds=10 if more else 100)

def end_at(place):
    if more[1:] == [place, str(index)]:
        os.kill(os.getpid(), int(more[0]))

if what == "unread" and index == 1:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
with ending_together():
    if what == "different":
        check_same("the options", f"rank {index}")
    if what == "early" and index == 1:
        raise LoraError("there is no data.jsonl\\x1b[2J.\\nGive another.")
    if what in ("fault", "unread") and index == 1:
        raise ZeroDivisionError("a fault")
    if what == "stopped" and index == 1:
        signal.raise_signal(signal.SIGINT)
    end_at("computing")
    assert multihost_utils.process_allgather(np.int32(index)).tolist() == [0, 1]
    end_at("leaving")
    if what == "last" and index == 0:
        raise OSError(28, "No space left on device", "runs/peft")
    if index == 0:
        time.sleep(1)
print("left", what, flush=True)
end_at("left")
"""


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
def test_both_end_with_the_same_line(what, code, process, said, tmp_path):
    """Whether the other one waits in a computation of both, or for the end of the first."""
    codes, outputs = ended(PROCESS, tmp_path, what)
    assert codes == [code, code], outputs
    for i, output in enumerate(outputs):
        assert f"error: process {process} of 2, on {socket.gethostname()}{said}" in output
        assert f"left {what}" not in output
        assert ("Traceback" in output) == (what == "fault" and i == 1)


@pytest.mark.slow
def test_both_leave_together(tmp_path):
    codes, outputs = ended(PROCESS, tmp_path, "nothing")
    assert codes == [0, 0], outputs
    assert all("left nothing" in output for output in outputs)


@pytest.mark.slow
def test_an_error_that_cannot_be_printed_ends_both(tmp_path):
    """Not even its line can: the disk that it goes to is full."""
    codes, outputs = ended(PROCESS, tmp_path, "unread")
    assert codes == [1, 1], outputs
    assert "ZeroDivisionError: a fault." in outputs[0]
    assert outputs[1] == ""


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("place", ["computing", "leaving", "left"])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_none_waits_for_one_that_says_nothing(sign, place, process, tmp_path):
    """It is killed or stopped before a computation of both, before they leave together, or after that."""
    codes, outputs = ended(PROCESS, tmp_path, "nothing", int(sign), place, process, awaited=[1 - process])
    assert codes[1 - process] not in (None, 0), outputs
    assert place == "left" or "left nothing" not in outputs[1 - process]


def test_a_process_by_itself_is_left_alone():
    with ending_together():
        check_same("the options", "rank 8")
    with pytest.raises(ZeroDivisionError), ending_together():
        raise ZeroDivisionError
