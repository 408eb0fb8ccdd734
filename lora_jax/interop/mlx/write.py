"""Adapters by torch's modules as a folder of mlx-lm, one module in memory at a time."""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.checkpoints.atomic_dir import written
from lora_jax.checkpoints.replaceable import Format, check_target
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array
from lora_jax.interop.module_adapters import ModuleAdapters
from lora_jax.interop.peft.common_rank import one_rank_for_all, padded
from lora_jax.interop.peft.dtypes import cast, common_dtype
from lora_jax.interop.peft.expert_projections import apart, check_order_of_outputs, check_projections
from lora_jax.interop.peft.formats.format import Arrays, Module
from lora_jax.interop.safetensors_writer import Form, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
EXPERTS = "switch_mlp"  # the module that holds the experts in most of mlx-lm's models
NUMBERED = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")  # a projection of one expert, as older models have them

Modules = Mapping[str, Module]
_FORMAT = Format("adapters of MLX", (WEIGHTS,), (CONFIG, WEIGHTS))


class _Source(NamedTuple):
    """Some modules of torch's, and the tensors of MLX that they become together."""

    modules: tuple[str, ...]
    tensors: Callable[[Sequence[Arrays]], Arrays]  # from the arrays of these modules, all of one rank and one scale


def check_mlx_folder(folder: Path) -> None:
    """Raise if a folder cannot be written, or holds something else."""
    check_target(folder, _FORMAT)


def write_mlx(folder: Path, found: ModuleAdapters, *, dtype: Any = None) -> None:
    """Write a folder that mlx-lm loads.

    Args:
        folder: as of `save_mlx`.
        found: adapters of LoRA or DoRA. Experts are in one parameter, or modules `experts.3.up_proj` of their own.
        dtype: of the tensors; None keeps those of the arrays.

    Raises:
        LoraError: as `save_mlx`.
    """
    if found.format.name not in ("LORA", "DORA"):
        raise LoraError(f"{folder}: MLX has LoRA and DoRA, and no {found.format.name}: merge it instead.")
    sources = _sources(found)
    rank = one_rank_for_all(found.outlines, found.experts, "MLX has")
    scales = dict.fromkeys(module.scale for module in found.outlines.values())
    scale = next(iter(scales)) if len(scales) == 1 else 1.0

    def arrays_of(modules: Modules, source: _Source) -> dict[str, Array]:
        alike = [
            padded(found.format.rescaled(modules[name], scale).arrays, rank, found.experts.get(name))
            for name in source.modules
        ]
        own = common_dtype(array for arrays in alike for array in arrays.values())  # also of experts, which are stacked
        return cast(source.tensors([cast(arrays, own) for arrays in alike]), dtype)

    forms: dict[str, Form] = {}
    owner: dict[str, _Source] = {}
    for source in sources:
        for name, tensor in arrays_of(found.outlines, source).items():
            if name in owner:
                raise LoraError(f"{folder}: two modules are {short(name)} in MLX, and one can be: merge the other.")
            forms[name], owner[name] = (tensor.shape, tensor.dtype), source
    read = functools.lru_cache(maxsize=1)(lambda source: arrays_of(found.modules, source))
    with written(folder, _FORMAT) as new:
        write_safetensors(new / WEIGHTS, forms, lambda name: read(owner[name])[name], {"format": "mlx"})
        entries = _config(found.format.name, [*owner], rank, scale)
        (new / CONFIG).write_text(json.dumps(entries, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _config(kind: str, tensors: Sequence[str], rank: int, scale: float) -> dict[str, Any]:
    """Return the config. With whole names as keys, just these modules get factors, whatever `num_layers` says."""
    keys = sorted(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    layers = [int(number) for key in keys for number in re.findall(r"\.(\d+)\.", key)[:1]]
    return {
        "fine_tune_type": kind.lower(),
        "num_layers": 1 + max(layers, default=0),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }


def _sources(found: ModuleAdapters) -> list[_Source]:
    """Return what becomes of all modules.

    Raises:
        LoraError: MLX has no place for one of them.
    """
    sources = []
    numbered: dict[tuple[str, str], dict[int, str]] = {}
    for name, kind in found.kinds.items():
        if kind == "conv":
            raise LoraError(f"MLX has no LoRA of convolutions, and {short(name)} is one: merge it instead.")
        if found.format.name == "DORA" and kind == "embedding":
            raise LoraError(
                f"{short(name)} is a table with DoRA, whose lengths are those of the features here and in PEFT, and "
                "those of the tokens in MLX: merge it instead."
            )
        if (match := NUMBERED.fullmatch(name)) is not None:
            numbered.setdefault((match[1], match[3]), {})[int(match[2])] = name
        elif name in found.experts:
            check_projections(name, "MLX has")
            check_order_of_outputs(name, kind, "MLX has")
            sources.append(_Source((name,), functools.partial(_of_parameter, name, found.experts[name])))
        else:
            sources.append(_Source((name,), functools.partial(_of_module, name)))
    for (parent, projection), names in numbered.items():
        if found.format.name == "DORA":
            raise LoraError(f"MLX has no DoRA of experts, and {short(names[min(names)])} is one: merge it instead.")
        if sorted(names) != [*range(len(names))]:
            raise LoraError(
                f"MLX has the experts of a layer together, and of {short(f'{parent}.experts')} there are {len(names)} "
                f"with factors of {projection}, numbered up to {max(names)}: give all of them adapters."
            )
        _check_alike(found, [names[i] for i in sorted(names)])
        own = functools.partial(_of_numbered, f"{parent}.{EXPERTS}.{projection}")
        sources.append(_Source(tuple(names[i] for i in sorted(names)), own))
    return sources


def _check_alike(found: ModuleAdapters, names: Sequence[str]) -> None:
    """Raise unless these experts have the same inputs and outputs."""
    first, expected = names[0], None
    for name in names:
        arrays = found.outlines[name].arrays
        sizes = (found.format.inputs_of(arrays), found.format.outputs_of(arrays))
        expected = expected or sizes
        if sizes != expected:
            raise LoraError(
                f"MLX has the experts of a layer together, and {short(first)} has the inputs and outputs "
                f"{list(expected)}, {short(name)} {list(sizes)}."
            )


def _of_module(name: str, arrays: Sequence[Arrays]) -> Arrays:
    own = arrays[0]
    lengths = {f"{name}.m": own["m"].reshape(-1)} if "m" in own else {}
    return {f"{name}.lora_a": own["a"].T, f"{name}.lora_b": own["b"].T} | lengths


def _of_parameter(name: str, experts: int, arrays: Sequence[Arrays]) -> Arrays:
    parent = name.rpartition(".")[0]  # the module that holds the experts, `experts` in transformers
    where = f"{parent.removesuffix('experts')}{EXPERTS}"
    projections = apart(name, arrays[0], experts)
    return {f"{where}.{own}.lora_{x}": array for own, each in projections.items() for x, array in each.items()}


def _of_numbered(name: str, arrays: Sequence[Arrays]) -> Arrays:
    return {f"{name}.lora_{x}": np.stack([own[x] for own in arrays]) for x in "ab"}
