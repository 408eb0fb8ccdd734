"""Changes of the experts of a layer, for published files that have a tensor for each expert and projection."""

from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.experts_apart import fused_shape, names_apart
from lora_jax.interop.safetensors_index import Tensor
from lora_jax.interop.tensor_changes import Change, Changes


def with_experts_apart(changes: Changes, tensors: Mapping[str, Tensor]) -> Changes:
    """Return the changes with those of all experts together in the tensors that the files have.

    Raises:
        LoraError: the files have another number of experts, or experts of other shapes.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    found: Changes = {}
    for name, change in changes.items():
        apart = [] if name in tensors else names_apart(name, shapes)
        if not apart:
            found[name] = change
            continue
        change = _outputs_first(change)
        if any(shape != fused_shape(name, shapes) for shape in change.shapes):
            raise LoraError(
                f"{name!r} is {len(apart)} experts in the files, from {apart[0][0]!r} of shape "
                f"{list(shapes[apart[0][0]])} to {apart[-1][-1]!r} of shape {list(shapes[apart[-1][-1]])}, and its "
                f"adapter is for {list(change.shape)}: it is of another model, or of another key map."
            )
        for expert, own in enumerate(apart):
            start = 0
            for tensor in own:
                outputs = shapes[tensor][0]
                found[tensor] = _part(change, expert, slice(start, start + outputs), shapes[tensor])
                start += outputs
    return found


def _outputs_first(change: Change) -> Change:
    """Return the change of a parameter [experts, in, out] as that of one [experts, out, in]."""
    if not change.inputs_first:
        return change
    n, inputs, outputs = change.shape
    return change._replace(
        shape=(n, outputs, inputs),
        factors=tuple((right.T, left.T) for left, right in change.factors),
        delta=_turned(change.delta),
        base=_turned(change.base),
        inputs_first=False,
    )


def _turned(array: Array | None) -> Array | None:
    return None if array is None else array.swapaxes(1, 2)


def _part(change: Change, expert: int, outputs: slice, shape: tuple[int, ...]) -> Change:
    """Return the change of some outputs of one expert."""

    def cut(array: Array | None) -> Any:
        return None if array is None else array[expert, outputs]

    factors = tuple((left[outputs], right) for left, right in change.factors[expert : expert + 1])
    return Change(shape, factors, delta=cut(change.delta), base=cut(change.base))
