"""Adapters from the files of HF PEFT: `adapter_config.json` beside `adapter_model.safetensors`.

PEFT's factors are those of torch's weights: W' = W + s B A, with A [r, in] and B [out, r], which are our A and B
transposed. Files are not trusted: nothing in them is executed, no name in them becomes a path, and what is not
understood is refused by name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.base import Adapter
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.axes import KernelAxes
from lora_jax.errors import LoraError
from lora_jax.keymap import Array, Entry, KeyMap, Placed
from lora_jax.paths import flatten_with_names, nearest
from lora_jax.peft_config import Config, read_config, short
from lora_jax.plan import Plan

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LONGEST = 1000  # characters of a name

Factors = tuple[Array, Array, float]  # A [r, in] and B [out, r] of torch, and the scale


def load_peft(
    folder: str | Path, plan_or_params: Any, key_map: KeyMap
) -> tuple[dict[str, Adapter], dict[str, jax.Array]]:
    """The adapters of a folder that HF PEFT wrote, and the arrays that were trained whole: `(adapters, others)`.

    Args:
        plan_or_params: a plan, for adapters of just the planned weights, with the plan's axes; or parameters (or their
            shapes), with the axes of the key map.
        key_map: from parameters to modules.

    Returns:
        `{path: adapter}`, and `{path: array}` of biases, heads and tables to put in the place of the parameters there.

    Raises:
        LoraError: no such folder; a file that is cut short or not of this format; a kind of adapter, or an option that
            this version lacks; tensors that the key map gives to no parameter, factors without their partners, ranks
            other than those of the config, shapes that do not fit: each is named, and nothing is returned.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    tensors = _read(folder / WEIGHTS)
    factors, rest = _sort(tensors, config, folder)
    shapes = shapes_of(plan_or_params)
    placed = key_map.place(shapes, strict=False)
    adapters, used = _adapters(placed, factors, config)
    others, taken = _others(placed, rest)
    _check_targets(folder, config, factors)
    unmatched = [*(name for name in factors if name not in used), *(name for name in rest if name not in taken)]
    if unmatched:
        raise LoraError(_unmatched(folder, unmatched, placed, isinstance(plan_or_params, Plan)))
    if isinstance(plan_or_params, Plan):
        if missing := [path for path in plan_or_params if path not in adapters]:
            raise LoraError(
                f"{folder} holds no factors for {missing[0]!r} of the plan, and {len(missing) - 1} more: plan the "
                f"weights that it has, which are {', '.join(sorted(adapters)[:8]) or 'none'}."
            )
        adapters = {
            path: turned(adapter, plan_or_params[path].axes, path, "the plan") for path, adapter in adapters.items()
        }
    return adapters, others


def _read(path: Path) -> dict[str, Array]:
    """The tensors of a file, by their names without the prefix. The header is checked before anything is read."""
    from lora_jax._safetensors import SafetensorError, load_file

    if not path.is_file():
        torch = path.with_name("adapter_model.bin")
        hint = f" {torch.name} is a pickle, which may run any code: save it again as safetensors." * torch.is_file()
        raise LoraError(f"there is no {path}.{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise LoraError(f"{path} cannot be read: {str(error)[:200]}.") from error
    foreign = next((name for name in tensors if not name.startswith(PREFIX)), None)
    if foreign is not None:
        raise LoraError(f"{path} holds {short(foreign)}, expected names that begin with {PREFIX!r}.")
    for name, tensor in tensors.items():
        if len(name) > LONGEST:
            raise LoraError(f"{path} holds a name of {len(name):,} characters, expected at most {LONGEST}.")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise LoraError(f"{path}: {short(name)} is of {tensor.dtype}, expected a floating dtype.")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_(A|B)|(A|B)\.weight)")
_FOREIGN = re.compile(
    r".*(\.lora_(magnitude_vector|B\.bias|[ABE]|diag|velora.*|arrow.*|monteclora.*)|\.token_adapter\..+"
    r"|\.(hada|lokr)_\w+|\.?vera_\w+)"
)


def _sort(tensors: Mapping[str, Array], config: Config, folder: Path) -> tuple[dict[str, Factors], dict[str, Array]]:
    """The factors of each module, and the tensors that are whole."""
    halves: dict[str, dict[str, Array]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.fullmatch(name):
            halves.setdefault(match[1], {})[match[2] or match[3]] = tensor
        elif _FOREIGN.fullmatch(name):
            raise LoraError(f"{folder} holds {short(name)}, of a kind of adapter that this version does not have.")
        else:
            rest[name.replace(".base_layer.", ".")] = tensor
    factors = {}
    for module, found in halves.items():
        if len(found) == 1:
            raise LoraError(
                f"{folder} holds only the factor {next(iter(found))} of {short(module)}, and not the other one."
            )
        a, b = found["A"], found["B"]
        if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != b.shape[1] or 0 in a.shape + b.shape:
            raise LoraError(
                f"{folder}: the factors of {short(module)} are {list(a.shape)} and {list(b.shape)}, of no common rank."
            )
        factors[module] = (a, b, config.scale_of(module.replace(".base_layer", "")))
    return factors, rest


def load_by_module(folder: Path) -> tuple[dict[str, Adapter], dict[str, Array], KeyMap]:
    """Adapters and others of a folder by torch's own names, where no model is at hand; and the key map back."""
    factors, whole = torch_factors_of_folder(folder)
    kernels = [Entry(name, name, "window* in out" if kind == "conv" else "in out", kind)
               for name, (kind, *_) in factors.items()]  # fmt: skip
    key_map = KeyMap(*kernels, *(Entry(name, name, "keep*", "array") for name in whole))
    placed = key_map.place({name: (*a.shape[2:], a.shape[1], b.shape[0]) for name, (_, a, b, _) in factors.items()})
    adapters: dict[str, Adapter] = {}
    for name, (_, a, b, scale) in factors.items():
        a, b = placed[name].factors_from_torch(a, b, 0)
        adapters[name] = LoraAdapter(jnp.asarray(a), jnp.asarray(b), placed[name].axes, scale)
    return adapters, whole, key_map


def torch_factors_of_folder(folder: Path) -> tuple[dict[str, tuple[str, Array, Array, float]], dict[str, Array]]:
    """`{module: (kind of module, A, B, scale)}` of a folder, and `{name: tensor}` of what it holds whole."""
    config = read_config(folder / CONFIG)
    if config.target_parameters:
        raise LoraError(
            f"{folder} adapts {config.target_parameters[0]}, and its tensors do not tell of which parameter they are: "
            "load it with a key map, lora.load_peft(folder, params, key_map)."
        )
    tensors = _read(folder / WEIGHTS)
    factors, rest = _sort(tensors, config, folder)
    _check_targets(folder, config, factors)
    tables = {name.removesuffix(".lora_embedding_A") for name in tensors if name.endswith(".lora_embedding_A")}
    found = {}
    for module, (a, b, scale) in factors.items():
        if a.shape[0] != config.rank_of(module):
            raise LoraError(f"{folder}: {short(module)} has rank {a.shape[0]}, by the config {config.rank_of(module)}.")
        kind = (
            "embedding" if module in tables else "conv" if a.ndim > 2 else "conv1d" if config.transposed else "linear"
        )
        found[module] = (kind, a, b, scale)
    return found, rest


def shapes_of(plan_or_params: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(plan_or_params, Plan):
        return {path: target.shape for path, target in plan_or_params.items()}
    names, leaves, _ = flatten_with_names(plan_or_params)
    return {name: tuple(leaf.shape) for name, leaf in zip(names, leaves, strict=True) if hasattr(leaf, "shape")}


def _adapters(
    placed: Mapping[str, Placed], factors: Mapping[str, Factors], config: Config
) -> tuple[dict[str, Adapter], dict[str, None]]:
    """The adapters of those parameters whose modules have factors; and the names of these."""
    files = names_in_files(placed, config.target_parameters)
    groups, starts = groups_of(placed), _starts(placed)
    adapters: dict[str, Adapter] = {}
    used: dict[str, None] = {}
    for path, place in placed.items():
        found = {}
        for index, module in place.names.items():
            name = files.get(module, module)
            if place.entry.kind != "array" and name in factors:
                a, b, scale = factors[name]
                _check_parts(place, groups[place.tensors()[index]], b)
                ours = place.factors_from_torch(a, b, starts[path])
                found[index] = (*ours, _expected_scale(place, module, ours[0].shape[-1], scale, config))
                used[name] = None
        if found:
            adapters[path] = _adapter(place, found)
    return adapters, used


def _expected_scale(place: Placed, module: str, rank: int, scale: float, config: Config) -> float:
    name = module.rpartition(".")[0] if place.entry.is_of_experts else module
    if rank != config.rank_of(name):
        raise LoraError(
            f"the factors of {short(module)} have rank {rank}, but by the config it is {config.rank_of(name)}: the "
            "two files do not belong together."
        )
    return scale


def _adapter(place: Placed, found: Mapping[tuple[int, ...], tuple[Array, Array, float]]) -> LoraAdapter:
    """The adapter of one parameter, from the modules that it is in; those without factors do not change."""
    scales = list(dict.fromkeys(scale for *_, scale in found.values()))
    rank = max(a.shape[-1] for a, *_ in found.values())
    stacks = tuple(place.shape[i] for i in place.unstacked)
    e = len(place.axes.stack) - len(stacks)

    def pad(array: Array, axis: int) -> Array:
        missing = rank - array.shape[axis]
        return np.pad(array, [(0, missing if i == axis % array.ndim else 0) for i in range(array.ndim)])

    padded = {
        index: (pad(a, -1), pad(b if len(scales) == 1 else b * np.asarray(scale, b.dtype), e))
        for index, (a, b, scale) in found.items()
    }
    wholes = []
    for one in zip(*padded.values(), strict=True):
        whole = np.zeros((*stacks, *one[0].shape), one[0].dtype)
        for index, part in zip(padded, one, strict=True):
            whole[index] = part
        wholes.append(whole)
    experts = [axis for axis in place.axes.stack if axis not in place.unstacked]
    order = [[*place.unstacked, *experts].index(axis) for axis in place.axes.stack]
    a, b = (array.transpose(*order, *range(len(order), array.ndim)) for array in wholes)
    return LoraAdapter(jnp.asarray(a), jnp.asarray(b), place.axes, scales[0] if len(scales) == 1 else 1.0)


def names_in_files(placed: Mapping[str, Placed], targets: Sequence[str]) -> dict[str, str]:
    """What PEFT calls the factors of experts: the module, with `.base_layer` for each later parameter beside it.

    Its wrappers are nested, the first parameter innermost, and their names do not tell which one they are of: the order
    of the entries in the key map does.
    """
    modules: dict[str, dict[str, None]] = {}
    for place in sorted(placed.values(), key=lambda place: place.order):
        for name in place.names.values() if place.entry.is_of_experts else ():
            if any(name == target or name.endswith(f".{target}") for target in targets):
                modules.setdefault(name.rpartition(".")[0], {})[name] = None
    return {
        name: module + ".base_layer" * (len(names) - 1 - i)
        for module, names in modules.items()
        for i, name in enumerate(names)
    }


def groups_of(placed: Mapping[str, Placed]) -> dict[str, list[Placed]]:
    """The parameters that are parts of one module, in order, by the names of modules."""
    groups: dict[str, list[Placed]] = {}
    for place in placed.values():
        for name in place.tensors().values():
            groups.setdefault(name, []).append(place)
    return {name: sorted(parts, key=lambda place: place.entry.part or 0) for name, parts in groups.items()}


def _starts(placed: Mapping[str, Placed]) -> dict[str, int]:
    """Where the outputs of each parameter begin among those of its module."""
    starts = {}
    for parts in groups_of(placed).values():
        start = 0
        for place in parts:
            starts[place.path] = start
            start += place.outputs
    return starts


def _others(placed: Mapping[str, Placed], rest: Mapping[str, Array]) -> tuple[dict[str, jax.Array], dict[str, None]]:
    """The parameters that the file holds whole."""
    starts, others = _starts(placed), {}
    taken: dict[str, None] = {}
    for path, place in placed.items():
        found = {}
        for index, name in place.tensors().items():
            if name in rest:
                taken[name] = None
                found[index] = place.from_torch(place.outputs_of(rest[name], starts[path]), index)
        if not found:
            continue
        missing = [name for index, name in place.tensors().items() if index not in found]
        if missing:
            raise LoraError(f"the file holds a part of {path!r} whole, but not {short(missing[0])}.")
        whole = np.zeros(place.shape, next(iter(found.values())).dtype)
        for index, part in found.items():
            whole[place.where(index)] = part
        others[path] = jnp.asarray(whole)
    return others, taken


def _check_targets(folder: Path, config: Config, factors: Mapping[str, Factors]) -> None:
    """A file that lacks some of what the config says it has was cut, or is of another adapter."""
    modules = [f".{module.replace('.base_layer', '')}" for module in factors]
    for target in config.target_modules:
        if not any(module.endswith(f".{target}") for module in modules):
            raise LoraError(
                f"{folder} holds no factors for {short(target)}, which its config has among target_modules: the two "
                "files do not belong together."
            )
    if not factors:
        raise LoraError(f"{folder} holds no factors of any module.")


def _check_parts(place: Placed, parts: Sequence[Placed], b: Array) -> None:
    """All of a module's outputs have to be known, to know which are ours."""
    total = sum(part.outputs for part in parts)
    if place.entry.part is not None and (
        total != b.shape[0] or [p.entry.part for p in parts] != list(range(len(parts)))
    ):
        known = ", ".join(f"{part.path!r} ({part.outputs})" for part in parts)
        raise LoraError(
            f"{place.path!r} is part {place.entry.part} of a module with {b.shape[0]} outputs, of which these are "
            f"known: {known}. Give all parameters, not only a plan, and a key map with all parts."
        )


def turned(adapter: Adapter, axes: KernelAxes, path: str, whose: str) -> Adapter:
    """With these axes: a table may be used the other way round."""
    for candidate in (adapter, adapter.transpose()):
        if candidate.axes == axes:
            return candidate
    raise LoraError(
        f"{path!r} has {axes} by {whose}, but its adapter has {adapter.axes}: mend its entry in the key map."
    )


def _unmatched(folder: Path, names: Sequence[str], placed: Mapping[str, Placed], planned: bool) -> str:
    known = [name for place in placed.values() for name in (*place.names.values(), *place.tensors().values())]
    listed = "\n".join(
        f"  {short(name)}; nearest: {', '.join(nearest(name, known, n=2)) or 'none'}" for name in names[:8]
    )
    more = f"\n  and {len(names) - 8} more" if len(names) > 8 else ""
    where = "the planned weights" if planned else "the parameters"
    hint = "Plan these too, or give the parameters in the plan's place" if planned else "Mend the key map"
    return (
        f"{folder} holds {len(names)} module(s) or tensor(s) that the key map gives to none of {where}:\n"
        f"{listed}{more}\n"
        f'{hint}; names that only begin with something else are met by key_map.under(name="bert.").'
    )
