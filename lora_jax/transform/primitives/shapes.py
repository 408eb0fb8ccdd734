"""Operations that move or reshape an adapted weight: they run on the frozen array, and the operand follows."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core._compat import JaxprEqn, bind, vary
from lora_jax.core.arrays import accumulator
from lora_jax.core.deferred import blocks
from lora_jax.core.packed import Packed, is_packed, unpacked
from lora_jax.transform.adapted_weight import AdaptedWeight, plain
from lora_jax.transform.no_adapter import NoAdapter
from lora_jax.transform.primitives.registry import no_rule, rule


@rule("copy", "sharding_constraint", "device_put", "reduce_precision", "optimization_barrier", "name")
def of_the_value(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """Run an operation on the frozen value alone, which changes where it is, when, how precise, or what it is called.

    The operand's arrays stay out of a barrier: its derivative would have a term for W beside theirs.
    """
    values = [a.value if isinstance(a, AdaptedWeight) else a for a in args]
    if eqn.primitive.name == "reduce_precision":
        values = [unpacked(value) for value in values]
    arrays = [value for value in values if not is_packed(value)]  # what is packed stays as it is
    results = iter(bind(eqn, arrays) if arrays else [])
    out = [value if is_packed(value) else next(results) for value in values]
    return [a.replace(o) if isinstance(a, AdaptedWeight) else o for a, o in zip(args, out, strict=True)]


@rule("stop_gradient")
def stop_gradient(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    """Stop the gradient of the value, of the operand and of the factor."""
    stopped = weight.replace(jax.tree.map(lax.stop_gradient, weight.value), weight.operand.stop())
    return [dataclasses.replace(stopped, factor=jax.tree.map(lax.stop_gradient, weight.factor))]


@rule("pvary")
def pvary(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    """Let the operand's arrays differ between the devices of a `shard_map` where the weight does."""
    return [jax.tree.map(lambda array: vary(array, eqn.params["axes"]), weight)]


@rule("convert_element_type")
def convert_element_type(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    """Cast the frozen value; the factors are cast to the product's dtype when they are used."""
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return no_rule(eqn, weight, why=f"casts it to {jnp.dtype(dtype).name}, which rounds W' itself")
    if is_packed(weight.value) and weight.factor is not None and not _has_fp32s_range(dtype):
        weight = weight.scaled()
    if is_packed(weight.value):
        return [weight.replace(weight.value.with_deferred("cast", jnp.dtype(dtype)))]
    return of_the_value(eqn, weight)


def _has_fp32s_range(dtype: Any) -> bool:
    return bool(jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp)


@rule("transpose")
def transpose(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    permutation = tuple(eqn.params["permutation"])
    value = _transposed(weight.value, permutation) if is_packed(weight.value) else weight.value.transpose(permutation)
    return [weight.replace(value, weight.operand.permute(permutation))]


def _transposed(packed: Packed, permutation: tuple[int, ...]) -> Packed | jax.Array:
    """Transpose each matrix when it is unpacked; the stack has to stay where it is."""
    n = len(packed.stack)
    if permutation[:n] != tuple(range(n)):
        return packed.dense().transpose(permutation)
    return packed.with_deferred("transpose", tuple(axis - n for axis in permutation[n:]))


def _reshaped_packed(packed: Packed, shape: tuple[int, ...]) -> Packed | jax.Array:
    """Reshape each matrix when it is unpacked; the axes of the stack have to stay apart from its own."""
    n = next((n for n in range(len(shape) + 1) if math.prod(shape[:n]) == math.prod(packed.stack)), None)
    if n is None:
        return packed.dense().reshape(shape)
    stack, old = shape[:n], len(packed.stack)
    return packed.on_stack(lambda leaf: leaf.reshape(*stack, *leaf.shape[old:])).with_deferred("reshape", shape[n:])


@rule("reduce_sum")
def reduce_sum(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    """Sum over axes of size 1, as `einsum` takes them away."""
    if any(weight.shape[axis] != 1 for axis in eqn.params["axes"]):
        return no_rule(eqn, weight)
    return reshape(eqn, weight)


@rule("reshape", "squeeze")
def reshape(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    """Merge and split axes of one group; axes of size 1 come and go."""
    operand, value = weight.operand, weight.value
    if is_packed(value):
        value = _reshaped_packed(value, eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]
    else:
        [value] = bind(eqn, [value])
    old, new = [n for n in weight.shape if n != 1], [n for n in value.shape if n != 1]
    if 0 in weight.shape:
        return no_rule(eqn, weight)
    for axis in reversed(range(weight.ndim)):
        if weight.shape[axis] == 1:
            operand = operand.replace_axes(axis, 1, 0, jnp.squeeze)
    for start, count, sizes in reversed(list(blocks(old, new))):
        if len({operand.group(axis) for axis in range(start, start + count)}) > 1:
            return no_rule(eqn, weight, why="mixes its axes of inputs, outputs or stacked matrices")
        if (count, len(sizes)) != (1, 1):
            operand = operand.replace_axes(start, count, len(sizes), _reshaped(count, sizes))
    for axis, n in enumerate(value.shape):
        if n == 1:
            operand = operand.insert_axis(axis)
    return [weight.replace(value, operand)]


def _reshaped(count: int, sizes: tuple[int, ...]) -> Callable[[jax.Array, int], jax.Array]:
    return lambda array, at: array.reshape(*array.shape[:at], *sizes, *array.shape[at + count :])


@rule("broadcast_in_dim")
def broadcast_in_dim(eqn: JaxprEqn, weight: AdaptedWeight, *dynamic_shape: Any) -> list[Any]:
    """Stack the matrix with itself along new axes, and along those that grow from size 1."""
    operand, kept = weight.operand, eqn.params["broadcast_dimensions"]
    [value] = bind(eqn, [unpacked(weight.value), *dynamic_shape])
    for axis, size in enumerate(value.shape):
        grows = axis in kept and weight.shape[kept.index(axis)] != size
        if grows:
            operand = operand.replace_axes(axis, 1, 0, jnp.squeeze)
        if grows or axis not in kept:
            operand = operand.insert_axis(axis)
            if size != 1:
                operand = operand.replace_axes(axis, 1, 1, functools.partial(_repeated, n=size))
    return [weight.replace(value, operand)]


def _repeated(array: jax.Array, at: int, n: int) -> jax.Array:
    return jnp.broadcast_to(array, (*array.shape[:at], n, *array.shape[at + 1 :]))


@rule("rev")
def rev(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    operand = weight.operand
    for axis in eqn.params["dimensions"]:
        operand = operand.replace_axes(axis, 1, 1, lambda array, at: lax.rev(array, (at,)))
    return [weight.replace(bind(eqn, [unpacked(weight.value)])[0], operand)]


@rule("pad")
def pad(eqn: JaxprEqn, weight: Any, value: Any) -> list[Any]:
    """Pad the value with what the program says, and the operand with zeros."""
    if not isinstance(weight, AdaptedWeight):
        return no_rule(eqn, weight, value)
    operand = weight.operand
    if not operand.is_additive and not (isinstance(value, float | int | np.ndarray | np.generic) and value == 0):
        return no_rule(eqn, weight, value, why="pads it, and its adapter scales what it pads with")
    for axis, config in enumerate(eqn.params["padding_config"]):
        if any(config):

            def fn(array: jax.Array, at: int, config: Any = config) -> jax.Array:
                configs = [config if i == at else (0, 0, 0) for i in range(array.ndim)]
                return lax.pad(array, jnp.zeros((), array.dtype), configs)

            operand = operand.replace_axes(axis, 1, 1, fn)
    return [weight.replace(bind(eqn, [unpacked(weight.value), value])[0], operand)]


@rule("all_gather", "all_gather_invariant")
def all_gather(eqn: JaxprEqn, weight: AdaptedWeight) -> list[Any]:
    """Gather a weight that is sharded within `shard_map`, and the operand with it."""
    if not eqn.params["tiled"]:
        return no_rule(eqn, weight)
    axis, operand = eqn.params["all_gather_dimension"], weight.operand

    def fn(array: jax.Array, at: int) -> jax.Array:
        return bind(eqn.replace(params={**eqn.params, "all_gather_dimension": at}), [array])[0]

    return [weight.replace(fn(unpacked(weight.value), axis), operand.replace_axes(axis, 1, 1, fn))]


@rule("mul", "div", "neg")
def scale(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """Multiply by a scalar: W and one factor of the operand.

    So nothing overflows, and nothing is rounded, that the program does not overflow or round. The derivative by a
    computed scalar waits for the product, as x @ (c W) = c (x @ W): else it would multiply W with a matrix of its size.
    A packed weight stays as it is, and the scalar itself waits, unless its dtype has no room for x @ W.
    """
    weight, *others = args if isinstance(args[0], AdaptedWeight) else args[::-1]
    divides, wide = eqn.primitive.name == "div", accumulator(weight.value.dtype)
    if (divides and weight is args[1]) or any(isinstance(other, AdaptedWeight) or jnp.ndim(other) for other in others):
        return no_rule(eqn, *args, why="takes it with more than a scalar factor")

    def as_factor(other: Any) -> jax.Array:
        return 1 / jnp.asarray(other, wide) if divides else jnp.asarray(other, wide)

    factor = as_factor(others[0] if others else -1)
    if is_packed(weight.value) and _has_fp32s_range(weight.value.dtype):
        return [_waiting(weight, factor)]
    if others and isinstance(others[0], jax.Array):
        others = [_held(others[0])]
        weight, factor = _waiting(weight, factor / as_factor(others[0])), as_factor(others[0])
    [value] = bind(eqn, [unpacked(weight.value) if isinstance(a, AdaptedWeight) else others[0] for a in args])
    return [weight.replace(value, weight.operand.scale_by(factor))]


def _waiting(weight: AdaptedWeight, factor: jax.Array) -> AdaptedWeight:
    return dataclasses.replace(weight, factor=factor if weight.factor is None else weight.factor * factor)


def _held(scalar: jax.Array) -> jax.Array:
    """Return a scalar without its derivative; 1 for one that cannot be divided by again."""
    held = lax.stop_gradient(scalar)
    return jnp.where(jnp.isfinite(held) & (held != 0), held, jnp.ones_like(held))


@rule("concatenate")
def concatenate(eqn: JaxprEqn, *args: Any) -> list[Any]:
    return _concatenate(eqn, args, args, eqn.params["dimension"])


@rule("stack")
def stack(eqn: JaxprEqn, *args: Any) -> list[Any]:
    axis = eqn.params["axis"]
    parts = [_with_axis(a, axis) if isinstance(a, AdaptedWeight) else a[None] for a in args]
    return _concatenate(eqn, args, parts, axis)


def _with_axis(weight: AdaptedWeight, axis: int) -> AdaptedWeight:
    return weight.replace(jnp.expand_dims(unpacked(weight.value), axis), weight.operand.insert_axis(axis))


def _has_no_adapter(part: Any) -> bool:
    return isinstance(part, AdaptedWeight) and isinstance(part.operand, NoAdapter)


def _concatenate(eqn: JaxprEqn, args: Sequence[Any], parts: Sequence[Any], axis: int) -> list[Any]:
    args, parts = ([a.scaled() if isinstance(a, AdaptedWeight) else a for a in group] for group in (args, parts))
    parts = [unpacked(p.value) if _has_no_adapter(p) else p for p in parts]
    weights = [p for p in parts if isinstance(p, AdaptedWeight)]
    if not weights:
        return bind(eqn, [plain(a, "joins it", eqn) for a in args])
    operands = [p.operand.to_lora() if isinstance(p, AdaptedWeight) else None for p in parts]
    sizes = [p.shape[axis] if isinstance(p, AdaptedWeight) or eqn.primitive.name == "concatenate" else 1 for p in parts]
    first = next(a for a in operands if a is not None)
    operand = first.concatenate(operands, sizes, axis)
    if operand is None:
        return no_rule(eqn, *args, why="joins it with weights whose adapters have no common form")
    [value] = bind(eqn, [unpacked(a.value) if isinstance(a, AdaptedWeight) else a for a in args])
    paths = tuple(dict.fromkeys(path for weight in weights for path in weight.paths))
    return [AdaptedWeight(value, operand, paths, weights[0].fallback)]
