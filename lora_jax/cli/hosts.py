"""Several processes of one command: what goes wrong in one of them is told to all, which end with it.

Otherwise the others would wait for it: a computation over all devices goes on when the last of them comes, and that one
never does. So each process looks for such news, in a thread of its own, wherever the command itself may be waiting. It
is passed on by the service of JAX that connects the processes, of which each computation is independent.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console

from lora_jax.checkpoints.failures import first_line
from lora_jax.core._compat import coordination_client
from lora_jax.core.errors import LoraError
from lora_jax.core.text import printable

FAILED = "lora_jax_failed"  # the code to exit with, and what to say
ENDED, DONE, SAME = "lora_jax_ended", "lora_jax_done", "lora_jax_same"  # folders with an entry of each process
EVERY = 1.0  # seconds between two looks
GRACE = 30.0  # seconds in which all processes have seen what went wrong
LONGEST = 4000  # characters of what is said
CTRL_C = 130


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Run a block in each of several processes, all of which end at once with the same line if it fails in one of them.

    They leave the block together as well: what is last to be done may still fail in one. A process by itself just runs
    the block. One that is killed or stopped says nothing: the others end by JAX's own error when its signs of life have
    been missing for long enough. One that is alive and does not get on, as its disk does not answer, is waited for.
    """
    client = coordination_client()
    if client is None:
        yield
        return
    left = threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, left), daemon=True)
    watcher.start()
    try:
        yield
        _meet(client, DONE)
    except BaseException as error:
        tell(error)
        raise
    left.set()
    watcher.join()


def tell(error: BaseException) -> None:
    """Tell all processes in `ending_together` what went wrong, and end with them. A process by itself does nothing.

    It is for where the way out of the block has something that waits for the others.
    """
    if (client := coordination_client()) is None:
        return
    code, text = _said(error)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        client.key_value_set(FAILED, f"{code} {text}")
    time.sleep(GRACE + 5 * EVERY)  # the watcher ends this process
    _end(code, text)  # it could not reach the others


def check_same(what: str, value: str) -> None:
    """Check, in `ending_together`, that all processes have the same: else they would compute something else, or wait.

    Args:
        what: it is, in a message.
        value: that stands for it.

    Raises:
        LoraError: this process has another than the first one.
    """
    client = coordination_client()
    if client is None:
        return
    if jax.process_index() == 0:
        client.key_value_set(f"{SAME}/{what}", value)
        return
    while (found := _get(client, f"{SAME}/{what}")) is None:
        time.sleep(EVERY)
    if found != value:
        raise LoraError(f"{what} differ from those of process 0: give the same command and the same files everywhere.")


def _watch(client: Any, left: threading.Event) -> None:
    """Look for what went wrong in any process until this one has left, and end with it."""
    while not left.wait(EVERY):
        try:
            found = _get(client, FAILED)
        except jax.errors.JaxRuntimeError as error:
            _end(1, f"process 0, which connects the others, has ended: its own output says why ({first_line(error)}).")
        if found is not None:
            code, _, text = found.partition(" ")
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone already
                _meet(client, ENDED, GRACE)
            _end(int(code), text)


def _end(code: int, text: str) -> None:
    """End this process, whatever it is doing: at the usual end it would wait for the others."""
    try:
        with _unread():
            Console(stderr=True).show_cursor()  # which a progress bar may have hidden
            print(f"error: {text}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        if jax.process_index() == 0:
            time.sleep(2 * EVERY)  # its end breaks the connection of the others, which end in this time
    finally:
        os._exit(code)


def _unread() -> contextlib.AbstractContextManager[None]:
    """Print in this block what may not be printable: to a file on a full disk, or to a reader that has ended."""
    return contextlib.suppress(OSError, ValueError)  # the second one of a file that is closed


def _said(error: BaseException) -> tuple[int, str]:
    """Return the exit code of all processes, and what is said of an error in this one."""
    who = f"process {jax.process_index()} of {jax.process_count()}, on {socket.gethostname()}"
    code = 1
    if isinstance(error, LoraError):
        text = f"{who}: {error}"
    elif isinstance(error, OSError):
        text = f"{who}: {first_line(error)}"
    elif isinstance(error, KeyboardInterrupt):
        text, code = f"{who}, was stopped by Ctrl-C.", CTRL_C
    else:
        with _unread():
            traceback.print_exception(error)
        text = f"{who}: {first_line(error)}. Its own output has more; if another process was killed, this comes of it."
    return code, "\n".join(map(printable, text[:LONGEST].split("\n")))


def _meet(client: Any, name: str, seconds: float = float("inf")) -> None:
    """Wait until all processes are here, or this time is over. Ctrl-C ends it, which it does no waiting of JAX's."""
    client.key_value_set(f"{name}/{jax.process_index()}", "here")
    until = time.monotonic() + seconds
    while len(client.key_value_dir_get(name)) < jax.process_count() and time.monotonic() < until:
        time.sleep(EVERY)


def _get(client: Any, key: str) -> str | None:
    """Return what is told by this name, or None if nothing is.

    Raises:
        JaxRuntimeError: the service cannot be reached.
    """
    try:
        return str(client.key_value_try_get(key))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
