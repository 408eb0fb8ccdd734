"""Inputs of products that a derivative makes again, in the place of keeping them.

The gradient of A needs x, and nothing else of a step with a frozen W does. Where x comes by elementwise operations from
arrays that the step keeps anyway, those are kept for it: x is made of them again when the gradient of A is due.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from lora_jax.core._compat import Primitive, abstract_result
from lora_jax.core.arrays import is_key

REMADE_PRODUCT = "lora_remade_product"  # by this name the interpreter knows the call
Linear = Callable[..., jax.Array]  # (*sources, w), linear in w


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Remade:
    """An array, and of what it can be made again: `make(*sources)` is the array."""

    value: jax.Array
    sources: tuple[jax.Array, ...] = ()
    make: Callable[..., jax.Array] | None = field(default=None, metadata={"static": True})  # None: it is kept

    def masked(self, fn: Callable[[jax.Array, jax.Array], jax.Array], keys: jax.Array) -> Self:
        """Return fn(array, keys), which is linear in the array. Its derivative draws the mask again."""
        if self.make is None:
            return self.map(fn, keys)
        value = remade_p.bind(keys, self.value, product=lambda keys, x: fn(x, keys))
        return dataclasses.replace(self.map(fn, keys), value=value)

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
    """Return x @ dA, of which a derivative keeps the sources of x.

    Of y the product takes the shape alone.
    """
    origin = product.origin
    rest, tree = jax.tree.flatten(dataclasses.replace(product, x=None, y=None, origin=None))
    n, y = len(origin.sources), product.y

    def along(*args: jax.Array) -> jax.Array:
        sources, rest, da = args[:n], args[n:-1], args[-1]
        again = dataclasses.replace(jax.tree.unflatten(tree, rest), x=origin.make(*sources), y=jnp.zeros_like(y))
        return again.contract(da)

    return remade_p.bind(*origin.sources, *rest, da, product=along)


remade_p = Primitive("lora_remade_product")
remade_p.def_impl(lambda *args, product: product(*args))
remade_p.def_abstract_eval(lambda *avals, product: abstract_result(product, avals))
mlir.register_lowering(remade_p, mlir.lower_fun(lambda *args, product: product(*args), multiple_results=False))


def _jvp(primals: Any, tangents: Any, product: Linear) -> tuple[jax.Array, jax.Array]:
    *sources, _ = primals
    if all(type(t) is ad.Zero for t in tangents[:-1]):
        return product(*primals), remade_p.bind(*sources, tangents[-1], product=product)
    return jax.jvp(product, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(ct: Any, *args: Any, product: Linear) -> list[Any]:
    *sources, w = args
    if type(ct) is ad.Zero:
        return [None] * len(sources) + [ad.Zero(w.aval)]
    sources = _after(sources, ct)
    _, pull = jax.vjp(lambda w: product(*sources, w), jnp.zeros(w.aval.shape, w.aval.dtype))
    return [None] * len(sources) + list(pull(ct))


def _batch(args: Any, axes: Any, product: Linear) -> tuple[jax.Array, int]:
    return remade_p.bind(*args, product=jax.vmap(product, tuple(axes))), 0


ad.primitive_jvps[remade_p] = _jvp
ad.primitive_transposes[remade_p] = _transpose
batching.primitive_batchers[remade_p] = _batch


def _after(arrays: list[jax.Array], token: jax.Array) -> list[jax.Array]:
    """Return arrays that a program cannot read before another one is there, a product with rows [*T, n].

    Without that, compilers make x again at once, where its sources are, and keep it. A barrier says so to those for
    TPUs and GPUs. That for CPUs takes barriers away before it puts a program in order. There the arrays depend on the
    token: on whether a number has less than 65 bits that are set, of which no compiler knows that it is true.
    """
    return lax.platform_dependent(arrays, token, cpu=_dependent, default=_barrier)


def _barrier(arrays: list[jax.Array], token: jax.Array) -> list[jax.Array]:
    arrays, _ = lax.optimization_barrier((arrays, token))
    return arrays


def _dependent(arrays: list[jax.Array], token: jax.Array) -> list[jax.Array]:
    rows = token[..., 0]
    known = lax.population_count(lax.bitcast_convert_type(rows, f"uint{token.dtype.itemsize * 8}")) < 65  # [*T]

    def dependent(array: jax.Array) -> jax.Array:
        if is_key(array):
            data = dependent(jax.random.key_data(array))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
        if array.shape[: rows.ndim] == rows.shape:  # on a mesh, each device asks of its own rows
            there = known.reshape(*rows.shape, *(1,) * (array.ndim - rows.ndim))
        elif jax.device_count() == 1:
            there = known.ravel()[:1].reshape((1,) * array.ndim)
        else:
            return array
        return jnp.where(there, array, jnp.zeros((), array.dtype))

    return [dependent(array) for array in arrays]
