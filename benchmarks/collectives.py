"""Count the communication of a training step: what the compiler put into it, for each mesh and each way to train.

    python benchmarks/collectives.py                      # on eight simulated CPU devices, printed
    python benchmarks/collectives.py --topology v5e:2x4   # by the compiler for TPUs; with --write, into docs/pods.md
    python benchmarks/collectives.py --topology h100:8    # by the one for GPUs

A stack of scanned layers, `x + tanh(x @ up) @ down`, on eight devices: `up` is split along its outputs
(column-parallel), `down` along its inputs (row-parallel). No clock is involved: the counts are exact, and
`tests/test_collectives.py` holds those of the CPU to the bounds.

Axes: L layers, B sequences, T tokens, D width, F inner width, r rank.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
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
from lora_jax.analysis import hlo, hlo_costs
from lora_jax.core.text import format_table

Tree = Any
ROOT = Path(__file__).parent.parent
LAYERS, ROWS, TOKENS, WIDTH, INNER, RANK, MICROBATCHES = 12, 32, 16, 64, 256, 4, 4


# Reading a compiled program ------------------------------------------------------------------------------------------


def collectives(text: str) -> list[hlo_costs.Collective]:
    """Every collective of a compiled program, `jitted.lower(...).compile().as_text()`, with loops counted."""
    return hlo_costs.collectives(hlo.parse(text))


def launches(found: list[hlo_costs.Collective]) -> int:
    return sum(c.times for c in found)


def nbytes(found: list[hlo_costs.Collective]) -> int:
    return sum(c.times * c.nbytes for c in found)


# What is trained, where, and how -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A mesh, and what its axes split."""

    axes: dict[str, int]
    batch: P
    up: P
    down: P

    def mesh(self, topology: str | None = None) -> jax.sharding.Mesh:
        if topology is not None:
            return lora.topology_mesh(topology, **self.axes)
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


def make_model(place: Place, mesh: jax.sharding.Mesh) -> Callable[[Tree, jax.Array], jax.Array]:
    """The stack; as models for pods do, it says that activations stay split as the batch is."""
    whole_rows = NamedSharding(mesh, place.batch)

    def model(params: Tree, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
            h = jnp.tanh(x @ p["up"])
            return jax.lax.with_sharding_constraint(x + h @ p["down"], whole_rows), None

        return jax.lax.scan(layer, x, params)[0]

    return model


class Setup:
    """The base of one place, on a machine that is not there as shapes, and the programs that are compared there."""

    def __init__(self, place: Place, topology: str | None = None) -> None:
        self.topology, self.mesh = topology, place.mesh(topology)
        self.model = make_model(place, self.mesh)
        self.batch = NamedSharding(self.mesh, place.batch)
        made = make_params(jax.random.key(0)) if topology is None else jax.eval_shape(make_params, jax.random.key(0))
        self.params = lora.abstract(made, self.mesh, {"up": place.up, "down": place.down})
        if topology is None:
            self.params = jax.device_put(made, jax.tree.map(lambda leaf: leaf.sharding, self.params))
        self.x = lora.abstract(jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.float32), self.mesh, place.batch)
        self.optimizer = optax.adam(1e-3)
        self.plan = lora.plan(self.model, self.params, self.x, rules={".*": lora.Lora(RANK)})

    def adapters(self, policy: Any) -> Tree:
        made = jax.eval_shape(
            lambda key, params: lora.init(key, params, self.plan), jax.random.key(2), bare(self.params)
        )
        return jax.tree.map(at, made, lora.adapter_shardings(self.params, self.plan, policy=policy))

    def state(self, trainable: Tree) -> lora.TrainState:
        """The state of these shapes, moments beside them."""
        made = jax.eval_shape(lambda tree: lora.TrainState.create(tree, self.optimizer), bare(trainable))
        shardings, whole = jax.tree.map(lambda leaf: leaf.sharding, trainable), NamedSharding(self.mesh, P())

        alike: Any = jax.tree.structure(trainable)

        def is_alike(node: Any) -> bool:
            return bool(alike == jax.tree.structure(node))

        def placed(node: Any) -> Any:
            return jax.tree.map(at, node, shardings) if is_alike(node) else at(node, whole)

        return jax.tree.map(placed, made, is_leaf=is_alike)

    def base(self, microbatches: int) -> list[hlo_costs.Collective]:
        """No adapters: the forward pass and the gradient of x, which the layers below would need."""

        def run(params: Tree, x: jax.Array) -> Any:
            def part(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
                value, grad = jax.value_and_grad(lambda x: jnp.mean(self.model(params, x) ** 2))(x)
                return total + value, grad

            cut = x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.scan(part, jnp.zeros(()), cut)

        return self.compiled(jax.jit(run), self.params, self.x)

    def lora(self, microbatches: int, policy: Any = "tensor", once: bool = True) -> list[hlo_costs.Collective]:
        """`lora.jit_step`; or, with `once` off, the same step under a plain `jax.jit`."""
        apply = lora.lora_apply(self.model)
        state = self.state(self.adapters(policy))

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
        return self.compiled(step, state, self.params, self.x)

    def shard_map(self, microbatches: int) -> list[hlo_costs.Collective]:
        apply = lora.lora_apply(self.model_without_constraint())
        state = self.state(self.adapters("tensor"))

        def loss(adapters: Tree, params: Tree, x: jax.Array) -> jax.Array:
            return jnp.mean(apply(params, adapters, x) ** 2)

        step = lora.shard_map_step(loss, self.optimizer, self.mesh, self.batch.spec, microbatches=microbatches)
        return self.compiled(step, state, self.params, self.x)

    def model_without_constraint(self) -> Callable[[Tree, jax.Array], jax.Array]:
        """Inside `shard_map` a device sees its own rows, and there is nothing to say of the others."""

        def model(params: Tree, x: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None), x, params)[0]

        return model

    def compiled(self, step: Any, *args: Any) -> list[hlo_costs.Collective]:
        if self.topology is None:
            return collectives(step.lower(*args).compile().as_text())
        sys.path.append(str(ROOT / "tests" / "compiled"))
        from cached import report  # type: ignore[import-not-found]  # keeps what is compiled

        return collectives(report(step, *args, topology=self.topology).text)

    def full(self, microbatches: int) -> list[hlo_costs.Collective]:
        """Every weight trained."""

        def loss(params: Tree, _: Tree, x: jax.Array) -> jax.Array:
            return jnp.mean(self.model(params, x) ** 2)

        state = self.state(self.params)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(
            lambda *args: lora.train_step(loss, self.optimizer, *args, microbatches=microbatches),
            out_shardings=(places, NamedSharding(self.mesh, P())),
        )
        return self.compiled(step, state, {}, self.x)


def bare(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def at(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def table(topology: str | None = None) -> str:
    rows = []
    for name, place in PLACES.items():
        setup = Setup(place, topology)
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
            kinds = [f"{sum(c.times for c in found if c.kind == kind)} {kind}" for kind in hlo_costs.KINDS]
            figures = [f"{launches(found):,}", f"{nbytes(found):,}", f"{nbytes(found) / nbytes(full):.3f}"]
            print(name, program, *kinds, file=sys.stderr, flush=True)
            rows.append([name, program, ", ".join(k for k in kinds if k[0] != "0"), *figures])
            name = ""
    return format_table(["mesh", "program", "collectives of a step", "launches", "bytes", "of full"], rows, right=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="a machine of eight devices to compile for; the CPU if none is given")
    parser.add_argument("--write", action="store_true", help="also write the table into docs/pods.md")
    arguments = parser.parse_args()
    found = table(arguments.topology)
    print(found)
    if arguments.write:
        page = ROOT / "docs" / "pods.md"
        start, end = "<!-- collectives -->\n", "<!-- end -->"
        before, rest = page.read_text(encoding="utf-8").split(start)
        page.write_text(f"{before}{start}```\n{found}\n```\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
