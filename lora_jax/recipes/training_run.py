"""A training run: a model and examples as tokens in, adapters out, with checkpoints to go on from.

Its parts are public functions, for loops of one's own: `packed_batches`, `answer_loss` and `preference_loss`,
`make_optimizer`, `lora.jit_step`, `evaluate`, `lora.Checkpoints`.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import P
from jax.sharding import NamedSharding

from lora_jax.adapters.dropout import with_dropout
from lora_jax.checkpoints.manager import Checkpoints
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, LoraWarning
from lora_jax.core.targets import Plan
from lora_jax.initialization.init import init
from lora_jax.recipes.memory import Memory, check_memory, step_memory
from lora_jax.recipes.meter import Meter
from lora_jax.recipes.model import Model
from lora_jax.recipes.objectives import Batch, Loss, make_loss
from lora_jax.recipes.options import (
    Options,
    batch_spec,
    learning_rate,
    make_optimizer,
    rules,
    tracker_names,
    with_rows,
)
from lora_jax.recipes.packed_rows import PackedBatches, packed_batches
from lora_jax.recipes.preferences import preference_batches
from lora_jax.recipes.records import MEASURE, Log
from lora_jax.recipes.tokens import Tokenized, TokenizedPairs
from lora_jax.recipes.trackers import Trackers
from lora_jax.sharding.batches import local_rows, shard_batch
from lora_jax.sharding.devices import on_mesh
from lora_jax.training.state import TrainState
from lora_jax.training.step import JitStep, jit_step

Data = Tokenized | TokenizedPairs
EVALUATIONS = 10  # of a run, unless the options say otherwise
CHECKPOINTS = "checkpoints"


class Reporter:
    """What is told of a run while it goes on. This one says nothing."""

    def begin(self, run: "Prepared") -> None:
        """Take what is about to be trained."""

    def line(self, line: dict[str, Any]) -> None:
        """Take a line of the log: of a step, or of an evaluation."""

    def failed(self, error: BaseException) -> None:
        """Take what ends the run, before it is raised: on the way out, what is being saved waits for other hosts."""


@dataclass(frozen=True)
class Result:
    """What came of a training run.

    Attributes:
        adapters: the best by the loss of the held-out examples; without these, the last ones.
        step: of these adapters.
        steps: taken in all.
        before: the loss of the held-out examples without adapters; None if there are none.
        after: the same with these adapters.
        ended: whether the process was told to end before all steps were taken.
        log: a line for each step and evaluation.
    """

    adapters: dict[str, Adapter]
    step: int
    steps: int
    before: float | None
    after: float | None
    ended: bool
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """All that a training run needs, before anything is trained.

    Attributes:
        options: of the run, with the tokens of a step.
        plan: where adapters go.
        batches: of all epochs.
        steps: to take.
        loss: of a batch.
        step: compiled, from `lora.jit_step`.
        state: before the first step.
        memory: that a step takes.
    """

    options: Options
    plan: Plan
    batches: PackedBatches
    steps: int
    loss: Loss
    step: JitStep
    state: TrainState
    memory: Memory


def prepare(model: Model, train: Data, options: Options) -> Prepared:
    """Make what a training run needs, and compile its step.

    Raises:
        LoraError: settings, examples and mesh do not fit together, or a step takes more memory than there is.

    Warns:
        LoraWarning: an example is longer than the texts that the model was made for.
    """
    options.check()
    _check_lengths(model, train)
    sharding = batch_sharding(model)
    axes, together = sharding.mesh.shape if sharding else {}, 2 if isinstance(train, TokenizedPairs) else 1
    options = with_rows(options, axes, together)
    batches = make_batches(train, options, sharding, options.epochs)
    steps = _steps(batches, options)
    plan, loss = model.plan(rules(options, model)), make_loss(model, options, isinstance(train, TokenizedPairs))
    optimizer, key = make_optimizer(options, steps), jax.random.key(options.seed)
    state = TrainState.create(init(key, model.params, plan), optimizer, key if options.dropout else None)
    step = jit_step(_with_dropout(loss, options.dropout), optimizer, microbatches=options.microbatches)
    batch = _placed(next(make_batches(train, options, sharding)), sharding, _rows(train, options))
    memory = step_memory(step, state, model.params, batch)
    check_memory(memory)
    return Prepared(options, plan, batches, steps, loss, step, state, memory)


def finetune(
    model: Model,
    train: Data,
    held_out: Data | None,
    folder: str | Path,
    options: Options = Options(),  # noqa: B008 (it is frozen)
    reporter: Reporter = Reporter(),  # noqa: B008
) -> Result:
    """Train adapters of a model, and return the best.

    What the folder has of this run is gone on from: the steps that follow are those that would have followed.

    Args:
        model: from `lora.recipes.load`. Over the mesh that its parameters are on, each device has a part of each batch.
        train: examples, from `tokenized`; or pairs, from `tokenized_pairs`, for DPO with the base as the reference.
        held_out: of the same kind, which the loss is measured with; None for none.
        folder: for checkpoints and the log.
        options: the settings.
        reporter: is told how it goes.

    Returns:
        The adapters, and how the training went.

    Raises:
        LoraError: as `prepare`; what is in the folder is of something else; the loss is not finite: the checkpoints
            before that stay.

    >>> import json, tempfile, jax, jax.numpy as jnp, numpy as np, lora_jax as lora
    >>> from pathlib import Path
    >>> from lora_jax.recipes.tokens import Tokenized
    >>> facts = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> tokens = Tokenized(np.arange(6, dtype=np.int32), np.arange(6) % 3 > 0, np.array([0, 3, 6]))
    >>> options = lora.recipes.Options(rank=2, max_length=4, batch_tokens=4, max_steps=1, mesh="data=1")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     model = lora.recipes.abstract(folder, jnp.float32)
    ...     model = model.replace(params=jax.tree.map(lambda like: jnp.ones(like.shape), model.params))
    ...     result = lora.recipes.finetune(model, tokens, None, f"{folder}/run", options)
    >>> result.steps, len(result.adapters)
    (1, 7)
    """
    run = prepare(model, train, options)
    folder, sharding, options = Path(folder), batch_sharding(model), run.options
    batches, steps, state = run.batches, run.steps, run.state
    measure = _measure(model, held_out, options, run.loss, sharding)
    examples = None if held_out is None else held_out.fingerprint

    def position() -> dict[str, Any]:
        return {**batches.get_state(), "held_out": examples}

    reporter.begin(run)
    every = options.eval_every or max(1, steps // EVALUATIONS)
    best: Any = (MEASURE, "min") if measure else None
    with (
        Checkpoints(folder / CHECKPOINTS, model.params, run.plan, every=every, keep=2, best=best) as checkpoints,
        _told(reporter),
    ):
        state, place = checkpoints.restore(state)
        if place is not None:
            batches.set_state(place)
            if place.get("held_out", examples) != examples:
                raise LoraError(
                    f"{folder} was begun with other held-out examples, by which the best adapters are chosen: give the "
                    "same, or another folder."
                )
        begun, ended = int(state.step), False
        writes = jax.process_index() == 0
        names = tracker_names(options.log_to) if writes else ()
        with (
            Log(folder if writes else None, begun) as log,
            Trackers(names, folder, log, dataclasses.asdict(options)) as trackers,
        ):

            def add(**line: Any) -> None:
                log.add(line)
                trackers.add(line)
                reporter.line(line)

            if measure and not begun:
                add(step=0, **{MEASURE: measure(state.trainable)})
            meter = Meter(add, learning_rate(options, steps))
            for n, batch in zip(range(begun + 1, steps + 1), batches, strict=False):
                placed = _placed(batch, sharding, _rows(train, options))
                state, metrics = run.step(state, model.params, placed)
                meter.took(n, metrics, placed)
                found: dict[str, float | None] = {MEASURE: None}
                if n % every == 0 or n == steps:
                    meter.read()
                    if measure:
                        found = {MEASURE: measure(state.trainable)}
                        add(step=n, **found)
                    meter.restart()
                if checkpoints.save(state, found, position=position, force=n == steps):
                    ended = True
                    break
            meter.read()
        taken = int(state.step)
        if measure and not ended:
            state, _ = checkpoints.restore(state, "best")
    losses = {line["step"]: line[MEASURE] for line in log.lines if MEASURE in line}
    own = int(state.step)
    return Result(_whole(state.trainable), own, taken, losses.get(0), losses.get(own), ended, log.lines)


# Its parts ------------------------------------------------------------------------------------------------------------


def batch_sharding(model: Model) -> NamedSharding | None:
    """Return how the rows of a batch are split over the mesh of the parameters; None if they are on no mesh."""
    mesh = on_mesh(model.params)
    return None if mesh is None else NamedSharding(mesh, batch_spec(mesh.axis_names))


def make_batches(data: Data, options: Options, sharding: NamedSharding | None, epochs: int = 1) -> PackedBatches:
    """Return the batches of examples or pairs: those rows of each that this process's devices have."""
    rows = _rows(data, options)
    shard = (0, 1)
    if sharding is not None:
        own = local_rows(sharding, rows)
        shard = own.start // (own.stop - own.start), rows // (own.stop - own.start)
    make: Any = preference_batches if isinstance(data, TokenizedPairs) else packed_batches
    return make(data, rows, options.max_length, options.seed, shard=shard, epochs=epochs)


def _rows(data: Data, options: Options) -> int:
    """Return the rows of a batch, on all hosts together; each of pairs is one for both answers."""
    return max(1, options.rows // 2) if isinstance(data, TokenizedPairs) else options.rows


def _steps(batches: PackedBatches, options: Options) -> int:
    """Return how many steps there are to take. Epochs that none of them reaches are not packed to be counted."""
    steps = 0
    for epoch in range(options.epochs):
        steps += batches.batches_of(epoch)
        if options.max_steps and steps >= options.max_steps:
            return options.max_steps
    return steps


def _check_lengths(model: Model, data: Data) -> None:
    """Warn of examples with positions that the model was never trained at. Rows may be longer: each begins at 0."""
    sides = (data.chosen, data.rejected) if isinstance(data, TokenizedPairs) else (data,)
    longest, most = max(int(side.lengths.max()) for side in sides), model.config.length
    if 0 < most < longest:
        warnings.warn(
            LoraWarning(
                f"the longest example has {longest:,} tokens, and the model was made for texts of {most:,} "
                "(max_position_embeddings): what it computes beyond these may mean little at first. "
                f"max_length={most} cuts examples there."
            ),
            stacklevel=3,
        )


@contextlib.contextmanager
def _told(reporter: Reporter) -> Iterator[None]:
    """Tell what ends a block."""
    try:
        yield
    except BaseException as error:
        reporter.failed(error)
        raise


def evaluate(loss: Loss, adapters: Any, params: Any, batches: Iterable[Batch]) -> float:
    """Return the mean loss over batches, each of which counts by its tokens or pairs.

    Args:
        loss: jitted, from `answer_loss` or `preference_loss`.
        adapters: those that are measured; {} for the base alone.
        params: the base.
        batches: as the loss takes them.

    Returns:
        The mean, in nats a token or a pair; NaN if nothing counts.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> loss = lambda adapters, params, batch: (jnp.mean(batch), {}, batch.size)
    >>> lora.recipes.evaluate(loss, {}, {}, [jnp.array([1.0]), jnp.array([2.0, 3.0])])
    2.0
    """
    found = [(value, count) for value, _, count in (loss(adapters, params, batch) for batch in batches)]
    total = sum(float(count) for _, count in found)
    return sum(float(value) * float(count) for value, count in found) / total if total else math.nan


def _measure(
    model: Model, held_out: Data | None, options: Options, loss: Loss, sharding: NamedSharding | None
) -> Callable[[Any], float] | None:
    """Return what measures adapters with the examples that are held out."""
    if held_out is None or len(held_out) == 0:
        return None
    jitted = jax.jit(loss)

    def batches() -> Iterator[Batch]:
        rows = _rows(held_out, options)
        return (_placed(batch, sharding, rows) for batch in make_batches(held_out, options, sharding))

    return lambda adapters: evaluate(jitted, adapters, model.params, batches())


def _with_dropout(loss: Loss, rate: float) -> Loss:
    if not rate:
        return loss

    def dropped(adapters: Any, params: Any, batch: Batch, key: jax.Array) -> Any:
        return loss(with_dropout(adapters, key, rate), params, batch)

    return dropped  # type: ignore[return-value]


def _placed(batch: Batch, sharding: NamedSharding | None, rows: int) -> Batch:
    """Bring a batch to the devices; on a mesh, each process brings its own of these rows."""
    if sharding is None:
        return jax.device_put(batch)
    return shard_batch(batch, sharding, rows)  # without their number, processes would exchange it at each step


def _whole(adapters: Any) -> Any:
    """Return adapters whole on each device, where they may be split over hosts."""
    mesh = on_mesh(adapters)
    if mesh is None:
        return adapters
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(adapters)
