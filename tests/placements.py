"""A small transformer and the meshes that its training is spread over: the table of law 5."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P

import lora_jax as lora

LAYERS, D, HEADS, KV, HEAD, F, EXPERTS, VOCAB, ROWS, TIME, RANK = 3, 16, 4, 2, 4, 32, 4, 32, 16, 8, 2
SHAPES = {
    "q": (LAYERS, D, HEADS, HEAD),
    "kv": (LAYERS, D, 2, KV, HEAD),
    "o": (LAYERS, HEADS, HEAD, D),
    "up": (LAYERS, D, F),
    "down": (LAYERS, F, D),
    "router": (LAYERS, D, EXPERTS),
    "experts": (LAYERS, EXPERTS, D, D),
}


def model(params: Any, ids: jax.Array) -> jax.Array:
    """Token ids [B, T] -> logits [B, T, V]: scanned layers of grouped-query attention and a soft mixture of experts."""

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        q = jnp.einsum("btd,dhk->bthk", x, p["q"])
        k, v = jnp.einsum("btd,dchk->cbthk", x, p["kv"])
        k, v = (jnp.repeat(z, HEADS // KV, axis=2) for z in (k, v))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(HEAD))
        x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), p["o"])
        x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
        gates = jax.nn.softmax(x @ p["router"])
        each = jnp.einsum("bte,btd->ebtd", gates, x)
        return x + jnp.einsum("ebtd,edk->ebtk", each, p["experts"]).sum(0), None

    x, _ = jax.lax.scan(layer, params["embed"][ids], params["layers"])
    return x @ params["embed"].T


@functools.cache
def params() -> Any:
    keys = iter(jax.random.split(jax.random.key(0), len(SHAPES) + 1))
    layers = {name: jax.random.normal(next(keys), shape) / (2 * math.sqrt(D)) for name, shape in SHAPES.items()}
    return {"embed": jax.random.normal(next(keys), (VOCAB, D)), "layers": layers}


@functools.cache
def plan() -> lora.Plan:
    rules = {"layers/router": None, "layers/.*": lora.Lora(RANK, alpha=4)}
    return lora.plan(model, params(), batch(0)[0], rules=rules)


def batch(step: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(step).integers(0, VOCAB, (rows, TIME + 1)).astype(np.int32)
    return ids[:, :-1], ids[:, 1:]


apply = lora.lora_apply(model)


def loss(adapters: Any, params: Any, ids: jax.Array, labels: jax.Array) -> Any:
    logits = apply(params, adapters, ids)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return value, {"accuracy": (logits.argmax(-1) == labels).mean()}


@functools.cache
def optimizer() -> optax.GradientTransformation:
    return lora.freeze_base(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)))


@dataclass(frozen=True, eq=False)
class Placement:
    """A mesh, and what its axes split: of the base, by the names of its axes, and of the batch."""

    name: str
    axes: dict[str, int]
    batch: P
    base: dict[str, P]

    def mesh(self, kind: Any = jax.sharding.AxisType.Auto) -> jax.sharding.Mesh:
        n = math.prod(self.axes.values())
        kinds = (kind,) * len(self.axes)
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), kinds, devices=jax.devices()[:n])

    def specs(self) -> Any:
        layers = {name: self.base.get(name, P()) for name in SHAPES}
        return {"embed": self.base.get("embed", P()), "layers": layers}

    def params(self, mesh: jax.sharding.Mesh) -> Any:
        return jax.device_put(params(), jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), self.specs()))


def over(fsdp: str | None = None, tensor: str | None = None, expert: str | None = None) -> dict[str, P]:
    """The usual places: heads and inner axes over `tensor`, the model's width over `fsdp`, experts over `expert`."""
    return {
        "embed": P(None, fsdp),
        "q": P(None, fsdp, tensor),
        "kv": P(None, fsdp),  # fewer key and value heads than devices: whole along `tensor`
        "o": P(None, tensor, None, fsdp),
        "up": P(None, fsdp, tensor),
        "down": P(None, tensor, fsdp),
        "experts": P(None, expert, fsdp),
    }


PLACEMENTS = [
    Placement("data", {"data": 8}, P("data"), {}),
    Placement("fsdp", {"fsdp": 8}, P("fsdp"), over(fsdp="fsdp")),
    Placement("tensor", {"tensor": 4}, P(), over(tensor="tensor")),
    Placement("data and tensor", {"data": 2, "tensor": 4}, P("data"), over(tensor="tensor")),
    Placement(
        "data, fsdp and tensor", {"data": 2, "fsdp": 2, "tensor": 2}, P(("data", "fsdp")), over("fsdp", "tensor")
    ),
    Placement("data and expert", {"data": 2, "expert": 4}, P("data"), over(expert="expert")),
    Placement("data and sequence", {"data": 2, "sequence": 4}, P("data", "sequence"), {}),
    Placement(
        "fsdp, sequence and tensor",
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        P("fsdp", "sequence"),
        over("fsdp", "tensor"),
    ),
]
