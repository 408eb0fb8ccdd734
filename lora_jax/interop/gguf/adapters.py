"""LoRA in GGUF: adapters as llama.cpp, and what is built on it, reads them beside a model.

A file says the architecture of its model, `general.type` "adapter", `adapter.type` "lora" and `adapter.lora.alpha`, and
holds a pair for each weight: "blk.0.attn_q.weight.lora_a" and ".lora_b". The scale is the user's times alpha / r, or
the user's alone where alpha is 0. Files here have 0, and each weight's own scale in its B: one alpha for all would be
wrong for rank-stabilised LoRA and for scales that differ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lora_jax.adapters.arguments import check_dtype
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import A_KEY_MAP, check_folder, check_is
from lora_jax.interop.gguf.base import Base, facts_of
from lora_jax.interop.gguf.names import style_of
from lora_jax.interop.gguf.read import read_gguf
from lora_jax.interop.gguf.write import write_gguf
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.module_adapters import for_parameters, module_adapters
from lora_jax.interop.peft.parameters import shapes_of
from lora_jax.interop.peft.tied_tables import Tied

__all__ = ["load_gguf", "read_gguf", "save_gguf", "write_gguf"]


def save_gguf(
    path: str | Path,
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    base: Base,
    params: Any = None,
    dtype: Any = None,
    tied: bool | None = None,
) -> None:
    """Write adapters as a GGUF file, which llama.cpp, Ollama and LM Studio load beside the model's GGUF.

    Architectures are llama (Llama, Mistral, Mixtral), qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3 and gpt2.
    Each scale is multiplied into B, so that the user's scale (`--lora-scaled FILE SCALE`) is 1 for the model as it was
    trained. Experts of a layer become one tensor; those without an adapter have zeros there, and so have ranks that
    some of them lack.

    Args:
        path: of the file, such as "adapter.gguf"; what is there is replaced when the new file is complete.
        adapters: `{path: adapter}`; kinds that are LoRA in another form are written as the LoRA that they are.
        key_map: from parameters to modules, named as in transformers.
        base: the model that they are for: its folder with `config.json`, its GGUF, whose tensors the adapters then have
            to fit, or a dict of the config: `model_type`, `num_attention_heads`, `num_key_value_heads`,
            `tie_word_embeddings`, `num_experts`.
        params: parameters, only where a module holds several of them and not all have adapters.
        dtype: of the factors, jnp.float32, jnp.float16 or jnp.bfloat16; None keeps that of the arrays.
        tied: whether the model's head is its table of tokens. None is what `base` says; a GGUF with a head of its own
            does not say it.

    Raises:
        LoraError: the model is of another architecture, or `base` lacks a number; an adapter is of another kind, or of
            a weight that llama.cpp does not adapt: norms, biases, tables of positions, and a table that is the head,
            unless the model's GGUF holds both; shapes that do not fit; numbers beyond the dtype. Nothing is written
            then.

    >>> import jax, tempfile, lora_jax as lora
    >>> from lora_jax.interop.gguf.adapters import load_gguf, save_gguf
    >>> params = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": jax.numpy.zeros((8, 4, 2))}}}}}}
    >>> axes = lora.KernelAxes((), (0,), (1, 2))
    >>> adapter = lora.LoraAdapter(jax.numpy.ones((8, 2)), jax.numpy.ones((2, 4, 2)), axes, 0.5)
    >>> adapters = {"model/layers/0/self_attn/q_proj/kernel": adapter}
    >>> base = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    >>> file = tempfile.mkdtemp() + "/adapter.gguf"
    >>> save_gguf(file, adapters, lora.key_maps.LLAMA, base=base)
    >>> [back] = load_gguf(file, params, lora.key_maps.LLAMA, base=base).values()
    >>> float(back.scale), float(back.b[0, 0, 0])  # the scale is in b
    (1.0, 0.5)
    """
    call = "save_gguf(path, adapters, key_map, base=...)"
    check_folder(call, path, "path")
    if dtype is not None:
        check_dtype("save_gguf", dtype)
    facts_of(call, base)  # which is refused before any work
    write_gguf(Path(path), module_adapters(call, adapters, key_map, params=params), base=base, dtype=dtype, tied=tied)


def load_gguf(
    path: str | Path,
    plan_or_params: Any,
    key_map: KeyMap,
    *,
    base: Base | None = None,
    dtype: Any = jnp.float32,
    tied: Tied = "refuse",
) -> dict[str, Adapter]:
    """Read the adapters of a GGUF file, as llama.cpp's converter or `save_gguf` wrote it.

    Args:
        path: of the file.
        plan_or_params: a plan, for adapters of just the planned weights; or parameters, or their shapes.
        key_map: from parameters to modules, named as in transformers.
        base: the model, as in `save_gguf`; the architecture llama needs it, for the number of heads.
        dtype: of the adapters; None keeps the file's, and fp32 for Q8_0.
        tied: as of `load_peft`.

    Returns:
        `{path: adapter}`. The scale is alpha / r, or 1 where alpha is 0. Where experts are one parameter and the file
        has other factors a for gate and up, their ranks add up, which is exact.

    Raises:
        LoraError: there is no such file; it is cut short, no adapter, of another architecture, or an aLoRA; a tensor is
            of a type or of a name that adapters do not have, or without its partner; a pair fits no parameter; `base`
            is needed. Each is named, and nothing is returned.

    >>> import jax.numpy as jnp, tempfile, lora_jax as lora
    >>> path, axes = "model/layers/0/mlp/up_proj/kernel", lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {path: lora.LoraAdapter(jnp.ones((8, 2)), jnp.ones((2, 6)), axes, 1.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_gguf(f"{folder}/adapter.gguf", adapters, lora.key_maps.LLAMA, base={"model_type": "qwen2"})
    ...     lora.load_gguf(f"{folder}/adapter.gguf", {path: jnp.zeros((8, 6))}, lora.key_maps.LLAMA)
    {'model/layers/0/mlp/up_proj/kernel': LoraAdapter(a 8x2, b 2x6)}
    """
    check_folder("load_gguf(path, plan_or_params, key_map)", path, "path")
    check_is("load_gguf(path, plan_or_params, key_map)", "key_map", key_map, KeyMap, A_KEY_MAP)
    matches = key_map.match(shapes_of(plan_or_params), strict=False)
    experts = style_of(name for match in matches.values() for name in match.names.values())
    found = read_gguf(Path(path), base=base, experts=experts)
    return for_parameters(found, plan_or_params, key_map, Path(path), dtype=dtype, tied=tied)
