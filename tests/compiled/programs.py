"""The steps that are compiled and compared: the decoder frozen, with LoRA, with LoRA by hand, packed, and trained."""

import functools
import math
from collections.abc import Callable
from typing import Any

import cached
import decoder
import jax
import jax.numpy as jnp
import optax
from cached import report
from jax import P

import lora_jax as lora
from lora_jax.analysis.abstract_arguments import argument_bytes
from lora_jax.analysis.compile_report import report_on
from lora_jax.analysis.topologies import find_topology

RANK, TOKENS = 16, 2048  # tokens of a row; each device that splits the batch has one row
OPTIMIZER = optax.adam(1e-4)
FORMATS = {"nf4": lora.bases.Nf4(double=False, stack=1), "int8": lora.bases.Int8(stack=1)}
SMALL = decoder.Size(layers=2, width=512, inner=1024, heads=4, kv_heads=4, vocabulary=1024)  # for counts alone
FEW = 256  # tokens of a row

Loss = Callable[[Any, Any, jax.Array, jax.Array], jax.Array]


class Setup:
    """The shapes of the decoder on one mesh."""

    def __init__(self, topology: str, slices: int, axes: dict[str, int], size: decoder.Size, tokens: int = TOKENS):
        self.topology, self.slices, self.size = topology, slices, size
        self.mesh = lora.topology_mesh(topology, slices=slices, **axes)
        self.params = lora.abstract(decoder.shapes(size), self.mesh, decoder.specs(self.mesh))
        split = decoder.batch_axes(self.mesh)
        rows = math.prod(self.mesh.shape[name] for name in split)
        self.ids = lora.abstract(jax.ShapeDtypeStruct((rows, tokens), jnp.int32), self.mesh, P(split))
        embedded = jax.ShapeDtypeStruct((rows, tokens, size.width), jnp.bfloat16)
        self.embedded = lora.abstract(embedded, self.mesh, P(split))
        self.model = decoder.make(size, self.mesh)

    def packed(self, bits: str) -> Any:
        rules = {decoder.LINEARS: FORMATS[bits]}
        shapes = jax.eval_shape(lambda params: lora.bases.quantize(params, rules), decoder.shapes(self.size))
        return lora.abstract(shapes, self.mesh, decoder.specs(self.mesh))

    def plan(self, params: Any, rule: lora.Rule) -> lora.Plan:
        return lora.plan(self.model, params, self.ids, rules={decoder.LINEARS: rule})

    def report(self, step: Any, *args: Any) -> lora.CompileReport:
        return report(step, *args, topology=self.topology, slices=self.slices)

    def loss(self, model: Any = None, keep: Any = "inputs") -> Loss:
        """Return the loss of adapters on all seven linears."""
        apply = lora.lora_apply(model or self.model, keep=keep)

        def loss(adapters: Any, params: Any, ids: jax.Array, labels: jax.Array) -> jax.Array:
            return decoder.cross_entropy(apply(params, adapters, ids), labels)

        return loss

    def state(self, params: Any, rule: lora.Rule = lora.Lora(rank=RANK)) -> lora.TrainState:  # noqa: B008
        return lora.abstract_state(params, self.plan(params, rule), OPTIMIZER)

    def lora_step(self, rule: lora.Rule = lora.Lora(rank=RANK), bits: str = "") -> lora.CompileReport:  # noqa: B008
        """`lora.jit_step` with adapters on all seven linears."""
        params = self.packed(bits) if bits else self.params
        step = lora.jit_step(self.loss(), OPTIMIZER)
        return self.report(step, self.state(params, rule), params, self.ids, self.ids)

    def shard_map_step(self) -> lora.CompileReport:
        """`lora.shard_map_step` over the axis "data". Inside of it the model says nothing of that axis."""
        step = lora.shard_map_step(self.loss(decoder.make(self.size)), OPTIMIZER, self.mesh, P("data"))
        return self.report(step, self.state(self.params), self.params, self.ids, self.ids)

    def pmap_step(self) -> lora.CompileReport:
        """What `lora.pmap_step` runs. That takes the devices at hand, so the `jax.pmap` around it is written here."""
        n = self.mesh.size
        step = functools.partial(lora.train_step, self.loss(decoder.make(self.size)), OPTIMIZER, axis_name="batch")
        mapped = jax.pmap(step, "batch", devices=list(self.mesh.devices.flat), donate_argnums=0)
        everywhere = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype), (self.state(self.params), self.params)
        )
        ids = jax.ShapeDtypeStruct((n, self.ids.shape[0] // n, self.ids.shape[1]), jnp.int32)
        machine = find_topology(self.topology, self.slices)
        compiled = cached.compiled(machine, mapped.lower(*everywhere, ids, ids), everywhere)
        return report_on(machine, argument_bytes((self.state(self.params), self.params)), compiled)

    def gradient(self, bits: str = "", keep: Any = "inputs") -> lora.CompileReport:
        """The loss and the gradient of the adapters, by `jax.value_and_grad` of `lora_apply`."""
        params = self.packed(bits) if bits else self.params
        step = jax.value_and_grad(self.loss(keep=keep))
        return self.report(step, self.state(params).trainable, params, self.ids, self.ids)

    def value_and_grad(self) -> lora.CompileReport:
        """The same by `lora.value_and_grad`, which knows how the batch is split."""
        step = lora.value_and_grad(self.loss(), batch_sharding=self.ids.sharding)
        return self.report(step, self.state(self.params).trainable, self.params, self.ids, self.ids)

    def init(self) -> lora.CompileReport:
        """Fresh adapters where `lora.adapter_shardings` has them."""
        plan = self.plan(self.params, lora.Lora(rank=RANK))
        key = lora.abstract(jax.eval_shape(lambda: jax.random.key(0)), self.mesh)
        return self.report(lambda key: lora.init(key, self.params, plan), key)

    def merge(self) -> lora.CompileReport:
        """All adapters merged, into weights where the weights were."""
        step = jax.jit(lora.merge, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.params))
        return self.report(step, self.params, self.state(self.params).trainable)

    def floor(self) -> lora.CompileReport:
        """No adapters: forward, and the gradient of the embedded input, which adapters below would need."""

        def loss(x: jax.Array, params: Any, labels: jax.Array) -> jax.Array:
            return decoder.cross_entropy(self.model(params, x), labels)

        return self.report(jax.value_and_grad(loss), self.embedded, self.params, self.ids)

    def by_hand(self) -> lora.CompileReport:
        """LoRA written into the model: y = x W + (x A) B, with factors in bf16 for the products."""
        adapters = self.state(self.params).trainable
        factors = {path.removeprefix("layers/"): (one.a, one.b) for path, one in adapters.items()}

        def linear(_: str, x: jax.Array, weight: Any) -> jax.Array:
            w, a, b = weight
            return x @ w + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)

        model = decoder.make(self.size, self.mesh, linear=linear)

        def loss(factors: Any, params: Any, ids: jax.Array, labels: jax.Array) -> jax.Array:
            layers = {k: (w, *factors[k]) if k in factors else w for k, w in params["layers"].items()}
            return decoder.cross_entropy(model(params | {"layers": layers}, ids), labels)

        return self.report(jax.value_and_grad(loss), factors, self.params, self.ids, self.ids)

    def full(self) -> lora.CompileReport:
        """Every weight trained: the loss and its gradient."""

        def loss(params: Any, ids: jax.Array, labels: jax.Array) -> jax.Array:
            return decoder.cross_entropy(self.model(params, ids), labels)

        return self.report(jax.value_and_grad(loss), self.params, self.ids, self.ids)


@functools.cache
def setup(
    topology: str,
    slices: int = 1,
    size: decoder.Size = decoder.Size(),  # noqa: B008
    tokens: int = TOKENS,
    **axes: int,
) -> Setup:
    return Setup(topology, slices, axes, size, tokens)


def small(topology: str, slices: int = 1, **axes: int) -> Setup:
    """Return the decoder at a size at which a compile takes some seconds: what is sent, dtypes and bytes, no cycles."""
    return setup(topology, slices, SMALL, FEW, **axes)


def cycles(found: lora.CompileReport) -> int:
    return sum(found.cycles.values())


def temporary(found: lora.CompileReport) -> int:
    return found.parts["temporary (activations)"]


def sent(found: lora.CompileReport) -> int:
    return sum(found.sent.values())
