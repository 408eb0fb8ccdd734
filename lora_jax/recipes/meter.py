"""What is measured of the steps of a training run, without a wait between one step and the next."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.recipes.memory import peak_bytes
from lora_jax.recipes.objectives import Batch


class Meter:
    """Reads what is measured of a step while the device takes the next one, so that neither waits for the other.

    Whatever is computed for a line of the log is put in line right behind its step. Asked for later, it would come
    behind the next step, and reading it would wait for that one: the device then has nothing to do until the step after
    it is given.

    Args:
        add: takes a line of the log.
        rate: the learning rate of each step.
    """

    def __init__(self, add: Callable[..., None], rate: Callable[[Any], Any]) -> None:
        self._add = add
        # Tokens are counted where the batch is, since a process has its own rows alone.
        self._more = jax.jit(lambda n, segments: {"lr": rate(n), "tokens": jnp.count_nonzero(segments)})
        self._waiting: tuple[int, dict[str, Any]] | None = None
        self.restart()

    def restart(self) -> None:
        """Begin to measure time anew, after something else than steps."""
        self._since = time.perf_counter()

    def took(self, n: int, metrics: dict[str, Any], batch: Batch) -> None:
        """Take the metrics of step `n`, which is under way, and read those of the one before."""
        more = self._more(np.int32(n - 1), batch["segments"])
        self.read()
        self._waiting = n, {**metrics, **more}

    def read(self) -> None:
        """Read what is waiting.

        Raises:
            LoraError: the loss or its gradient is not finite.
        """
        if self._waiting is None:
            return
        n, found = self._waiting
        self._waiting = None
        metrics = {name: value.item() for name, value in jax.device_get(found).items()}  # waits for the step, once
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            raise LoraError(
                f"the loss is {metrics['loss']} at step {n}, and the norm of its gradient {metrics['grad_norm']}. The "
                "checkpoints before stay. Begin again in another folder with a lower lr, or a longer warmup."
            )
        line = {name: value for name, value in metrics.items() if name not in ("skipped", "loss_scale")}
        self._add(step=n, **line, seconds=seconds, memory=peak_bytes())
