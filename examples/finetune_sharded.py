"""Fine-tune the encoder of finetune_sentiment.py on many devices: the same training, on a mesh, that may be killed.

What is new is where things are (MESH AXES and `SPECS`) and the checkpoints. Model, adapters, loss and step are those of
the single device, and so are the losses.

    python examples/finetune_sharded.py                                          # all devices that JAX sees
    python examples/launch.py examples/finetune_sharded.py --fsdp 8 --tensor 4   # on every host of a pod
    python examples/launch.py --local 2 --devices-per-process 4 examples/finetune_sharded.py --tiny

Kill it, and run it again to go on from the last checkpoint, also on other devices and hosts.
"""

import contextlib
import dataclasses
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import batches
import finetune_sentiment as demo
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import snippets
import tyro
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_jax as lora
from lora_jax.checkpoints.manager import Checkpoints

Tree = Any


@dataclass(frozen=True)
class Config(demo.Config):
    """Fine-tune MiniLM-L6 on film review sentences, on a mesh of devices."""

    data: int | None = None  # devices along "data": each has rows of its own; what the other axes leave if not given
    fsdp: int = 1  # along "fsdp": rows of their own too, and a part of every weight
    tensor: int = 1  # along "tensor": the same rows; each does a part of the heads and of the inner axes
    microbatches: int = 1  # parts of a batch, one after the other: less memory
    every: int = 50  # steps from one checkpoint to the next
    output: Path = Path("runs/sharded")  # where checkpoints and adapters go
    tiny: bool = False  # a small random encoder and made-up sentences: for a first try, nothing is downloaded

    compare: tyro.conf.Suppress[bool] = False  # these belong to the single device
    predict: tyro.conf.Suppress[str | None] = None
    full_learning_rate: tyro.conf.Suppress[float] = 1e-4


# Where things are -----------------------------------------------------------------------------------------------------

BATCH = P(("data", "fsdp"))  # rows of ids, mask and labels

SPECS = {  # by path, the first that matches; kernels are [in, out]
    r"layer_\d+/(attention/(query|key|value)|intermediate)/kernel": P("fsdp", "tensor"),
    r"layer_\d+/(attention/)?output/kernel": P("tensor", "fsdp"),
    r".*/(embedding|bias|scale)": P(),
    r"head/.*": P(),
}


def make_mesh(config: Config) -> Mesh:
    """All devices, of all hosts.

    Raises:
        LoraError: the mesh does not use each device once, or the batch cannot be split over it.
    """
    for name in ("data", "fsdp", "tensor", "microbatches", "every"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise lora.LoraError(f"--{name} is {value}, expected at least 1.")
    devices = jax.device_count()
    data = devices // (config.fsdp * config.tensor) if config.data is None else config.data
    if data * config.fsdp * config.tensor != devices:
        given = f"--data {config.data} " if config.data is not None else ""
        raise lora.LoraError(
            f"{given}--fsdp {config.fsdp} --tensor {config.tensor} do not make a mesh of {devices} devices: the "
            f"product of data, fsdp and tensor has to be {devices}."
        )
    parts = data * config.fsdp * config.microbatches
    if config.batch % parts:
        raise lora.LoraError(
            f"--batch is {config.batch}, expected a multiple of {parts}: data {data} x fsdp {config.fsdp} x "
            f"microbatches {config.microbatches}."
        )
    return jax.make_mesh((data, config.fsdp, config.tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)


def place(tree: Tree, mesh: Mesh) -> Tree:
    """The arrays of a tree, which every host has, on the mesh by `SPECS`: each device gets its part."""

    def one(keys: Any, array: Any) -> jax.Array:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        spec = next((spec for pattern, spec in SPECS.items() if re.fullmatch(pattern, path)), None)
        if spec is None:
            raise lora.LoraError(f"no pattern of SPECS matches {path!r}: say where it goes.")
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(array.shape)
        except ValueError as error:
            raise lora.LoraError(
                f"{path!r} of shape {list(array.shape)} cannot be split as {spec} on a mesh of {dict(mesh.shape)}: "
                "give --fsdp and --tensor that divide it."
            ) from error
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))

    return jax.tree.map_with_path(one, tree)


# Training -------------------------------------------------------------------------------------------------------------


def fine_tune(task: demo.Task, config: Config, mesh: Mesh) -> demo.Run | None:
    """Everything but the command line. None if the process was told to end, and will go on another time.

    Raises:
        DivergedError: the loss or its gradient is NaN or infinite. The checkpoints before stay.
        LoraError: a setting does not fit the mesh or the data; the checkpoints are of something else.
    """
    say = print if jax.process_index() == 0 else lambda *_: None  # one process speaks for all
    train, rows, whole = task.splits["train"], NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    steps = len(train) // config.batch * config.epochs
    if not steps:
        raise lora.LoraError(f"--batch is {config.batch}, but there are only {len(train)} sentences to train on.")
    say(f"Mesh {dict(mesh.shape)}, {jax.process_count()} processes; {len(train):,} sentences, {steps} steps.")

    task = dataclasses.replace(task, params=place(task.params, mesh))
    plan = demo.make_plan(task, config)
    logits, trainable = demo.make_lora(task, config, config.seed)  # the adapters go where the weights are
    trainable |= place({"head": trainable["head"]}, mesh)
    step, state = demo.make_step(logits, trainable, config.learning_rate, steps, config.microbatches)
    own = lora.local_rows(rows, config.batch)
    data = batches.training_batches(train, config.batch, config.epochs, config.seed, own)

    run = demo.Run("LoRA")
    with Checkpoints(config.output / "checkpoints", task.params, plan, every=config.every) as checkpoints:
        state, position = checkpoints.restore(state)
        if position is not None:
            same_batches(config, position)
            data.set_state(position["data"])
            say(f"Goes on from step {int(state.step)}.")
        with progress_bar("LoRA", steps, int(state.step)) as advance:
            start = time.perf_counter()
            for batch in data:
                state, metrics = step(state, task.params, *lora.shard_batch(batch, rows, config.batch))
                loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
                if not math.isfinite(loss + float(metrics["grad_norm"])):
                    raise demo.DivergedError(
                        f"the loss is {loss} at step {int(state.step)}, and the norm of its gradient "
                        f"{float(metrics['grad_norm'])}: try a lower learning rate, in another --output."
                    )
                run.losses.append(loss)
                advance(loss, accuracy, config.batch / (time.perf_counter() - start))
                start = time.perf_counter()
                if checkpoints.save(state, metrics, position=lambda: order(config) | {"data": data.get_state()}):
                    say(f"Told to end at step {int(state.step)}, which is saved: run it again to go on.")
                    return None

    @jax.jit
    def predict(trainable: Tree, params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        ids, mask = jax.lax.with_sharding_constraint((ids, mask), rows)
        return jax.lax.with_sharding_constraint(logits(trainable, params, ids, mask), whole)

    run.test_accuracy = demo.accuracy_of(predict, state.trainable, task.params, task, "test", config.batch)
    run.trainable = jax.jit(lambda tree: tree, out_shardings=whole)(state.trainable)  # of all hosts, on each
    if jax.process_index() == 0:
        demo.save_adapters(config.output / "adapters", jax.device_get(run.trainable))
    say(f"Test accuracy {run.test_accuracy:.1%}. Adapters are in {config.output / 'adapters'}.")
    return run


def order(config: Config) -> dict[str, int]:
    """What the order of the sentences depends on: a position among them means nothing in another one."""
    return {"batch": config.batch, "seed": config.seed}


def same_batches(config: Config, position: dict[str, Any]) -> None:
    for name, now in order(config).items():
        if position[name] != now:
            raise lora.LoraError(
                f"the checkpoints in {config.output} were trained with --{name} {position[name]}, found {now}: give "
                "that, or another --output."
            )


def progress_bar(what: str, steps: int, done: int) -> Any:
    if jax.process_index() == 0:
        return demo.progress_bar(what, steps, done)
    return contextlib.nullcontext(lambda *_: None)


def tiny_task() -> demo.Task:
    """A random encoder, and sentences of numbers: positive are those with more even numbers than odd ones."""
    words, rng = 40, np.random.default_rng(0)
    tokenizer = Tokenizer(models.WordLevel({str(n): n for n in range(words)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    numbers = [rng.integers(1, words, rng.integers(3, 9)) for _ in range(1200)]
    sentences = [(" ".join(map(str, row)), int(np.mean(row % 2) < 0.5)) for row in numbers]
    model = minilm.Encoder(minilm.Config(layers=2, hidden=16, heads=4, intermediate=32, vocabulary=words, positions=64))
    ids = jnp.ones((1, 4), jnp.int32)

    def encode(params: Tree, ids: jax.Array, mask: jax.Array) -> Any:
        return model.apply({"params": params}, ids, mask)

    def no_file(*_: Any) -> None:
        raise NotImplementedError("the weights of the tiny encoder are random, in no file.")

    return demo.Task(
        encode=encode,
        params=model.init(jax.random.key(0), ids, ids > 0)["params"],
        splits=snippets.split_by_hash(sentences, tokenizer),
        tokenizer=tokenizer,
        save_weights=no_file,
        load_weights=no_file,
    )


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        demo.check(config)
        mesh = make_mesh(config)
        fine_tune(tiny_task() if config.tiny else demo.load_task(), config, mesh)
    except (assets.AssetError, lora.LoraError, demo.DivergedError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
