"""A loss of each row of x @ W, computed block by block, so that x @ W never exists as a whole.

The gradient of a row's loss by that row does not depend on what is done to the loss afterwards, but for a factor. So it
is taken in the pass that computes the loss, while the block's logits are there, and nothing is computed again. The
same holds of the gradient by W, or by the factors of its adapter, where the losses are summed. Only where each row's
loss is wanted, and a gradient by W with it, the logits are computed a second time.

The derivative is stated as the product of these gradients with what the inputs change by, so that it has forward mode,
reverse mode, and derivatives of its own. Only what is asked for is computed.

Axes: n blocks, each of u rows of t parts; d inputs, v outputs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import PyTreeDef

from lora_jax.core._compat import JaxprEqn, open_jaxpr, remat_p, vary, varying_axes
from lora_jax.core.arrays import accumulator

ROW_LOSSES, LOGITS = "lora_row_losses", "lora_logits"  # by these names the interpreter knows the calls
ROWS = 3  # arguments that have rows, before the leaves of W: x, labels, weights


@dataclass(frozen=True)
class RowLoss:
    """What is computed of each block. It is found again in a program, as the policy of a remat that keeps nothing."""

    project: Callable[..., jax.Array]  # (x [..., d], W, wide) -> x @ W [..., v], in fp32 if wide
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # (x @ W [..., v], labels [...]) -> [...]
    summed: bool  # whether the result is the sum over all rows
    shapes: tuple[tuple[int, ...], ...] = ()  # of x, labels, weights and the arrays of W: others are under a vmap

    def __call__(self, *_: Any, **__: Any) -> bool:
        return False


def row_losses(how: RowLoss, x: jax.Array, labels: jax.Array, weights: jax.Array, head: Any) -> jax.Array:
    """Return weights * loss(x @ W, labels), or their sum.

    Args:
        x: [..., t, n, u, d], of which x[..., i, :, :] is a block. A mesh that splits t splits every block so.
        labels: [..., t, n, u]; a row of a label below 0 is taken as zeros.
        weights: [..., t, n, u], in fp32 or wider.
        head: W as `how.project` takes it: any tree of arrays.
    """
    leaves, tree = jax.tree.flatten(head)
    args = (x, labels, weights, *leaves)
    how = replace(how, shapes=tuple(arg.shape for arg in args))
    axes = sorted({axis for arg in args for axis in varying_axes(arg)})
    return lora_row_losses(how, tree, *(vary(arg, axes) for arg in args))


def found(eqn: JaxprEqn) -> RowLoss | None:
    """Return what a call of `row_losses` in a program computes; None if the program has it under `jax.vmap`."""
    shapes = tuple(v.aval.shape for v in eqn.invars)  # type: ignore[attr-defined]
    for scan in open_jaxpr(eqn.params["call_jaxpr"])[0].eqns:
        for inner in open_jaxpr(scan.params.get("jaxpr"))[0].eqns if scan.primitive.name == "scan" else ():
            if inner.primitive is remat_p and isinstance(how := inner.params["policy"], RowLoss):
                return how if how.shapes == shapes else None
    return None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def lora_row_losses(how: RowLoss, tree: PyTreeDef, *args: jax.Array) -> jax.Array:
    """Return the losses of all rows, or their sum; `args` are x, labels, weights and the leaves of W."""
    return _block_by_block(how, tree, *args)


def _block_by_block(how: RowLoss, tree: PyTreeDef, *args: jax.Array) -> jax.Array:
    """Return the losses. Their derivative computes each block again, and keeps nothing of it."""
    run = jax.checkpoint(functools.partial(_block, how, tree), policy=how, prevent_cse=False)

    def step(result: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return _with_values(how, result, run(*_rows(args, i), *args[ROWS:]), i), None

    return lax.scan(step, _start(how, args), jnp.arange(blocks(args[1])))[0]


def _block(how: RowLoss, tree: PyTreeDef, x: jax.Array, labels: jax.Array, weights: jax.Array, *head: Any) -> jax.Array:
    x = jnp.where((labels < 0)[..., None], 0, x)  # whatever it is, NaN too, it counts for nothing
    return how.loss(lora_logits(how, tree, x, *head), labels) * weights


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def lora_logits(how: RowLoss, tree: PyTreeDef, x: jax.Array, *head: Any) -> jax.Array:
    """Return x @ W in fp32 or wider. The products of its derivative are those of x @ W in x's dtype: narrow ones."""
    return how.project(x, tree.unflatten(head), True)


@functools.partial(lora_logits.defjvp, symbolic_zeros=True)
def _logits_tangent(how: RowLoss, tree: PyTreeDef, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    def project(x: jax.Array, *head: Any, wide: bool) -> jax.Array:
        return how.project(x, tree.unflatten(head), wide)

    is_wide = primals[0].dtype == accumulator(primals[0].dtype)
    y, dy = _jvp(functools.partial(project, wide=is_wide), primals, tangents)
    return (y, dy) if is_wide else (lora_logits(how, tree, *primals), dy.astype(accumulator(dy.dtype)))


@functools.partial(lora_row_losses.defjvp, symbolic_zeros=True)
def _tangent(how: RowLoss, tree: PyTreeDef, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    moved = _moved(primals, tangents)
    if not how.summed and any(i >= ROWS for i in moved):  # the gradient by W waits for what each row's loss is worth
        return _jvp(functools.partial(_block_by_block, how, tree), primals, tangents)
    result, gradients = _in_one_pass(how, tree, primals, moved)
    terms = []
    for i, gradient in zip(moved, gradients, strict=True):
        term = gradient.astype(result.dtype) * tangents[i].astype(result.dtype)
        terms.append(jnp.sum(term, axis=None if how.summed else tuple(range(result.ndim, term.ndim))))
    return result, functools.reduce(jnp.add, terms)


def _in_one_pass(how: RowLoss, tree: PyTreeDef, args: Any, moved: list[int]) -> tuple[jax.Array, list[jax.Array]]:
    """Return the losses, or their sum, and the sum's gradients by the arguments `moved`.

    Those by rows are in the dtype of these; those by W are summed over blocks in fp32.
    """

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        result, gradients = carry
        inputs = [*_rows(args, i), *args[ROWS:]]

        def of_moved(*values: jax.Array) -> jax.Array:
            return _block(how, tree, *_replaced(inputs, moved, values))

        values, pull = jax.vjp(of_moved, *(inputs[j] for j in moved))
        news = pull(jnp.ones_like(values))
        gradients = [
            _put(gradient, new, i, _axis(j)) if j < ROWS else gradient + new.astype(gradient.dtype)
            for j, gradient, new in zip(moved, gradients, news, strict=True)
        ]
        return (_with_values(how, result, values, i), gradients), None

    zeros = [_zeros(args[j], None if j < ROWS else accumulator(args[j].dtype)) for j in moved]
    (result, gradients), _ = lax.scan(step, (_start(how, args), zeros), jnp.arange(blocks(args[1])))
    return result, gradients


def _with_values(how: RowLoss, result: jax.Array, values: jax.Array, i: jax.Array) -> jax.Array:
    return result + jnp.sum(values) if how.summed else _put(result, values, i, _axis(1))


def _start(how: RowLoss, args: Any) -> jax.Array:
    weights = args[ROWS - 1]
    return _zeros(weights) if not how.summed else vary(jnp.zeros((), weights.dtype), varying_axes(weights))


def _zeros(like: jax.Array, dtype: Any = None) -> jax.Array:
    return vary(jnp.zeros_like(like, dtype), varying_axes(like))


def _axis(i: int) -> int:
    """Return the axis of blocks of an argument that has rows."""
    return -3 if i == 0 else -2


def blocks(labels: jax.Array) -> int:
    """Return the number n of blocks of labels [..., t, n, u]."""
    return labels.shape[_axis(1)]


def _rows(args: Sequence[jax.Array], i: jax.Array) -> list[jax.Array]:
    return [lax.dynamic_index_in_dim(arg, i, _axis(j), keepdims=False) for j, arg in enumerate(args[:ROWS])]


def _put(rows: jax.Array, block: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_update_index_in_dim(rows, block, i, axis)


def _moved(primals: Any, tangents: Any) -> list[int]:
    """Return the arguments that something is differentiated by."""
    pairs = enumerate(zip(primals, tangents, strict=True))
    return [i for i, (p, t) in pairs if jnp.issubdtype(p.dtype, jnp.inexact) and not isinstance(t, SymbolicZero)]


def _replaced(args: Sequence[Any], which: list[int], values: Sequence[Any]) -> list[Any]:
    new = dict(zip(which, values, strict=True))
    return [new.get(i, arg) for i, arg in enumerate(args)]


def _jvp(fn: Callable[..., jax.Array], primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Return `jax.jvp` by the arguments alone that something is differentiated by."""
    moved = _moved(primals, tangents)

    def of_moved(*values: jax.Array) -> jax.Array:
        return fn(*_replaced(primals, moved, values))

    y, dy = jax.jvp(of_moved, [primals[i] for i in moved], [tangents[i] for i in moved])
    return y, dy


def in_blocks(array: jax.Array, blocks: int, parts: int, fill: Any, rows: int = -1) -> jax.Array:
    """Return an array whose axis `rows` (counted from the end) is in blocks: [..., t, n, u, ...], padded by `fill`.

    The rows may be split over as many devices as there are parts, or fewer. So each part is made of blocks, and a block
    has rows of each device. They lie together there, and are read and written where they lie: of rows that lie far from
    each other, compilers for TPUs make copies of the whole array.
    """
    axis = array.ndim + rows
    padding = [(0, -array.shape[axis] % blocks if i == axis else 0) for i in range(array.ndim)]
    array = jnp.pad(array, padding, constant_values=fill) if any(map(any, padding)) else array
    shape, of_block = array.shape, array.shape[axis] // blocks
    parts = math.gcd(of_block, parts)
    return array.reshape(*shape[:axis], parts, blocks, of_block // parts, *shape[axis + 1 :])


def number_of_blocks(rows: int, block: int) -> int:
    """Return the number of equal blocks of at most so many rows, of which the fewest rows are padding."""
    least = max(1, math.ceil(rows / block))
    return max(1, math.ceil(rows / max(1, math.ceil(rows / least))))
