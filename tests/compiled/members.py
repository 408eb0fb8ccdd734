"""Many adapters over one base, as they are compiled: a population over experts, and a mixed batch over two linears.

Axes: N members, S slots, B examples, T tokens, D width, F inner width, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import layers
import programs
from cached import report
from jax import P

import lora_jax as lora

D, F, E, T, SLOTS = layers.D, layers.F, layers.E, layers.T, 4
EACH = 2  # members, or examples, on each device
SHORT = 256  # examples of one token
RULE = lora.Lora(rank=programs.RANK)
EXPERTS = layers.EXPERTS


def routed(params: Any, x: jax.Array) -> jax.Array:
    """Tokens [T, D], each sent to the one expert that its router names."""
    to = jnp.argmax(x @ params["router"], -1)
    order = jnp.argsort(to)
    sizes = jnp.sum(to[:, None] == jnp.arange(E)[None], 0, dtype=jnp.int32)
    inner = jax.nn.silu(jax.lax.ragged_dot(x[order], params["up"], sizes))
    return x.at[order].add(jax.lax.ragged_dot(inner, params["down"], sizes))


def loss_of(model: Any) -> Any:
    apply = lora.lora_apply(model)

    def loss(adapters: Any, params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(apply(params, adapters, x).astype(jnp.float32)))

    return loss


def population(topology: str, devices: int) -> lora.CompileReport:
    """A step of two members on each device, of which each has tokens and routes of its own; the base is whole."""
    mesh, n = lora.topology_mesh(topology, members=devices), EACH * devices
    params = lora.abstract(EXPERTS, mesh)
    tokens = layers.bf16(T, D)
    plan = lora.plan(routed, EXPERTS, tokens, rules={"up|down": RULE})
    optimizer = programs.OPTIMIZER
    one = lora.abstract_state(params, plan, optimizer).trainable
    made = lora.Population.create([jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)] * n, optimizer)
    place = lambda leaf: lora.abstract(leaf, mesh, P("members") if leaf.ndim else P())  # noqa: E731
    x = lora.abstract(layers.bf16(n, T, D), mesh, P("members"))
    step = lora.population_step(loss_of(routed), optimizer, mesh=mesh, members="members")
    return report(step, jax.tree.map(place, made), params, lora.PerMember(x), topology=topology)


def mixed(topology: str, devices: int) -> lora.CompileReport:
    """The loss of a mixed batch and the gradient of its bank; the base is split over fsdp, and so are the examples."""
    stack = layers.Compiled("stack", topology, devices)
    one = stack.adapters(RULE)
    bank = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((SLOTS, *leaf.shape), leaf.dtype), one)
    loss = loss_of(stack.model)

    def of_bank(bank: Any, params: Any, ids: jax.Array, x: jax.Array) -> jax.Array:
        return loss(lora.select(bank, ids), params, x)

    x = lora.abstract(layers.bf16(EACH * devices, T, D), stack.mesh, P("fsdp"))
    ids = lora.abstract(jax.ShapeDtypeStruct((EACH * devices,), jnp.int32), stack.mesh, P("fsdp"))
    step = jax.value_and_grad(of_bank)
    return report(step, lora.abstract(bank, stack.mesh), stack.params, ids, x, topology=topology)


def short(topology: str, devices: int) -> lora.CompileReport:
    """The same of many examples of one token, on one device: examples of one slot lie side by side."""
    mesh = lora.topology_mesh(topology, data=devices)
    params = lora.abstract(layers.STACK, mesh)
    model = layers.stack(None)
    plan = lora.plan(model, params, layers.bf16(2, D), rules={".*": RULE})
    one = lora.abstract_state(params, plan, programs.OPTIMIZER).trainable
    bank = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((SLOTS, *leaf.shape), leaf.dtype), one)
    loss = loss_of(model)

    def of_bank(bank: Any, params: Any, ids: jax.Array, x: jax.Array) -> jax.Array:
        return loss(lora.select(bank, ids), params, x)

    x, ids = layers.bf16(SHORT, D), jax.ShapeDtypeStruct((SHORT,), jnp.int32)
    args = (lora.abstract(arg, mesh) for arg in (bank, params, ids, x))
    return report(jax.value_and_grad(of_bank, argnums=0), *args, topology=topology)
