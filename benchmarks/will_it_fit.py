"""Will it fit? Whole models, compiled for the machines that they are trained on: the table in docs/will_it_fit.md.

    python benchmarks/will_it_fit.py                  # every program of the table, and the page
    python benchmarks/will_it_fit.py Llama-3-70B v5e:16x16 NF4 4096 inherit   # the report of one, printed only

It takes what `make test-compiled` takes, and none of the machines. One compile takes some minutes. What was compiled is
kept in `.compiled_cache`, and each row is written as it comes, so that a run that was broken off goes on where it was.

The model is as one is trained on a pod: layers in a scan, each computed again in the backward pass; attention in blocks
of queries, and the loss in blocks of tokens, so that neither all scores nor all logits are in memory at once. All
weights are split over all devices (fsdp), of more than 64 over groups of 64; each device has one sequence.

Axes: L layers, B sequences, T tokens, D width, F inner width, V vocabulary, N heads, H width of a head,
E experts, C places for tokens of an expert.
"""

import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # no accelerator is asked for

import jax
import jax.numpy as jnp
import optax
from jax import P
from jax.sharding import NamedSharding

import lora_jax as lora
from lora_jax.analysis.compile_report import gib
from lora_jax.core.text import count, format_table

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "compiled"))
from cached import report  # type: ignore[import-not-found]  # noqa: E402  keeps what is compiled

Tree = Any
RANK, OPTIMIZER = 16, optax.adam(1e-4)
QUERIES, ROWS = 256, 512  # tokens of one block of attention, and of the loss
BLOCK = 64  # inputs that share a scale in NF4
FSDP = 64  # devices that weights are split over, at most; of more, blocks of 64 of 4,096 inputs would be cut
CAPACITY = 1.25  # places for tokens of an expert, over those that it has if all have as many
START, END = "<!-- fits -->\n", "<!-- end of fits -->"
LINEARS = "layers/(q|k|v|o|gate|up|down)"


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder; with experts, each layer has that many in the place of one of Llama's."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int = 0
    chosen: int = 0  # experts of a token
    head: int = 128


MODELS = {
    "Llama-3-8B": Model(32, 4096, 14336, 32, 8, 128256),
    "Llama-3-70B": Model(80, 8192, 28672, 64, 8, 128256),
    "Qwen3-30B-A3B": Model(48, 2048, 768, 32, 4, 151936, experts=128, chosen=8),
}
BASES = ("bf16", "NF4")
HOST = ", host"  # the layers are in the memory of the host


# The model -----------------------------------------------------------------------------------------------------------


def shapes(c: Model) -> Tree:
    """The parameters, in bf16."""
    queries, keys, experts = c.heads * c.head, c.kv_heads * c.head, (c.experts,) if c.experts else ()
    layer = {
        "q": (c.width, queries),
        "k": (c.width, keys),
        "v": (c.width, keys),
        "o": (queries, c.width),
        "gate": (*experts, c.width, c.inner),
        "up": (*experts, c.width, c.inner),
        "down": (*experts, c.inner, c.width),
        "norm1": (c.width,),
        "norm2": (c.width,),
    }
    if c.experts:
        layer |= {"router": (c.width, c.experts), "q_norm": (c.head,), "k_norm": (c.head,)}
    found = {
        "embed": (c.vocabulary, c.width),
        "layers": {name: (c.layers, *shape) for name, shape in layer.items()},
        "norm": (c.width,),
        "head": (c.width, c.vocabulary),
    }
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), found, is_leaf=lambda x: isinstance(x, tuple))


def specs(params: Tree, fsdp: int) -> Tree:
    """Where the parameters are: matrices split along their inputs, or where that would cut NF4's blocks, their outputs.

    The embedding and the head are split along their outputs.
    """

    def where(path: Any, w: Any) -> P:
        name = path[-1].key
        if "norm" in name:
            return P()
        along_inputs = w.shape[-2] % (BLOCK * fsdp) == 0 and name not in ("embed", "head")
        return P(*(None,) * (w.ndim - 2), "fsdp") if along_inputs else P(*(None,) * (w.ndim - 1), "fsdp")

    return jax.tree_util.tree_map_with_path(where, params)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm over the last axis."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of x [B, T, N, H]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 500000.0 ** (-jnp.arange(half) / half)[None]  # [T, H / 2]
    cos, sin = (fn(angles)[None, :, None].astype(x.dtype) for fn in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] as [T / size, B, size, ...], for a scan."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention, whose scores are [B, N, QUERIES, T] at a time, in the backward pass too."""
    starts = jnp.arange(0, q.shape[1], QUERIES)

    @jax.checkpoint
    def block(carry: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        q, start = part
        seen = jnp.arange(k.shape[1])[None] <= start + jnp.arange(QUERIES)[:, None]
        return carry, jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])

    _, out = jax.lax.scan(block, None, (blocks(q, QUERIES), starts))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def attended(c: Model, x: jax.Array, p: Tree) -> jax.Array:
    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], -1, c.head) for name in "qkv")
    if c.experts:
        q, k = norm(q, p["q_norm"]), norm(k, p["k_norm"])
    return attention(rotated(q), rotated(k), v).reshape(*x.shape[:2], -1) @ p["o"]


def mlp(x: jax.Array, p: Tree) -> jax.Array:
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def experts(c: Model, x: jax.Array, p: Tree) -> jax.Array:
    """Each token by its experts, which have C places for tokens of a sequence; a token that finds none is dropped."""
    tokens = x.shape[1]
    places = math.ceil(tokens * c.chosen * CAPACITY / c.experts)  # C
    gates, chosen = jax.lax.top_k(jax.nn.softmax((x @ p["router"]).astype(jnp.float32)), c.chosen)
    gates = (gates / gates.sum(-1, keepdims=True)).astype(x.dtype)

    def routed(chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of one sequence: where each token is at each of its experts [T * 8], and which is at each place [E * C]."""
        flat = chosen.reshape(-1)
        before = jnp.cumsum(jax.nn.one_hot(flat, c.experts, dtype=jnp.int32), 0)
        at = jnp.take_along_axis(before, flat[:, None], 1)[:, 0] - 1
        place = jnp.where(at < places, flat * places + at, c.experts * places)
        token = jnp.zeros(c.experts * places, jnp.int32).at[place].set(jnp.arange(flat.size) // c.chosen, mode="drop")
        return place, token

    place, token = jax.vmap(routed)(chosen)
    there = jax.vmap(lambda x, token: x[token])(x, token).reshape(-1, c.experts, places, c.width)
    inner = jax.nn.silu(jnp.einsum("becd,edf->becf", there, p["gate"])) * jnp.einsum("becd,edf->becf", there, p["up"])
    out = jnp.einsum("becf,efd->becd", inner, p["down"]).reshape(-1, c.experts * places, c.width)
    back = jax.vmap(lambda out, place: out.at[place].get(mode="fill", fill_value=0))(out, place)
    return jnp.einsum("btkd,btk->btd", back.reshape(*chosen.shape, c.width), gates)


def make(c: Model, mesh: Any) -> Callable[[Tree, jax.Array, jax.Array], jax.Array]:
    """`model(params, ids [B, T], labels [B, T]) -> loss`."""
    rows = NamedSharding(mesh, P(mesh.axis_names))
    kept = functools.partial(jax.lax.with_sharding_constraint, shardings=rows)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def layer(x: jax.Array, p: Tree) -> tuple[jax.Array, None]:
        x = kept(x + attended(c, norm(x, p["norm1"]), p))
        h = norm(x, p["norm2"])
        return kept(x + (experts(c, h, p) if c.experts else mlp(h, p))), None

    def model(params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(layer, kept(params["embed"][ids]), params["layers"])
        x = norm(x, params["norm"])

        @jax.checkpoint
        def block(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            x, labels = part
            logits = (x @ params["head"]).astype(jnp.float32)
            right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
            return total + jnp.sum(jax.nn.logsumexp(logits, -1) - right), None

        total, _ = jax.lax.scan(block, jnp.zeros(()), (blocks(x, ROWS), blocks(labels, ROWS)))
        return total / ids.size

    return model


# One program ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """One row of the table: a training step on a machine."""

    model: str
    machine: str
    base: str
    tokens: int
    policy: str = "tensor"  # where adapters and moments are: whole, or with "inherit" split as the base is

    @property
    def name(self) -> tuple[str, ...]:
        """The first words of its row."""
        base = self.base if self.policy == "tensor" else f"{self.base}, {self.policy}"
        return self.model, self.machine, base, f"{self.tokens:,}"

    def report(self) -> lora.CompileReport:
        """`lora.jit_step` with LoRA on all linears, and Adam."""
        c = MODELS[self.model]
        devices = math.prod(map(int, self.machine.split(":")[1].split("x")))
        fsdp = min(devices, FSDP)
        axes = {"data": devices // fsdp} if devices > fsdp else {}
        mesh = lora.topology_mesh(self.machine, **axes, fsdp=fsdp)
        dense = shapes(c)
        params = lora.abstract(self.packed(dense), mesh, specs(dense, fsdp))
        if self.base.endswith(HOST):
            params = lora.bases.to_host(params, "layers/.*")
        ids = lora.abstract(jax.ShapeDtypeStruct((devices, self.tokens), jnp.int32), mesh, P(mesh.axis_names))
        model = make(c, mesh)
        plan = lora.plan(model, params, ids, ids, rules={LINEARS: lora.Lora(rank=RANK)})
        state = lora.abstract_state(params, plan, OPTIMIZER, policy=self.policy)  # type: ignore[arg-type]
        apply = lora.lora_apply(model)

        def loss(adapters: Tree, params: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
            return apply(params, adapters, ids, labels)

        return report(lora.jit_step(loss, OPTIMIZER), state, params, ids, ids, topology=self.machine)

    def packed(self, params: Tree) -> Tree:
        if self.base.startswith("bf16"):
            return params
        of_layers, of_experts = (lora.bases.Nf4(double=False, stack=stack) for stack in (1, 2))
        mlp = of_experts if MODELS[self.model].experts else of_layers
        rules = {"layers/(q|k|v|o)": of_layers, "layers/(gate|up|down)": mlp}
        return jax.eval_shape(lambda params: lora.bases.quantize(params, rules), params)


# The table -----------------------------------------------------------------------------------------------------------

BOUNDS = (  # these should fit
    Program("Llama-3-70B", "v5e:16x16", "NF4", 4096, "inherit"),
    Program("Llama-3-70B", "v5p:4x4x4", "NF4", 4096),
    Program("Llama-3-8B", "v5e:2x2", "NF4", 2048),
    Program("Llama-3-8B", "v5e:1x1", "bf16, host", 2048),
)
TPUS, TOKENS = ("v5e:4x4", "v6e:4x8", "v5p:4x4x4"), (2048, 8192)
LLAMAS, QWEN = ("Llama-3-70B", "Llama-3-8B"), ("Qwen3-30B-A3B",)


def programs(models: Sequence[str], machines: Sequence[str]) -> Iterator[Program]:
    for tokens, machine, model, base in itertools.product(TOKENS, machines, models, BASES):
        yield Program(model, machine, base, tokens)


SPLIT = tuple(Program("Qwen3-30B-A3B", "v5e:4x4", base, 2048, "inherit") for base in BASES)  # whole, they do not fit
TABLE = (*programs(LLAMAS, ("h100:8",)), *BOUNDS, *programs(LLAMAS, TPUS), *programs(QWEN, ("h100:8", *TPUS)), *SPLIT)
HEADER = ["model", "machine", "base", "tokens", "GiB", "of", "fits", "largest part", "GiB", "MB sent", "cycles"]


def row(program: Program, found: lora.CompileReport) -> list[str]:
    largest = max(found.parts, key=lambda part: found.parts[part])
    sent, cycles = sum(found.sent.values()), sum(found.cycles.values())
    return [
        *program.name,
        gib(found.needed),
        gib(found.hbm),
        "yes" if found.fits else "NO",
        largest.removesuffix(" (activations)"),
        gib(found.parts[largest]),
        f"{sent / 1e6:,.0f}" if sent else "-",
        count(cycles) if cycles else "-",
    ]


def write(rows: list[list[str]]) -> None:
    """Write rows into the page's table, in the place of those of the same programs."""
    page = ROOT / "docs" / "will_it_fit.md"
    before, rest = page.read_text(encoding="utf-8").split(START)
    table, after = rest.split(END, 1)
    programs = {program.name: i for i, program in enumerate(TABLE)}
    kept = [re.split(r" {2,}", line.strip()) for line in table.splitlines() if line.startswith(tuple(MODELS))]
    found = {tuple(one[:4]): one for one in [*kept, *rows]}
    text = format_table(HEADER, sorted(found.values(), key=lambda one: programs[tuple(one[:4])]), right=2)
    page.write_text(f"{before}{START}```\n{text}\n```\n{END}{after}", encoding="utf-8")


def main() -> None:
    if len(sys.argv) > 1:
        model, machine, base, tokens, *policy = sys.argv[1:]
        print(Program(model, machine, base, int(tokens), *policy).report())
        return
    for program in TABLE:
        found = program.report()
        one = row(program, found)
        print(*one, *found.advice[:1], sep=" | ", flush=True)
        write([one])


if __name__ == "__main__":
    main()
