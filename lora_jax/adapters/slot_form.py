"""Adapters in the form that the slots of a bank have: of one rank, one dtype, and with the scale in B."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.scaled import quotient
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import check_adapter_dict
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import Layout, spans
from lora_jax.core.paths import nearest


def form_of(like: Mapping[str, Adapter]) -> dict[str, Any]:
    """Return the shapes and dtypes of one slot, for adapters or their shapes."""
    return in_slots(jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), dict(like)))


def in_slots(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapters, whatever is in the place of their arrays, with those that a bank has.

    LoRA has no scale of its own in a bank: it is multiplied into B when an adapter is loaded, once and not in each
    call for all slots.
    """
    return {p: dataclasses.replace(a, ratio=None) if isinstance(a, LoraAdapter) else a for p, a in adapters.items()}


def in_form(name: str, adapters: Any, form: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapters as numpy arrays in the form of a slot.

    Raises:
        LoraError: a path is not of the bank; an adapter is missing that is no LoRA; a kind or axes are others; a rank
            is above that of the bank; another shape differs.
    """
    check_adapter_dict(name, adapters)
    for path in adapters:
        if path not in form:
            near = ", ".join(map(repr, nearest(path, list(form))))
            raise LoraError(f"{name} has an adapter for {path!r}, which the bank has not; the nearest are {near}.")
    return {path: _fitted(f"{name}: {path!r}", adapters.get(path), wanted) for path, wanted in form.items()}


def _fitted(where: str, adapter: Any, wanted: Any) -> Any:
    is_lora = isinstance(wanted, LoraAdapter)
    if adapter is None:
        if not is_lora:
            raise LoraError(f"{where} has no adapter, and no zeros that are none: the bank has {_kind(wanted)} there.")
        return jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), wanted)
    if is_lora and not isinstance(adapter, LoraAdapter):
        adapter = adapter.to_lora() or adapter
    if type(adapter) is not type(wanted) or adapter.axes != wanted.axes:
        raise LoraError(
            f"{where} is a {_kind(adapter)} of {adapter.axes}, but the bank has a {_kind(wanted)} of "
            f"{wanted.axes} there."
        )
    arrays = {name: np.asarray(array) for name, array in adapter.arrays().items()}
    if is_lora:
        ratio = arrays.pop("ratio", None)
        wide = np.promote_types(arrays["b"].dtype, np.float32)
        arrays["b"] = arrays["b"].astype(wide) * (1 if ratio is None else quotient(ratio))
    shapes = wanted.arrays()
    if arrays.keys() != shapes.keys():
        raise LoraError(f"{where} has the arrays {[*arrays]}, but the bank has {[*shapes]} there.")
    fitted = {
        name: _padded(f"{where} {name}", array, shapes[name], wanted.layout[name], wanted)
        for name, array in arrays.items()
    }
    return dataclasses.replace(wanted, **fitted)


def _padded(where: str, array: Any, shape: Any, layout: Layout, adapter: Any) -> Any:
    """Return an array with zeros up to the rank of the bank, in its dtype."""
    ranks = [start for part, start, _ in spans(layout, adapter.axes) if part == "rank"]
    missing = [n - have for n, have in zip(shape.shape, array.shape, strict=True)] if array.ndim == shape.ndim else None
    if missing is None or any(n for i, n in enumerate(missing) if i not in ranks):
        raise LoraError(f"{where} has the shape {list(array.shape)}, but the bank has {list(shape.shape)} there.")
    if any(missing[i] < 0 for i in ranks):
        rank, most = (shapes[ranks[0]] for shapes in (array.shape, shape.shape))
        raise LoraError(
            f"{where} is of rank {rank}, above the {most} of the bank: make the bank with adapters of the "
            f"largest rank, lora.AdapterBank(lora.init(key, params, plan), slots), with rules of rank {rank}."
        )
    return np.pad(array, [(0, n) for n in missing]).astype(shape.dtype)


def _kind(adapter: Any) -> str:
    return type(adapter).__name__
