"""What a process of a job does in test_hosts: the training of `placements`, started by examples/launch.py.

    python tests/host_worker.py placements FOLDER        # on two meshes; and batches that do not fit together
    python tests/host_worker.py train FOLDER KILL_AT     # with checkpoints; process 1 is killed once, before a step
    python tests/host_worker.py population FOLDER KILL_AT   # four members, two on each host; killed in the same way
    python tests/host_worker.py save FOLDER              # adapters, by all processes at once

What was trained is written to FOLDER, by each process for itself, to be compared.
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import placements
from jax import P

import lora_jax as lora
from lora_jax.checkpoints.manager import Checkpoints

STEPS = 12
NAMES = ["data and tensor", "data, fsdp and tensor"]


def start(placement):
    """The mesh, the base, and the state before the first step."""
    mesh = placement.mesh()
    params = placement.params(mesh)
    adapters = lora.init(jax.random.key(1), params, placements.plan())
    return mesh, params, lora.TrainState.create(adapters, placements.optimizer())


def batch_of(placement, mesh, i):
    """The i-th batch, of which this process gives its own rows."""
    sharding = jax.NamedSharding(mesh, placement.batch)
    own = lora.local_rows(sharding, placements.ROWS)
    return lora.shard_batch(tuple(array[own] for array in placements.batch(i)), sharding, rows=placements.ROWS)


def arrays(tree, mesh, prefix):
    """`{name: array}`, whole on every process."""
    whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, P()))(tree)
    return {prefix + jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in jax.tree.leaves_with_path(whole)}


def write(folder, name, **found):
    np.savez(folder / f"{name} {jax.process_index()}.npz", **found)


def run_placements(folder):
    for placement in [p for p in placements.PLACEMENTS if p.name in NAMES]:
        mesh, params, state = start(placement)
        first, losses = arrays(state.trainable, mesh, "first"), []
        step = lora.jit_step(placements.loss, placements.optimizer())
        for i in range(STEPS):
            state, metrics = step(state, params, *batch_of(placement, mesh, i))
            losses.append(float(metrics["loss"]))
        write(folder, placement.name, losses=losses, **first, **arrays(state.trainable, mesh, "last"))
    wrong_batches(folder, jax.NamedSharding(mesh, P("data")))


def wrong_batches(folder, sharding):
    """Process 1 has a row more than process 0, which has its 8 of 16."""
    mine = np.zeros((8 + jax.process_index(), 4), np.float32)
    for name, rows in [("unknown", None), ("known", 16)]:
        try:
            lora.shard_batch(mine, sharding, rows=rows)
            said = ""
        except lora.LoraError as error:
            said = str(error)
        write(folder, name, said=said)


def train(folder, kill_at):
    placement = next(p for p in placements.PLACEMENTS if p.name == NAMES[0])
    mesh, params, state = start(placement)
    step = lora.jit_step(placements.loss, placements.optimizer())
    take = lambda state, i: step(state, params, *batch_of(placement, mesh, i))  # noqa: E731
    if (state := loop(folder, kill_at, state, params, take)) is not None:
        write(folder, "end", **arrays(state.trainable, mesh, "last"))


def loop(folder, kill_at, state, params, take):
    """Train from the newest checkpoint to the end; None if the processes were told to end before."""
    with Checkpoints(folder / "checkpoints", params, placements.plan(), every=3) as checkpoints:
        state, position = checkpoints.restore(state)
        first = position["next"] if position else 0
        print("from", first, flush=True)
        for i in range(first, STEPS):
            if i == kill_at and jax.process_index() == 1 and not (folder / "killed").exists():
                checkpoints.wait()
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            state, metrics = take(state, i)
            jax.block_until_ready(metrics)
            stop = checkpoints.save(state, metrics, position={"next": i + 1})
            print("step", i + 1, flush=True)
            if stop:
                write(folder, "stopped", at=i + 1)
                return None
            time.sleep(0.5)  # long enough to be told to end in between
    return state


RANKS, RATES = (1, 2, 4, 2), {"learning_rate": [1e-2, 3e-3, 1e-2, 3e-2]}
HALVED = 5  # the step after which the best two go on


def members():
    """Four members of three ranks, with rates of their own."""
    ids, _ = placements.batch(0)
    rules = lambda rank: {"layers/router": None, "layers/.*": lora.Lora(rank, alpha=4)}  # noqa: E731
    plans = [lora.plan(placements.model, placements.params(), ids, rules=rules(rank)) for rank in RANKS]
    adapters = [lora.init(jax.random.key(i), placements.params(), plan) for i, plan in enumerate(plans)]
    return lora.Population.create(adapters, rated, RATES, key=jax.random.key(7))


def rated(learning_rate):
    return lora.freeze_base(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(learning_rate)))


def keyed(adapters, params, ids, labels, *, key):
    """The loss of a member. Its key, which has come to the mesh too, is another one on each device, so no use of it."""
    return placements.loss(adapters, params, ids, labels)


def halved(step, i, population, *args):
    """A step, and after one of them a halving of the members."""
    population, metrics = step(population, *args)
    return (population.keep_best(metrics["loss"], 2) if i == HALVED else population), metrics


def population(folder, kill_at):
    """The members over both hosts, and the rows of each of them over two devices."""
    mesh = jax.make_mesh((4, 2), ("members", "data"), (jax.sharding.AxisType.Auto,) * 2)
    params = jax.device_put(placements.params(), jax.NamedSharding(mesh, P()))
    sharding = jax.NamedSharding(mesh, P("data"))
    step = lora.population_step(keyed, rated, mesh=mesh, members="members", data="data")

    def take(state, i):
        own = lora.local_rows(sharding, placements.ROWS)
        batch = lora.shard_batch([array[own] for array in placements.batch(i)], sharding, rows=placements.ROWS)
        return halved(step, i, state, params, *batch)

    state = loop(folder, kill_at, members().placed(mesh, "members"), params, take)
    table = state.table()
    each = [jax.tree.map(np.asarray, state.member(i)) for i in range(len(state))]
    named = {
        f"{i}{jax.tree_util.keystr(keys)}": leaf
        for i, one in enumerate(each)
        for keys, leaf in jax.tree.leaves_with_path(one)
    }
    write(folder, "members", table=table, steps=arrays(state.steps, mesh, "")[""], **named)


def save(folder):
    """All processes save at once: adapters that are spread are refused, and those that each of them has are written."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    axes, keys = lora.KernelAxes((), (0,), (1,)), lora.key_maps.KeyMap(lora.key_maps.linear("w", "m"))

    def place(array, spec):
        return jax.make_array_from_callback(array.shape, jax.NamedSharding(mesh, spec), lambda index: array[index])

    a, b = np.arange(32, dtype=np.float32).reshape(16, 2), np.ones((2, 3), np.float32)
    spread = {"w": lora.LoraAdapter(place(a, P("x")), place(b, P()), axes, 2.0)}
    copies = {"w": lora.LoraAdapter(place(a, P()), place(b, P()), axes, 2.0)}
    whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, P()))(spread)
    writers = {
        "adapters": lambda path, adapters: lora.checkpoint.save(path, adapters),
        "peft": lambda path, adapters: lora.save_peft(path, adapters, keys),
    }
    for name, writer in writers.items():
        said = ""
        try:
            writer(folder / "refused", spread)
        except lora.LoraError as error:
            said = str(error)
        write(folder, name, said=said)
        for adapters in (copies, whole):
            for _ in range(3):
                writer(folder / name, adapters)


if __name__ == "__main__":
    action, folder, *rest = sys.argv[1:]
    if action in ("train", "population"):
        {"train": train, "population": population}[action](Path(folder), int(rest[0]))
    else:
        {"placements": run_placements, "save": save}[action](Path(folder))
