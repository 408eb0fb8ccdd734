"""Round weights to 8 bits, as files of compressed-tensors hold them: q * scale, with a scale for each block.

A block is a whole output, or 128 x 128 numbers as of DeepSeek-V3. Its scale is its largest |W| over the largest q,
which is 448 for floats (e4m3; Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433) and 127 for
integers, rounded to the dtype that it is written in before W is divided by it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.low_bits.codes import Array
from lora_jax.interop.low_bits.config import WHOLE

BLOCK = 128
_BITS = {"num_bits": 8, "symmetric": True, "group_size": None, "block_structure": None, "actorder": None}


class EightBits(NamedTuple):
    """How weights are rounded.

    Args:
        format: what compressed-tensors calls it.
        dtype: of q, as safetensors call it.
        largest: |q|.
        block: rows and columns that share a scale.
    """

    format: str
    dtype: str
    largest: float
    block: tuple[int, int]

    def scheme(self) -> dict[str, Any]:
        """Return the entry of a `config_groups`: weights so, activations rounded in 8 bits as the model runs."""
        kind = "float" if self.dtype == "F8_E4M3" else "int"
        fixed = _BITS | {"type": kind, "observer": "minmax", "observer_kwargs": {}}
        rows, activations = self.block[0], {"strategy": "token", "dynamic": True, "observer": None}
        weights: dict[str, Any] = {"strategy": "channel", "dynamic": False}
        if rows != 1:
            weights |= {"strategy": "block", "block_structure": list(self.block)}
            activations |= {"strategy": "group", "group_size": self.block[1]}
        return {
            "targets": ["Linear"],
            "weights": fixed | weights,
            "input_activations": fixed | activations,
            "output_activations": None,
        }

    def rounded(self, w: Array, scale_dtype: Any) -> tuple[Array, Array]:
        """Return q [rows, columns] and the scales [rows / block, columns / block] of some rows of a weight.

        Args:
            w: fp32 [rows, columns], finite; the rows of whole blocks, but for the last of a weight.
            scale_dtype: of the scales.
        """
        rows, columns = (np.arange(0, n, min(size, n)) for n, size in zip(w.shape, self.block, strict=True))
        largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(w), rows, 0), columns, 1)
        smallest = np.float32(jnp.finfo(scale_dtype).smallest_normal)
        scales = np.maximum(largest / np.float32(self.largest), smallest).astype(scale_dtype)
        q = np.clip(w / self.spread(scales, w.shape), -self.largest, self.largest)
        return (np.rint(q).astype(np.int8) if self.dtype == "I8" else q.astype(jnp.float8_e4m3fn)), scales

    def values(self, q: Array, scales: Array) -> Array:
        """Return the numbers that q stands for, in fp32."""
        return q.astype(np.float32) * self.spread(scales, q.shape)

    def spread(self, scales: Array, shape: tuple[int, ...]) -> Array:
        """Return the scale of each number in fp32, [rows or 1, columns or 1] where all along an axis are the same."""
        found = scales.astype(np.float32)
        for axis, size in enumerate(self.block):
            if 1 < size < WHOLE:
                found = np.repeat(found, size, axis).take(range(shape[axis]), axis)
        return found


EIGHT_BITS = {
    "fp8": EightBits("float-quantized", "F8_E4M3", 448.0, (1, WHOLE)),
    "fp8_block": EightBits("float-quantized", "F8_E4M3", 448.0, (BLOCK, BLOCK)),
    "int8": EightBits("int-quantized", "I8", 127.0, (1, WHOLE)),
}
