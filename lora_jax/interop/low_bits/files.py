"""Weights of 4 or 8 bits in safetensors as other libraries publish them: the tensors that belong to one weight.

Of a weight X.weight [outputs, inputs], the files have

    MXFP4, gpt-oss          X_blocks u8 [experts, out, n, 16], X_scales u8 [experts, out, n]: X [experts, in, out]
    MXFP4                   X.weight_packed u8 [out, in / 2], X.weight_scale u8 [out, in / 32]
    NVFP4                   X.weight_packed u8, X.weight_scale e4m3 [out, in / 16], X.weight_global_scale fp32 [1],
                            by which scales are divided
    NVFP4, ModelOpt         X.weight u8, X.weight_scale e4m3, X.weight_scale_2 fp32 [], by which they are multiplied
    fp8 in blocks           X.weight e4m3 [out, in], X.weight_scale_inv [out / 128, in / 128], by which W is multiplied
    fp8, int8               X.weight e4m3 or i8, X.weight_scale, and X.weight_zero_point i8 if it is asymmetric
    int4, int8, packed      X.weight_packed i32 [out, in / 8], X.weight_shape, X.weight_scale [out, groups], and
                            X.weight_zero_point i32 [out / 8, groups], X.weight_g_idx i32 [in] if there are some

Sources: the model card and `torch/weights.py` of openai/gpt-oss; the compressors of vllm-project/compressed-tensors
0.20; `nvfp4_tensor.py` of NVIDIA/Model-Optimizer; README_WEIGHTS.md of deepseek-ai/DeepSeek-V3.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.low_bits.codes import Array, decoded, grid_shape, numbers, powers
from lora_jax.interop.low_bits.config import MEND, MX, NV, WHOLE, Packing
from lora_jax.interop.safetensors_index import DTYPES, Tensor, read

EXPONENTS = ("U8", "F8_E8M0")
_FLOATS = ("F32", "BF16", "F16")
# What is rounded as the packed model runs, and is not here.
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "input_zero_point", "output_scale", "activation_scale",
                   "k_scale", "v_scale", "q_scale", "prob_output_scale", "output_zero_point")  # fmt: skip
_DIRECT = {"F8_E4M3": "e4m3", "I8": "int8", "U8": "e2m1"}  # how q of X.weight is written, by its dtype
_NEVER_DENSE = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I32")


class LowBit(NamedTuple):
    """A weight in several tensors.

    Args:
        name: of the weight in the unpacked model.
        shape: of the weight.
        dtype: the narrowest of the files' dtypes that holds its numbers exactly, or F32.
        kind: how q is written, a key of `TABLES`.
        codes, scale: tensors of q and of the scales.
        block: rows and columns that share a scale.
        outer: the scale of the scales, if there is one.
        divides: whether scales are divided by it.
        zero: tensor of the zeros, if there are some.
        groups: for each column, the column of `scale` that it belongs to, if the file says so.
        turned: whether the codes are those of the transposed weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    codes: Tensor
    scale: Tensor
    block: tuple[int, int]
    outer: Tensor | None = None
    divides: bool = False
    zero: Tensor | None = None
    groups: Tensor | None = None
    turned: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """Return the rows and columns of the codes; of several matrices, the rows of all."""
        outputs, inputs = self.shape[-2:][::-1] if self.turned else self.shape[-2:]
        return math.prod(self.shape[:-2]) * outputs, inputs


Weight = Tensor | LowBit


def as_dense(weight: Weight) -> Tensor:
    """Return a weight as a tensor, for those who look at names, shapes and dtypes."""
    if isinstance(weight, Tensor):
        return weight
    return Tensor(weight.codes.file, weight.dtype, weight.shape, weight.codes.start, weight.codes.size)


def weights_of(folder: Path, tensors: Mapping[str, Tensor], packing: Packing | None) -> dict[str, Weight]:
    """Return the tensors of a folder by their names, with one `LowBit` in the place of all that belong to it.

    Args:
        folder: where the files are.
        tensors: in them.
        packing: as of `packing_of`; None leaves all as they are.

    Raises:
        LoraError: tensors of a weight are missing, or do not fit each other; one is packed in a way that is not read.
    """
    if packing is None:
        return dict(tensors)
    finder = _Finder(folder, tensors, packing)
    found: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        weight = finder.weight(name, tensor)
        own = name if weight is None else weight.name
        if weight is not None or not _is_beside(name, tensors):
            if own in found or (weight is not None and own != name and own in tensors):
                raise LoraError(f"{folder} holds {short(own)} twice, packed and unpacked.")
            found[own] = tensor if weight is None else weight
    for name, other in found.items():
        if isinstance(other, Tensor) and other.dtype in _NEVER_DENSE and name.endswith((".weight", "packed", "blocks")):
            raise LoraError(
                f"{short(name)} in {folder} is of {other.dtype}{list(other.shape)}, without what says how it is packed "
                f"beside it, or not as {packing.method} packs weights. {MEND}"
            )
    return found


def read_weight(folder: Path, weight: Weight, dtype: Any) -> Array:
    """Return a weight as an array of this dtype, with its shape.

    What is packed is unpacked in fp32, some rows at a time, and rounded once.

    Raises:
        LoraError: a file became shorter; what is packed has numbers that are not finite, or not in this dtype.
    """
    if isinstance(weight, Tensor):
        return read(folder, weight, DTYPES[weight.dtype]).reshape(weight.shape).astype(dtype, copy=False)
    rows, columns = weight.matrix
    grid = grid_shape((rows, columns), weight.block)
    scales = _floats(folder, weight.scale).reshape(grid)
    if weight.outer is not None:
        with np.errstate(all="ignore"):
            outer = _floats(folder, weight.outer).reshape(())
            scales = scales / outer if weight.divides else scales * outer
    data = read(folder, weight.codes, np.uint8).reshape(rows, -1)
    zeros = None if weight.zero is None else _zeros(folder, weight, grid)
    groups = None if weight.groups is None else _groups(folder, weight, grid[1])
    found = decoded(weight.kind, data, scales, weight.block, (rows, columns), dtype, zeros, groups)
    if not np.isfinite(found).all():
        raise LoraError(
            f"{short(weight.name)} in {folder} has numbers that are not finite in {np.dtype(dtype).name}: the file is "
            "damaged; or take a wider dtype, such as bfloat16 in the place of float16."
        )
    if not weight.turned:
        return found.reshape(weight.shape)
    return found.reshape(*weight.shape[:-2], weight.shape[-1], weight.shape[-2]).swapaxes(-1, -2)


def _floats(folder: Path, tensor: Tensor) -> Array:
    """Return scales in fp32."""
    if tensor.dtype in EXPONENTS:
        return powers(read(folder, tensor, np.uint8))
    return read(folder, tensor, DTYPES[tensor.dtype]).astype(np.float32)


def _zeros(folder: Path, weight: LowBit, grid: tuple[int, int]) -> Array:
    """Return the zeros as they are taken off q, fp32, one for each block."""
    assert weight.zero is not None
    if weight.zero.dtype == "I8":
        return read(folder, weight.zero, np.int8).astype(np.float32).reshape(grid)
    words = read(folder, weight.zero, np.int32).reshape(-1, grid[1])  # packed along the outputs
    packed = np.ascontiguousarray(words.T).view(np.uint8)
    return numbers(weight.kind, packed, grid[0]).T


def _groups(folder: Path, weight: LowBit, count: int) -> Array | None:
    """Return the group of each column; None where all are -1, which says that they are in order."""
    assert weight.groups is not None
    found = read(folder, weight.groups, np.int32)
    if (found == -1).all():
        return None
    if not ((found >= 0) & (found < count)).all():
        raise LoraError(f"{short(weight.name)} in {folder} has a g_idx beyond its {count} groups. {MEND}")
    return found


def _is_beside(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor says something of a weight that is packed, or of activations."""
    module, _, last = name.rpartition(".")
    if last in _OF_ACTIVATIONS:
        return True
    beside = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point",
              "weight_shape", "weight_g_idx")  # fmt: skip
    if last in beside:
        return any(f"{module}.{own}" in tensors for own in ("weight", "weight_packed"))
    return name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors


class _Finder:
    """Finds the tensors of one weight, and checks that they fit each other.

    Args:
        folder: for messages, and for the shapes that files hold as tensors.
        tensors: by their names.
        packing: what the config says.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], packing: Packing) -> None:
        self.folder, self.tensors, self.packing = folder, tensors, packing

    def weight(self, name: str, tensor: Tensor) -> LowBit | None:
        """Return the weight whose codes this tensor is; None for all other tensors."""
        module, _, last = name.rpartition(".")
        if last == "pre_quant_scale":
            raise LoraError(f"{short(name)} in {self.folder} scales what {short(module)} is given: not read. {MEND}")
        if name.endswith("_blocks") and self.packing.method == "mxfp4":
            return self._gpt_oss(name, tensor)
        if last == "weight_packed" and tensor.dtype == "U8":
            return self._floats_packed(module, name, tensor)
        if last == "weight_packed" and tensor.dtype == "I32":
            return self._integers_packed(module, name, tensor)
        if last == "weight" and tensor.dtype in _DIRECT:
            return self._direct(module, name, tensor)
        return None

    def _gpt_oss(self, name: str, codes: Tensor) -> LowBit:
        """MXFP4 of all experts of a layer."""
        own = name.removesuffix("_blocks")
        scale = self._beside(name, f"{own}_scales", EXPONENTS)
        if len(codes.shape) < 3 or 0 in codes.shape or codes.shape[-1] != MX[1] // 2 or codes.dtype != "U8":
            raise self._misfit(name, codes, "u8 [experts, out, in / 32, 16]")
        self._check_shape(f"{own}_scales", scale, codes.shape[:-1])
        *stack, outputs, blocks, _ = codes.shape
        return LowBit(own, (*stack, blocks * MX[1], outputs), "BF16", "e2m1", codes, scale, MX, turned=True)

    def _floats_packed(self, module: str, name: str, codes: Tensor) -> LowBit:
        """MXFP4 or NVFP4 of compressed-tensors, which is told by the dtype of the scales."""
        shape = self._matrix(name, codes, 2)
        scale = self._beside(name, f"{module}.weight_scale", (*EXPONENTS, "F8_E4M3"))
        if scale.dtype in EXPONENTS:
            self._check_shape(f"{module}.weight_scale", scale, grid_shape(shape, MX))
            return LowBit(f"{module}.weight", shape, "BF16", "e2m1", codes, scale, MX)
        return self._nvfp4(module, codes, shape, scale, f"{module}.weight_global_scale", True)

    def _nvfp4(
        self, module: str, codes: Tensor, shape: tuple[int, int], scale: Tensor, outer: str, divides: bool
    ) -> LowBit:
        self._check_shape(f"{module}.weight_scale", scale, grid_shape(shape, NV))
        whole = self._beside(f"{module}.weight", outer, ("F32",))
        self._check_size(outer, whole, 1)
        return LowBit(f"{module}.weight", shape, "F32", "e2m1", codes, scale, NV, whole, divides)

    def _direct(self, module: str, name: str, codes: Tensor) -> LowBit:
        """One number for each entry of the weight, or ModelOpt's NVFP4."""
        if codes.dtype == "U8":
            scale = self._beside(name, f"{module}.weight_scale", ("F8_E4M3",))
            shape = self._matrix(name, codes, 2)
            return self._nvfp4(module, codes, shape, scale, f"{module}.weight_scale_2", False)
        shape = self._matrix(name, codes, 1)
        names = (f"{module}.weight_scale_inv", f"{module}.weight_scale")
        own = next((own for own in names if own in self.tensors), names[self.packing.method != "fp8"])
        scale = self._beside(name, own, (*_FLOATS, *EXPONENTS))
        block = self._block(own, scale, shape)
        zero = self._zero(module, grid_shape(shape, block), 8) if codes.dtype == "I8" else None
        return LowBit(name, shape, "F32", _DIRECT[codes.dtype], codes, scale, block, zero=zero)

    def _integers_packed(self, module: str, name: str, codes: Tensor) -> LowBit:
        """Integers of 2, 4 or 8 bits in words of 32, without a gap."""
        beside = self._beside(name, f"{module}.weight_shape", ("I64", "I32"))
        self._check_size(f"{module}.weight_shape", beside, 2)
        rows, columns = map(int, read(self.folder, beside, DTYPES[beside.dtype]))
        bits = [
            own for own in self.packing.bits
            if rows > 0 and columns > 0 and codes.shape == (rows, -(-columns * own // 32))
        ]  # fmt: skip
        if len(bits) != 1:
            raise self._misfit(name, codes, f"the codes of a weight [{rows}, {columns}]")
        scale = self._beside(name, f"{module}.weight_scale", _FLOATS)
        block = self._block(f"{module}.weight_scale", scale, (rows, columns))
        zero = self._zero(module, grid_shape((rows, columns), block), bits[0])
        groups = self.tensors.get(f"{module}.weight_g_idx")
        if groups is not None and (groups.dtype, groups.shape) != ("I32", (columns,)):
            raise self._misfit(f"{module}.weight_g_idx", groups, f"I32[{columns}]")
        weight = LowBit(f"{module}.weight", (rows, columns), "F32", f"packed {bits[0]}", codes, scale, block)
        return weight._replace(zero=zero, groups=groups)

    def _zero(self, module: str, grid: tuple[int, int], bits: int) -> Tensor | None:
        """Return the tensor of zeros, packed or not, if there is one."""
        name = f"{module}.weight_zero_point"
        if name not in self.tensors:
            if self.packing.asymmetric:
                raise LoraError(f"{self.folder} lacks {short(name)}, and its config says that weights are asymmetric.")
            return None
        zero = self._beside(f"{module}.weight", name, ("I8", "I32"))
        words = (-(-grid[0] * bits // 32), grid[1])
        if zero.dtype == "I8":
            self._check_size(name, zero, math.prod(grid))
        else:
            self._check_shape(name, zero, words)
        return zero

    def _block(self, name: str, scale: Tensor, shape: tuple[int, int]) -> tuple[int, int]:
        """Return which entries share a scale: the block of the config that the scales have the shape for."""
        for most in self.packing.blocks:
            block = min(most[0], shape[0]), min(most[1], shape[1])
            grid = grid_shape(shape, block)
            one_axis = grid[:1] if grid[1] == 1 else None  # as some write a scale for each row
            no_axis = () if grid == (1, 1) else None
            if scale.shape in (grid, one_axis, no_axis):
                return block
        raise self._misfit(name, scale, f"scales of {list(shape)} in blocks of {_listed(self.packing.blocks)}")

    def _matrix(self, name: str, codes: Tensor, numbers: int) -> tuple[int, int]:
        """Return the shape of a weight of which each byte has this many numbers."""
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise self._misfit(name, codes, "two axes, of outputs and inputs")
        return codes.shape[0], codes.shape[1] * numbers

    def _beside(self, name: str, other: str, dtypes: tuple[str, ...]) -> Tensor:
        """Return a tensor that has to be there beside another one, and of one of these dtypes."""
        found = self.tensors.get(other)
        if found is None:
            raise LoraError(
                f"{short(name)} in {self.folder} is packed, without {short(other)} that it is unpacked with: give the "
                "folder with all of its files."
            )
        if found.dtype not in dtypes:
            raise self._misfit(other, found, f"one of {', '.join(dtypes)}")
        return found

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise self._misfit(name, tensor, str(list(shape)))

    def _check_size(self, name: str, tensor: Tensor, size: int) -> None:
        if math.prod(tensor.shape) != size:
            raise self._misfit(name, tensor, f"{size} number(s)")

    def _misfit(self, name: str, tensor: Tensor, expected: str) -> LoraError:
        found = f"{tensor.dtype}{list(tensor.shape)}"
        return LoraError(f"{short(name)} in {self.folder} is {found}, expected {expected}. {MEND}")


def _listed(blocks: Sequence[tuple[int, int]]) -> str:
    """Return sizes of blocks as messages name them."""
    return " or ".join(" x ".join("all" if n == WHOLE else str(n) for n in block) for block in blocks) or "any size"
