"""From the tensors of one module of an image model's file to our arrays, in torch's layout.

All forms of `forms` are LoRA in another form, of rank r, r^2 or more: so one that has no place as it is becomes
the LoRA that it is. Arrays that are tensors of the file keep its dtype; products of several are computed in fp32 and
kept there, rounded once for each factor.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.image.forms import Shape, Shapes, listed
from lora_jax.interop.peft.formats.format import Arrays
from lora_jax.interop.peft.formats.lokr import MOST_ENTRIES


def arrays_of(tensors: Arrays, window: Shape | None, format: str) -> Arrays:
    """Return the arrays of a module in a format of ours: the one that its form has, or "LORA"."""
    return _converted(np, tensors, window, format)


def forms_of_arrays(
    shapes: Shapes, dtypes: Mapping[str, Any], window: Shape | None, format: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of these arrays.

    Raises:
        LoraError: they would be larger than those of any model; the message lacks the names of file and module.
    """
    key = tuple((name, shape, np.dtype(dtypes[name])) for name, shape in shapes.items())
    found = _traced(key, window, format)
    if (entries := sum(math.prod(array.shape) for array in found.values())) > MOST_ENTRIES:
        raise LoraError(f"has {listed(shapes)}, and together {entries:,} entries, expected at most {MOST_ENTRIES:,}")
    return found


@functools.lru_cache(maxsize=256)  # modules of one shape are many
def _traced(key: tuple[tuple[str, Shape, Any], ...], window: Shape | None, format: str) -> Any:
    tensors = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in key}
    return jax.eval_shape(lambda tensors: _converted(jnp, tensors, window, format), tensors)


def _converted(xp: Any, tensors: Mapping[str, Any], window: Shape | None, format: str) -> dict[str, Any]:
    """Return the arrays: `xp` is numpy for numbers, and jax.numpy for shapes alone."""
    if "hada_w1_a" in tensors:
        arrays = _loha(xp, tensors, window)
        return _loha_as_lora(xp, arrays) if format == "LORA" else arrays
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        return _lokr_as_lora(xp, tensors, window) if format == "LORA" else _lokr(xp, tensors)
    a = _with_core(xp, tensors["mid"], tensors["down"]) if "mid" in tensors else tensors["down"]
    a, b = _windowed(a, tensors["up"], window)
    lengths = tensors.get("dora_scale", tensors.get("magnitude"))
    return {"a": a, "b": b} if lengths is None else {"a": a, "b": b, "m": lengths.reshape(-1)}


def _windowed(a: Any, b: Any, window: Shape | None) -> tuple[Any, Any]:
    """Return a [r, in, *window] and b [out, r, 1, ...] of factors that may be matrices, or have windows of 1.

    What does not fit the window stays as it is, and is refused by its shape later.
    """
    if window and a.ndim == 2 and a.shape[1] % math.prod(window) == 0:
        a = a.reshape(len(a), -1, *window)
    elif window == () and math.prod(a.shape[2:]) == 1:
        a = a.reshape(a.shape[:2])
    return a, b.reshape(*b.shape[:2], *(1 for _ in a.shape[2:]))


def _wide(xp: Any, array: Any) -> Any:
    return array.astype(xp.float32)


def _with_core(xp: Any, core: Any, inner: Any) -> Any:
    """Return core [r, i, *window] times inner [i, in], as [r, in, *window]."""
    inner = _wide(xp, inner).reshape(inner.shape[:2])
    return xp.moveaxis(xp.tensordot(_wide(xp, core), inner, axes=((1,), (0,))), -1, 1)


def _loha(xp: Any, tensors: Mapping[str, Any], window: Shape | None) -> dict[str, Any]:
    """Return a1 and a2 [r, in, *window], b1 and b2 [out, r, 1, ...]."""
    arrays = {}
    for i in "12":
        a, b = tensors[f"hada_w{i}_b"], tensors[f"hada_w{i}_a"]
        if f"hada_t{i}" in tensors:
            a, b = _with_core(xp, tensors[f"hada_t{i}"], a), b.T
        arrays[f"a{i}"], arrays[f"b{i}"] = _windowed(a, b, window)
    return arrays


def _loha_as_lora(xp: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the LoRA of rank r^2: each row of a1 times each of a2, and the columns of b1 and b2 likewise."""
    a1, b1, a2, b2 = (_wide(xp, arrays[name]) for name in ("a1", "b1", "a2", "b2"))
    a, b = a1[:, None] * a2[None, :], b1[:, :, None] * b2[:, None, :]
    return {"a": a.reshape(-1, *a1.shape[1:]), "b": b.reshape(len(b1), -1, *b1.shape[2:])}


def _lokr(xp: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return w1, and a and b, or a whole a, of a linear layer."""
    if "lokr_w1" in tensors:
        first = tensors["lokr_w1"]
    else:
        first = xp.matmul(_wide(xp, tensors["lokr_w1_a"]), _wide(xp, tensors["lokr_w1_b"]))
    if "lokr_w2" in tensors:
        return {"w1": first, "a": tensors["lokr_w2"]}
    return {"w1": first, "a": tensors["lokr_w2_b"], "b": tensors["lokr_w2_a"]}


def _lokr_as_lora(xp: Any, tensors: Mapping[str, Any], window: Shape | None) -> dict[str, Any]:
    """Return the LoRA b1 (x) b2 times a1 (x) a2, of w1 = b1 a1 and w2 = b2 a2."""
    (a1, b1), (a2, b2) = (_factors(xp, tensors, f"lokr_w{i}") for i in "12")
    if "lokr_t2" in tensors:
        a2, b2 = _with_core(xp, tensors["lokr_t2"], a2), b2.T
    ones = [1 for _ in a2.shape[2:]]
    a = a1.reshape(len(a1), 1, a1.shape[1], 1, *ones) * a2[None, :, None]
    b = b1[:, None, :, None] * b2[None, :, None]
    a = a.reshape(len(a1) * len(a2), a1.shape[1] * a2.shape[1], *a2.shape[2:])
    a, b = _windowed(a, b.reshape(len(b1) * len(b2), b1.shape[1] * b2.shape[1]), window)
    return {"a": a, "b": b}


def _factors(xp: Any, tensors: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Return a [r, in, *window] and b [out, r]: of a whole matrix itself, and the unit matrix of its smaller side."""
    if name not in tensors:
        return _wide(xp, tensors[f"{name}_b"]), _wide(xp, tensors[f"{name}_a"])
    whole = _wide(xp, tensors[name])
    outputs, inputs = len(whole), math.prod(whole.shape[1:])
    if outputs <= inputs:
        return whole, xp.eye(outputs, dtype=xp.float32)
    unit = xp.eye(inputs, dtype=xp.float32).reshape(inputs, *whole.shape[1:])
    return unit, whole.reshape(outputs, inputs)
