"""Packed weights where they enter a program: they are checked, and nothing is differentiated with respect to them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import PyTreeDef

from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed


def check_packed(name: str, packed: Packed) -> None:
    """Raise if the arrays of a packed weight do not fit one another."""
    arrays = packed.arrays()
    leaves, tree = jax.tree.flatten(packed)
    if problem := _misfit(tree, tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves)):
        found = ", ".join(f"{part} {array.dtype}{list(array.shape)}" for part, array in arrays.items())
        raise LoraError(
            f"{name!r} is a {type(packed).__name__} of arrays that do not fit each other, {found}, for matrices of "
            f"{list(packed.inner)}: {problem} Pack it again with lora.bases.quantize."
        )


@functools.lru_cache(maxsize=4096)
def _misfit(tree: PyTreeDef, kinds: tuple[tuple[tuple[int, ...], Any], ...]) -> str:
    """Return why arrays of these shapes and dtypes cannot be unpacked; nothing if they can."""
    packed = tree.unflatten([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds])
    try:
        found, expected = jax.eval_shape(lambda packed: packed.dense(), packed).shape, packed.shape
    except (TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return "" if found == expected else f"they unpack to {list(found)}."


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def as_constant(name: str, packed: Packed) -> Packed:
    """Return a packed weight as it is, and refuse derivatives by it: some of its arrays are floats all the same."""
    return packed


@functools.partial(as_constant.defjvp, symbolic_zeros=True)
def _derivative(name: str, primals: tuple[Packed], tangents: tuple[Any]) -> tuple[Packed, Any]:
    changes = jax.tree.leaves(tangents, is_leaf=_is_zero)
    if not all(map(_is_zero, changes)):
        raise LoraError(
            f"{name!r} is packed, and something differentiates with respect to it, of which only arrays are capable: "
            "differentiate with respect to the adapters, as jax.grad(loss)(adapters, params) does, or unpack the "
            "weight with lora.bases.dense."
        )
    return primals[0], tangents[0]


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero) or getattr(tangent, "dtype", None) == jax.dtypes.float0
