"""Inputs of products that a derivative makes again, in the place of keeping them.

The gradient of A needs x, and nothing else of a step with a frozen W does. Where x comes by elementwise operations from
arrays that the step keeps anyway, those are kept for it: x is made of them again when the gradient of A is due.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from lora_jax.core._compat import Primitive, jaxpr_as_fun, open_jaxpr
from lora_jax.core.arrays import is_key
from lora_jax.core.factor_products import as_derivative

REMADE_PRODUCT = "lora_remade_product"  # by this name the interpreter knows the call
Linear = Callable[..., jax.Array]  # (*sources, w), linear in w
Wait = Callable[[list[jax.Array], jax.Array], list[jax.Array]]  # (sources, cotangent) -> sources, when that is there


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Remade:
    """An array, and of what it can be made again: `make(*sources)` is the array."""

    value: jax.Array
    sources: tuple[jax.Array, ...] = ()
    make: Callable[..., jax.Array] | None = field(default=None, metadata={"static": True})  # None: it is kept

    def masked(self, fn: Callable[..., jax.Array], *keys: jax.Array) -> Self:
        """Return fn(array, *keys), which is linear in the array. Its derivative draws the mask again."""
        if self.make is None:
            return self.map(fn, *keys)
        value = linear_in_last(lambda *args: fn(args[-1], *args[:-1]), *keys, self.value)
        return dataclasses.replace(self.map(fn, *keys), value=value)

    def map(self, fn: Callable[..., jax.Array], *others: jax.Array) -> Self:
        """Return fn(array, *others)."""
        value, make = fn(self.value, *others), self.make
        if make is None:
            return dataclasses.replace(self, value=value)
        n = len(self.sources)
        return type(self)(value, (*self.sources, *others), lambda *s: fn(make(*s[:n]), *s[n:]))

    def origin(self) -> "Remade | None":
        """Return this, if it can be made again."""
        return None if self.make is None else self


def thin_product(product: Any, a: jax.Array) -> jax.Array:
    """Return h = x @ A in x's dtype, by the name `lora_h`."""
    return checkpoint_name(contract(product, a).astype(product.x.dtype), "lora_h")


def contract(product: Any, a: jax.Array) -> jax.Array:
    """Return h = x @ A of a `Product`. Where its x can be made again, the gradient of A does that."""
    is_kept = product.origin is None or product.origin.make is itself
    return product.contract(a) if is_kept else lora_remade_product(product, a)


def itself(x: jax.Array) -> jax.Array:
    """Return x: what is made of itself is kept, until something else is made of it."""
    return x


@jax.custom_jvp
def lora_remade_product(product: Any, a: jax.Array) -> jax.Array:
    """Return x @ A."""
    return product.contract(a)


@functools.partial(lora_remade_product.defjvp, symbolic_zeros=True)
def _tangent(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    (product, a), (d_product, da) = primals, tangents
    h, dx = product.contract(a), d_product.x
    along_x = None if isinstance(dx, SymbolicZero) else dataclasses.replace(product, x=dx).contract(a)
    if isinstance(da, SymbolicZero):
        return h, jnp.zeros_like(h) if along_x is None else along_x
    along_a = _along_a(product, da)
    return h, along_a if along_x is None else along_x + along_a


def _along_a(product: Any, da: jax.Array) -> jax.Array:
    """Return x @ dA, of which a derivative keeps the sources of x. Of y the product takes the shape alone."""
    origin, y = product.origin, product.y
    rest, tree = jax.tree.flatten(dataclasses.replace(product, x=None, y=None, origin=None))
    n = len(origin.sources)

    def along(*args: jax.Array) -> jax.Array:
        sources, rest, da = args[:n], args[n:-1], args[-1]
        again = dataclasses.replace(jax.tree.unflatten(tree, rest), x=origin.make(*sources), y=jnp.zeros_like(y))
        with as_derivative():
            return again.contract(da)

    return linear_in_last(along, *origin.sources, *rest, da)


def numbers(shape: tuple[Any, ...]) -> int:
    """Return how many numbers an array has. Of an axis of unknown length, as `jax.export` knows them, it has many."""
    return math.prod(n if isinstance(n, int) else 1024 for n in shape)


def linear_in_last(product: Linear, *args: jax.Array, wait: Wait | None = None) -> jax.Array:
    """Return product(*sources, w), which is linear in w.

    Its transpose keeps the sources and begins when its cotangent is there, where that of another function keeps what
    was made of the sources. `wait` says how it waits; by itself, the large sources do.
    """
    return remade_p.bind(*args, program=jax.make_jaxpr(product)(*args), wait=wait or _after)


def _run(*args: jax.Array, program: Any, wait: Wait | None = None) -> jax.Array:
    [out] = jaxpr_as_fun(program)(*args)
    return out


remade_p = Primitive("lora_linear_in_last")
remade_p.def_impl(_run)
remade_p.def_abstract_eval(lambda *_, program, wait: open_jaxpr(program)[0].outvars[0].aval)
mlir.register_lowering(remade_p, mlir.lower_fun(_run, multiple_results=False))


def _jvp(primals: Any, tangents: Any, program: Any, wait: Wait) -> tuple[jax.Array, jax.Array]:
    *sources, _ = primals
    if all(type(t) is ad.Zero for t in tangents[:-1]):
        return _run(*primals, program=program), remade_p.bind(*sources, tangents[-1], program=program, wait=wait)
    run = functools.partial(_run, program=program)
    return jax.jvp(run, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(ct: Any, *args: Any, program: Any, wait: Wait) -> list[Any]:
    *sources, w = args
    if type(ct) is ad.Zero:
        return [None] * len(sources) + [ad.Zero(w.aval)]
    sources = wait(sources, ct)
    transposed = jax.linear_transpose(lambda w: _run(*sources, w, program=program), w.aval)
    return [None] * len(sources) + list(transposed(ct))


def _batch(args: Any, axes: Any, program: Any, wait: Wait) -> tuple[jax.Array, int]:
    return linear_in_last(jax.vmap(functools.partial(_run, program=program), tuple(axes)), *args, wait=wait), 0


ad.primitive_jvps[remade_p] = _jvp
ad.primitive_transposes[remade_p] = _transpose
batching.primitive_batchers[remade_p] = _batch


def _after(arrays: list[jax.Array], token: jax.Array) -> list[jax.Array]:
    """Return arrays of which the large ones cannot be read before another one is there, a product with rows [*T, n].

    Without that, compilers make x again at once, where its sources are, and keep it. That for CPUs takes barriers away
    before it puts a program in order. So the arrays depend on the token, by `are_there`.
    """
    if not jnp.issubdtype(token.dtype, jnp.floating) or 0 in token.shape:
        return arrays
    rows = token[..., 0]
    there = are_there(rows)  # [*T]
    large = max(numbers(array.shape) for array in arrays) // 2

    def after(array: jax.Array) -> jax.Array:
        if is_key(array):
            return jax.random.wrap_key_data(after(jax.random.key_data(array)), impl=jax.random.key_impl(array))
        if array.shape[: rows.ndim] == rows.shape:  # on a mesh, each device asks of its own rows
            return jnp.where(there.reshape(*rows.shape, *(1,) * (array.ndim - rows.ndim)), array, jnp.zeros_like(array))
        if jax.device_count() > 1:
            return array
        return jnp.where(there.ravel()[:1].reshape((1,) * array.ndim), array, jnp.zeros_like(array))

    return [after(array) if numbers(array.shape) >= large or is_key(array) else array for array in arrays]


def are_there(x: jax.Array) -> jax.Array:
    """Return whether floating point numbers have less than 65 bits that are set: true, which no compiler knows."""
    return lax.population_count(lax.bitcast_convert_type(x, f"uint{x.dtype.itemsize * 8}")) < 65
