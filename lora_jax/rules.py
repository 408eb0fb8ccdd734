"""Primitive -> rule: what each operation does to a kernel. With `products.py`, all that knows dimension numbers.

Structural operations carry a kernel along: they are run on the frozen array as they stand, and the adapter follows.
Products reduce to y = x @ W and hand that to the adapter. Anything that has no rule asks the kernel for a plain
array, which is refused unless the user allowed it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._compat import JaxprEqn, Operation, bind, describe
from lora_jax.adapters.base import Adapter
from lora_jax.axes import KernelAxes
from lora_jax.kernel import Kernel, plain
from lora_jax.lowrank import accumulator
from lora_jax.products import (
    BackwardConv,
    Conv,
    Matmul,
    Ragged,
    as_matrices,
    channels_last,
    product_dtype,
)

Rule = Callable[..., list[Any]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of the primitives of these names."""

    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def no_rule(eqn: JaxprEqn, *args: Any, why: str = "is not an operation that a weight in factored form can pass") -> Any:
    """Any other operation: run as it stands, on plain arrays."""
    return bind(eqn, [plain(a, f"{describe(eqn)} {why}") for a in args])


# Structural operations


@rule("copy", "sharding_constraint", "device_put", "reduce_precision", "optimization_barrier")
def of_the_value(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """Where the array is, when, or how precise: the adapter is as it was.

    In a barrier it would cost: the derivative of one has a term for each operand, that of W's shape among them.
    """
    out = bind(eqn, [a.value if isinstance(a, Kernel) else a for a in args])
    return [a.replace(o) if isinstance(a, Kernel) else o for a, o in zip(args, out, strict=True)]


@rule("stop_gradient")
def stop_gradient(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """No gradient passes W', so none passes either of its parts."""
    return [kernel.replace(lax.stop_gradient(kernel.value), kernel.adapter.stop())]


@rule("pvary")
def pvary(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """In `shard_map`: the arrays of the adapter differ between devices where the weight does."""
    return [jax.tree.map(lambda array: bind(eqn, [array])[0], kernel)]


@rule("convert_element_type")
def convert_element_type(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """A cast moves the frozen value; the factors follow the product's dtype when they are used."""
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return no_rule(eqn, kernel, why=f"casts it to {jnp.dtype(dtype).name}, which rounds W' itself")
    return of_the_value(eqn, kernel)


@rule("transpose")
def transpose(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    permutation = tuple(eqn.params["permutation"])
    return [kernel.replace(kernel.value.transpose(permutation), kernel.adapter.permute(permutation))]


@rule("reduce_sum")
def reduce_sum(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """Over axes of size 1, as `einsum` takes them away."""
    if any(kernel.shape[axis] != 1 for axis in eqn.params["axes"]):
        return no_rule(eqn, kernel)
    return reshape(eqn, kernel)


@rule("reshape", "squeeze")
def reshape(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """Axes of one group are merged and split; axes of size 1 come and go."""
    adapter = kernel.adapter
    [value] = bind(eqn, [kernel.value])
    old, new = [n for n in kernel.shape if n != 1], [n for n in value.shape if n != 1]
    if 0 in kernel.shape:
        return no_rule(eqn, kernel)
    for axis in reversed(range(kernel.ndim)):
        if kernel.shape[axis] == 1:
            adapter = adapter.replace_axes(axis, 1, 0, jnp.squeeze)
    for start, count, sizes in reversed(list(_blocks(old, new))):
        if len({adapter.group(axis) for axis in range(start, start + count)}) > 1:
            return no_rule(eqn, kernel, why="mixes its axes of inputs, outputs or stacked matrices")
        if (count, len(sizes)) != (1, 1):
            adapter = adapter.replace_axes(start, count, len(sizes), _reshaped(count, sizes))
    for axis, n in enumerate(value.shape):
        if n == 1:
            adapter = adapter.insert_axis(axis)
    return [kernel.replace(value, adapter)]


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The shortest runs of axes of equal size on both sides of a reshape: start, count, new sizes."""
    i = j = 0
    while i < len(old):
        start, first = i, j
        i, j = i + 1, j + 1
        while math.prod(old[start:i]) != math.prod(new[first:j]):
            if math.prod(old[start:i]) < math.prod(new[first:j]):
                i += 1
            else:
                j += 1
        yield start, i - start, tuple(new[first:j])


def _reshaped(count: int, sizes: tuple[int, ...]) -> Callable[[jax.Array, int], jax.Array]:
    return lambda array, at: array.reshape(*array.shape[:at], *sizes, *array.shape[at + count :])


@rule("broadcast_in_dim")
def broadcast_in_dim(eqn: JaxprEqn, kernel: Kernel, *dynamic_shape: Any) -> list[Any]:
    """New axes, and those that grow from size 1, stack the matrix with itself."""
    adapter, kept = kernel.adapter, eqn.params["broadcast_dimensions"]
    [value] = bind(eqn, [kernel.value, *dynamic_shape])
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


@rule("slice")
def slice_(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * kernel.ndim
    return [_cut(kernel, [slice(*index) for index in zip(start, limit, strides, strict=True)])]


@rule("split")
def split(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    axis, end, parts = eqn.params["axis"], 0, []
    for size in map(int, eqn.params["sizes"]):
        start, end = end, end + size
        parts.append(_cut(kernel, [slice(start, end) if i == axis else slice(None) for i in range(kernel.ndim)]))
    return parts


def _cut(kernel: Kernel, index: list[slice]) -> Any:
    """kernel[index]; one entry of the inputs or of the outputs is a row: a plain array."""
    out: Any = kernel
    for axis, part in enumerate(index):
        start, stop, stride = part.indices(kernel.shape[axis])
        if len(range(start, stop, stride)) != kernel.shape[axis]:
            out = _cut_one(out, axis, functools.partial(_sliced, start=start, stop=stop, stride=stride))
    return out


def _cut_one(kernel: Any, axis: int, fn: Callable[[jax.Array, int], jax.Array]) -> Any:
    if not isinstance(kernel, Kernel):
        return fn(kernel, axis)
    value, group = fn(kernel.value, axis), kernel.adapter.group(axis)
    if value.shape[axis] != 1:
        return kernel.replace(value, kernel.adapter.replace_axes(axis, 1, 1, fn))
    row = kernel.replace(value, kernel.adapter.rows(axis, 1, fn))
    return row.merged() if group in ("inputs", "outputs") else row


def _sliced(array: jax.Array, at: int, start: int, stop: int, stride: int) -> jax.Array:
    return lax.slice_in_dim(array, start, stop, stride, axis=at)


def _dynamically_sliced(array: jax.Array, at: int, start: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, size, axis=at)


@rule("dynamic_slice")
def dynamic_slice(eqn: JaxprEqn, kernel: Any, *starts: Any) -> list[Any]:
    if not isinstance(kernel, Kernel):
        return no_rule(eqn, kernel, *starts)
    out: Any = kernel
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if size != kernel.shape[axis]:
            out = _cut_one(out, axis, functools.partial(_dynamically_sliced, start=starts[axis], size=size))
    return [out]


@rule("rev")
def rev(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    adapter = kernel.adapter
    for axis in eqn.params["dimensions"]:
        adapter = adapter.replace_axes(axis, 1, 1, lambda array, at: lax.rev(array, (at,)))
    return [kernel.replace(bind(eqn, [kernel.value])[0], adapter)]


@rule("pad")
def pad(eqn: JaxprEqn, kernel: Any, value: Any) -> list[Any]:
    """The padding is the program's; the change of it is zero."""
    if not isinstance(kernel, Kernel):
        return no_rule(eqn, kernel, value)
    adapter = kernel.adapter
    for axis, config in enumerate(eqn.params["padding_config"]):
        if any(config):

            def fn(array: jax.Array, at: int, config: Any = config) -> jax.Array:
                configs = [config if i == at else (0, 0, 0) for i in range(array.ndim)]
                return lax.pad(array, jnp.zeros((), array.dtype), configs)

            adapter = adapter.replace_axes(axis, 1, 1, fn)
    return [kernel.replace(bind(eqn, [kernel.value, value])[0], adapter)]


@rule("all_gather", "all_gather_invariant")
def all_gather(eqn: JaxprEqn, kernel: Kernel) -> list[Any]:
    """A weight that is sharded within `shard_map`, gathered before it is used."""
    if not eqn.params["tiled"]:
        return no_rule(eqn, kernel)
    axis, adapter = eqn.params["all_gather_dimension"], kernel.adapter

    def fn(array: jax.Array, at: int) -> jax.Array:
        return bind(eqn.replace(params={**eqn.params, "all_gather_dimension": at}), [array])[0]

    return [kernel.replace(fn(kernel.value, axis), adapter.replace_axes(axis, 1, 1, fn))]


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
    if others and isinstance(others[0], jax.Array):
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
    return kernel.replace(jnp.expand_dims(kernel.value, axis), kernel.adapter.insert_axis(axis))


def _concatenate(eqn: JaxprEqn, args: Sequence[Any], parts: Sequence[Any], axis: int) -> list[Any]:
    args, parts = ([a.scaled() if isinstance(a, Kernel) else a for a in group] for group in (args, parts))
    kernels = [p for p in parts if isinstance(p, Kernel)]
    adapters = [p.adapter if isinstance(p, Kernel) else None for p in parts]
    sizes = [p.shape[axis] if isinstance(p, Kernel) or eqn.primitive.name == "concatenate" else 1 for p in parts]
    adapter = kernels[0].adapter.concatenate(adapters, sizes, axis)
    if adapter is None:
        return no_rule(eqn, *args, why="joins it with weights whose adapters have no common form")
    [value] = bind(eqn, [a.value if isinstance(a, Kernel) else a for a in args])
    paths = tuple(dict.fromkeys(path for kernel in kernels for path in kernel.paths))
    return [Kernel(value, adapter, paths, kernels[0].fallback)]


@rule("gather")
def gather(eqn: JaxprEqn, kernel: Any, indices: Any) -> list[Any]:
    """Rows of an embedding, or some of the stacked matrices: one axis is indexed and all others are whole.

    Rows are a plain array, W[ids] + (alpha / r) A[ids] B.
    """
    if not isinstance(kernel, Kernel):
        return no_rule(eqn, kernel, indices)
    dims, sizes, adapter = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], kernel.adapter
    batched, batch_of_indices = dims.operand_batching_dims, dims.start_indices_batching_dims
    indexed = [i for i in dims.start_index_map if i in dims.collapsed_slice_dims or sizes[i] != kernel.shape[i]]
    ignored = [i for i in dims.start_index_map if i not in indexed]  # clipped to the whole axis, whatever the index
    whole = all(n == kernel.shape[i] for i, n in enumerate(sizes) if i not in (*indexed, *batched))
    stacked = all(adapter.group(i) in ("stack", "unknown") for i in batched)
    clips = eqn.params["mode"] == lax.GatherScatterMode.CLIP
    if len(indexed) != 1 or sizes[indexed[0]] != 1 or not (whole and stacked) or (ignored and not clips):
        return no_rule(eqn, kernel, indices, why="picks more than whole rows from it")
    [axis], free = indexed, [i for i in range(indices.ndim - 1) if i not in batch_of_indices]
    column = dims.start_index_map.index(axis)
    unit = [("w", axis)] if axis not in dims.collapsed_slice_dims else []  # the axis stays, of size 1

    def take(array: jax.Array, at: int) -> jax.Array:
        lead = [adapter.axes.stack.index(i) for i in batched]  # every array begins with the stack axes
        front = range(len(lead))
        fn = _take_along(eqn, at - sum(i < at for i in lead))
        for _ in front:
            fn = jax.vmap(fn)
        ids = jnp.moveaxis(indices[..., column : column + 1], batch_of_indices, front)
        rows = fn(jnp.moveaxis(array, lead, front), ids)
        rows = jnp.moveaxis(rows, front, [i if i < at else i + len(free) - 1 for i in lead])
        return jnp.expand_dims(rows, at + len(free)) if unit else rows

    # The axes of the rows with the indices in the place of the indexed axis, and those of the program's result.
    in_place: list[Any] = [("w", i) for i in range(kernel.ndim)]
    in_place[axis : axis + 1] = [*(("i", i) for i in free), *unit]
    window = iter([("w", i) for i in range(kernel.ndim) if i not in (*dims.collapsed_slice_dims, *batched)])
    of_batch = dict(zip(batch_of_indices, batched, strict=True))
    batch = iter([("w", of_batch[i]) if i in of_batch else ("i", i) for i in range(indices.ndim - 1)])
    result = [next(window if i in dims.offset_dims else batch) for i in range(len(in_place))]
    picked = adapter.rows(axis, len(free) + len(unit), take, batched)
    picked = picked.permute(tuple(in_place.index(label) for label in result))
    rows = kernel.replace(bind(eqn, [kernel.value, indices])[0], picked)
    return [rows.merged() if adapter.group(axis) in ("inputs", "outputs") else rows]


def _take_along(eqn: JaxprEqn, at: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The gather of an equation along one axis of an array; what is out of bounds changes nothing."""

    def fn(array: jax.Array, indices: jax.Array) -> jax.Array:
        n = indices.ndim - 1
        dims = lax.GatherDimensionNumbers(
            offset_dims=tuple(i for i in range(array.ndim - 1 + n) if not at <= i < at + n),
            collapsed_slice_dims=(at,),
            start_index_map=(at,),
        )
        sizes = tuple(1 if i == at else size for i, size in enumerate(array.shape))
        fill = None if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else 0
        return lax.gather(array, indices, dims, sizes, mode=eqn.params["mode"], fill_value=fill)

    return fn


# Products: each is a function of an operation, an adapter and arrays, so that equal ones are traced once.


def _multiply(eqn: JaxprEqn, args: Sequence[Any], kernel: Kernel, axes: KernelAxes, product: Any, *arrays: Any) -> Any:
    """The product with W', where the adapter was made for these axes."""
    adapter = kernel.adapter.used_as(axes, eqn)
    if adapter is None:
        own = kernel.adapter.axes
        made = f"its adapter was made for {own}" if any(own) else "these are not inputs and outputs of a matrix"
        return no_rule(eqn, *args, why=f"uses it with {axes}, but {made}")
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((adapter, kernel.value, arrays)))
    run = _traced_once(product) if traced and adapter.traced_once else product
    y = run(Operation.of(eqn), axes, adapter, kernel.value, *arrays)
    return [y if kernel.factor is None else y * kernel.factor.astype(y.dtype)]


@functools.cache
def _traced_once(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(product, static_argnums=(0, 1), inline=True)


@rule("dot_general")
def dot_general(eqn: JaxprEqn, lhs: Any, rhs: Any) -> list[Any]:
    """A product with the kernel on either side, over any of its axes."""
    if isinstance(lhs, Kernel) and isinstance(rhs, Kernel):
        lhs = lhs.dense(f"{describe(eqn)} multiplies it by another adapted weight, {_names(rhs)}")
    contract, batch = eqn.params["dimension_numbers"]
    if isinstance(lhs, Kernel):
        axes = _axes(lhs, contract[0], batch[0])
        return _multiply(eqn, (lhs, rhs), lhs, axes, _dot_on_left, rhs)
    axes = _axes(rhs, contract[1], batch[1])
    return _multiply(eqn, (lhs, rhs), rhs, axes, _dot_on_right, lhs)


def _axes(kernel: Kernel, contract: Sequence[int], batch: Sequence[int]) -> KernelAxes:
    outputs = tuple(i for i in range(kernel.ndim) if i not in (*contract, *batch))
    return KernelAxes(tuple(sorted(batch)), tuple(sorted(contract)), outputs)


def _dot_on_left(dot: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array) -> jax.Array:
    return _dot(dot, axes, adapter, w, x, on_left=True)


def _dot_on_right(dot: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array) -> jax.Array:
    return _dot(dot, axes, adapter, w, x, on_left=False)


def _dot(dot: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array, on_left: bool) -> jax.Array:
    """XLA orders the result as [batch, free of lhs, free of rhs]. Each axis of it gets a label, ("w", axis of the
    weight) or ("x", axis of x), and the canonical order is stated in the same labels.
    """
    contract, batch = dot.params["dimension_numbers"]
    (w_contract, x_contract), (w_batch, x_batch) = (contract, batch) if on_left else (contract[::-1], batch[::-1])
    x_free = [i for i in range(x.ndim) if i not in (*x_contract, *x_batch)]
    stack, inputs = sorted(zip(w_batch, x_batch, strict=True)), sorted(zip(w_contract, x_contract, strict=True))
    w_labels, x_labels = [("w", i) for i in axes.outputs], [("x", i) for i in x_free]
    result = [("w", i) for i in w_batch] + (w_labels + x_labels if on_left else x_labels + w_labels)
    canonical = [("w", w) for w, _ in stack] + x_labels + w_labels

    [y] = dot.bind(w, x) if on_left else dot.bind(x, w)
    y = y.transpose([result.index(label) for label in canonical])
    rows = x.transpose([i for _, i in stack] + x_free + [i for _, i in inputs])
    product = Matmul(
        axes,
        as_matrices(rows.astype(product_dtype(x.dtype, w.dtype)), len(stack), len(x_free)),
        as_matrices(y, len(stack), len(x_free)),
        _precision(dot.params["precision"], on_left),
    )
    return adapter.apply(product).reshape(y.shape).transpose([canonical.index(label) for label in result])


@rule("conv_general_dilated")
def conv_general_dilated(eqn: JaxprEqn, x: Any, kernel: Any) -> list[Any]:
    """A convolution with the kernel as its window; or the one that is its derivative, where the adapter says so."""
    if isinstance(x, Kernel) or eqn.params["batch_group_count"] != 1:
        return no_rule(eqn, x, kernel)
    out, channels, *window = eqn.params["dimension_numbers"].rhs_spec
    forward = KernelAxes((), tuple(sorted([*window, channels])), (out,))
    backward = KernelAxes((), (channels,), tuple(sorted([*window, out])))
    fits = kernel.adapter.used_as
    if eqn.params["feature_group_count"] == 1 and fits(forward, eqn) is None and fits(backward, eqn) is not None:
        return _multiply(eqn, (x, kernel), kernel, backward, _conv, x)
    return _multiply(eqn, (x, kernel), kernel, forward, _conv, x)


def _conv(conv: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array) -> jax.Array:
    dims, groups = conv.params["dimension_numbers"], conv.params["feature_group_count"]
    settings = {name: conv.params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    [y] = conv.bind(x, w)
    of = (
        axes,
        x.astype(product_dtype(x.dtype, w.dtype)),
        channels_last(y, dims),
        _precision(conv.params["precision"], on_left=False),
        dims,
    )
    is_forward = axes.outputs == (dims.rhs_spec[0],)
    adapted = adapter.apply(Conv(*of, groups, settings) if is_forward else BackwardConv(*of, settings))
    channels = dims.out_spec[1]
    shape = [n for i, n in enumerate(y.shape) if i != channels]
    return jnp.moveaxis(adapted.reshape(*shape, -1), -1, channels)


@rule("ragged_dot_general")
def ragged_dot_general(eqn: JaxprEqn, x: Any, kernel: Any, group_sizes: Any) -> list[Any]:
    """Each group of rows of x by its own expert's matrix."""
    ragged = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), (x_batch, _) = ragged.dot_dimension_numbers
    groups, args = tuple(ragged.rhs_group_dimensions), (x, kernel, group_sizes)
    rows = [i for i in range(x.ndim) if i not in x_contract]
    if isinstance(x, Kernel) or x_batch or len(groups) != 1 or rows != list(ragged.lhs_ragged_dimensions):
        return no_rule(eqn, *args, why="is not a product of ragged rows with a stack of matrices")
    return _multiply(eqn, args, kernel, _axes(kernel, w_contract, groups), _ragged_dot, x, group_sizes)


def _ragged_dot(
    ragged: Operation, axes: KernelAxes, adapter: Adapter, w: jax.Array, x: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    dims = ragged.params["ragged_dot_dimension_numbers"]
    (x_contract, w_contract), _ = dims.dot_dimension_numbers
    inputs = [i for _, i in sorted(zip(w_contract, x_contract, strict=True))]
    [y] = ragged.bind(x, w, group_sizes)  # [T, *outputs]
    rows = as_matrices(x.transpose([*dims.lhs_ragged_dimensions, *inputs]), 0, 1)
    rows = rows.astype(product_dtype(x.dtype, w.dtype))
    return adapter.apply(Ragged(axes, rows, as_matrices(y, 0, 1), ragged.params["precision"], group_sizes)).reshape(
        y.shape
    )


def _precision(precision: Any, on_left: bool) -> Any:
    """The precision of x and of W in that order. An algorithm preset names the base's dtypes: not for the factors."""
    if precision is None or isinstance(precision, lax.Precision):
        return precision
    if isinstance(precision, tuple):
        return precision[::-1] if on_left else precision
    return None


def _names(kernel: Kernel) -> str:
    return ", ".join(map(repr, kernel.paths))
