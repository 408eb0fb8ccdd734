"""The products of a compiled program."""

import math
from typing import NamedTuple

import lora_jax as lora
from lora_jax.analysis import hlo


class Array(NamedTuple):
    """Its dtype and its shape on one device."""

    dtype: str
    shape: tuple[int, ...]


def products(report: lora.CompileReport) -> list[tuple[Array, Array, Array]]:
    """Return (x, w, x @ w) of each product, wherever it is in the program; one in a loop counts once."""
    found = []
    for lines in hlo.parse(report.text).computations.values():
        results = {one.name: one.results for one in lines}
        for one in lines:
            if one.operation in ("convolution", "dot"):  # a compiler for TPUs writes products as convolutions
                x, w, y = (_array(text) for text in (*(results[name] for name in one.operands), one.results))
                found.append((x, w, y))
    return found


def _array(text: str) -> Array:
    [(dtype, shape, _)] = hlo.arrays(text)
    return Array(dtype, shape)


def taking(report: lora.CompileReport, size: int) -> list[int]:
    """Return, for each product with an operand of so many numbers, how many numbers the other operand has.

    A compiler for TPUs calls a kernel for ragged products.
    """
    found = []
    for lines in hlo.parse(report.text).computations.values():
        results = {one.name: one.results for one in lines}
        for one in lines:
            ragged = one.operation == "custom-call" and one.name.startswith("ragged-dot-none")
            if one.operation in ("convolution", "dot") or ragged:
                x, w = (_array(results[name]) for name in one.operands[-2:])
                if size in (math.prod(x.shape), math.prod(w.shape)):
                    other = x if math.prod(w.shape) == size else w
                    found.append(math.prod(other.shape))
    return found
