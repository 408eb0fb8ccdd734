"""A training script to be killed: tiny, deterministic, and starting again from its newest checkpoint.

    python tests/kill_worker.py FOLDER STEPS SECONDS_A_STEP

Prints each step, and at the end a hash of everything that was trained.
"""

import hashlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax.checkpoints.manager import Checkpoints


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def main(folder, steps, pause):
    random = np.random.default_rng(0)
    params = {
        name: random.normal(size=shape).astype(np.float32) for name, shape in [("up", (8, 16)), ("down", (16, 4))]
    }
    plan = lora.plan(model, params, np.ones((2, 8), np.float32), rules={"up|down": lora.Lora(rank=2)})
    apply = lora.lora_apply(model)
    optimizer = optax.adamw(1e-2)
    step = lora.jit_step(lambda a, p, x, y: ((apply(p, a, x) - y) ** 2).mean(), optimizer)
    state = lora.TrainState.create(lora.init(jax.random.key(0), params, plan), optimizer)
    with Checkpoints(folder, params, plan, every=3, keep=2) as checkpoints:
        state, position = checkpoints.restore(state)
        first = position["next"] if position else 0
        print("from", first, flush=True)
        for i in range(first, steps):
            batch = np.random.default_rng(i).normal(size=(2, 12, 8)).astype(np.float32)
            state, metrics = step(state, params, batch[0], np.sin(batch[1, :, :4]))
            stop = checkpoints.save(state, metrics, position={"next": i + 1})
            print("step", i + 1, flush=True)
            time.sleep(pause)
            if stop:
                sys.exit(3)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    print("done", hashlib.sha256(b"".join(leaves)).hexdigest(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
