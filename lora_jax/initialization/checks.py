"""Checks of arguments that weights, gradients or data are: finite numbers, of the shapes that fit the adapters."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.arguments import rank_above
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.core.adapter_checks import check_adapters
from lora_jax.core.argument_checks import check_is
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed, unpacked
from lora_jax.core.paths import flatten_with_names, is_array, nearest
from lora_jax.initialization.svd import to_fp32


def check_weights(params: Any, adapters: Any) -> dict[str, Any]:
    """Return `{path: W}` of the weights that fresh adapters are for, as arrays or packed.

    Raises:
        LoraError: the adapters are not fresh ones of plain LoRA, or do not fit `params`; a weight is not finite.
    """
    check_fresh(adapters)
    names, leaves, _ = flatten_with_names(params)
    check_adapters(adapters, names, leaves)
    weights = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name in adapters}
    for path, leaf in weights.items():
        check_numbers(f"the parameter {path!r}", unpacked(leaf))  # only one is unpacked at a time
    return {path: leaf if is_packed(leaf) else jnp.asarray(leaf) for path, leaf in weights.items()}


def check_fresh(adapters: Any) -> None:
    """Raise unless these are `{path: LoraAdapter}` as `lora.init` makes them, of finite numbers and with B = 0."""
    check_is("(params, adapters, ...)", "adapters", adapters, Mapping, "a dict {path: adapter} of lora.init")
    for path, adapter in adapters.items():
        if not isinstance(adapter, LoraAdapter):
            raise LoraError(
                f"{path!r} is a {type(adapter).__name__}, and starts are of LoraAdapter: plan it with a lora.Lora "
                "rule, and give parameters and adapters in this order, (params, adapters, ...)."
            )
        _check_adapter(path, adapter)


def _check_adapter(path: str, adapter: LoraAdapter) -> None:
    """Raise unless an adapter is of one piece, of a rank that its weight can have, finite, and with B = 0."""
    try:
        _, d, k = adapter.axes.fans(adapter.kernel_shape())
    except LoraError as error:
        raise LoraError(f"the adapter for {path!r} {error} lora.init makes one that fits.") from None
    if problem := rank_above(adapter.a.shape[-1], d, k):
        raise LoraError(f"{path!r}: {problem}.")
    for name, factor in (("A", adapter.a), ("B", adapter.b)):
        check_numbers(f"{name} of {path!r}", factor)
    if not math.isfinite(scale := float(adapter.scale)) or not scale:
        raise LoraError(f"{path!r} has the scale {scale}, expected a finite number other than 0: set its alpha.")
    with jax.ensure_compile_time_eval():
        started = bool(jnp.any(adapter.b != 0))
    if started:
        raise LoraError(
            f"{path!r} has been started or trained already, its B is not zero, and a start would drop that: take fresh "
            "adapters from lora.init."
        )


def check_data(what: str, tree: Any, expected: Mapping[str, tuple[int | None, ...]]) -> dict[str, jax.Array]:
    """Return `{path: array}` of what a tree has at the expected paths.

    Args:
        what: the name of the argument, for messages.
        tree: `{path: array}`, or nested like the parameters.
        expected: `{path: shape}`; None in a shape stands for any size.

    Raises:
        LoraError: a path is missing; an array is not finite, not of floats or of another shape.
    """
    names, leaves, _ = flatten_with_names(tree)
    given = dict(zip(names, leaves, strict=True))
    for path, shape in expected.items():
        if path not in given:
            near = ", ".join(map(repr, nearest(path, names))) or "none at all"
            raise LoraError(
                f"{what} has nothing for {path!r}, expected an array for each adapted weight; the nearest: {near}."
            )
        check_numbers(f"{what}[{path!r}]", given[path])
        found = given[path].shape
        if len(found) != len(shape) or any(n not in (None, m) for n, m in zip(shape, found, strict=True)):
            sizes = ", ".join("n" if n is None else str(n) for n in shape)
            raise LoraError(f"{what}[{path!r}] has shape {list(found)}, expected [{sizes}]: reshape it to that.")
    return {path: jnp.asarray(given[path]) for path in expected}


def inputs_shape(axes: KernelAxes, shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """Return [*stack, None, d], the shape of any number of inputs x of a weight with these axes and this shape."""
    stack, _, _ = axes.sizes(shape)
    _, d, _ = axes.fans(shape)
    return (*stack, None, d)


def check_choice(call: str, argument: str, found: str, known: tuple[str, ...]) -> None:
    """Raise if an argument is none of the known names."""
    if found not in known:
        raise LoraError(f"{call}({argument}={found!r}): expected one of {', '.join(map(repr, known))}.")


def check_numbers(what: str, leaf: Any) -> None:
    """Raise if a leaf is traced, or not an array of finite floats."""
    if isinstance(leaf, jax.core.Tracer):
        raise LoraError(f"{what} is traced, and starts look at numbers: call them outside jax.jit and the like.")
    if not is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        found = f"of {leaf.dtype} numbers" if is_array(leaf) else f"a {type(leaf).__name__}"
        raise LoraError(f"{what} is {found}, expected an array of floats: give it as one.")
    with jax.ensure_compile_time_eval():  # so that values that are not traced are read inside jax.jit too
        finite = bool(jnp.isfinite(to_fp32(jnp.asarray(leaf))).all())
    if not finite:
        raise LoraError(f"{what} holds a NaN or an infinity, expected finite numbers: look for where they come from.")
