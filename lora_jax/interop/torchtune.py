"""Adapters by torchtune's own names, as safetensors: read. The folders that it writes for HF PEFT are for `load_peft`.

    layers.0.attn.q_proj.lora_a.weight [r, in], .lora_b.weight [out, r], and of DoRA .magnitude [out]

torchtune 0.6.1 keeps these in a pickle, `adapter_model.pt`, which is never read here; torch makes a file of it that is:

    import torch, safetensors.torch
    tensors = torch.load("adapter_model.pt", weights_only=True)
    safetensors.torch.save_file({name: x.contiguous() for name, x in tensors.items()}, "adapter.safetensors")

That is worth it where its folder for PEFT is not what it trained: it brings the rows of queries and keys into another
order for all models (`models/convert_weights.py`), which those with rotary pairs side by side need, such as Llama, and
Qwen does not; and it leaves the magnitudes of DoRA in the order that they had.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lora_jax.adapters.arguments import check_dtype
from lora_jax.checkpoints.reading import identity
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array, KeyMap
from lora_jax.interop.module_adapters import Lazy, ModuleAdapters, for_parameters, outline
from lora_jax.interop.peft.files import places_of_tensors
from lora_jax.interop.peft.formats.format import Arrays, Module
from lora_jax.interop.peft.formats.registry import FORMATS
from lora_jax.interop.peft.tied_tables import Tied
from lora_jax.interop.safetensors_index import DTYPES, Tensor, read

_FIELDS = {"lora_a.weight": "a", "lora_b.weight": "b", "magnitude": "m"}
_NAMES = {
    **{f"attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"},
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def load_torchtune(
    path: str | Path,
    plan_or_params: Any,
    key_map: KeyMap,
    *,
    alpha: float,
    heads: int,
    kv_heads: int,
    interleaved: bool,
    dtype: Any = jnp.float32,
    tied: Tied = "refuse",
) -> dict[str, Adapter]:
    """Read adapters by torchtune's own names.

    Args:
        path: of the file of safetensors.
        plan_or_params: a plan, for adapters of just the planned weights; or parameters, or their shapes.
        key_map: from parameters to modules, by transformers' names.
        alpha: of torchtune's config, `lora_alpha`; the scale is alpha / rank.
        heads: of the queries.
        kv_heads: of the keys.
        interleaved: rotary pairs lie side by side: True for Llama, Mistral and Gemma in torchtune, False for Qwen.
        dtype: of the adapters; None keeps the file's.
        tied: as of `load_peft`.

    Returns:
        `{path: adapter}`, of LoRA or of DoRA.

    Raises:
        LoraError: there is no such file, or it is damaged or of other names; factors do not fit one another, the heads
            or the parameters; the key map gives a module to no parameter.

    >>> import jax.numpy as jnp, numpy as np, tempfile, lora_jax as lora
    >>> from safetensors.numpy import save_file
    >>> params = {"model/layers/0/mlp/gate_proj/kernel": jnp.ones((4, 6))}
    >>> tensors = {"layers.0.mlp.w1.lora_a.weight": np.ones((2, 4), np.float32)}
    >>> tensors |= {"layers.0.mlp.w1.lora_b.weight": np.ones((6, 2), np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(tensors, f"{folder}/adapter.safetensors")
    ...     facts = {"alpha": 8.0, "heads": 2, "kv_heads": 1, "interleaved": True}
    ...     lora.load_torchtune(f"{folder}/adapter.safetensors", params, lora.key_maps.LLAMA, **facts)
    {'model/layers/0/mlp/gate_proj/kernel': LoraAdapter(a 4x2, b 2x6)}
    """
    if dtype is not None:
        check_dtype("load_torchtune", dtype)
    found = read_torchtune(Path(path), alpha=alpha, heads=heads, kv_heads=kv_heads, interleaved=interleaved)
    return for_parameters(found, plan_or_params, key_map, Path(path), dtype=dtype, tied=tied)


def read_torchtune(path: Path, *, alpha: float, heads: int, kv_heads: int, interleaved: bool) -> ModuleAdapters:
    """Return the adapters of a file by transformers' modules; arguments and errors as of `load_torchtune`."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) < math.inf:
        raise LoraError(f"alpha is {short(alpha)}, expected a number that is not 0.")
    for name, given in (("heads", heads), ("kv_heads", kv_heads)):
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise LoraError(f"{name} is {short(given)}, expected a whole number above 0.")
    if path.suffix in (".pt", ".bin") and os.path.lexists(path):
        raise LoraError(f"{path} is a pickle, which may run any code: save its tensors as safetensors first.")
    before = identity(path)
    modules = _modules(path)
    kind = FORMATS["DORA" if any("m" in places for places in modules.values()) else "LORA"]
    counts = {"q_proj": heads, "k_proj": kv_heads} if interleaved else {}
    outlines: dict[str, Module] = {}
    for name, places in modules.items():
        arrays = {field: outline(place.shape, DTYPES[place.dtype]) for field, place in places.items()}
        if why := kind.problem(arrays):
            raise LoraError(f"{path}: {short(name)} {why}.")
        count = counts.get(name.rpartition(".")[2], 1)
        rows = len(arrays["b"])
        if rows % count or (count > 1 and rows // count % 2):
            raise LoraError(f"{path}: {short(name)} has {rows} outputs, which are no {count} heads of an even size.")
        outlines[name] = Module(arrays, alpha / len(arrays["a"]))

    def make(name: str) -> Module:
        if identity(path) != before:
            raise LoraError(f"{path} was replaced while it was read: call this again.")
        arrays: Arrays = {
            field: read(path.parent, place, DTYPES[place.dtype]).reshape(place.shape)
            for field, place in modules[name].items()
        }
        count = counts.get(name.rpartition(".")[2])
        if count is not None:
            arrays |= {field: _in_halves(arrays[field], count) for field in arrays if field != "a"}
        return Module(arrays, outlines[name].scale)

    return ModuleAdapters(kind, Lazy([*modules], make), outlines, dict.fromkeys(modules, "linear"), {})


def _modules(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return where the arrays of each module are, by transformers' names."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, place in places_of_tensors(path).items():
        ending = next((ending for ending in _FIELDS if name.endswith(f".{ending}")), None)
        module = None if ending is None else _module_of(name.removesuffix(f".{ending}"))
        if ending is None or module is None:
            raise LoraError(f"{path}: {short(name)} is no factor of a module that torchtune adapts.")
        modules.setdefault(module, {})[_FIELDS[ending]] = place
    if not modules:
        raise LoraError(f"{path} holds no factors of any module.")
    return modules


def _module_of(name: str) -> str | None:
    """Return transformers' name of a module of torchtune's decoders."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return "lm_head" if name == "output" else None
    return f"model.layers.{layer[1]}.{_NAMES[layer[2]]}" if layer[2] in _NAMES else None


def _in_halves(rows: Array, heads: int) -> Array:
    """Return outputs whose rotary pairs lie side by side, x0 y0 x1 y1, as transformers has them, x0 x1 y0 y1."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
