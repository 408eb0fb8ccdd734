"""Small models beside the decoder, as shapes and functions: experts, convolutions, and a stack of two linears.

Axes: L layers, B rows, T tokens, D width, F inner width, E experts, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import programs
from cached import report
from jax import P

import lora_jax as lora

L, D, F, E, T, HEADS, SIZE = 2, 512, 1024, 8, 32, 8, 64
Model = Callable[..., jax.Array]


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def stack(_: Any) -> Model:
    """Two linears in each of L scanned layers."""

    def model(params: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            return x + jnp.tanh(x @ p["up"]) @ p["down"], None

        return jax.lax.scan(jax.checkpoint(layer), x, params)[0]

    return model


STACK = {"up": bf16(L, D, F), "down": bf16(L, F, D)}


def experts(mesh: Any) -> Model:
    """Experts split over the axis "expert": all tokens of it meet on each device, sorted, and go through its experts.

    The rows are split over the same axis. Each token has one expert, the one with its number modulo E, as what a router
    finds is not known to a compiler either: the sizes of groups are computed.
    """

    def local(up: jax.Array, down: jax.Array, x: jax.Array, to: jax.Array) -> jax.Array:
        here, first = up.shape[0], jax.lax.axis_index("expert") * up.shape[0]
        every = jax.lax.all_gather(x.reshape(-1, D), "expert", tiled=True)
        own = jax.lax.all_gather(to.reshape(-1), "expert", tiled=True) - first
        own = jnp.where((own >= 0) & (own < here), own, here)  # tokens of other experts come last, and are in no group
        order = jnp.argsort(own)
        sizes = jnp.sum(own[:, None] == jnp.arange(here)[None], 0, dtype=jnp.int32)
        inner = jax.nn.silu(jax.lax.ragged_dot(every[order], up, sizes))
        y = jnp.zeros_like(every).at[order].set(jax.lax.ragged_dot(inner, down, sizes))
        return jax.lax.psum_scatter(y, "expert", tiled=True).reshape(x.shape)

    def model(params: Any, x: jax.Array) -> jax.Array:
        to = jnp.argmax(x @ params["router"], -1).astype(jnp.int32)
        split = P("expert")
        run = jax.shard_map(local, mesh=mesh, in_specs=(split, split, split, split), out_specs=split)
        return x + run(params["up"], params["down"], x, to)

    return model


EXPERTS = {"router": bf16(D, E), "up": bf16(E, D, F), "down": bf16(E, F, D)}


def encoder(_: Any) -> Model:
    """A layer as speech has it: two convolutions, the second of them of each channel alone, and attention."""

    def conv(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
        names = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=names, feature_group_count=groups
        )

    def model(params: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(conv(x, params["conv"]))
        x = x + conv(x, params["depthwise"], D)
        return x + heads(None)(params, x)

    return model


def heads(_: Any) -> Model:
    """Attention whose kernels are [D, H, 64] and [H, 64, D]."""

    def model(params: Any, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btd,dhr->bthr", x, params[name]) for name in ("q", "k", "v"))
        return jnp.einsum("bthr,hrd->btd", decoder.plain_attention(q, k, v), params["o"])

    return model


KERNELS = {**{name: bf16(D, HEADS, SIZE) for name in ("q", "k", "v")}, "o": bf16(HEADS, SIZE, D)}
ENCODER = {"conv": bf16(3, D, D), "depthwise": bf16(3, 1, D), **KERNELS}


@dataclass(frozen=True)
class Layers:
    """A model, its weights, where they are, and which of them have adapters."""

    make: Callable[[Any], Model]  # from the mesh: model(params, x [B, T, D]) -> y
    shapes: dict[str, jax.ShapeDtypeStruct]
    specs: dict[str, P]
    axis: str = "fsdp"  # of the mesh: it splits the rows
    adapted: str = ".*"


MODELS = {
    "stack": Layers(stack, STACK, {"up": P(None, "fsdp"), "down": P(None, None, "fsdp")}),
    "experts": Layers(
        experts, EXPERTS, {"router": P(), "up": P("expert"), "down": P("expert")}, axis="expert", adapted="up|down"
    ),
    "encoder": Layers(
        encoder,
        ENCODER,
        {"conv": P(None, "fsdp"), "depthwise": P(), **{name: P("fsdp") for name in "qkv"}, "o": P(None, None, "fsdp")},
        adapted="conv|[qkvo]",
    ),
    "heads": Layers(heads, KERNELS, {**{name: P("fsdp") for name in "qkv"}, "o": P(None, None, "fsdp")}),
}


class Compiled:
    """A model on all devices of a machine, in one axis."""

    def __init__(self, name: str, topology: str, devices: int):
        self.layers, self.topology = MODELS[name], topology
        axis = self.layers.axis
        self.mesh = lora.topology_mesh(topology, **{axis: devices})
        self.params = lora.abstract(self.layers.shapes, self.mesh, self.layers.specs)
        self.x = lora.abstract(bf16(devices, T, D), self.mesh, P(axis))
        self.model = self.layers.make(self.mesh)

    def adapters(self, rule: lora.Rule) -> Any:
        plan = lora.plan(self.model, self.params, self.x, rules={self.layers.adapted: rule})
        return lora.abstract_state(self.params, plan, programs.OPTIMIZER).trainable

    def frozen(self) -> lora.CompileReport:
        """The loss and the gradient of x."""

        def loss(x: jax.Array, params: Any) -> jax.Array:
            return _loss(self.model(params, x))

        return report(jax.value_and_grad(loss), self.x, self.params, topology=self.topology)

    def gradient(self, rule: lora.Rule) -> lora.CompileReport:
        """The loss and the gradient of the adapters, by `lora.value_and_grad` as in `lora.jit_step`."""
        adapters = self.adapters(rule)
        places = jax.tree.map(lambda leaf: leaf.sharding, adapters)
        step = lora.value_and_grad(self.loss(), batch_sharding=self.x.sharding, shardings=places)
        return report(step, adapters, self.params, self.x, topology=self.topology)

    def plain_gradient(self, rule: lora.Rule) -> lora.CompileReport:
        """The same by `jax.value_and_grad`."""
        step = jax.value_and_grad(self.loss())
        return report(step, self.adapters(rule), self.params, self.x, topology=self.topology)

    def loss(self) -> Callable[..., jax.Array]:
        apply = lora.lora_apply(self.model)

        def loss(adapters: Any, params: Any, x: jax.Array) -> jax.Array:
            return _loss(apply(params, adapters, x))

        return loss


def _loss(y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(y.astype(jnp.float32)))
