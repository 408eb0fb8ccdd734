"""The writers of the library, for test_writers.py: each saves a numbered version, and says which version is there.

    python tests/writers.py        takes orders on stdin: see `serve`

Every number of a version is made of its own number, so that a folder of two versions is found out.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401 (takes half a second, which is not to be paid after each fork)
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import bases, checkpoint, key_maps
from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.interop.peft.load import load_by_module

KEYS = key_maps.KeyMap(key_maps.linear("w{i}", "m.{i}"))
AXES = lora.KernelAxes((), (0,), (1,))
WIDTH, COUNT = 48, 3


def adapters(v):
    a, b = np.full((WIDTH, 2), v, np.float32), np.full((2, WIDTH), v, np.float32)
    return {f"w{i}": lora.LoraAdapter(a, b, AXES, float(v)) for i in range(COUNT)}


def one(values):
    """The number that all values are."""
    found = sorted({float(x) for value in values for x in np.unique(np.asarray(value))})
    assert len(found) == 1, f"of several versions: {found}"
    return found[0]


def of_adapters(found):
    assert sorted(found) in ([f"w{i}" for i in range(COUNT)], [f"m.{i}" for i in range(COUNT)]), sorted(found)
    return round(one([x for adapter in found.values() for x in (adapter.a, adapter.b, adapter.scale)]))


def read_loralib(folder):
    tensors = load_file(folder / "lora.safetensors")
    assert len(tensors) == 2 * COUNT
    return round(one([tensor if "lora_A" in name else tensor**0.5 for name, tensor in tensors.items()]))


def read_adapters(folder):
    found, others = checkpoint.load(folder)
    assert of_adapters(found) == one([others["head"]])
    return of_adapters(found)


def source(folder):
    """A published model of zeros beside the target."""
    model = folder.parent / "model"
    if not model.exists():
        model.mkdir(parents=True)
        save_file(
            {f"m.{i}.weight": np.zeros((WIDTH, WIDTH), np.float32) for i in range(COUNT)}, model / "model.safetensors"
        )
        (model / "config.json").write_text("{}")
    return model


def save_merged(folder, v):
    """A version is in a folder of its own, as nothing is replaced."""
    lora.merge_checkpoint(source(folder), adapters(v), folder / str(v), KEYS)


def read_merged(folder):
    """The last version, after a look at all."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
            np.testing.assert_allclose(one(load_file(path / "model.safetensors").values()), 2 * int(path.name) ** 3)
    return max(int(path.name) for path in folder.iterdir() if not path.name.startswith("."))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: Any
    trainable: Any


def checkpoints(folder):
    return lora.Checkpoints(folder, {"base": np.ones(3, np.float32)}, {}, every=1, keep=2)


def state(v):
    return State(np.int32(v), adapters(1) | {"head": np.full(700, v, np.float32)})


def save_run(folder, v):
    with checkpoints(folder) as kept:
        kept.restore(state(0))
        kept.save(state(v))


def read_run(folder):
    with checkpoints(folder) as kept:
        found, _ = kept.restore(state(0))
    assert one([found.trainable["head"]]) == found.step
    return int(found.step)


def save_file_of_text(path, v):
    with written_file(path) as new:
        new.write_text(json.dumps([v] * 2000))


def read_file_of_text(path):
    found = json.loads(path.read_text())
    assert len(found) == 2000
    return round(one(found))


class Writer(NamedTuple):
    """How to save a version, and how to read which one is there; and names at which others' files may lie in it."""

    save: Callable[[Path, int], None]
    read: Callable[[Path], int]
    foreign: tuple[str, ...] = ()


OTHERS = ("README.md", "checkpoint-500/optimizer.pt", ".git/HEAD", "arrays/notes.txt", "lora.safetensors.bak")
WRITERS = {
    "peft": Writer(
        lambda f, v: lora.save_peft(f, adapters(v), KEYS), lambda f: of_adapters(load_by_module(f)[0]), OTHERS
    ),
    "loralib": Writer(lambda f, v: lora.save_peft(f, adapters(v), KEYS, profile="loralib"), read_loralib, OTHERS),
    "adapters": Writer(
        lambda f, v: checkpoint.save(f, adapters(v), {"head": np.full(700, v, np.float32)}), read_adapters, OTHERS
    ),
    "base": Writer(
        lambda f, v: bases.save(f, {"w": np.full((40, 40), v, np.float32), "b": np.full(3, v, np.float32)}),
        lambda f: round(one(jax.tree.leaves(bases.load(f)))),
        OTHERS,
    ),
    "merge": Writer(save_merged, read_merged),
    "run": Writer(save_run, read_run),
    "file": Writer(save_file_of_text, read_file_of_text),
}


# Processes to be killed -----------------------------------------------------------------------------------------------


def serve():
    """Fork processes that save, as each line of stdin says: NAME FOLDER COUNT FIRST SAVES LIMIT.

    COUNT processes begin with the versions FIRST, FIRST + 1000, ... and save SAVES of them, one after another; no file
    of theirs may be longer than LIMIT bytes, if that is not 0. What they print is read by `Server` of test_writers.py.
    """
    for line in sys.stdin:
        name, folder, *numbers = line.rstrip("\n").split("\t")
        count, first, saves, limit = map(int, numbers)
        children = []
        for i in range(count):
            child = os.fork()
            if child == 0:
                work(WRITERS[name], Path(folder), first + 1000 * i, saves, limit)
                os._exit(0)
            children.append(child)
        say("pids", *children)
        for child in children:
            os.waitpid(child, 0)
        say("end")


def work(writer, folder, first, saves, limit):
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for v in range(first, first + saves):
        say("start", v)
        try:
            writer.save(folder, v)
            say("done", v)
        except lora.LoraError as error:
            say("refused", v, str(error).replace("\n", " "))
        except BaseException as error:
            say("failed", v, repr(error).replace("\n", " "))


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())  # in one piece, whoever else writes


if __name__ == "__main__":
    serve()
