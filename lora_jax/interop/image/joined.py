"""Modules whose outputs an image model's own code has in one: query, key and value of Flux, and an MLP beside them.

sd-scripts trains such modules apart from one another, and joins their factors in the file: down is [A0; A1; ...], and
up has B0, B1, ... along its diagonal, with zeros elsewhere. Other trainers have one down for all.
"""

import numpy as np

from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.formats.format import Arrays


def rows_of(part: int, parts: int, outputs: int, inputs: int) -> slice:
    """Return the outputs of one of several modules that are joined.

    Three are query, key and value, of equal sizes; the fourth beside them, which has all others, is the first layer of
    an MLP, and each of the three then has as many outputs as there are inputs.
    """
    each = outputs // parts if parts < 4 else inputs
    return slice(part * each, outputs if part == parts - 1 else (part + 1) * each)


def own_ranks(up: Array, inputs: int, parts: int) -> list[slice]:
    """Return which of the rank's entries each module has: its own block where up has blocks along its diagonal.

    Args:
        up: of all of them, [out, r].
        inputs: of each.
        parts: how many they are.
    """
    up = up.reshape(up.shape[:2])
    whole = [slice(None)] * parts
    each, rest = divmod(up.shape[1], parts)
    if rest or not each:
        return whole
    blocks = [slice(i * each, (i + 1) * each) for i in range(parts)]
    for i, block in enumerate(blocks):
        if np.delete(up[rows_of(i, parts, len(up), inputs)], block, axis=1).any():
            return whole
    return blocks


def part_of(arrays: Arrays, part: int, parts: int, own_rank: slice) -> Arrays:
    """Return the arrays of one of several joined modules: a [r, in], b [out, r] and m [out], or those of LoHa."""
    if parts == 1:
        return arrays
    first, inputs = arrays["b" if "b" in arrays else "b1"], arrays["a" if "a" in arrays else "a1"].shape[1]
    rows = rows_of(part, parts, len(first), inputs)
    own = {}
    for field, array in arrays.items():
        own[field] = array[own_rank] if field.startswith("a") else array[rows]
        if field.startswith("b"):
            own[field] = own[field][:, own_rank]
    return own
