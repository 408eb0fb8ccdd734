"""Modules of torch's that are several parameters here: [W0 | W1 | ...], such as query, key and value in one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array, ParameterMatch
from lora_jax.interop.peft.formats.format import OF_OUTPUTS, Format, Module


def joined(
    format: Format, name: str, found: Mapping[int, Module], parts: Sequence[ParameterMatch], params: Any
) -> Module:
    """Return one module of several parts: with one A if all share it, else with [A0; A1; ...] and blocks of B.

    Args:
        found: what is known of the parts that have an adapter, by their numbers.
        parts: all parameters that the module consists of, in order.

    Raises:
        LoraError: some of the parts are not known; the weight of a part without adapter is needed, and is not there.
    """
    if [part.entry.part for part in parts] != list(range(len(parts))):
        known = ", ".join(repr(part.path) for part in parts)
        raise LoraError(
            f"{name} holds several parameters, of which only {known} are known. Give all parameters: "
            "save_peft(..., params=params)."
        )
    scales = list(dict.fromkeys(module.scale for module in found.values()))
    scale = scales[0] if len(scales) == 1 else 1.0
    arrays = {i: format.rescaled(module, scale).arrays for i, module in sorted(found.items())}  # as B has its columns
    blocks = [b for _, b in format.pairs]
    first = next(iter(arrays.values()))
    over_outputs = [field for field, layout in format.layout.items() if layout == OF_OUTPUTS]
    over_rank = [field for field in format.endings if field in first and field not in (*blocks, *over_outputs)]
    shared = all(np.array_equal(one[field], first[field]) for one in arrays.values() for field in over_rank)
    whole = {}
    for field in over_rank:
        pieces = [one[field] for one in arrays.values()]
        whole[field] = first[field] if shared else _along_rank(pieces, parts[0].experts)
    for field in blocks:
        whole[field] = _blocks({i: one[field] for i, one in arrays.items()}, parts, shared)
    for field in over_outputs:
        whole[field] = np.concatenate(
            [
                arrays[i][field] if i in arrays else format.unchanged_outputs(name, part, params)
                for i, part in enumerate(parts)
            ]
        )
    return Module(whole, scale)


def _along_rank(pieces: Sequence[Array], experts: int) -> Array:
    """Return [A0; A1; ...] along the rank of each A [experts * r, ...]."""
    apart = [piece.reshape(experts, -1, *piece.shape[1:]) for piece in pieces]
    whole = np.concatenate(apart, axis=1)
    return whole.reshape(-1, *whole.shape[2:])


def _blocks(found: Mapping[int, Array], parts: Sequence[ParameterMatch], shared: bool) -> Array:
    """Return B [out, r * experts] of all outputs, with zeros for parts without one.

    The parts are one below the other; unless they share their A, each has its own columns too.
    """
    experts, some = parts[0].experts, next(iter(found.values()))
    apart = {i: b.reshape(len(b), -1, experts) for i, b in found.items()}
    ranks = [b.shape[1] for b in apart.values()]
    blocks, start = [], 0
    for i, part in enumerate(parts):
        block = np.zeros((part.outputs, ranks[0] if shared else sum(ranks), experts), some.dtype)
        if i in apart:
            block[:, start : start + apart[i].shape[1]] = apart[i]
            start += 0 if shared else apart[i].shape[1]
        blocks.append(block)
    whole = np.concatenate(blocks)
    return whole.reshape(len(whole), -1, *some.shape[2:])
