"""Dropout on the input of the adapters: y = x @ W + scale * dropout(x) @ A @ B."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.adapter import Adapter, AdapterWrapper, lower
from lora_jax.core.argument_checks import check_adapter_dict, check_key
from lora_jax.core.arrays import concrete, describe, is_key
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.operand import Operand, Wrapper
from lora_jax.core.paths import path_hash, path_key
from lora_jax.core.products import Product
from lora_jax.core.serialization import register_node

CALL = "with_dropout(adapters, key, rate)"


def with_dropout(adapters: Mapping[str, Adapter], key: jax.Array, rate: Any = 0.1) -> dict[str, Adapter]:
    """Return the adapters for one training call, in which each entry of x is dropped with probability `rate` before A.

    y = x @ W + scale * (mask * x / (1 - rate)) @ A @ B, a mask drawn for each weight and each stacked layer or expert.
    Call it inside the loss, with a new key for each step, and differentiate with respect to the adapters that go in:

        def loss(adapters, params, key, x, y):
            return jnp.mean((apply(params, lora.with_dropout(adapters, key, 0.1), x) - y) ** 2)

    The masks depend on the key, the path and the layer alone: they are the same on every host, for any sharding and
    under remat. A weight that one call uses several times, as a recurrent one, has one mask for all uses of one shape.
    The frozen product sees all of x, and `Ia3`, which scales it, has no x of its own to drop. Neither have rows of
    embeddings, and weights that are materialized. For several sets of adapters at once, call it inside the function
    that is vmapped.

    Keys of `jax.random.key(seed, impl="rbg")` draw the masks by the hardware's own generator, which is the fastest on
    TPUs; on CPUs they bring nothing. Their masks are the same on every sharding, unless XLA is told otherwise by
    `--xla_tpu_spmd_rng_bit_generator_unsafe`, but other ones on another backend or version of XLA, and under `jax.vmap`
    over keys. https://docs.jax.dev/en/latest/jax.random.html compares the generators.

    Args:
        adapters: `{path: adapter}`, those that are trained.
        key: a `jax.random.key` (or an old-style `PRNGKey`).
        rate: the probability that an entry is dropped, at least 0 and below 1; 0 returns the adapters as they are. Or
            an fp32 scalar, which may be traced: each member of a population has its own.

    Returns:
        `{path: adapter}`, for this call.

    Raises:
        LoraError: another rate; `adapters` are no `{path: adapter}`, or `key` is no random key.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def model(params, x):
    ...     return x @ params["w"]
    >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((1, 6))
    >>> plan = lora.plan(model, params, x, rules={"w": lora.Lora(rank=2)})
    >>> adapters = jax.tree.map(lambda array: array + 1, lora.init(jax.random.key(0), params, plan))
    >>> dropped = lora.with_dropout(adapters, jax.random.key(1), rate=0.5)
    >>> apply = lora.lora_apply(model)
    >>> bool(jnp.allclose(apply(params, dropped, x), apply(params, adapters, x)))
    False
    """
    check_adapter_dict(CALL, adapters)
    check_key(CALL, key)
    if isinstance(rate, jax.Array):
        _check_array(rate)
    elif isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise LoraError(f"with_dropout(rate={rate!r}): the rate is a number of at least 0 and below 1, such as 0.1.")
    if not isinstance(rate, jax.Array) and rate == 0:
        return dict(adapters)
    if not is_key(key):
        key = jax.random.wrap_key_data(key)
    inner = {
        path: adapter.inner if isinstance(adapter, DropoutAdapter) else adapter for path, adapter in adapters.items()
    }
    stacks = {path: adapter.axes.sizes(adapter.kernel_shape())[0] for path, adapter in inner.items()}
    keys = _keys(key, {path: math.prod(stack) for path, stack in stacks.items()})

    def of(stack: tuple[int, ...]) -> tuple[Any, float | None]:
        return (jnp.full(stack, 1 - rate), None) if isinstance(rate, jax.Array) else (None, float(rate))

    return {
        path: DropoutAdapter(adapter, keys[path].reshape(stacks[path]), *of(stacks[path]), adapter.axes)
        for path, adapter in inner.items()
    }


def _check_array(rate: jax.Array) -> None:
    """Raise if an array is no rate; of a traced one, the number is not known."""
    is_wrong = rate.shape != () or rate.dtype != jnp.float32 or (concrete(rate) and not 0 <= float(rate) < 1)
    if is_wrong:
        shown = float(rate) if concrete(rate) and rate.shape == () else describe(rate)
        raise LoraError(f"with_dropout(rate) is {shown}, expected a number, or float32[], at least 0 and below 1.")


def _keys(key: jax.Array, counts: Mapping[str, int]) -> dict[str, jax.Array]:
    """Return `jax.random.split(path_key(key, path), count)` for each path.

    All paths of one count are hashed together. Programs of many layers would otherwise be slow to compile: each hash
    that stands by itself is a program of its own, and each mask too whose key lies at a place known to the compiler.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":  # others may give other numbers under vmap
        return {path: jax.random.split(path_key(key, path), n) for path, n in counts.items()}
    keys: dict[str, jax.Array] = {}
    for n in dict.fromkeys(counts.values()):
        paths = [path for path, count in counts.items() if count == n]
        hashes = np.array([path_hash(path) for path in paths], np.uint32)
        together = jax.vmap(lambda one, n=n: jax.random.split(jax.random.fold_in(key, one), n))(hashes)  # [paths, n]
        keys |= {path: _row(together, i) for i, path in enumerate(paths)}
    return keys


def _row(table: jax.Array, i: int) -> jax.Array:
    """Return table[i], in code that is the same for all i, which XLA's CPU backend compiles once for all of them.

    A number that is known would become part of each kernel that reads the row, and so would a scalar constant.
    """
    where = jax.lax.optimization_barrier(np.array([i, 0], np.int32))
    return jax.lax.dynamic_index_in_dim(table, where[0], keepdims=False)


@register_node("lora_jax.dropout")
@dataclass(frozen=True)
class DropoutAdapter(AdapterWrapper):
    """An adapter whose input has dropout."""

    inner: Adapter
    keys: jax.Array  # [*stack]
    kept: jax.Array | None  # f32 [*stack], 1 - rate, all the same: where the rate is data
    rate: float | None = field(metadata={"static": True})
    axes: KernelAxes = field(metadata={"static": True})

    def lower(self, w: Any) -> Operand | jax.Array:
        operand = lower(self.inner, w)
        if not isinstance(operand, Operand):
            return operand
        return DropoutOperand(operand, self.keys, self.kept, self.rate, self.axes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DropoutOperand(Wrapper):
    """The operand of a `DropoutAdapter`."""

    inner: Operand
    keys: jax.Array  # [*stack]
    kept: jax.Array | None  # [*stack]
    rate: float | None = field(metadata={"static": True})
    axes: KernelAxes = field(metadata={"static": True})

    layout = MappingProxyType({"keys": ("stack",), "kept": ("stack",)})

    def apply(self, product: Product) -> jax.Array:
        return self.inner.apply(product.keep(self.keys, self.kept if self.rate is None else 1 - self.rate))

    def concatenate(self, parts: Sequence[Any], sizes: Sequence[int], axis: int) -> "DropoutOperand | None":
        """Join the operands inside. Parts that share inputs share a mask and a rate that is data, the first one's."""
        if any(p is not None and (not isinstance(p, DropoutOperand) or p.rate != self.rate) for p in parts):
            return None
        inner = self.inner.concatenate([p and p.inner for p in parts], sizes, axis)
        if inner is None or axis not in self.axes.stack:
            return None if inner is None else self.around(inner)
        at = self.axes.stack.index(axis)
        keys = [
            jnp.repeat(self.keys.take(jnp.array([0]), at), n, at) if p is None else p.keys
            for p, n in zip(parts, sizes, strict=True)
        ]
        joined = dataclasses.replace(self.around(inner), keys=jnp.concatenate(keys, at))
        if self.kept is None:
            return joined
        first = self.kept.take(jnp.array([0]), at)
        kept = [jnp.repeat(first, n, at) if p is None else p.kept for p, n in zip(parts, sizes, strict=True)]
        return dataclasses.replace(joined, kept=jnp.concatenate(kept, at))
