"""What LoRA costs on the GPU or TPU at hand: a step over its floor, QLoRA's kernels, a loss without logits.

    python benchmarks/accelerator.py                         # at most six minutes, on one GPU or TPU
    python benchmarks/accelerator.py --tiny                  # small sizes, on any device: does it run?
    python benchmarks/accelerator.py --compile-for v5e:1x1   # compile all of it for a machine that is not there

The model is a decoder of Llama's shape in bf16 with its layers in a scan and nothing computed again; its sizes, and
those of the loss, are chosen by the device's memory. LoRA of rank 16 is on all seven linears. Before programs are timed
their values are compared: losses and gradients with those of the plain path on the same device. Then all programs of a
table run in turn, and a ratio is the median over the rounds of this program's time over the first one's.

`--compile-for` takes what `make test-compiled` takes, keeps what it compiled in `.compiled_cache`, and says for each
program what it needs of the memory. Axes: T tokens, D width, V vocabulary, r rank.
"""

import argparse
import functools
import importlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__" and any(argument.startswith("--compile-for") for argument in sys.argv):
    os.environ["JAX_PLATFORMS"] = "cpu"  # no accelerator is asked for

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax.analysis.compile_report import TEMPORARY, gib
from lora_jax.analysis.topologies import find_topology
from lora_jax.core.packed import is_packed
from lora_jax.core.text import count, format_table

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "tests" / "compiled")]
import cached  # type: ignore[import-not-found]  # noqa: E402
import losses  # noqa: E402
from will_it_fit import attention  # noqa: E402

decoder: Any = importlib.import_module("decoder")  # of tests/compiled; the examples have another one of this name

Tree = Any
RANK, OPTIMIZER = 16, optax.adam(1e-4)
ROWS = 16  # of one product, as in generation
ROUNDS, FEWEST = 20, 3  # how often each program is run, and at least, if time runs out
SECONDS, LAST_START = 40, 270  # that the rounds of one table take at most, and after which no table is begun
LOSS_ERROR, GRADIENT_ERROR = 1e-2, 5e-2  # relative: two ways to round to bf16, whose numbers have 8 bits


@dataclass(frozen=True)
class Scale:
    """Sizes for a device of so much memory."""

    gib: float
    model: Any  # decoder.Size
    tokens: int
    loss: tuple[int, int, int]  # T, D, V


SCALES = (
    Scale(56, decoder.Size(layers=8, vocabulary=32_000), 4096, (8192, 4096, 128_256)),
    Scale(28, decoder.Size(layers=4, vocabulary=32_000), 4096, (4096, 4096, 128_256)),
    Scale(14, decoder.Size(layers=2, vocabulary=32_000), 2048, (2048, 4096, 128_256)),
    Scale(0, decoder.Size(2, 2048, 5632, heads=16, kv_heads=8, vocabulary=32_000), 1024, (1024, 2048, 32_000)),
)
TINY = Scale(0, decoder.Size(2, 128, 256, heads=4, kv_heads=2, vocabulary=256), 256, (256, 128, 512))


def scale_for(memory: float) -> Scale:
    return next(scale for scale in SCALES if memory >= scale.gib * 2**30)


# The programs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Program:
    """One row of a table. A step takes its state first, donated, and returns the next one first."""

    name: str
    step: Any  # a jitted function
    arguments: Callable[[Tree], tuple[Any, ...]]  # out of what the programs of a table share
    values: Callable[[Any], tuple[Any, Tree]]  # out of the first result: the loss, and gradients or outputs
    plain: str | None = None  # the program whose values it has to have
    is_step: bool = True


@dataclass(frozen=True)
class Table:
    """Programs that run in turn. Shared arrays are made anew for each table, so that no two need memory at once."""

    title: str
    rows: int  # tokens of one call
    shared: Callable[[], Tree]
    programs: list[Program]


def random_params(c: Any) -> Tree:
    """Weights that keep the size of activations, and norms of 1."""

    def made(path: Any, w: Any) -> jax.Array:
        if "norm" in path[-1].key:
            return jnp.ones(w.shape, w.dtype)
        key = jax.random.fold_in(jax.random.key(0), sum(map(ord, str(path))))
        return jax.random.normal(key, w.shape, w.dtype) * jnp.asarray(w.shape[-2] ** -0.5, w.dtype)

    return jax.tree_util.tree_map_with_path(made, decoder.shapes(c))


def random_ids(c: Any, rows: int, tokens: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (rows, tokens), 0, c.vocabulary)


def random_adapters(model: Any, params: Tree, ids: jax.Array) -> dict[str, lora.LoraAdapter]:
    """Adapters whose B is away from zero: at zero, A would have no gradient to compare."""
    plan = lora.plan(model, params, ids, rules={decoder.LINEARS: lora.Lora(RANK)})
    adapters = {}
    for i, (path, adapter) in enumerate(lora.init(jax.random.key(2), params, plan).items()):
        assert isinstance(adapter, lora.LoraAdapter)
        b = 0.02 * jax.random.normal(jax.random.key(3 + i), adapter.b.shape, adapter.b.dtype)
        adapters[path] = replace(adapter, b=b)
    return adapters


def of_state(result: Any) -> tuple[Any, Tree]:
    """The loss of a first step, and its gradients: Adam's first moments are a tenth of these."""
    state, metrics = result
    moments = state.opt_state[0].mu
    pairs = {path: (m.a, m.b) if isinstance(m, lora.LoraAdapter) else m for path, m in moments.items()}
    return metrics["loss"], pairs


def lora_step(model: Any, keep: Literal["thin", "inputs"] = "inputs") -> Any:
    apply = lora.lora_apply(model, keep=keep)

    def loss(adapters: Tree, params: Tree, ids: jax.Array) -> jax.Array:
        return next_token_loss(apply(params, adapters, ids), ids)

    return lora.jit_step(loss, OPTIMIZER)


def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    return decoder.cross_entropy(logits, jnp.roll(ids, -1, axis=1))


def hand_written(params: Tree, factors: Tree) -> Tree:
    """Parameters in which each linear is its weight, A and B."""
    triples = {path.split("/")[1]: (params["layers"][path.split("/")[1]], *pair) for path, pair in factors.items()}
    return {**params, "layers": {**params["layers"], **triples}}


def hand_written_linear(name: str, x: jax.Array, p: tuple[jax.Array, ...]) -> jax.Array:
    w, a, b = p
    return x @ w + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)


def steps(s: Scale) -> Table:
    """One training step: the floor, LoRA by hand and by lora_jax, and full fine-tuning."""
    model = decoder.make(s.model, attention=attention, remat=False)
    by_hand = decoder.make(s.model, attention=attention, linear=hand_written_linear, remat=False)

    def shared() -> Tree:
        params, ids = random_params(s.model), random_ids(s.model, 1, s.tokens)
        return {"params": params, "ids": ids, "adapters": random_adapters(model, params, ids)}

    def floor(x: jax.Array, params: Tree, ids: jax.Array) -> Any:
        return jax.value_and_grad(lambda x: next_token_loss(model(params, x), ids))(x)

    def hand_loss(factors: Tree, params: Tree, ids: jax.Array) -> jax.Array:
        return next_token_loss(by_hand(hand_written(params, factors), ids), ids)

    def full_loss(params: Tree, _: Tree, ids: jax.Array) -> jax.Array:
        return next_token_loss(model(params, ids), ids)

    def state(trained: Tree) -> lora.TrainState:
        return lora.TrainState.create(trained, OPTIMIZER)

    def adapted(g: Tree) -> Any:
        return state(g["adapters"]), g["params"], g["ids"]

    def factors(g: Tree) -> Any:
        pairs = {path: (adapter.a, adapter.b) for path, adapter in g["adapters"].items()}
        return state(pairs), g["params"], g["ids"]

    def of_loss(result: Any) -> Any:
        return result[1]["loss"], {}

    hand, frozen = "LoRA, hand-written", "frozen floor"
    programs = [
        Program(frozen, jax.jit(floor), lambda g: (g["params"]["embed"][g["ids"]], g["params"], g["ids"]),
                lambda result: (result[0], {}), is_step=False),
        Program(hand, lora.jit_step(hand_loss, OPTIMIZER), factors, of_state),
        Program("lora_jax", lora_step(model), adapted, of_state, hand),
        Program('lora_jax, keep="thin"', lora_step(model, "thin"), adapted, of_state, hand),
        Program("full fine-tuning", lora.jit_step(full_loss, OPTIMIZER), lambda g: (state(g["params"]), {}, g["ids"]),
                of_loss, frozen),
    ]  # fmt: skip
    return Table("a training step", s.tokens, shared, programs)


def with_nf4(params: Tree) -> Tree:
    return lora.bases.quantize(params, {decoder.LINEARS: lora.bases.Nf4(double=False, stack=1)})


def by_kernels(params: Tree, kernel: bool) -> Tree:
    """The same packed weights, multiplied by kernels or by dequantizing them."""
    return jax.tree.map(lambda w: replace(w, kernel=kernel) if is_packed(w) else w, params, is_leaf=is_packed)


def bases(s: Scale) -> Table:
    """One training step over a base in bf16 and in NF4."""
    model = decoder.make(s.model, attention=attention, remat=False)

    def shared() -> Tree:
        params, ids = random_params(s.model), random_ids(s.model, 1, s.tokens)
        adapters = random_adapters(model, params, ids)
        return {"params": params, "nf4": with_nf4(params), "ids": ids, "adapters": adapters}

    def adapted(g: Tree, base: Tree) -> Any:
        return lora.TrainState.create(g["adapters"], OPTIMIZER), base, g["ids"]

    step, off = lora_step(model), "QLoRA, NF4, kernels off"
    programs = [
        Program("LoRA, bf16", step, lambda g: adapted(g, g["params"]), of_state),
        Program(off, step, lambda g: adapted(g, by_kernels(g["nf4"], False)), of_state),
        Program("QLoRA, NF4, kernels on", step, lambda g: adapted(g, by_kernels(g["nf4"], True)), of_state, off),
    ]
    return Table("a training step over bases", s.tokens, shared, programs)


def few_rows(s: Scale) -> Table:
    """A forward pass of a few rows, as in generation, over a base in bf16 and in NF4."""
    model = decoder.make(s.model, remat=False)
    apply = jax.jit(lora.lora_apply(model))

    def shared() -> Tree:
        params, ids = random_params(s.model), random_ids(s.model, ROWS, 1)
        adapters = random_adapters(model, params, ids)
        return {"params": params, "nf4": with_nf4(params), "ids": ids, "adapters": adapters}

    def values(logits: jax.Array) -> Any:
        return jnp.zeros(()), logits

    off = "LoRA, NF4, kernels off"
    programs = [
        Program("LoRA, bf16", apply, lambda g: (g["params"], g["adapters"], g["ids"]), values, is_step=False),
        Program(off, apply, lambda g: (by_kernels(g["nf4"], False), g["adapters"], g["ids"]), values, is_step=False),
        Program("LoRA, NF4, kernels on", apply, lambda g: (by_kernels(g["nf4"], True), g["adapters"], g["ids"]),
                values, off, is_step=False),
    ]  # fmt: skip
    return Table(f"a forward pass of {ROWS} rows", ROWS, shared, programs)


def vocabulary_losses(s: Scale) -> Table:
    """A loss over a vocabulary and its gradient by the hidden states, of a frozen head."""
    rows, width, vocabulary = s.loss

    def shared() -> Tree:
        keys = jax.random.split(jax.random.key(0), 3)
        head = jax.random.normal(keys[1], (width, vocabulary), jnp.bfloat16) * jnp.bfloat16(width**-0.5)
        labels = jax.random.randint(keys[2], (rows,), 0, vocabulary)
        return jax.random.normal(keys[0], (rows, width), jnp.bfloat16), head, labels

    ours = functools.partial(lora.losses.linear_cross_entropy, ignore=None)
    programs = [
        Program("plain", jax.jit(jax.value_and_grad(losses.plain)), tuple, tuple, is_step=False),
        Program("linear_cross_entropy", jax.jit(jax.value_and_grad(ours)), tuple, tuple, "plain", is_step=False),
    ]
    return Table(f"a loss over {vocabulary:,} words", rows, shared, programs)


TABLES = (steps, bases, few_rows, vocabulary_losses)


# On the device at hand -----------------------------------------------------------------------------------------------


class Running:
    """A compiled program and its arguments, of which the state is replaced by each step's result."""

    def __init__(self, program: Program, shared: Tree) -> None:
        self.program, self.arguments = program, list(program.arguments(shared))
        self.compiled = program.step.lower(*self.arguments).compile()
        self.seconds: list[float] = []

    def run(self) -> Any:
        result = jax.block_until_ready(self.compiled(*self.arguments))
        if self.program.is_step:
            self.arguments[0] = result[0]
        return result

    def timed(self) -> None:
        start = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - start)

    def row(self, first: "Running", tokens: int) -> list[str]:
        median, memory = float(np.median(self.seconds)), self.compiled.memory_analysis()
        ratio = np.median(np.array(self.seconds) / np.array(first.seconds))
        figures = [f"{1e3 * median:.2f}", f"{ratio:.3f}", f"{tokens / median:,.0f}"]
        return [self.program.name, *figures, f"{memory.temp_size_in_bytes / 1e6:,.0f}"]


def check(name: str, found: tuple[Any, Tree], plain: tuple[Any, Tree]) -> None:
    """Compare a program's values with those of the plain path.

    Raises:
        AssertionError: they are others, and timing would compare different things.
    """
    np.testing.assert_allclose(np.float32(found[0]), np.float32(plain[0]), rtol=LOSS_ERROR, err_msg=name)
    ours, theirs = jax.tree.leaves(found[1]), jax.tree.leaves(plain[1])
    assert len(ours) == len(theirs) or not ours, f"{name}: {len(ours)} arrays beside {len(theirs)}"
    for one, other in zip(ours, theirs, strict=False):
        one, other = (jnp.asarray(array, jnp.float32) for array in (one, other))
        error = float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))
        assert error < GRADIENT_ERROR, f"{name}: an array of shape {one.shape} is off by {error:.1e} of its norm"


def measure(table: Table, rounds: int) -> str:
    """Check the values of a table's programs, and time them."""
    shared = table.shared()
    running = [Running(program, shared) for program in table.programs]
    values: dict[str, tuple[Any, Tree]] = {}
    for one in running:  # this warms up too
        values[one.program.name] = jax.tree.map(np.array, one.program.values(one.run()))
    for one in running:
        if one.program.plain is not None:
            check(one.program.name, values[one.program.name], values[one.program.plain])
    start = time.perf_counter()
    for i in range(rounds):
        for one in running[:: -1 if i % 2 else 1]:
            one.timed()
        if i + 1 >= FEWEST and time.perf_counter() - start > SECONDS:
            break
    header = [table.title, "ms", "of the first", "tokens/s", "temporary MB"]
    done = f"{len(running[0].seconds)} rounds, values agree"
    return f"{format_table(header, [one.row(running[0], table.rows) for one in running], right=4)}\n{done}"


def run(tiny: bool, rounds: int) -> None:
    """Print all tables for the device at hand.

    Raises:
        SystemExit: there is no accelerator, or more than one.
    """
    start, device = time.perf_counter(), jax.devices()[0]
    if device.platform == "cpu" and not tiny:
        raise SystemExit(
            "accelerator.py measures a GPU or TPU, and JAX finds none, only CPUs. --tiny runs small sizes on a CPU, to "
            "see that all works; --compile-for v5e:1x1 compiles all of it for a machine that is not there."
        )
    if jax.device_count() > 1:
        raise SystemExit(
            f"accelerator.py measures one device, and JAX finds {jax.device_count()}: let it see one, as by "
            "CUDA_VISIBLE_DEVICES=0, or for TPUs TPU_VISIBLE_CHIPS=0 with TPU_CHIPS_PER_PROCESS_BOUNDS=1,1,1 and "
            "TPU_PROCESS_BOUNDS=1,1,1."
        )
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    scale = TINY if tiny else scale_for(memory)
    print(f"{device.device_kind}, {gib(memory)} GiB for JAX {jax.__version__}\n{scale}\n", flush=True)
    for table in (make(scale) for make in TABLES):
        if not tiny and time.perf_counter() - start > LAST_START:
            print(f"{table.title}: left out, as {LAST_START} s were over\n", flush=True)
            continue
        print(f"{measure(table, rounds)}\n", flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


# For a device that is not there --------------------------------------------------------------------------------------


def compile_for(topology: str, tiny: bool = False) -> list[lora.CompileReport]:
    """Compile all programs for one device of a machine that is not there, and print what they need.

    A table holds the arguments of all its programs at a time, and the temporary memory of one.

    Raises:
        SystemExit: a table needs more memory than JAX takes of the device.
    """
    machine = find_topology(topology)
    memory = machine.hbm * machine.share
    scale, mesh = TINY if tiny else scale_for(memory), lora.topology_mesh(topology, data=1)
    print(f"{machine}, {gib(int(memory))} GiB for JAX\n{scale}\n", flush=True)
    reports: list[lora.CompileReport] = []
    for table in (make(scale) for make in TABLES):
        shared = jax.eval_shape(table.shared)
        rows, held, most = [], tree_bytes(shared), 0
        for program in table.programs:
            arguments = jax.eval_shape(program.arguments, shared)
            report = cached.report(program.step, *lora.abstract(arguments, mesh), topology=topology)
            held += tree_bytes(arguments[0]) if program.is_step else 0
            most = max(most, *(report.parts.get(part, 0) for part in ("outputs", TEMPORARY)))
            cycles = sum(report.cycles.values())
            sizes = gib(report.needed), gib(report.parts[TEMPORARY])
            rows.append([program.name, *sizes, count(cycles) if cycles else "-"])
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
            reports.append(report)
        print(format_table([table.title, "GiB", "temporary", "cycles"], rows, right=3))
        print(f"together {gib(held + most)} GiB\n", flush=True)
        if held + most > memory or not all(report.fits for report in reports):
            raise SystemExit(f"{table.title}: needs more than the {gib(int(memory))} GiB that JAX takes.")
    return reports


def tree_bytes(tree: Tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each program is run")
    parser.add_argument("--compile-for", metavar="TOPOLOGY", help="a machine that is not there, such as h100:1")
    options = parser.parse_args()
    if options.compile_for:
        compile_for(options.compile_for, options.tiny)
    else:
        run(options.tiny, options.rounds)


if __name__ == "__main__":
    main()
