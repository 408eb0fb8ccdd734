"""Run a script in every process of a job: on a TPU pod, under Slurm, on hosts of one's own, or several on this machine.

    python examples/launch.py examples/finetune_sharded.py --its-own-arguments
    python examples/launch.py --local 2 --devices-per-process 4 examples/finetune_sharded.py --tiny

The first form is one process of a job; start it once on each host. JAX finds the others by itself on TPU pods and under
Slurm, Open MPI and Kubernetes. Elsewhere say where they are, in the environment: JAX_COORDINATOR_ADDRESS (host:port of
process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. With none of these it is one process by itself.

The second form starts all processes of a job here, on simulated CPU devices, and watches over them: when one fails the
others are ended too and, with --restarts, all start again, to go on from the script's last checkpoint. SIGTERM and
Ctrl-C reach every process as SIGTERM, so that all of them can save; the second one ends them at once.
"""

import argparse
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import IO

import jax

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LAUNCHER = "LORA_JAX_LAUNCHER"  # its process id, for the processes that it started

# XLA's threads for each simulated device, by the environment's NPROC. A thread waits in a collective for all the other
# devices; with as few threads as cores, some programs of the 32 that may be under way could keep all of them, for ever.
THREADS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--local", type=at_least_1, metavar="N", help="start N processes on this machine")
    add("--devices-per-process", type=at_least_1, default=1, metavar="K", help="simulated CPU devices, with --local")
    add("--restarts", type=int, default=0, metavar="R", help="start a failed job again, up to R times; with --local")
    add("--grace-seconds", type=float, default=60.0, metavar="S", help="for the others to end when one has failed")
    add("--all-output", action="store_true", help="show what every process prints, with its number before each line")
    add(
        "--heartbeat-seconds",
        type=at_least_1,
        default=100,
        metavar="S",
        help="without a sign of life: a process is lost",
    )
    add("script", help="the script to run")
    add("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    options = parser.parse_args()
    if not Path(options.script).is_file():
        parser.error(f"there is no script {options.script}")
    if options.restarts and not options.local:
        parser.error(
            "--restarts needs --local: elsewhere it is the scheduler that starts a job again (sbatch --requeue)"
        )
    if options.local:
        sys.exit(Job(options).run())
    join(options.heartbeat_seconds)
    run(options.script, options.arguments)


def at_least_1(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


# One process of a job -------------------------------------------------------------------------------------------------


def join(heartbeat_seconds: int) -> None:
    """Find the other processes, before anything asks for a device."""
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    for name in (COUNT, INDEX):
        if not given.get(name, "0").isdigit():
            sys.exit(f"error: {name} is {given[name]!r}, expected a whole number.")
    try:
        jax.distributed.initialize(
            given.get(ADDRESS),
            int(given[COUNT]) if COUNT in given else None,
            int(given[INDEX]) if INDEX in given else None,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:  # something is missing: JAX found no cluster to ask
        if given:
            found = ", ".join(f"{name}={value}" for name, value in given.items())
            sys.exit(f"error: {error} Found {found}; set all of {ADDRESS}, {COUNT} and {INDEX}, or none.")
        print("A single process: no cluster was found, and JAX_COORDINATOR_ADDRESS is not set.", file=sys.stderr)
    if launcher := os.environ.get(LAUNCHER):
        threading.Thread(target=follow, args=(int(launcher),), daemon=True).start()


def follow(launcher: int) -> None:
    """Do not outlive the launcher: a second job would then write to the same folder."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(1)


def run(script: str, arguments: list[str]) -> None:
    """As `python script arguments` would, but one that fails ends at once.

    At its exit a process waits for all others, minutes long; and these may wait for it, in the middle of a step.
    """
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not code or not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        elif not isinstance(code, int):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


# A whole job on this machine ------------------------------------------------------------------------------------------


class Job:
    """Several processes of one script, started and ended together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.signals = 0  # how often the launcher was told to end
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        del frame
        self.signals += 1

    def run(self) -> int:
        """Start the job, again and again if need be -> exit code: 0 only if all processes ended with 0."""
        for left in range(self.options.restarts, -1, -1):
            code = self.run_once()
            if code == 0 or self.signals or not left:
                break
            say(f"all processes start again (restarts left: {left - 1}).")
        return code

    def run_once(self) -> int:
        port = free_port()
        workers = [Worker(index, port, self.options) for index in range(self.options.local)]
        first: Worker | None = None  # the first that failed: what became of the others is its doing
        passed_on, failed_at, deadline = 0, 0.0, float("inf")
        while any(worker.is_running() for worker in workers):
            time.sleep(0.05)
            if self.signals > passed_on:
                passed_on = self.signals
                say("told to end: passed on to all processes." if passed_on == 1 else "told again: they end now.")
                for worker in workers:
                    worker.send(signal.SIGTERM if passed_on == 1 else signal.SIGKILL)
            if first is None and (failed := [worker for worker in workers if worker.has_failed()]):
                # One that dies takes others with it, within the same moment: what was killed from outside came first.
                failed.sort(key=lambda worker: worker.process.returncode not in (-signal.SIGKILL, -signal.SIGTERM))
                first = failed[0]
                for worker in failed:
                    worker.say_why()
                failed_at = time.monotonic()
                deadline = failed_at + self.options.grace_seconds
            if time.monotonic() > deadline:
                late = [worker for worker in workers if worker.is_running()]
                say(f"{', '.join(worker.name for worker in late)} did not end within the time of grace: ended now.")
                for worker in late:
                    worker.send(signal.SIGKILL)
                deadline = float("inf")
        if first is None:
            return 0
        say(f"all processes have ended, {time.monotonic() - failed_at:.1f} s after {first.name} failed.")
        return first.exit_code()


class Worker:
    """One process. That of index 0 has the terminal; of the others the last lines are kept, should they fail."""

    def __init__(self, index: int, port: int, options: argparse.Namespace) -> None:
        self.name = f"process {index}"
        self.last_lines: deque[str] = deque(maxlen=30)
        self.prefix = f"[{index}] " if options.all_output else None
        has_terminal = index == 0 and not options.all_output
        flags = os.environ.get("XLA_FLAGS", "")
        self.process = subprocess.Popen(
            [
                *(sys.executable, __file__, "--heartbeat-seconds", str(options.heartbeat_seconds)),
                *(options.script, *options.arguments),
            ],
            env=os.environ
            | {ADDRESS: f"127.0.0.1:{port}", COUNT: str(options.local), INDEX: str(index), LAUNCHER: str(os.getpid())}
            | {"JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
            | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={options.devices_per_process}"}
            | {"NPROC": str(THREADS * options.devices_per_process)},
            stdin=subprocess.DEVNULL,
            stdout=None if has_terminal else subprocess.PIPE,
            stderr=None if has_terminal else subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches it through the launcher only
        )
        self.reader = threading.Thread(target=self.read, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def read(self, output: IO[str] | None) -> None:
        for line in output or ():
            self.last_lines.append(line)
            if self.prefix is not None:
                print(self.prefix + line, end="", flush=True)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def has_failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def exit_code(self) -> int:
        """As a shell gives it: 128 and the signal's number, if a signal ended it."""
        code = self.process.wait()
        return code if code >= 0 else 128 - code

    def send(self, number: signal.Signals) -> None:
        """To the process, and at the end to those that it started too."""
        if self.is_running():
            (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)

    def say_why(self) -> None:
        code = self.process.wait()
        self.reader.join(timeout=2)
        why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = "" if self.prefix is not None else "".join(f"\n  {line.rstrip()}" for line in self.last_lines)
        say(f"{self.name} {why}{':' if lines else '.'}{lines}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
