"""The weights of a published model in safetensors files, each of which is read when it is needed."""

import os
from functools import partial
from pathlib import Path

import jax

from lora_jax.bases.bitsandbytes import stored_by_bitsandbytes
from lora_jax.bases.lazy import Stored
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.low_bits.config import packing_of
from lora_jax.interop.low_bits.files import read_weight, weights_of
from lora_jax.interop.safetensors_index import DTYPES, header, tensors_in


def open_safetensors(path: str | Path) -> dict[str, Stored]:
    """Return the tensors of a model as `{name: Stored}`. Only headers and descriptions of packed weights are read.

    A weight that bitsandbytes packed as NF4 is a `Stored` packed weight with the same codes and scales. Its axes are
    torch's, [out, in], until `lora.bases.from_torch` makes it a parameter; it is stored as [in, out] all the time.

    Weights in MXFP4, NVFP4, fp8 or integers of 2, 4 or 8 bits, of gpt-oss, DeepSeek, compressed-tensors or ModelOpt, as
    the `quantization_config` of the folder says, are arrays of the numbers that they stand for: `X.weight` in the place
    of all tensors that belong to it, in bf16 where that holds the numbers exactly, and else in fp32. They are unpacked
    as they are read, and `lora.bases.quantize` packs them again, one at a time.

    Args:
        path: a file, or a folder with `model.safetensors` or an index and its shards.

    Returns:
        `{name: Stored}`, for `from_torch` or `quantize`.

    Raises:
        LoraError: a file is missing or damaged; a tensor is packed in another format, or does not fit its description.

    >>> import tempfile, numpy as np, lora_jax as lora
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"up.weight": np.ones((8, 4), np.float32)}, f"{folder}/model.safetensors")
    ...     tensors = lora.bases.open_safetensors(folder)
    ...     tensors["up.weight"].shape, tensors["up.weight"].read().sum()
    ((8, 4), np.float32(32.0))
    """
    path = Path(path).absolute()
    is_file = os.path.isfile(path)
    folder = path.parent if is_file else path
    tensors = header(path) if is_file else tensors_in(path)[0]
    packed, beside = stored_by_bitsandbytes(folder, tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise LoraError(f"{short(name)} in {folder} is of {tensor.dtype}, expected one of {', '.join(DTYPES)}.")
    own = dict.fromkeys(beside)
    weights = weights_of(folder, {n: t for n, t in tensors.items() if n not in own}, packing_of(folder))
    found = {}
    for name in dict.fromkeys((*tensors, *weights)):
        if name in packed:
            found[name] = packed[name]
        elif name in weights:
            dtype = DTYPES[weights[name].dtype]
            like = jax.ShapeDtypeStruct(weights[name].shape, dtype)
            found[name] = Stored(like, partial(read_weight, folder, weights[name], dtype))
    return found
