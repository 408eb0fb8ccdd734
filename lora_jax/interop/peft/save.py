"""Adapters as a folder that HF PEFT reads, and whatever reads its files."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.adapters.vera import shared_projections
from lora_jax.checkpoints.atomic_dir import written
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import flatten_with_names
from lora_jax.interop.key_map import Array, KeyMap, Placed
from lora_jax.interop.peft.config_write import facts_of, with_more
from lora_jax.interop.peft.formats import KINDS, Module, tensors_of
from lora_jax.interop.peft.from_modules import names_in_files
from lora_jax.interop.peft.full_weights import lora_biases, rest_of_modules, whole_tensors, with_base
from lora_jax.interop.peft.load import CONFIG, PREFIX, PROJECTIONS, WEIGHTS
from lora_jax.interop.peft.to_modules import arrays_of, modules_to_save, torch_modules

LORALIB = "lora.safetensors"  # of profile="loralib", which has no config


def save_peft(
    folder: str | Path,
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    others: Any = None,
    params: Any = None,
    profile: Literal["peft", "vllm", "loralib"] = "peft",
    base_model: str | None = None,
    task_type: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters as a folder that HF PEFT reads, and whatever reads its files.

    Adapters that are all of DoRA, AdaLoRA, LoHa, LoKr or VeRA are written as these; what else is LoRA in another form,
    as the LoRA that it is. `Rows` become PEFT's trainable tokens; `Full` of a bias its `lora_bias` beside LoRA of that
    module, and other `Full` are written whole.

    The folder is written under a hidden name and renamed when it is complete. Of several processes one calls it, with
    arrays that it holds whole. An adapter of a table that the program also uses as its head is written for the
    embedding alone: merge it for torch models that tie the two.

    Args:
        folder: where; replaced if it holds such adapters.
        adapters: `{path: adapter}`.
        key_map: from parameters to modules.
        others: `{path: array}`, or nested dicts, of what was trained whole: biases, a head, a table.
        params: parameters, only where a module holds several of them and not all have adapters, for which shapes will
            do unless they are of DoRA; and for `Full` that is written whole.
        profile: "vllm" has one rank and one scale for all and no others; "loralib" names tensors as loralib does, with
            the scale in B, since it keeps none.
        base_model: name or folder of the model that the adapters are for, as transformers knows it.
        task_type: such as "SEQ_CLS" or "CAUSAL_LM", for the class that PEFT wraps the model in.
        config: further entries of the config that the tensors do not tell, such as "revision", "layer_replication" or,
            for adapters that began with PiSSA, "init_lora_weights".

    Raises:
        LoraError: a path that the key map lacks; a kind, or others, that the profile cannot express, or that one folder
            cannot hold beside one another; parameters that are missing; an entry of the config that PEFT does not have,
            or that says other than what is written; the folder holds something else. Nothing is written.
    """
    folder = Path(folder).absolute()
    whole = dict(zip(*flatten_with_names(others or {})[:2], strict=True))
    _check_call(folder, adapters, whole, profile)
    if profile == "loralib":
        if config:
            raise LoraError(f"profile='loralib' has no config, found config={short(dict(config))}: leave it out.")
        return _write(folder, LORALIB, _for_loralib(adapters, key_map, params), None)
    if profile == "vllm":
        tensors, facts = _for_vllm(adapters, key_map, params)
    else:
        tensors, facts = _for_peft(adapters, key_map, params, whole)
    facts = with_more(facts | {"base_model_name_or_path": base_model, "task_type": task_type}, config or {})
    if not facts.get("save_projection"):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in PROJECTIONS}
    _write(folder, WEIGHTS, tensors, facts)


def _check_call(folder: Path, adapters: Mapping[str, Adapter], whole: Mapping[str, Any], profile: str) -> None:
    """What is wrong with a call whatever the adapters hold."""
    if profile not in ("peft", "vllm", "loralib"):
        raise LoraError(f"profile={profile!r}: expected 'peft', 'vllm' or 'loralib'.")
    ours = any((folder / name).exists() for name in (CONFIG, LORALIB))
    if folder.exists() and not ours and any(folder.iterdir()):
        raise LoraError(f"{folder} exists and holds no adapters of PEFT; it is left as it is. Save to another folder.")
    if whole and profile != "peft":
        raise LoraError(f"profile={profile!r} has no place for others, found {', '.join(whole)}: merge these instead.")
    if not adapters:
        raise LoraError("there are no adapters to save.")
    apart = [path for path, adapter in adapters.items() if isinstance(adapter, FullAdapter | RowsAdapter)]
    if apart and (profile != "peft" or len(apart) == len(adapters)):
        why = f"profile={profile!r} has no place for it" if profile != "peft" else "PEFT has no folder of such alone"
        raise LoraError(f"{apart[0]!r} is a {type(adapters[apart[0]]).__name__}, and {why}: merge it instead.")


def _for_loralib(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> dict[str, Array]:
    modules, _ = torch_modules(adapters, key_map, params)
    folded = {name: module.folded(KINDS["LORA"], 1.0).arrays for name, module in modules.items()}
    return {f"{name}.lora_{x}": pair[x.lower()] for name, pair in folded.items() for x in "AB"}


def _for_vllm(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors, and the config."""
    modules, placed = torch_modules(adapters, key_map, params)
    if packed := [name for name, place in placed.items() if place.entry.is_of_experts]:
        raise LoraError(f"profile='vllm' has no place for experts in one parameter, found {packed[0]}: merge these.")
    modules = _one_rank(modules)
    return _named("LORA", modules, placed), facts_of("LORA", modules, placed, {"bias": "none", "modules_to_save": None})


def _for_peft(
    adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any, whole: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors, and the config."""
    full = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, FullAdapter)}
    rows = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, RowsAdapter)}
    factored = {path: adapter for path, adapter in adapters.items() if path not in full and path not in rows}
    kind, modules, placed = modules_to_save(factored, key_map, params)
    if kind == "ADALORA":
        modules = _one_scale(modules)
    added, full = lora_biases(full, key_map, params, modules, placed) if kind == "LORA" else ({}, full)
    base = arrays_of(params)
    whole = {**whole, **with_base(full, base, whole)}
    extra, told = whole_tensors(whole | rest_of_modules(whole, base, key_map, modules), key_map, modules)
    if kind in ("LOHA", "LOKR") and told["bias"] != "none":
        raise LoraError(f"PEFT keeps no biases beside {kind}: merge them, or train LoRA with them.")
    if kind not in ("LORA", "DORA", "ADALORA") and rows:
        raise LoraError(f"PEFT keeps no rows of tables beside {kind}: merge {next(iter(rows))!r} instead.")
    tables, indices = _tables(rows, key_map)
    shared, seed = _shared(next(iter(factored.values()))) if kind == "VERA" else ({}, {})
    facts = facts_of(kind, modules, placed, told) | seed
    facts |= ({"lora_bias": True} if added else {}) | ({"trainable_token_indices": indices} if indices else {})
    return _named(kind, modules, placed, added | tables | extra) | shared, facts


def _one_rank(modules: Mapping[str, Module]) -> dict[str, Module]:
    """All of LoRA with the largest rank, and scales of 1."""
    rank = max(len(module.arrays["a"]) for module in modules.values())

    def pad(array: Array, axis: int) -> Array:
        return np.pad(array, [(0, rank - array.shape[axis] if i == axis else 0) for i in range(array.ndim)])

    found = {}
    for name, module in modules.items():
        arrays = module.folded(KINDS["LORA"], 1.0).arrays
        found[name] = Module({"a": pad(arrays["a"], 0), "b": pad(arrays["b"], 1)}, 1.0)
    return found


def _one_scale(modules: Mapping[str, Module]) -> dict[str, Module]:
    """All of AdaLoRA with the scale that most have, which is above zero."""
    scale = Counter(abs(module.scale) for module in modules.values()).most_common(1)[0][0]
    return {name: module.folded(KINDS["ADALORA"], scale or 1.0) for name, module in modules.items()}


def _named(
    kind: str, modules: Mapping[str, Module], placed: Mapping[str, Placed], more: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """The tensors of a file, by PEFT's names."""
    experts = {name: place for name, place in placed.items() if place.entry.is_of_experts}
    files = names_in_files(experts, list(experts))
    own = {
        f"{files.get(name, name)}.{ending}": tensor
        for name, module in modules.items()
        for ending, tensor in tensors_of(kind, placed[name], module.arrays).items()
    }
    return {PREFIX + name: tensor for name, tensor in (own | dict(more or {})).items()}


def _tables(rows: Mapping[str, RowsAdapter], key_map: KeyMap) -> tuple[dict[str, Array], dict[str, list[int]]]:
    """What rows of tables are now, and which they are, by the names of the modules."""
    tensors, indices = {}, {}
    for path, place in key_map.place({path: adapter.kernel_shape() for path, adapter in rows.items()}).items():
        first = "in" if place.entry.kind == "embedding" else "out"  # of torch's axes
        if place.names.keys() != {()} or place.words[rows[path].axis] != first:
            raise LoraError(f"{path!r} is no table of which torch has rows by the key map: merge it instead.")
        name = place.names[()]
        tensors[f"{name}.token_adapter.trainable_tokens_delta"] = np.asarray(jax.device_get(rows[path].values))
        indices[name] = list(rows[path].indices)
    return tensors, indices


def _shared(adapter: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """VeRA's projections, and what the config says of them."""
    pair = shared_projections(adapter.seed, adapter.d.shape[-1], *adapter.widths)
    tensors = dict(zip(PROJECTIONS, (one.T for one in pair), strict=True))
    return tensors, {"projection_prng_key": adapter.seed, "save_projection": True}


def _write(folder: Path, name: str, tensors: Mapping[str, Array], config: Mapping[str, Any] | None) -> None:
    from lora_jax.interop._safetensors import save_file

    whole = {key: np.ascontiguousarray(tensor) for key, tensor in sorted(tensors.items())}
    with written(folder) as new:
        save_file(whole, new / name, metadata={"format": "pt"})
        if config is not None:
            (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
