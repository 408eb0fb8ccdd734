"""The steps that are compiled and compared: the decoder frozen, with LoRA, with LoRA by hand, packed, and trained."""

import functools
import math
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import optax
from cached import report
from jax import P

import lora_jax as lora

RANK, TOKENS = 16, 2048  # tokens of a row; each device that splits the batch has one row
OPTIMIZER = optax.adam(1e-4)
FORMATS = {"nf4": lora.bases.Nf4(double=False, stack=1), "int8": lora.bases.Int8(stack=1)}


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

    def lora_step(self, rule: lora.Rule = lora.Lora(rank=RANK), bits: str = "") -> lora.CompileReport:  # noqa: B008
        """`lora.jit_step` with adapters on all seven linears."""
        params = self.packed(bits) if bits else self.params
        state = lora.abstract_state(params, self.plan(params, rule), OPTIMIZER)
        apply = lora.lora_apply(self.model)

        def loss(adapters: Any, params: Any, ids: jax.Array, labels: jax.Array) -> jax.Array:
            return decoder.cross_entropy(apply(params, adapters, ids), labels)

        return self.report(lora.jit_step(loss, OPTIMIZER), state, params, self.ids, self.ids)

    def gradient(self, bits: str = "") -> lora.CompileReport:
        """The loss and the gradient of the adapters, by `jax.value_and_grad` of `lora_apply`."""
        params = self.packed(bits) if bits else self.params
        adapters = lora.abstract_state(params, self.plan(params, lora.Lora(rank=RANK)), OPTIMIZER).trainable
        apply = lora.lora_apply(self.model)

        def loss(adapters: Any, params: Any, ids: jax.Array, labels: jax.Array) -> jax.Array:
            return decoder.cross_entropy(apply(params, adapters, ids), labels)

        return self.report(jax.value_and_grad(loss), adapters, params, self.ids, self.ids)

    def floor(self) -> lora.CompileReport:
        """No adapters: forward, and the gradient of the embedded input, which adapters below would need."""

        def loss(x: jax.Array, params: Any, labels: jax.Array) -> jax.Array:
            return decoder.cross_entropy(self.model(params, x), labels)

        return self.report(jax.value_and_grad(loss), self.embedded, self.params, self.ids)

    def by_hand(self) -> lora.CompileReport:
        """LoRA written into the model: y = x W + (x A) B, with factors in bf16 for the products."""
        adapters = lora.abstract_state(self.params, self.plan(self.params, lora.Lora(rank=RANK)), OPTIMIZER).trainable
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
def setup(topology: str, slices: int = 1, size: decoder.Size = decoder.Size(), **axes: int) -> Setup:  # noqa: B008
    return Setup(topology, slices, axes, size)


def cycles(found: lora.CompileReport) -> int:
    return sum(found.cycles.values())


def temporary(found: lora.CompileReport) -> int:
    return found.parts["temporary (activations)"]


def sent(found: lora.CompileReport) -> int:
    return sum(found.sent.values())
