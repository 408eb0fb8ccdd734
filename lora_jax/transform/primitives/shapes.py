"""Operations that carry a kernel along: run on the frozen array as they stand, and the adapter follows."""

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
from lora_jax.transform.adapted_weight import Kernel, plain
from lora_jax.transform.no_adapter import Frozen
from lora_jax.transform.primitives.registry import no_rule, rule


@rule("copy", "sharding_constraint", "device_put", "reduce_precision", "optimization_barrier")
def of_the_value(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """Where the array is, when, or how precise: the adapter is as it was.

    In a barrier it would cost: the derivative of one has a term for each operand, that of W's shape among them.
    """
    values = [a.value if isinstance(a, Kernel) else a for a in args]
    if eqn.primitive.name == "reduce_precision":
        values = [unpacked(value) for value in values]
    arrays = [value for value in values if not is_packed(value)]  # what is packed stays as it is
    results = iter(bind(eqn, arrays) if arrays else [])
    out = [value if is_packed(value) else next(results) for value in values]
    return [a.replace(o) if isinstance(a, Kernel) else o for a, o in zip(args, out, strict=True)]


@rule("stop_gradient")
def stop_gradient(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """No gradient passes W', so none passes any of its parts."""
    stopped = kernel.replace(jax.tree.map(lax.stop_gradient, kernel.value), kernel.adapter.stop())
    return [dataclasses.replace(stopped, factor=jax.tree.map(lax.stop_gradient, kernel.factor))]


@rule("pvary")
def pvary(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """In `shard_map`: the arrays of the adapter differ between devices where the weight does, if not before."""
    return [jax.tree.map(lambda array: vary(array, eqn.params["axes"]), kernel)]


@rule("convert_element_type")
def convert_element_type(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """A cast moves the frozen value; the factors follow the product's dtype when they are used."""
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return no_rule(eqn, kernel, why=f"casts it to {jnp.dtype(dtype).name}, which rounds W' itself")
    if is_packed(kernel.value):
        return [kernel.replace(kernel.value.with_deferred("cast", jnp.dtype(dtype)))]
    return of_the_value(eqn, kernel)


@rule("transpose")
def transpose(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    permutation = tuple(eqn.params["permutation"])
    value = _transposed(kernel.value, permutation) if is_packed(kernel.value) else kernel.value.transpose(permutation)
    return [kernel.replace(value, kernel.adapter.permute(permutation))]


def _transposed(packed: Packed, permutation: tuple[int, ...]) -> Packed | jax.Array:
    """Each matrix is transposed after it is unpacked; the stack has to stay where it is."""
    n = len(packed.stack)
    if permutation[:n] != tuple(range(n)):
        return packed.dense().transpose(permutation)
    return packed.with_deferred("transpose", tuple(axis - n for axis in permutation[n:]))


def _reshaped_packed(packed: Packed, shape: tuple[int, ...]) -> Packed | jax.Array:
    """Each matrix is reshaped after it is unpacked; the axes of the stack have to stay apart from its own."""
    n = next((n for n in range(len(shape) + 1) if math.prod(shape[:n]) == math.prod(packed.stack)), None)
    if n is None:
        return packed.dense().reshape(shape)
    stack, old = shape[:n], len(packed.stack)
    return packed.on_stack(lambda leaf: leaf.reshape(*stack, *leaf.shape[old:])).with_deferred("reshape", shape[n:])


@rule("reduce_sum")
def reduce_sum(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """Over axes of size 1, as `einsum` takes them away."""
    if any(kernel.shape[axis] != 1 for axis in eqn.params["axes"]):
        return no_rule(eqn, kernel)
    return reshape(eqn, kernel)


@rule("reshape", "squeeze")
def reshape(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """Axes of one group are merged and split; axes of size 1 come and go."""
    adapter, value = kernel.adapter, kernel.value
    if is_packed(value):
        value = _reshaped_packed(value, eqn.outvars[0].aval.shape)  # type: ignore[attr-defined]
    else:
        [value] = bind(eqn, [value])
    old, new = [n for n in kernel.shape if n != 1], [n for n in value.shape if n != 1]
    if 0 in kernel.shape:
        return no_rule(eqn, kernel)
    for axis in reversed(range(kernel.ndim)):
        if kernel.shape[axis] == 1:
            adapter = adapter.replace_axes(axis, 1, 0, jnp.squeeze)
    for start, count, sizes in reversed(list(blocks(old, new))):
        if len({adapter.group(axis) for axis in range(start, start + count)}) > 1:
            return no_rule(eqn, kernel, why="mixes its axes of inputs, outputs or stacked matrices")
        if (count, len(sizes)) != (1, 1):
            adapter = adapter.replace_axes(start, count, len(sizes), _reshaped(count, sizes))
    for axis, n in enumerate(value.shape):
        if n == 1:
            adapter = adapter.insert_axis(axis)
    return [kernel.replace(value, adapter)]


def _reshaped(count: int, sizes: tuple[int, ...]) -> Callable[[jax.Array, int], jax.Array]:
    return lambda array, at: array.reshape(*array.shape[:at], *sizes, *array.shape[at + count :])


@rule("broadcast_in_dim")
def broadcast_in_dim(eqn: JaxprEqn, kernel: Kernel, *dynamic_shape: Any) -> list[Any]:
    """New axes, and those that grow from size 1, stack the matrix with itself."""
    adapter, kept = kernel.adapter, eqn.params["broadcast_dimensions"]
    [value] = bind(eqn, [unpacked(kernel.value), *dynamic_shape])
    for axis, size in enumerate(value.shape):
        grows = axis in kept and kernel.shape[kept.index(axis)] != size
        if grows:
            adapter = adapter.replace_axes(axis, 1, 0, jnp.squeeze)
        if grows or axis not in kept:
            adapter = adapter.insert_axis(axis)
            if size != 1:
                adapter = adapter.replace_axes(axis, 1, 1, functools.partial(_repeated, n=size))
    return [kernel.replace(value, adapter)]


def _repeated(array: jax.Array, at: int, n: int) -> jax.Array:
    return jnp.broadcast_to(array, (*array.shape[:at], n, *array.shape[at + 1 :]))


@rule("rev")
def rev(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    adapter = kernel.adapter
    for axis in eqn.params["dimensions"]:
        adapter = adapter.replace_axes(axis, 1, 1, lambda array, at: lax.rev(array, (at,)))
    return [kernel.replace(bind(eqn, [unpacked(kernel.value)])[0], adapter)]


@rule("pad")
def pad(eqn: JaxprEqn, kernel: Any, value: Any) -> list[Any]:
    """The padding is the program's; the change of it is zero."""
    if not isinstance(kernel, Kernel):
        return no_rule(eqn, kernel, value)
    adapter = kernel.adapter
    if not adapter.additive and not (isinstance(value, float | int | np.ndarray | np.generic) and value == 0):
        return no_rule(eqn, kernel, value, why="pads it, and its adapter scales what it pads with")
    for axis, config in enumerate(eqn.params["padding_config"]):
        if any(config):

            def fn(array: jax.Array, at: int, config: Any = config) -> jax.Array:
                configs = [config if i == at else (0, 0, 0) for i in range(array.ndim)]
                return lax.pad(array, jnp.zeros((), array.dtype), configs)

            adapter = adapter.replace_axes(axis, 1, 1, fn)
    return [kernel.replace(bind(eqn, [unpacked(kernel.value), value])[0], adapter)]


@rule("all_gather", "all_gather_invariant")
def all_gather(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """A weight that is sharded within `shard_map`, gathered before it is used."""
    if not eqn.params["tiled"]:
        return no_rule(eqn, kernel)
    axis, adapter = eqn.params["all_gather_dimension"], kernel.adapter

    def fn(array: jax.Array, at: int) -> jax.Array:
        return bind(eqn.replace(params={**eqn.params, "all_gather_dimension": at}), [array])[0]

    return [kernel.replace(fn(unpacked(kernel.value), axis), adapter.replace_axes(axis, 1, 1, fn))]


@rule("mul", "div", "neg")
def scale(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """A scalar. A constant meets W and one thin factor; one that is computed waits for the product.

    x @ (c W) = c (x @ W): else the derivative by c would multiply W with a matrix of its size.
    """
    kernel, *others = args if isinstance(args[0], Kernel) else args[::-1]
    divides = eqn.primitive.name == "div"
    if (divides and kernel is args[1]) or any(isinstance(other, Kernel) or jnp.ndim(other) for other in others):
        return no_rule(eqn, *args, why="takes it with more than a scalar factor")
    factor = jnp.asarray(others[0] if others else -1, accumulator(kernel.value.dtype))
    factor = 1 / factor if divides else factor
    if is_packed(kernel.value) or (others and isinstance(others[0], jax.Array)):
        return [dataclasses.replace(kernel, factor=factor if kernel.factor is None else kernel.factor * factor)]
    [value] = bind(eqn, [a.value if isinstance(a, Kernel) else a for a in args])
    return [kernel.replace(value, kernel.adapter.scale_by(factor))]


@rule("concatenate")
def concatenate(eqn: JaxprEqn, *args: Any) -> list[Any]:
    return _concatenate(eqn, args, args, eqn.params["dimension"])


@rule("stack")
def stack(eqn: JaxprEqn, *args: Any) -> list[Any]:
    axis = eqn.params["axis"]
    return _concatenate(eqn, args, [_with_axis(a, axis) if isinstance(a, Kernel) else a[None] for a in args], axis)


def _with_axis(kernel: Kernel, axis: int) -> Kernel:
    return kernel.replace(jnp.expand_dims(unpacked(kernel.value), axis), kernel.adapter.insert_axis(axis))


def _concatenate(eqn: JaxprEqn, args: Sequence[Any], parts: Sequence[Any], axis: int) -> list[Any]:
    args, parts = ([a.scaled() if isinstance(a, Kernel) else a for a in group] for group in (args, parts))
    parts = [unpacked(p.value) if isinstance(p, Kernel) and isinstance(p.adapter, Frozen) else p for p in parts]
    kernels = [p for p in parts if isinstance(p, Kernel)]
    if not kernels:
        return bind(eqn, [plain(a, "joins it", eqn) for a in args])
    adapters = [p.adapter.explicit() if isinstance(p, Kernel) else None for p in parts]
    sizes = [p.shape[axis] if isinstance(p, Kernel) or eqn.primitive.name == "concatenate" else 1 for p in parts]
    first = next(a for a in adapters if a is not None)
    adapter = first.concatenate(adapters, sizes, axis)
    if adapter is None:
        return no_rule(eqn, *args, why="joins it with weights whose adapters have no common form")
    [value] = bind(eqn, [unpacked(a.value) if isinstance(a, Kernel) else a for a in args])
    paths = tuple(dict.fromkeys(path for kernel in kernels for path in kernel.paths))
    return [Kernel(value, adapter, paths, kernels[0].fallback)]
