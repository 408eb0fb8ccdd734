"""What one training step with LoRA costs: lora_jax beside the other ways to write it, and beside its floor.

A decoder of six unrolled blocks, adapters on all six linear layers of each. Every program computes the loss, its
gradient and AdamW's update from the same numbers: losses and gradients are compared before any of them is timed. The
floor is what adapters are added to: the frozen model's forward pass and the gradient back to its embeddings.

    python benchmarks/train_step.py                       # the table, docs/train_step.png, docs/benchmarks.md
    python benchmarks/train_step.py --trace --rounds 5    # time to trace 24 layers, over hand-written LoRA
    python benchmarks/train_step.py --eager               # an eager call, over the model's own
    python benchmarks/train_step.py --scan                # memory of a scanned stack, over hand-written LoRA

Axes: B sequences, T tokens, D width, H heads, V vocabulary; d inputs, k outputs, r rank of an adapted weight.
"""

import gc
import importlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx

import lora_jax as lora
from lora_jax.core.text import format_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Tree = Any
Loss = Callable[..., jax.Array]  # (trained, frozen, ids [B, T], labels [B, T]) -> scalar
Linear = Callable[[str, jax.Array, jax.Array], jax.Array]  # (path of W, x [B, T, d], W [d, k]) -> [B, T, k]
Factors = dict[str, tuple[jax.Array, ...]]  # path -> A [d, r], B [r, k]; of DoRA also m [k]

LINEARS = ("q", "k", "v", "o", "up", "down")
RULE = rf"layer_\d+/({'|'.join(LINEARS)})"
DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Config:
    """Time one training step of a transformer."""

    rounds: int = 15  # how often each program is run, in turn with the others
    trace: bool = False  # measure the time to trace 24 layers instead
    eager: bool = False  # measure eager calls of a small model, and of the same one adapted, instead
    scan: bool = False  # measure the memory of a scanned stack of layers instead
    only: str = ""  # programs whose name matches this regular expression, and the floor
    write: bool = True  # the picture and the table in docs
    layers: int = 6
    width: int = 512
    heads: int = 8
    inner: int = 2048
    vocabulary: int = 4096
    batch: int = 8
    tokens: int = 128
    rank: int = 16


# The model -----------------------------------------------------------------------------------------------------------


def init_params(c: Config, key: jax.Array) -> Tree:
    def normal(*shape: int) -> jax.Array:
        nonlocal key
        key, this = jax.random.split(key)
        return jax.random.normal(this, shape) / np.sqrt(shape[0])

    def layer() -> Tree:
        shapes = {"up": (c.width, c.inner), "down": (c.inner, c.width)}
        weights = {name: normal(*shapes.get(name, (c.width, c.width))) for name in LINEARS}
        return {**weights, "norm_1": jnp.ones(c.width), "norm_2": jnp.ones(c.width)}

    params = {"embed": normal(c.vocabulary, c.width) * 64, "head": normal(c.width, c.vocabulary)}
    return {**params, "norm": jnp.ones(c.width), **{f"layer_{i}": layer() for i in range(c.layers)}}


def plain(path: str, x: jax.Array, w: jax.Array) -> jax.Array:
    del path
    return x @ w


def decode(c: Config, params: Tree, x: jax.Array, linear: Linear = plain) -> jax.Array:
    """Embedded tokens [B, T, D] -> logits [B, T, V]"""
    for i in range(c.layers):
        x = block(c, f"layer_{i}", params[f"layer_{i}"], x, linear)
    return rms_norm(x, params["norm"]) @ params["head"]


def block(c: Config, path: str, p: Tree, x: jax.Array, linear: Linear) -> jax.Array:
    h = rms_norm(x, p["norm_1"])
    q, k, v = (linear(f"{path}/{name}", h, p[name]) for name in "qkv")
    x = x + linear(f"{path}/o", attend(c, q, k, v), p["o"])
    h = jax.nn.gelu(linear(f"{path}/up", rms_norm(x, p["norm_2"]), p["up"]))
    return x + linear(f"{path}/down", h, p["down"])


def attend(c: Config, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of H heads: three [B, T, D] -> [B, T, D]"""
    shape, t = q.shape, q.shape[1]
    q, k, v = (z.reshape(*shape[:2], c.heads, -1) for z in (q, k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(c.width // c.heads)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9))
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(shape)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# The programs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all programs start from."""

    config: Config
    params: Tree
    adapters: dict[str, lora.LoraAdapter]
    ids: jax.Array
    labels: jax.Array

    @property
    def factors(self) -> Factors:
        return {path: (adapter.a, adapter.b) for path, adapter in self.adapters.items()}


@dataclass(frozen=True)
class Program:
    """One way to write the step."""

    name: str
    loss: Loss
    trained: Tree
    frozen: Tree
    factors: Callable[[Tree], Factors]  # the gradient that each A and B has, out of this program's own
    updates: bool = True  # whether AdamW moves what is trained
    oracle: Loss | None = None  # another loss of the same things, where it is not that of hand-written LoRA


def setting(c: Config) -> Setting:
    """B starts away from zero, as it is after the first step: at zero, A would have no gradient to compare."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = init_params(c, keys[0])
    ids = jax.random.randint(keys[1], (c.batch, c.tokens), 0, c.vocabulary)
    plan = lora.plan(model(c), params, ids, rules={RULE: lora.Lora(c.rank)})
    adapters = {}
    for i, (path, adapter) in enumerate(lora.init(keys[2], params, plan).items()):
        assert isinstance(adapter, lora.LoraAdapter)
        b = 0.02 * jax.random.normal(jax.random.fold_in(keys[3], i), adapter.b.shape)
        adapters[path] = replace(adapter, b=b)
    return Setting(c, params, adapters, ids, jnp.roll(ids, -1, axis=1))


def model(c: Config) -> Callable[[Tree, jax.Array], jax.Array]:
    def logits(params: Tree, ids: jax.Array) -> jax.Array:
        return decode(c, params, params["embed"][ids])

    return logits


def with_lora_jax(s: Setting) -> Program:
    return lora_jax_keeping(s, "lora_jax", "inputs")


def with_little_kept(s: Setting) -> Program:
    return lora_jax_keeping(s, 'lora_jax, keep="thin"', "thin")


def lora_jax_keeping(s: Setting, name: str, keep: Literal["thin", "inputs"]) -> Program:
    apply = lora.lora_apply(model(s.config), keep=keep)

    def loss(adapters: Tree, params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(apply(params, adapters, ids), labels)

    return Program(name, loss, s.adapters, s.params, lambda grads: {path: (g.a, g.b) for path, g in grads.items()})


def with_dora(s: Setting) -> Program:
    """The same A and B, and lengths m some way from those that the weights have."""
    merged = lora.merge(s.params, s.adapters)
    adapters = {}
    for i, (path, adapter) in enumerate(s.adapters.items()):
        layer, name = path.split("/")
        lengths = jnp.linalg.norm(merged[layer][name], axis=0)
        m = lengths * (1 + 0.1 * jax.random.normal(jax.random.key(i), lengths.shape))
        adapters[path] = lora.DoraAdapter(adapter.a, adapter.b, m, adapter.axes, adapter.scale)
    apply = lora.lora_apply(model(s.config))

    def loss(adapters: Tree, params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(apply(params, adapters, ids), labels)

    def written_out(adapters: Tree, params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        def linear(path: str, x: jax.Array, w: jax.Array) -> jax.Array:
            v = w + adapters[path].a @ adapters[path].b
            return x @ (v * (adapters[path].m / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))))

        return cross_entropy(decode(s.config, params, params["embed"][ids], linear), labels)

    def factors(grads: Tree) -> Factors:
        return {path: (g.a, g.b, g.m) for path, g in grads.items()}

    return Program("lora_jax, DoRA", loss, adapters, s.params, factors, oracle=written_out)


def by_hand(name: str, adapted: Callable[..., jax.Array]) -> Callable[[Setting], Program]:
    """`adapted(x, W, A, B)` in the place of x @ W."""

    def make(s: Setting) -> Program:
        def loss(factors: Factors, params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
            def linear(path: str, x: jax.Array, w: jax.Array) -> jax.Array:
                return adapted(x, w, *factors[path])

            return cross_entropy(decode(s.config, params, params["embed"][ids], linear), labels)

        return Program(name, loss, s.factors, s.params, lambda grads: grads)

    return make


def factored(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    y = x @ w
    return y + (x.reshape(-1, x.shape[-1]) @ a @ b).reshape(y.shape)


def factored_3d(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + (x @ a) @ b


def naive(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ (w + a @ b)


def full(s: Setting) -> Program:
    """All weights are trained, from W' = W + A B. The chain rule says what that means for A and B."""

    def loss(params: Tree, _: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(model(s.config)(params, ids), labels)

    def factors(grads: Tree) -> Factors:
        dw = {f"{layer}/{name}": leaf for layer, p in grads.items() if "layer" in layer for name, leaf in p.items()}
        return {path: (dw[path] @ b.T, a.T @ dw[path]) for path, (a, b) in s.factors.items()}

    return Program("full fine-tuning", loss, lora.merge(s.params, s.adapters), {}, factors)


def floor(s: Setting) -> Program:
    """Forward and back to the embeddings, through W' = W + A B."""

    def loss(x: jax.Array, params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        del ids
        return cross_entropy(decode(s.config, params, x), labels)

    merged = lora.merge(s.params, s.adapters)
    return Program("frozen floor", loss, s.params["embed"][s.ids], merged, lambda grads: {}, updates=False)


# The same model in Flax NNX, for the two peers that need a module ----------------------------------------------------


class Block(nnx.Module):
    def __init__(self, c: Config, linear: Callable[..., nnx.Linear], rngs: nnx.Rngs) -> None:
        self.config = c
        self.norm_1, self.norm_2 = (nnx.RMSNorm(c.width, epsilon=1e-6, rngs=rngs) for _ in range(2))
        self.q, self.k, self.v, self.o = (linear(c.width, c.width, use_bias=False, rngs=rngs) for _ in range(4))
        self.up = linear(c.width, c.inner, use_bias=False, rngs=rngs)
        self.down = linear(c.inner, c.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm_1(x)
        x = x + self.o(attend(self.config, self.q(h), self.k(h), self.v(h)))
        return x + self.down(jax.nn.gelu(self.up(self.norm_2(x))))


class Decoder(nnx.Module):
    def __init__(self, c: Config, linear: Callable[..., nnx.Linear], rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(c.vocabulary, c.width, rngs=rngs)
        self.layers = nnx.List([Block(c, linear, rngs) for _ in range(c.layers)])
        self.norm = nnx.RMSNorm(c.width, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(c.width, c.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def new_decoder(s: Setting, linear: Callable[..., nnx.Linear]) -> Any:
    decoder: Any = Decoder(s.config, linear, nnx.Rngs(0))
    decoder.embed.embedding[...] = s.params["embed"]
    decoder.head.kernel[...] = s.params["head"]
    decoder.norm.scale[...] = s.params["norm"]
    for i, layer in enumerate(decoder.layers):
        for name in ("norm_1", "norm_2"):
            getattr(layer, name).scale[...] = s.params[f"layer_{i}"][name]
        for name in LINEARS:
            getattr(layer, name).kernel[...] = s.params[f"layer_{i}"][name]
    return decoder


def from_nnx(name: str, s: Setting, decoder: Any, pair: Callable[[Any], tuple[Any, Any]]) -> Program:
    """`pair(linear)` are the variables of its A and B."""
    for path, factors in s.factors.items():
        for variable, value in zip(pair(at_path(decoder, path)), factors, strict=True):
            variable[...] = value
    graph, trained, *rest = nnx.split(decoder, nnx.LoRAParam, ...)
    [frozen] = rest

    def loss(trained: Tree, frozen: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(nnx.merge(graph, trained, frozen)(ids), labels)

    def factors_of(grads: Tree) -> Factors:
        pairs = {path: pair(at_path(nnx.merge(graph, grads, frozen), path)) for path in s.factors}
        return {path: (a[...], b[...]) for path, (a, b) in pairs.items()}

    return Program(name, loss, trained, frozen, factors_of)


def at_path(decoder: Any, path: str) -> Any:
    layer, name = path.removeprefix("layer_").split("/")
    return getattr(decoder.layers[int(layer)], name)


def with_nnx(s: Setting) -> Program:
    def linear(d: int, k: int, **kwargs: Any) -> nnx.Linear:
        return nnx.LoRALinear(d, k, lora_rank=s.config.rank, **kwargs)

    return from_nnx("nnx.LoRA", s, new_decoder(s, linear), lambda m: (m.lora.lora_a, m.lora.lora_b))


def with_qwix(s: Setting) -> Program:
    qwix = importlib.import_module("qwix")
    rank = s.config.rank
    provider = qwix.LoraProvider(module_path=r"layers/\d+/.*", rank=rank, alpha=float(rank))
    decoder = qwix.apply_lora_to_model(new_decoder(s, nnx.Linear), provider, s.ids, rngs=nnx.Rngs(0))
    return from_nnx("qwix", s, decoder, lambda m: (m.kernel_lora_a, m.kernel_lora_b))


PROGRAMS: dict[str, Callable[[Setting], Program]] = {
    "frozen floor": floor,
    "lora_jax": with_lora_jax,
    'lora_jax, keep="thin"': with_little_kept,
    "lora_jax, DoRA": with_dora,
    "hand-written": by_hand("hand-written", factored),
    "hand-written, 3-D": by_hand("hand-written, 3-D", factored_3d),
    "nnx.LoRA": with_nnx,
    "qwix": with_qwix,
    "naive W + A B": by_hand("naive W + A B", naive),
    "full fine-tuning": full,
}


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One program's figures, or why it has none."""

    name: str
    why_not: str = ""
    run: Callable[[], Any] = lambda: None
    seconds: list[float] = field(default_factory=list)
    ratio: float = 0.0
    flops: float = 0.0
    temporary: int = 0
    trained: int = 0  # bytes of gradients and optimizer state
    trace: float = 0.0
    compile: float = 0.0


def make_step(program: Program) -> tuple[jax.stages.Wrapped, Tree]:
    """The jitted step and its state, which it donates. The floor has no optimizer, and gives its gradient out."""
    optimizer = optax.adamw(1e-4)

    def step(state: Tree, frozen: Tree, ids: jax.Array, labels: jax.Array) -> tuple[Tree, jax.Array]:
        trained, opt_state = state
        loss, grads = jax.value_and_grad(program.loss)(trained, frozen, ids, labels)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), loss

    def back(state: Tree, frozen: Tree, ids: jax.Array, labels: jax.Array) -> tuple[Tree, jax.Array]:
        loss, grads = jax.value_and_grad(program.loss)(state, frozen, ids, labels)
        return grads, loss

    if not program.updates:
        return jax.jit(back), program.trained
    trained = jax.tree.map(jnp.copy, program.trained)
    return jax.jit(step, donate_argnums=0), (trained, optimizer.init(trained))


def prepare(program: Program, s: Setting) -> Row:
    """Trace and compile the step, and count what can be counted."""
    step, state = make_step(program)
    start = time.perf_counter()
    traced = step.trace(state, program.frozen, s.ids, s.labels)
    middle = time.perf_counter()
    compiled = traced.lower().compile()
    end = time.perf_counter()

    def run() -> None:
        nonlocal state
        new, _ = jax.block_until_ready(compiled(state, program.frozen, s.ids, s.labels))
        state = new if program.updates else state

    return Row(
        name=program.name,
        run=run,
        flops=compiled.cost_analysis()["flops"],
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        trained=tree_bytes(program.trained) + tree_bytes(state[1]) if program.updates else 0,
        trace=middle - start,
        compile=end - middle,
    )


def tree_bytes(tree: Tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def check(program: Program, s: Setting, expected: tuple[jax.Array, Factors]) -> None:
    """The program computes what hand-written LoRA does, or what its own oracle does.

    Raises:
        AssertionError: it does not, and the timing would compare different things.
    """
    loss, factors = loss_and_factors(program, s)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5, err_msg=program.name)
    for path, pair in factors.items():
        for ours, theirs in zip(pair, expected[1][path], strict=True):
            error = jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)
            assert error < 1e-4, f"{program.name}: the gradient of {path} is off by {error:.1e} of its norm"


def loss_and_factors(program: Program, s: Setting) -> tuple[jax.Array, Factors]:
    loss, grads = jax.jit(jax.value_and_grad(program.loss))(program.trained, program.frozen, s.ids, s.labels)
    return loss, program.factors(grads)


def measure(c: Config) -> list[Row]:
    s = setting(c)
    expected = loss_and_factors(PROGRAMS["hand-written"](s), s)
    rows = []
    for name, make in PROGRAMS.items():
        if name != "frozen floor" and not re.search(c.only, name):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            program = make(s)
        except ImportError as error:
            rows.append(Row(name, why_not=f"not installed ({error.name})"))
            continue
        except Exception as error:  # a peer that does not run with these versions keeps its line
            if name not in ("nnx.LoRA", "qwix"):
                raise
            rows.append(Row(name, why_not=f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"))
            continue
        oracle = program.oracle and loss_and_factors(replace(program, loss=program.oracle), s)
        check(program, s, oracle or expected)
        rows.append(prepare(program, s))
    time_in_turn([row for row in rows if not row.why_not], c.rounds)
    return rows


def time_in_turn(rows: list[Row], rounds: int) -> None:
    """Every round runs each program once, forwards and backwards by turns; ratios are of the same round."""
    for row in rows:
        row.run()
    gc.disable()
    for i in range(rounds):
        for row in rows[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            row.run()
            row.seconds.append(time.perf_counter() - start)
    gc.enable()
    for row in rows:
        row.ratio = float(np.median(np.array(row.seconds) / np.array(rows[0].seconds)))


# What the user sees --------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    header = ["program", "ms a step", "of the floor", "GFLOP", "temporary", "gradient + AdamW", "trace", "compile"]
    cells = []
    for row in rows:
        if row.why_not:
            cells.append([row.name, "-", row.why_not, *["-"] * 5])
            continue
        figures = [f"{1e3 * np.median(row.seconds):.0f}", f"{row.ratio:.2f}", f"{row.flops / 1e9:.1f}"]
        memory = [f"{row.temporary / 1e6:.0f} MB", f"{row.trained / 1e6:.1f} MB"]
        cells.append([row.name, *figures, *memory, f"{row.trace:.2f} s", f"{row.compile:.2f} s"])
    return format_table(header, cells, right=7)


def machine() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"one {device.device_kind}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}"


def draw(rows: list[Row], path: Path) -> None:
    """A bar a program: its time over the floor's, and its temporary memory beside it."""
    rows = [row for row in rows if not row.why_not][::-1]
    colours = {"lora_jax": "#1f6fb4", "frozen floor": "#aaaaaa"}
    figure, axes = plt.subplots(figsize=(8.5, 0.46 * len(rows) + 1.1), layout="constrained")
    ratios = [row.ratio for row in rows]
    axes.barh([row.name for row in rows], ratios, color=[colours.get(row.name, "#c9b89a") for row in rows], height=0.66)
    for i, row in enumerate(rows):
        axes.text(row.ratio + 0.03, i, f"{row.ratio:.2f}", va="center", weight="bold")
        axes.text(1.22 * max(ratios), i, f"{row.temporary / 1e6:.0f} MB", va="center", ha="right", color="#555555")
    axes.text(1.22 * max(ratios), len(rows) - 0.35, "temporary memory", ha="right", color="#555555")
    axes.axvline(1, color="#777777", lw=1, ls="--", zorder=0)
    axes.set(
        xlim=(0, 1.24 * max(ratios)),
        ylim=(-0.6, len(rows) - 0.1),
        xlabel="time of a training step / frozen forward and backward pass",
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_table(text: str, path: Path) -> None:
    """Put the table between its marks in the page, and leave the rest."""
    page = path.read_text()
    begin, end = "<!-- train_step -->\n", "<!-- end -->"
    path.write_text(page[: page.index(begin)] + f"{begin}```\n{text}\n```\n" + page[page.index(end) :])


# Tracing, and scanned layers -----------------------------------------------------------------------------------------


def trace_times(c: Config) -> dict[str, float]:
    """Seconds to trace `jit(grad)` of 24 unrolled layers: the least of several, each with a new function."""
    s = setting(replace(c, layers=24, width=32, heads=2, inner=64, vocabulary=64, batch=1, tokens=8, rank=2))
    seconds: dict[str, list[float]] = {}
    for _ in range(c.rounds):
        for name in ("hand-written", "lora_jax"):
            program = PROGRAMS[name](s)
            step = jax.jit(jax.grad(program.loss))
            gc.collect()
            start = time.perf_counter()
            step.trace(program.trained, program.frozen, s.ids, s.labels)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {name: min(times) for name, times in seconds.items()}


def eager_times(c: Config) -> dict[str, float]:
    """Median seconds of an eager call of 4 small layers, and of the same ones with all linears adapted, in turn."""
    s = setting(replace(c, layers=4, width=64, heads=4, inner=128, vocabulary=64, batch=1, tokens=16, rank=4))
    base, adapted = model(s.config), lora.lora_apply(model(s.config))
    calls = {"model": lambda: base(s.params, s.ids), "lora_jax": lambda: adapted(s.params, s.adapters, s.ids)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(10 * c.rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def scan_temporaries(c: Config) -> dict[str, int]:
    """Bytes of temporaries of the compiled gradient of a scan over stacked layers."""
    s = setting(c)
    layers = [f"layer_{i}" for i in range(c.layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s.params[name] for name in layers))
    factors = {
        name: tuple(jnp.stack(part) for part in zip(*(s.factors[f"{layer}/{name}"] for layer in layers), strict=True))
        for name in LINEARS
    }
    params = {**{name: leaf for name, leaf in s.params.items() if name not in layers}, "layers": stacked}

    def logits(params: Tree, ids: jax.Array, factors: Tree = None) -> jax.Array:
        def body(x: jax.Array, sliced: Tree) -> tuple[jax.Array, None]:
            layer, pairs = sliced

            def adapted(path: str, x: jax.Array, w: jax.Array) -> jax.Array:
                return factored(x, w, *pairs[path.removeprefix("layer/")])

            return block(c, "layer", layer, x, adapted if pairs else plain), None

        x, _ = jax.lax.scan(body, params["embed"][ids], (params["layers"], factors))
        return rms_norm(x, params["norm"]) @ params["head"]

    plan = lora.plan(logits, params, s.ids, rules={"layers/(" + "|".join(LINEARS) + ")": lora.Lora(c.rank)})
    adapters = lora.init(jax.random.key(0), params, plan)
    apply = lora.lora_apply(logits)

    def by_hand(factors: Tree, params: Tree) -> jax.Array:
        return cross_entropy(logits(params, s.ids, factors), s.labels)

    def by_lora_jax(adapters: Tree, params: Tree) -> jax.Array:
        return cross_entropy(apply(params, adapters, s.ids), s.labels)

    def temporary(loss: Loss, trained: Tree) -> int:
        memory: Any = jax.jit(jax.grad(loss)).lower(trained, params).compile().memory_analysis()
        return memory.temp_size_in_bytes

    return {"hand-written": temporary(by_hand, factors), "lora_jax": temporary(by_lora_jax, adapters)}


def main() -> None:
    c = tyro.cli(Config, description=__doc__)
    if c.trace:
        times = trace_times(c)
        print("trace of 24 layers: " + ", ".join(f"{name} {1e3 * t:.0f} ms" for name, t in times.items()))
        print(f"lora_jax takes {times['lora_jax'] / times['hand-written']:.2f} of hand-written (bound 1.20)")
        return
    if c.eager:
        times = eager_times(c)
        print("an eager call of 4 layers: " + ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in times.items()))
        print(f"lora_jax takes {times['lora_jax'] / times['model']:.2f} of the model alone")
        return
    if c.scan:
        sizes = scan_temporaries(c)
        print("temporary memory: " + ", ".join(f"{name} {n / 1e6:.1f} MB" for name, n in sizes.items()))
        print(f"lora_jax takes {sizes['lora_jax'] / sizes['hand-written']:.3f} of hand-written (bound 1.02)")
        return
    rows = measure(c)
    where = f"{machine()}, JAX {jax.__version__}, {c.rounds} rounds"
    print(f"\n{table(rows)}\n\n{where}")
    timed = {row.name: np.array(row.seconds) for row in rows}
    if {"lora_jax", "lora_jax, DoRA"} <= timed.keys():
        print(f"DoRA takes {np.median(timed['lora_jax, DoRA'] / timed['lora_jax']):.2f} of LoRA (bound 1.10)")
    if c.write:
        draw(rows, DOCS / "train_step.png")
        write_table(f"{table(rows)}\n\n{where}", DOCS / "benchmarks.md")


if __name__ == "__main__":
    main()
