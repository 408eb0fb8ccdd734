"""Count the communication of a training step: what the compiler put into it, for each mesh and each way to train.

    python benchmarks/collectives.py           # the table in docs/pods.md

A stack of scanned layers, `x + tanh(x @ up) @ down`, on eight simulated devices: `up` is split along its outputs
(column-parallel), `down` along its inputs (row-parallel). No clock is involved: the counts are exact, and
`tests/test_collectives.py` holds them to the bounds.

Axes: L layers, B sequences, T tokens, D width, F inner width, r rank.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
from jax import P
from jax.sharding import NamedSharding

import lora_jax as lora
from lora_jax.core.text import format_table

Tree = Any
LAYERS, ROWS, TOKENS, WIDTH, INNER, RANK, MICROBATCHES = 12, 32, 16, 64, 256, 4, 4


# Reading a compiled program ------------------------------------------------------------------------------------------

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One operation that devices take part in together, as the compiled program has it."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of its results, on one device
    nbytes: int  # of its results, each time
    times: int  # that a call of the program runs it
    depth: int  # loops that it is in


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program, `jitted.lower(...).compile().as_text()`, with loops counted."""
    computations, entry = _computations(hlo)

    def walk(name: str, times: int, depth: int) -> Iterator[Collective]:
        for line in computations[name]:
            found = re.match(r"(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
            if not found:
                continue
            results, operation = found.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                arrays = [_array(*array) for array in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", results)]
                yield Collective(kind, tuple(s for s, _ in arrays), sum(n for _, n in arrays), times, depth)
            elif operation == "while":
                [trips] = re.findall(r'"known_trip_count":\{"n":"(\d+)"', line)
                [body] = re.findall(r"body=%?([\w.\-]+)", line)
                yield from walk(body, times * int(trips), depth + 1)
            else:
                for inner in re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                    yield from walk(inner, times, depth)

    return list(walk(entry, 1, 0))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that is the program."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            computations[name].append(line.strip())
    return computations, entry


def _array(dtype: str, dims: str) -> tuple[tuple[int, ...], int]:
    shape = tuple(int(n) for n in dims.split(",") if n)
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return shape, math.prod(shape) * bits // 8


def launches(found: list[Collective]) -> int:
    return sum(c.times for c in found)


def nbytes(found: list[Collective]) -> int:
    return sum(c.times * c.nbytes for c in found)


# What is trained, where, and how -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A mesh, and what its axes split."""

    axes: dict[str, int]
    batch: P
    up: P
    down: P

    def mesh(self) -> jax.sharding.Mesh:
        kinds = (jax.sharding.AxisType.Auto,) * len(self.axes)
        n = math.prod(self.axes.values())
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), kinds, devices=jax.devices()[:n])


PLACES = {
    "data 8": Place({"data": 8}, P("data"), P(), P()),
    "tensor 8": Place({"tensor": 8}, P(), P(None, None, "tensor"), P(None, "tensor")),
    "data 2, tensor 4": Place({"data": 2, "tensor": 4}, P("data"), P(None, None, "tensor"), P(None, "tensor")),
    "fsdp 8": Place({"fsdp": 8}, P("fsdp"), P(None, "fsdp"), P(None, None, "fsdp")),
    "data 2, fsdp 2, tensor 2": Place(
        {"data": 2, "fsdp": 2, "tensor": 2},
        P(("data", "fsdp")),
        P(None, "fsdp", "tensor"),
        P(None, "tensor", "fsdp"),
    ),
    "data 2, sequence 4": Place({"data": 2, "sequence": 4}, P("data", "sequence"), P(), P()),
}


def make_params(key: jax.Array) -> Tree:
    k1, k2 = jax.random.split(key)
    up = jax.random.normal(k1, (LAYERS, WIDTH, INNER)) / math.sqrt(WIDTH)
    return {"up": up, "down": jax.random.normal(k2, (LAYERS, INNER, WIDTH)) / math.sqrt(INNER)}


def make_model(place: Place) -> Callable[[Tree, jax.Array], jax.Array]:
    """The stack; as models for pods do, it says that activations stay split as the batch is."""
    whole_rows = NamedSharding(place.mesh(), place.batch)

    def model(params: Tree, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
            h = jnp.tanh(x @ p["up"])
            return jax.lax.with_sharding_constraint(x + h @ p["down"], whole_rows), None

        return jax.lax.scan(layer, x, params)[0]

    return model


class Setup:
    """The arrays of one place, and the programs that are compared there."""

    def __init__(self, place: Place) -> None:
        self.mesh, self.model = place.mesh(), make_model(place)
        self.batch = NamedSharding(self.mesh, place.batch)
        specs = {"up": place.up, "down": place.down}
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        self.params = jax.device_put(make_params(jax.random.key(0)), shardings)
        self.x = jax.device_put(jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH)), self.batch)
        self.optimizer = optax.adam(1e-3)
        self.plan = lora.plan(self.model, self.params, self.x, rules={".*": lora.Lora(RANK)})

    def adapters(self, policy: Any) -> Tree:
        shardings = lora.adapter_shardings(self.params, self.plan, policy=policy)
        return lora.init(jax.random.key(2), self.params, self.plan, shardings)

    def base(self, microbatches: int) -> list[Collective]:
        """No adapters: the forward pass and the gradient of x, which the layers below would need."""

        def run(params: Tree, x: jax.Array) -> Any:
            def part(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
                value, grad = jax.value_and_grad(lambda x: jnp.mean(self.model(params, x) ** 2))(x)
                return total + value, grad

            cut = x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.scan(part, jnp.zeros(()), cut)

        return _compiled(jax.jit(run), self.params, self.x)

    def lora(self, microbatches: int, policy: Any = "tensor", once: bool = True) -> list[Collective]:
        """`lora.jit_step`; or, with `once` off, the same step under a plain `jax.jit`."""
        apply = lora.lora_apply(self.model)
        state = lora.TrainState.create(self.adapters(policy), self.optimizer)

        def loss(adapters: Tree, params: Tree, x: jax.Array) -> jax.Array:
            return jnp.mean(apply(params, adapters, x) ** 2)

        if once:
            step = lora.jit_step(loss, self.optimizer, microbatches=microbatches)
        else:
            places = jax.tree.map(lambda leaf: leaf.sharding, state)
            step = jax.jit(
                lambda *args: lora.train_step(loss, self.optimizer, *args, microbatches=microbatches),
                out_shardings=(places, NamedSharding(self.mesh, P())),
            )
        return _compiled(step, state, self.params, self.x)

    def shard_map(self, microbatches: int) -> list[Collective]:
        apply = lora.lora_apply(self.model_without_constraint())
        state = lora.TrainState.create(self.adapters("tensor"), self.optimizer)

        def loss(adapters: Tree, params: Tree, x: jax.Array) -> jax.Array:
            return jnp.mean(apply(params, adapters, x) ** 2)

        step = lora.shard_map_step(loss, self.optimizer, self.mesh, self.batch.spec, microbatches=microbatches)
        return _compiled(step, state, self.params, self.x)

    def model_without_constraint(self) -> Callable[[Tree, jax.Array], jax.Array]:
        """Inside `shard_map` a device sees its own rows, and there is nothing to say of the others."""

        def model(params: Tree, x: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None), x, params)[0]

        return model

    def full(self, microbatches: int) -> list[Collective]:
        """Every weight trained."""

        def loss(params: Tree, _: Tree, x: jax.Array) -> jax.Array:
            return jnp.mean(self.model(params, x) ** 2)

        state = lora.TrainState.create(self.params, self.optimizer)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(
            lambda *args: lora.train_step(loss, self.optimizer, *args, microbatches=microbatches),
            out_shardings=(places, NamedSharding(self.mesh, P())),
        )
        return _compiled(step, state, {}, self.x)


def _compiled(step: Any, *args: Any) -> list[Collective]:
    return collectives(step.lower(*args).compile().as_text())


def table() -> str:
    rows = []
    for name, place in PLACES.items():
        setup = Setup(place)
        base = setup.base(MICROBATCHES)
        programs = {
            "base model alone": base,
            "LoRA": setup.lora(MICROBATCHES),
            "LoRA, policy replicate": setup.lora(MICROBATCHES, policy="replicate"),
            "LoRA, policy inherit": setup.lora(MICROBATCHES, policy="inherit"),
            "LoRA, plain jax.jit": setup.lora(MICROBATCHES, once=False),
            "full fine-tuning": (full := setup.full(MICROBATCHES)),
        }
        if "fsdp" not in place.axes and any(place.batch):
            programs["LoRA, shard_map"] = setup.shard_map(MICROBATCHES)
        for program, found in programs.items():
            kinds = [f"{sum(c.times for c in found if c.kind == kind)} {kind}" for kind in KINDS]
            figures = [f"{launches(found):,}", f"{nbytes(found):,}", f"{nbytes(found) / nbytes(full):.3f}"]
            rows.append([name, program, ", ".join(k for k in kinds if k[0] != "0"), *figures])
            name = ""
    return format_table(["mesh", "program", "collectives of a step", "launches", "bytes", "of full"], rows, right=3)


def main() -> None:
    found = table()
    print(found)
    page = Path(__file__).parent.parent / "docs" / "pods.md"
    text = page.read_text()
    start, end = "<!-- collectives -->\n", "<!-- end -->"
    before, rest = text.split(start)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{start}```\n{found}\n```\n{end}{after}")


if __name__ == "__main__":
    main()
