"""The axes of an adapter, which may be those of the weight as it is used the other way round."""

import dataclasses

from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError


def with_axes(adapter: Adapter, axes: KernelAxes, path: str, source: str) -> Adapter:
    """Return the adapter with these axes: a LoRA of a table that is used as a head is transposed.

    Args:
        source: where the axes are from, for the error: "the plan" or "the key map".

    Raises:
        LoraError: it has other axes, and cannot be transposed to these.
    """
    if isinstance(adapter, FullAdapter | RowsAdapter) and not axes.stack:
        return dataclasses.replace(adapter, axes=axes)
    for candidate in (adapter, adapter.transpose()) if isinstance(adapter, LoraAdapter) else (adapter,):
        if candidate.axes == axes:
            return candidate
    raise LoraError(f"{path!r} has {axes} by {source}, but its adapter has {adapter.axes}: {_mend(adapter, axes)}.")


def _mend(adapter: Adapter, axes: KernelAxes) -> str:
    """Return what is to be done: name the stack in a rule, where one side has factors of its own for each matrix."""
    stack = sorted({*adapter.axes.stack, *axes.stack})
    if adapter.axes.stack == axes.stack:
        return "mend its entry in the key map"
    rule = f"lora.Lora(rank=8, stack={stack[0] if len(stack) == 1 else tuple(stack)})"
    return (
        f"plan it with a rule that names the stack, as in {rule}, so that each matrix has factors of its own, or mend "
        "its entry in the key map"
    )
