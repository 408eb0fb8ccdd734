"""Two processes of JAX that are one job: what each of them came to, and what it printed."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 600  # seconds; with a core to itself a pair takes 5 to 60, and CI's machines may be busy
FAST = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])  # how conftest compiles


def ended(program, folder, *arguments, awaited=(0, 1)):
    """Run `python -c program port i *arguments` in host0 and host1 of a folder, and return (exit codes, outputs).

    Those that are awaited have to end by themselves. The others are killed then, and have None for a code.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST}
    outputs = [folder / f"output{i}" for i in range(2)]  # and no pipes: one that is full stops its process
    jobs = []
    for i, output in enumerate(outputs):
        (folder / f"host{i}").mkdir(exist_ok=True)
        command = [sys.executable, "-c", program, port, str(i), *map(str, arguments)]
        with output.open("w") as out:
            jobs.append(
                subprocess.Popen(
                    command, env=environment, cwd=folder / f"host{i}", stdout=out, stderr=subprocess.STDOUT
                )
            )
    until = time.monotonic() + LIMIT
    try:
        codes = [jobs[i].wait(until - time.monotonic()) if i in awaited else None for i in range(2)]
    except subprocess.TimeoutExpired as error:
        raise AssertionError([output.read_text()[-4000:] for output in outputs]) from error
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    return codes, [output.read_text() for output in outputs]
