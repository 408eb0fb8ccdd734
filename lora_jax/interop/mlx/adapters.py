"""Adapters as a folder of mlx-lm, which LM Studio and what else runs on MLX take: written, and read.

A folder has `adapters.safetensors` and `adapter_config.json`. Of each module the file has `lora_a` [in, r] and `lora_b`
[r, out], torch's factors transposed, and of DoRA also `m` [out]; a table of embeddings has [entries, r] and
[r, features]; experts have all of a projection stacked, `lora_a` [experts, r, in] and `lora_b` [experts, out, r]. The
config has one rank and one scale for all, and names the modules.

Read from mlx-lm 0.32.2: `tuner/utils.py`, `tuner/lora.py`, `tuner/dora.py`, `models/switch_layers.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lora_jax.adapters.arguments import check_dtype
from lora_jax.checkpoints.reading import of_one_save
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import check_folder
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.mlx.read import read_mlx
from lora_jax.interop.mlx.write import check_mlx_folder, write_mlx
from lora_jax.interop.module_adapters import for_parameters, module_adapters
from lora_jax.interop.peft.dtypes import in_fp32
from lora_jax.interop.peft.tied_tables import Tied

__all__ = ["load_mlx", "read_mlx", "save_mlx", "write_mlx"]
CALL = "save_mlx(folder, adapters, key_map)"


def save_mlx(
    folder: str | Path,
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    params: Any = None,
    dtype: Any = None,
) -> None:
    """Write adapters as a folder that mlx-lm loads: LoRA, or DoRA where all of them are.

    mlx-lm has one rank and one scale for all: smaller factors are filled up with zeros, and scales that differ are
    multiplied into B. `mlx_lm.generate --model MODEL --adapter-path FOLDER` runs it, on Linux too.

    Args:
        folder: where to write; replaced if it holds such adapters and nothing else.
        adapters: `{path: adapter}`.
        key_map: from parameters to modules, by transformers' names, which are those of mlx-lm's models too; experts are
            `switch_mlp` there.
        params: parameters, only where a module holds several of them and not all have adapters.
        dtype: of the tensors, such as jnp.bfloat16; None keeps those of the arrays.

    Raises:
        LoraError: the key map lacks a path; MLX has no place for an adapter: it is no LoRA, is of a convolution, is a
            DoRA of a table, whose lengths are those of the tokens there and of the features here, or is of experts
            whose projections are not known; the folder cannot be written, or holds something else. Nothing has changed
            then.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lora
    >>> from lora_jax.key_maps import KeyMap, linear
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"q/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 0.5)}
    >>> key_map = KeyMap(linear("q/kernel", "model.layers.0.self_attn.q_proj"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_mlx(f"{folder}/adapters", adapters, key_map)
    ...     sorted(path.name for path in Path(f"{folder}/adapters").iterdir())
    ['adapter_config.json', 'adapters.safetensors']
    """
    check_folder(CALL, folder)
    check_mlx_folder(Path(folder))
    if dtype is not None:
        check_dtype("save_mlx", dtype)
        adapters = in_fp32(dict(adapters))
    found = module_adapters(CALL, adapters, key_map, params=params, formats=("LORA", "DORA"))
    write_mlx(Path(folder), found, dtype=dtype)


@of_one_save
def load_mlx(
    folder: str | Path,
    plan_or_params: Any,
    key_map: KeyMap,
    *,
    dtype: Any = jnp.float32,
    tied: Tied = "refuse",
) -> dict[str, Adapter]:
    """Read the adapters of a folder that mlx-lm trained, or that `save_mlx` wrote.

    Args:
        folder: with `adapter_config.json` and `adapters.safetensors`.
        plan_or_params: a plan, for adapters of just the planned weights; or parameters, or their shapes.
        key_map: from parameters to modules.
        dtype: of the adapters; None keeps the file's.
        tied: as of `load_peft`; mlx-lm has an adapter of a table at both ends where the table is the head as well, so
            "both" is what its files mean.

    Returns:
        `{path: adapter}`, of LoRA or of DoRA. Where a gate and the other projection of experts have an A of their own,
        and the model has both in one parameter, the rank is that of both together.

    Raises:
        LoraError: there is no such folder; a file is damaged, or is no adapter (`fine_tune_type` "full"); tensors do
            not fit one another, the config or the parameters; the key map gives a module to no parameter.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lora
    >>> from lora_jax.key_maps import KeyMap, linear
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"q/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 0.5)}
    >>> key_map = KeyMap(linear("q/kernel", "model.layers.0.self_attn.q_proj"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_mlx(f"{folder}/adapters", adapters, key_map)
    ...     again = load_mlx(f"{folder}/adapters", {"q": {"kernel": jnp.ones((4, 3))}}, key_map)
    >>> again["q/kernel"].a.shape, float(again["q/kernel"].scale)
    ((4, 2), 0.5)
    """
    if dtype is not None:
        check_dtype("load_mlx", dtype)
    check_folder("load_mlx(folder, plan_or_params, key_map)", folder)
    found = read_mlx(Path(folder))
    return for_parameters(found, plan_or_params, key_map, Path(folder), dtype=dtype, tied=tied)
