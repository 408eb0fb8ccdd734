"""Merge adapters into a published model and write it as one GGUF file, for llama.cpp, Ollama and LM Studio.

One tensor after the other is read, merged in fp32 and rounded by the quantisers of the package `gguf`, which has the
names of tensors, too. In the architecture llama, the rows of each head of q and k are in pairs where Hugging Face has
them in halves.
"""

import contextlib
import importlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import A_KEY_MAP, check_adapter_dict, check_folder, check_is
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.interop.gguf.merged_keys import (
    add_positions,
    add_sizes,
    add_vocabulary,
    architecture_of,
    sizes_of,
)
from lora_jax.interop.key_map import Array, KeyMap
from lora_jax.interop.low_bits.config import packing_of
from lora_jax.interop.low_bits.files import Weight, as_dense, read_weight, weights_of
from lora_jax.interop.merge_rows import Sums, Survival, merged_in_rows
from lora_jax.interop.merge_work import checked
from lora_jax.interop.model_config import CONFIG, model_facts
from lora_jax.interop.peft.tied_tables import Tied
from lora_jax.interop.safetensors_index import DTYPES, tensors_in
from lora_jax.interop.tensor_changes import Change

CALL = "merge_gguf(source, adapters, file, key_map)"
# Of weights: the name of the type of tensors, and of the type of files, in `gguf`.
TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
BLOCK = 32  # numbers along the inputs that share a scale of Q8_0
_UNUSED = ".rotary_emb.inv_freq"  # what files of Llama 2 have beside


def merge_gguf(
    source: str | Path,
    adapters: Mapping[str, Adapter] | str | Path,
    file: str | Path,
    key_map: KeyMap | None = None,
    *,
    dtype: str = "q8_0",
    cut: str | None = None,
    others: Any = None,
    params: Any = None,
    tied: Tied = "refuse",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Survival]:
    """Write a model of Hugging Face with adapters merged into its weights as a GGUF file.

    Llama, Mistral, SmolLM, Qwen 2, 2.5 and 3 (dense), with a tokenizer of bytes and merges; by the package `gguf`.
    The source may be published in few bits. A tensor, and what is written of it, are in memory at a time.

    Args:
        source: a folder with a config.json, a tokenizer.json, and `model.safetensors` or an index and its shards.
        adapters: as of `lora.merge_checkpoint`.
        file: a new file, such as "model.gguf". It has its name once it is complete.
        key_map: as of `lora.merge_checkpoint`.
        dtype: of weights: "q8_0", "bf16", "f16" or "f32". Norms and biases are in fp32; weights whose inputs are no
            multiple of 32 are in f16 in the place of q8_0, as llama.cpp's converter has it.
        cut: what llama.cpp calls the way in which the tokenizer cuts texts, such as "tekken"; by default it is known by
            tokenizer.json: llama-bpe, qwen2, smollm or gpt-2.
        others, params, tied: as of `lora.merge_checkpoint`.
        progress: called with how many tensors are written, and how many there are.

    Returns:
        `{tensor: Survival(kept, loss)}` of each tensor that changes, by its name in Hugging Face.

    Raises:
        LoraError: as `lora.merge_checkpoint`; another architecture or tokenizer; the file is there already. Then
            nothing has changed.

    >>> import jax.numpy as jnp, json, numpy as np, tempfile, tokenizers, lora_jax as lora
    >>> from pathlib import Path
    >>> from safetensors.numpy import save_file
    >>> facts = {"model_type": "llama", "vocab_size": 4, "hidden_size": 32, "intermediate_size": 32}
    >>> facts |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> facts |= {"max_position_embeddings": 8, "rms_norm_eps": 1e-5}
    >>> shapes = {"model.embed_tokens.weight": (4, 32), "model.norm.weight": (32,), "lm_head.weight": (4, 32)}
    >>> tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    >>> words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"lm_head/kernel": lora.LoraAdapter(jnp.ones((32, 1)), jnp.ones((1, 4)), axes, 0.5)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps(facts))
    ...     words.save(f"{folder}/tokenizer.json")
    ...     save_file(tensors, f"{folder}/model.safetensors")
    ...     found = lora.merge_gguf(folder, adapters, f"{folder}/model.gguf", lora.key_maps.LLAMA)
    >>> round(found["lm_head.weight"].kept, 3)
    1.0
    """
    check_folder(CALL, source, "source")
    source, file = Path(source).absolute(), Path(file).absolute()
    if dtype not in TYPES:
        raise LoraError(f"merge_gguf(dtype={dtype!r}): expected one of {', '.join(TYPES)}.")
    if not isinstance(adapters, str | Path):
        check_adapter_dict(CALL, adapters)
        refuse_spread(adapters)
    if key_map is not None:
        check_is(CALL, "key_map", key_map, KeyMap, A_KEY_MAP)
    if os.path.lexists(file):
        raise LoraError(f"{file} is there already: give the name of a new file, or take it away.")
    gguf = _package()
    facts, where = model_facts(source), str(source / CONFIG)
    architecture, sizes = architecture_of(facts, where), sizes_of(facts, where)
    tensors, files = tensors_in(source)
    weights = weights_of(source, tensors, packing_of(source))
    work = checked(
        source, ({n: as_dense(w) for n, w in weights.items()}, files), adapters, key_map, others, params, tied
    )
    same = {as_dense(weight): weight for weight in weights.values()}
    parts = _parts(gguf, architecture, sizes, {n: same.get(t, t) for n, t in work.tensors.items()}, dtype, source)
    with _new(file) as new:
        writer = gguf.GGUFWriter(new, architecture)
        writer.add_type("model")
        writer.add_name(source.name)
        writer.add_file_type(int(gguf.LlamaFileType[TYPES[dtype][1]]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_sizes(writer, facts, sizes, where)
        factors = add_positions(writer, gguf.RopeScalingType, facts, sizes, where)
        if factors is not None and architecture != "llama":
            raise LoraError(f"{where}: rope_type is 'llama3', which {architecture} of GGUF does not have.")
        add_vocabulary(gguf, writer, source, sizes["vocab_size"], cut)
        try:
            return _write(gguf, writer, source, parts, factors, work.changes, progress)
        finally:
            writer.close()


def _package() -> Any:
    """Return the package `gguf`."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise LoraError(
            "GGUF files are written by the package gguf, which is not installed: pip install gguf"
        ) from error


@contextlib.contextmanager
def _new(file: Path) -> Iterator[Path]:
    """Yield a path beside a file, which gets its name if all goes well, and else is removed."""
    part = file.with_name(f".{file.name[:200]}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.rename(part, file)
    except OSError as error:
        raise LoraError(f"{file} cannot be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


class _Part(NamedTuple):
    """A tensor that is written.

    Args:
        name: in Hugging Face.
        to: its name in GGUF.
        weight: where its numbers are.
        type: what it is written in.
        heads: of q and k whose rows go from halves to pairs; 0 for others.
    """

    name: str
    to: str
    weight: Weight
    type: Any
    heads: int


def _parts(
    gguf: Any, architecture: str, sizes: Mapping[str, int], weights: Mapping[str, Weight], dtype: str, source: Path
) -> list[_Part]:
    """Return what is written of each tensor.

    Raises:
        LoraError: one has no name in GGUF, or not the shape that the config says.
    """
    [kind] = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, sizes["num_hidden_layers"])
    heads = {"q_proj": sizes["num_attention_heads"], "k_proj": sizes["num_key_value_heads"]}
    found = []
    for name, weight in weights.items():
        if name.endswith(_UNUSED):
            continue
        to = names.get_name(key=name, try_suffixes=(".weight", ".bias"))
        if to is None or len(weight.shape) not in (1, 2):
            raise LoraError(
                f"{name!r} in {source}, of shape {list(weight.shape)}, has no place in {architecture} of GGUF."
            )
        module = name.split(".")[-2]
        own = heads.get(module, 0)
        if own and weight.shape[0] != own * sizes["head_dim"]:
            raise LoraError(f"{name!r} in {source} has {weight.shape[0]} outputs, expected {own * sizes['head_dim']}.")
        type_ = "F32" if len(weight.shape) == 1 else TYPES[dtype][0]
        if type_ == "Q8_0" and weight.shape[-1] % BLOCK:
            type_ = "F16"
        turned = own if architecture == "llama" else 0
        found.append(_Part(name, to, weight, gguf.GGMLQuantizationType[type_], turned))
    return found


def _write(
    gguf: Any,
    writer: Any,
    source: Path,
    parts: list[_Part],
    factors: Array | None,
    changes: Mapping[str, Change],
    progress: Callable[[int, int], None] | None,
) -> dict[str, Survival]:
    """Write the header and the tensors, and return what is left of each change."""
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for part in parts:
        rows = gguf.quant_shape_to_byte_shape(part.weight.shape, part.type)
        writer.add_tensor_info(part.to, rows, np.dtype(np.uint8), int(np.prod(rows)), part.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    found = {}
    for done, part in enumerate(parts):
        change = changes.get(part.name)
        data, survival = _rounded(gguf.quants, source, part, change)
        writer.write_tensor_data(data)
        if change is not None:
            found[part.name] = survival
        if progress is not None:
            progress(done + 1, len(parts))
    return {name: found[name] for name in changes}


def _rounded(quants: Any, source: Path, part: _Part, change: Change | None) -> tuple[Array, Survival]:
    """Return the bytes of a tensor, u8, and what is left of its change."""
    w = read_weight(source, part.weight, DTYPES[part.weight.dtype])
    pieces, sums = [], Sums()
    for before, after in merged_in_rows(part.name, w, change):
        flat = part.weight.shape[-1]
        before, after = (array.astype(np.float32).reshape(-1, min(flat, array.size)) for array in (before, after))
        with np.errstate(over="ignore"):
            data = quants.quantize(after, part.type)
        rounded = quants.dequantize(data, part.type).reshape(after.shape)
        if not np.isfinite(rounded).all():
            raise LoraError(
                f"{part.name!r} would hold numbers beyond those of {part.type.name}: dtype='bf16' has them."
            )
        pieces.append(data.view(np.uint8).reshape(-1))
        if change is not None:
            sums.add(before, after, quants.dequantize(quants.quantize(before, part.type), part.type), rounded)
    data = np.concatenate(pieces)
    if part.heads:
        data = data.reshape(part.heads, 2, part.weight.shape[0] // part.heads // 2, -1).swapaxes(1, 2)
    return np.ascontiguousarray(data).reshape(-1), sums.survival()
