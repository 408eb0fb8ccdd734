"""Weights in safetensors files that bitsandbytes packed as NF4, each read when it is needed.

bitsandbytes keeps a weight W of NF4 in several tensors:

    W                                      its codes, two a byte
    W.absmax                               the scales, in fp32; in 8 bits with double quantisation
    W.quant_map                            fp32 [16], what the codes stand for
    W.nested_absmax, W.nested_quant_map    with double quantisation: the scales of scales, fp32, and their codes [256]
    W.quant_state.bitsandbytes__nf4        JSON: the shape, the dtype, the sizes of blocks, the mean of the scales
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bases.lazy import Stored
from lora_jax.bases.nf4 import BLOCK, CODE, SCALES, Nf4Weight, scale_code
from lora_jax.bases.nf4_layouts import transposed
from lora_jax.core.errors import LoraError, short
from lora_jax.core.text import printable
from lora_jax.core.untrusted import parse_json
from lora_jax.interop.safetensors_index import AXES, DTYPES, Tensor, read

STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
VALUES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
ZEROS = 0x77  # a byte of two codes that stand for 0
LARGEST_STATE = 2**20  # bytes of the JSON, which has some hundred
MEND = "Take the weights that it was made of, and pack them with lora.bases.quantize."


def stored_by_bitsandbytes(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Stored], list[str]]:
    """Return the weights that bitsandbytes packed, and the names of all tensors that belong to them.

    Raises:
        LoraError: a tensor is packed in another format of bitsandbytes, or does not fit its description.
    """
    for name in tensors:
        _refuse_other_formats(name, folder)
    packed = {name.rpartition(STATE)[0]: name for name in tensors if STATE in name}
    if lost := [name for name in packed if name not in tensors]:
        raise LoraError(f"{folder} says how {lost[0]!r} is packed, but has no such tensor: download the files again.")
    found = {name: _packed(folder, name, tensors, key) for name, key in packed.items()}
    parts = {f"{name}.{part}" for name in packed for part in PARTS}
    return found, [name for name in tensors if name in packed or name in parts or STATE in name]


def _refuse_other_formats(name: str, folder: Path) -> None:
    """Raise if a tensor is packed in a format other than NF4."""
    module, _, last = name.rpartition(".")
    if last == "SCB":
        raise LoraError(f"{module!r} in {folder} is packed by bitsandbytes as int8, expected nf4. {MEND}")
    if STATE in name and not name.endswith(f"{STATE}nf4"):
        weight, _, kind = name.rpartition(STATE)
        raise LoraError(f"{weight!r} in {folder} is packed by bitsandbytes as {printable(kind)}, expected nf4. {MEND}")


class _State(NamedTuple):
    """The contents of the JSON."""

    shape: tuple[int, ...]
    dtype: Any
    mean: Any  # fp32 [], of the scales, with double quantization; else None

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return -(-math.prod(self.shape) // BLOCK)

    @property
    def sizes(self) -> dict[str, tuple[str, int]]:
        """Return the dtype and the size that each tensor beside the codes must have."""
        sizes = {"absmax": ("F32" if self.mean is None else "U8", self.blocks), "quant_map": ("F32", len(CODE))}
        if self.mean is not None:
            sizes |= {"nested_absmax": ("F32", -(-self.blocks // SCALES)), "nested_quant_map": ("F32", SCALES)}
        return sizes

    def weight(self, codes: Any, scales: Any, outer: Any = None) -> Nf4Weight:
        """Return the packed weight of these arrays."""
        return transposed(codes, scales, outer, self.mean, self.shape, self.dtype)


def _packed(folder: Path, name: str, tensors: Mapping[str, Tensor], key: str) -> Stored:
    """Return a weight that bitsandbytes packed, after a check that its tensors fit each other."""
    where = f"{name!r} in {folder}"
    if tensors[key].size > LARGEST_STATE:
        raise LoraError(f"{where} is described in {tensors[key].size:,} bytes, expected at most {LARGEST_STATE:,}.")
    state = _state(where, read(folder, tensors[key], np.uint8).tobytes())
    parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    if list(parts) != list(state.sizes):
        raise LoraError(f"{where} has {', '.join(parts) or 'nothing'} beside it, expected {', '.join(state.sizes)}.")
    for part, (dtype, size) in state.sizes.items():
        if parts[part].dtype != dtype or math.prod(parts[part].shape) != size:
            found = f"{parts[part].dtype}{list(parts[part].shape)}"
            raise LoraError(f"{where} of shape {list(state.shape)} has {part} {found}, expected {dtype}[{size}].")
    if tensors[name].size != (expected := -(-math.prod(state.shape) // 2)):  # of any dtype: they are but bytes
        raise LoraError(f"{where} of shape {list(state.shape)} has {tensors[name].size} bytes, expected {expected}.")
    for part, code in (("quant_map", CODE), ("nested_quant_map", scale_code())):
        if part in parts and not np.array_equal(read(folder, parts[part], np.float32), code):
            raise LoraError(f"{where} has a {part} of its own, expected the codes of NF4. {MEND}")
    arrays = [tensors[name], *(parts[part] for part in ("absmax", "nested_absmax") if part in parts)]
    sizes = [state.blocks * BLOCK // 2, *(math.prod(tensor.shape) for tensor in arrays[1:])]
    like = jax.eval_shape(
        state.weight,
        *(
            jax.ShapeDtypeStruct((size,), np.uint8 if i == 0 else DTYPES[tensor.dtype])
            for i, (size, tensor) in enumerate(zip(sizes, arrays, strict=True))
        ),
    )
    return Stored(like, partial(_read_packed, folder, name, arrays, state))


def _read_packed(folder: Path, name: str, arrays: Sequence[Tensor], state: _State) -> Nf4Weight:
    """Read a packed weight, and pad its codes with zeros to whole blocks."""
    codes = np.full(state.blocks * BLOCK // 2, ZEROS, np.uint8)
    codes[: arrays[0].size] = read(folder, arrays[0], np.uint8)
    scales = [read(folder, tensor, DTYPES[tensor.dtype]) for tensor in arrays[1:]]
    if not all(np.isfinite(array).all() for array in scales):
        raise LoraError(f"{name!r} in {folder} has scales of NaN or infinity. {MEND}")
    return state.weight(codes, *scales)


def _state(where: str, text: bytes) -> _State:
    """Parse and check the JSON."""
    facts = parse_json(text, f"{where}: what says how it is packed", finite=False)
    if not isinstance(facts, dict):
        raise LoraError(f"{where}: what says how it is packed is a {type(facts).__name__}, expected a dict.")
    fixed = {"quant_type": "nf4", "blocksize": BLOCK}
    double = "nested_offset" in facts
    if double:
        fixed |= {"nested_blocksize": SCALES, "nested_dtype": "float32"}
    for fact, expected in fixed.items():
        if facts.get(fact) != expected:
            raise LoraError(f"{where} is packed with {fact} {short(facts.get(fact))}, expected {expected!r}. {MEND}")
    shape, dtype, mean = facts.get("shape"), facts.get("dtype"), facts.get("nested_offset", 0.0)
    sizes = shape if isinstance(shape, list) and len(shape) <= AXES else []
    if not sizes or not all(type(n) is int and 0 < n < 2**31 for n in sizes):
        raise LoraError(f"{where} is packed with the shape {short(shape)}, expected numbers above 0.")
    if not isinstance(dtype, str) or dtype not in VALUES:
        raise LoraError(f"{where} is packed with the dtype {short(dtype)}, expected one of {', '.join(VALUES)}.")
    if type(mean) not in (int, float) or not abs(mean) < 3e38:
        raise LoraError(f"{where} is packed with nested_offset {short(mean)}, expected a finite number.")
    return _State(tuple(sizes), jnp.dtype(VALUES[dtype]), np.array(mean, np.float32) if double else None)
