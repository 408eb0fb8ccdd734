"""Adapters as a folder that HF PEFT reads, and whatever reads its files."""

import json
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lora_jax.adapters.base import Adapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.errors import LoraError
from lora_jax.folders import written
from lora_jax.keymap import Array, KeyMap, Placed
from lora_jax.paths import flatten_with_names
from lora_jax.peft import CONFIG, PREFIX, WEIGHTS, Factors, groups_of, names_in_files, shapes_of, turned

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
) -> None:
    """Write adapters as a folder that HF PEFT reads, and whatever reads its files.

    The folder is written under a hidden name and renamed when it is complete. Of several processes one calls it, with
    arrays that it holds whole. An adapter of a table that the program also uses as its head is written for the
    embedding alone: merge it for torch models that tie the two.

    Args:
        folder: where; replaced if it holds such adapters.
        adapters: `{path: adapter}`.
        key_map: from parameters to modules.
        others: `{path: array}`, or nested dicts, of what was trained whole: biases, a head, a table.
        params: parameters, or their shapes; only where a module holds several of them and not all have adapters.
        profile: "vllm" has one rank and one scale for all and no others; "loralib" names tensors as loralib does, with
            the scale in B, since it keeps none.
        base_model: name or folder of the model that the adapters are for, as transformers knows it.
        task_type: such as "SEQ_CLS" or "CAUSAL_LM", for the class that PEFT wraps the model in.

    Raises:
        LoraError: a path that the key map lacks; a kind, or others, that the profile cannot express; the folder holds
            something else. Nothing is written.
    """
    if profile not in ("peft", "vllm", "loralib"):
        raise LoraError(f"profile={profile!r}: expected 'peft', 'vllm' or 'loralib'.")
    folder = Path(folder).absolute()
    ours = any((folder / name).exists() for name in (CONFIG, LORALIB))
    if folder.exists() and not ours and any(folder.iterdir()):
        raise LoraError(f"{folder} exists and holds no adapters of PEFT; it is left as it is. Save to another folder.")
    whole = dict(zip(*flatten_with_names(others or {})[:2], strict=True))
    if whole and profile != "peft":
        raise LoraError(f"profile={profile!r} has no place for others, found {', '.join(whole)}: merge these instead.")
    if not adapters:
        raise LoraError("there are no adapters to save.")
    factors, placed = torch_factors(adapters, key_map, params)
    if profile == "vllm":
        if packed := [name for name, place in placed.items() if place.entry.is_of_experts]:
            raise LoraError(
                f"profile='vllm' has no place for experts in one parameter, found {packed[0]}: merge these."
            )
        factors = _one_rank(factors)
    if profile == "loralib":
        folded = {name: (a, b * np.asarray(scale, b.dtype)) for name, (a, b, scale) in factors.items()}
        named = {f"{name}.lora_{x}": f for name, pair in folded.items() for x, f in zip("AB", pair, strict=True)}
        return _write(folder, LORALIB, named, None)
    extra, told = _whole(whole, key_map, factors)
    config = _config(factors, placed, told) | {"base_model_name_or_path": base_model, "task_type": task_type}
    tensors = _named(factors, placed) | extra
    _write(folder, WEIGHTS, {PREFIX + name: tensor for name, tensor in tensors.items()}, config)


def torch_factors(
    adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any
) -> tuple[dict[str, Factors], dict[str, Placed]]:
    """Torch's factors of each module, and one of the parameters that it holds.

    Kinds that are LoRA with factors of a special form are taken as the LoRA that they are.
    """
    shapes = {}
    adapters = {path: a.explicit() if isinstance(a, Adapter) else a for path, a in adapters.items()}
    for path, adapter in adapters.items():
        if not isinstance(adapter, LoraAdapter):
            raise LoraError(
                f"{path!r} is a {type(adapter).__name__}; this version writes what is W + s A B: merge it instead."
            )
        shapes[path] = _shape_of(adapter)
    placed = key_map.place(shapes)
    others = {} if params is None else key_map.place(shapes_of(params), strict=False)
    groups = groups_of(placed | others)
    found: dict[str, dict[int, Factors]] = {}
    first: dict[str, Placed] = {}
    for path, place in placed.items():
        adapter = turned(adapters[path], place.axes, path, "the key map")
        assert isinstance(adapter, LoraAdapter)
        a, b = (np.asarray(array) for array in jax.device_get((adapter.a, adapter.b)))
        modules = {}
        for index, name in place.names.items():
            where = tuple(place.where(index)[axis] for axis in place.axes.stack)
            modules[name] = place.factors_to_torch(a[where], b[where])
        changed = [name for name, factors in modules.items() if factors[0].any() or factors[1].any()]
        for name in changed or modules:  # the others are layers of a stack that were not adapted
            found.setdefault(name, {})[place.entry.part or 0] = (*modules[name], adapter.scale)
            first.setdefault(name, place)
    joined = {}
    for name, parts in found.items():
        place = first[name]
        if place.entry.part is None:
            joined[name] = parts[0]
        else:
            joined[name] = _join(name, parts, groups[name + place.entry.suffix], place.experts)
    return joined, first


def _shape_of(adapter: LoraAdapter) -> tuple[int, ...]:
    """The shape of W."""
    n, axes = len(adapter.axes.stack), adapter.axes
    sizes = dict(zip((*axes.stack, *axes.inputs), adapter.a.shape[:-1], strict=True))
    sizes |= zip(axes.outputs, adapter.b.shape[n + 1 :], strict=True)
    return tuple(sizes[axis] for axis in sorted(sizes))


def _join(name: str, found: Mapping[int, Factors], parts: Sequence[Placed], experts: int) -> Factors:
    """[W0 | W1 | ...] as one module: one A if they share it, else [A0; A1; ...] and B of blocks."""
    if [part.entry.part for part in parts] != list(range(len(parts))):
        known = ", ".join(repr(part.path) for part in parts)
        raise LoraError(
            f"{name} holds several parameters, of which only {known} are known. Give all parameters: "
            "save_peft(..., params=params)."
        )
    scales = {scale: None for *_, scale in found.values()}
    scale = next(iter(scales)) if len(scales) == 1 else 1.0
    # With the rank as an axis of its own: A [experts, r, in], B [out, r, experts].
    apart = {
        i: (a.reshape(experts, -1, *a.shape[1:]), (b if own == scale else b * np.asarray(own, b.dtype)))
        for i, (a, b, own) in found.items()
    }
    apart = {i: (a, b.reshape(b.shape[0], -1, experts)) for i, (a, b) in apart.items()}
    first, some_b = next(iter(apart.values()))
    shared = all(np.array_equal(a, first) for a, _ in apart.values())
    whole = first if shared else np.concatenate([a for a, _ in apart.values()], axis=1)
    blocks, start = [], 0
    for i, part in enumerate(parts):
        block = np.zeros((part.outputs, whole.shape[1], experts), some_b.dtype)
        if i in apart:
            b = apart[i][1]
            block[:, start : start + b.shape[1]] = b
            start += 0 if shared else b.shape[1]
        blocks.append(block)
    joined = np.concatenate(blocks)
    return whole.reshape(-1, *whole.shape[2:]), joined.reshape(joined.shape[0], -1), scale


def _one_rank(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """All with the largest rank, and scales of 1."""
    rank = max(a.shape[0] for a, *_ in factors.values())

    def pad(array: Array, axis: int) -> Array:
        return np.pad(array, [(0, rank - array.shape[axis] if i == axis else 0) for i in range(array.ndim)])

    return {name: (pad(a, 0), pad(b * np.asarray(scale, b.dtype), 1), 1.0) for name, (a, b, scale) in factors.items()}


def _named(factors: Mapping[str, Factors], placed: Mapping[str, Placed]) -> dict[str, Array]:
    """The tensors of a file, by PEFT's names."""
    experts = {name: place for name, place in placed.items() if place.entry.is_of_experts}
    files = names_in_files(experts, list(experts))
    tensors = {}
    for name, (a, b, _) in factors.items():
        is_table = placed[name].entry.kind == "embedding"
        form = "{}.lora_embedding_{}" if is_table else "{}.lora_{}.weight"
        for letter, factor in (("A", a), ("B", b)):
            tensors[form.format(files.get(name, name), letter)] = factor
    return tensors


def _whole(
    others: Mapping[str, Any], key_map: KeyMap, adapted: Container[str]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors that were trained whole, and what the config says of them."""
    groups = groups_of(key_map.place({path: tuple(np.shape(leaf)) for path, leaf in others.items()}))
    tensors: dict[str, list[Array]] = {}
    for name, parts in groups.items():
        for place in parts:
            index = next(index for index, tensor in place.tensors().items() if tensor == name)
            whole = np.asarray(jax.device_get(others[place.path]))
            tensors.setdefault(name, []).append(place.to_torch(whole[place.where(index)]))
    found: dict[str, Array] = {}
    modules: dict[str, None] = {}
    bias = "none"
    weights = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    for name, pieces in tensors.items():
        place = groups[name][0]
        tensor = (
            pieces[0] if place.entry.part is None else np.concatenate(pieces, axis=place.output_axis(pieces[0].ndim))
        )
        module, _, leaf = name.rpartition(".")
        if module in adapted:
            name = f"{module}.base_layer.{leaf}"
            bias = "lora_only" if leaf == "bias" and bias == "none" else bias
        elif module in weights:
            modules[module] = None
        else:
            bias = "all"
        found[name] = tensor
    return found, {"bias": bias, "modules_to_save": sorted(modules) or None}


def _config(factors: Mapping[str, Factors], placed: Mapping[str, Placed], whole: Mapping[str, Any]) -> dict[str, Any]:
    """The options that every version of PEFT knows, and those that differ from their defaults."""
    experts = sorted(name for name in factors if placed[name].entry.is_of_experts)
    modules = sorted(name for name in factors if name not in experts)
    both: dict[str, tuple[int, float]] = {}  # rank and alpha by what patterns are matched with: of experts the module
    for name, (a, _, scale) in factors.items():
        module = name.rpartition(".")[0] if name in experts else name
        rank = a.shape[0] // placed[name].experts
        own = (rank, _plain(scale * rank))
        if both.setdefault(module, own) != own:
            raise LoraError(f"{module} has experts of rank and alpha {both[module]} and {own}; PEFT has one for all.")
    ranks, alphas = ({module: pair[i] for module, pair in both.items()} for i in (0, 1))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    kinds = {placed[name].entry.kind for name in modules}
    transposed = "conv1d" in kinds and "linear" not in kinds
    longest = sorted(ranks, key=lambda name: (-len(name), name))  # the first pattern that matches counts
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {name: ranks[name] for name in longest if ranks[name] != rank},
        "alpha_pattern": {name: alphas[name] for name in longest if alphas[name] != alpha},
        "use_rslora": False,
        "use_dora": False,
        **whole,
    }
    return config | ({"target_parameters": experts} if experts else {})


def _plain(number: float) -> int | float:
    """alpha is a whole number where it was one: alpha / rank * rank need not be."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


def _write(folder: Path, name: str, tensors: Mapping[str, Array], config: Mapping[str, Any] | None) -> None:
    from lora_jax._safetensors import save_file

    whole = {key: np.ascontiguousarray(tensor) for key, tensor in sorted(tensors.items())}
    with written(folder) as new:
        save_file(whole, new / name, metadata={"format": "pt"})
        if config is not None:
            (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
