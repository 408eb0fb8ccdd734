"""Write adapters of image models: kohya's sd-scripts and LyCORIS, and diffusers. One module is in memory at a time."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.image.metadata import ADAPTER
from lora_jax.interop.image.names import ModuleNames, TensorName
from lora_jax.interop.image.reader import check_component
from lora_jax.interop.key_map import Array
from lora_jax.interop.module_adapters import ModuleAdapters, key_map_of, mapped
from lora_jax.interop.peft.config import entries_of
from lora_jax.interop.peft.dtypes import cast
from lora_jax.interop.peft.formats.format import Format, Module
from lora_jax.interop.peft.formats.ranks import alpha_of
from lora_jax.interop.safetensors_writer import write_safetensors

KINDS = ("linear", "conv1d", "conv")  # of modules that files for image models have
KOHYA_FORMATS = ("LORA", "DORA", "LOHA", "LOKR")
DIFFUSERS_FORMATS = ("LORA", "DORA", "LOKR")
_KOHYA = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
_FLUX = ("double_blocks.", "single_blocks.")  # modules of Flux under its authors' names, which sd-scripts trains
_NETWORKS = {"LORA": "networks.lora", "DORA": "lycoris.kohya", "LOHA": "lycoris.kohya", "LOKR": "lycoris.kohya"}

Components = Mapping[str, ModuleAdapters]
TensorsOf = Callable[[Format, Module], Mapping[str, Array]]  # of a module in a file, by their endings


def write_kohya(
    path: Path, components: Components, *, dtype: Any = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file as sd-scripts and LyCORIS write them, scales as `alpha` in fp32.

    Args:
        path: of the file.
        components: the adapters by "unet", "transformer", "text_encoder", "text_encoder_2" or "text_encoder_3".
        dtype: of the factors; None keeps theirs.
        metadata: what the header says beside, such as `{"modelspec.title": "cats"}`.

    Raises:
        LoraError: there is no place for a kind of adapter or of module; two names of modules become one where dots
            become underscores; the file cannot be written.
    """
    _check(path, components, KOHYA_FORMATS)
    has_two = "text_encoder_2" in components or "text_encoder_3" in components
    beginnings = {}
    for component, found in components.items():
        beginning = "lora_te1_" if component == "text_encoder" and has_two else _KOHYA[component]
        is_flux = component == "transformer" and any(name.startswith(_FLUX) for name in found.modules)
        beginnings[component] = "lora_unet_" if is_flux else beginning
        _check_names(path, found)
    names = {
        (component, module): beginnings[component] + module.replace(".", "_")
        for component, found in components.items()
        for module in found.modules
    }
    facts = _network(components) | {"format": "pt"} | dict(metadata or {})
    _write(path, components, names, _kohya_tensors, dtype, facts)


def write_diffusers(
    path: Path, components: Components, *, dtype: Any = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file as diffusers writes `pytorch_lora_weights.safetensors`, with its options in the header.

    Scales are multiplied into B, or into W1 of LoKr: not all readers of these files read the options, and without them
    a scale is 1. Arguments and errors are those of `write_kohya`.
    """
    _check(path, components, DIFFUSERS_FORMATS)
    plain = {name: mapped(own, functools.partial(_of_scale_1, own.format)) for name, own in components.items()}
    options: dict[str, Any] = {}
    for component, found in plain.items():
        key_map, shapes = key_map_of(found)
        entries = entries_of(found.format, found.outlines, key_map.match(shapes), "none", None)
        options |= {f"{component}.{name}": value for name, value in entries.items()}
    names = {(component, name): f"{component}.{name}" for component, found in plain.items() for name in found.modules}
    facts = {"format": "pt", ADAPTER: json.dumps(options, sort_keys=True)} | dict(metadata or {})
    _write(path, plain, names, _peft_tensors, dtype, facts)


def _of_scale_1(format: Format, module: Module) -> Module:
    return format.rescaled(module, 1.0)


def _check(path: Path, components: Components, formats: tuple[str, ...]) -> None:
    """Raise for what the files have no place for."""
    if not components:
        raise LoraError(f"{path}: there are no adapters.")
    for component, found in components.items():
        check_component(component)
        if found.format.name not in formats:
            raise LoraError(
                f"{path}: the adapters are of {found.format.name}, and these files have {', '.join(formats)}."
            )
        for name, kind in found.kinds.items():
            if kind not in KINDS:
                raise LoraError(f"{path}: {short(name)} is of {kind}, and these files have {' and '.join(KINDS)}.")


def _check_names(path: Path, found: ModuleAdapters) -> None:
    """Raise where names of two modules are one when their dots become underscores."""
    names = ModuleNames(found.modules)
    for module in found.modules:
        try:
            names.targets(TensorName(None, module.replace(".", "_"), True, ""))
        except LoraError as error:
            raise LoraError(f"{path}: {short(module)} {error}") from None


def _network(components: Components) -> dict[str, str]:
    """Return what sd-scripts says of a network: its module, and its rank and alpha where all modules have one."""
    modules = [(found.format, module) for found in components.values() for module in found.outlines.values()]
    ranks = Counter(format.rank_of(module.arrays) for format, module in modules)
    scales = Counter(module.scale for _, module in modules)
    rank = next(iter(ranks)) if len(ranks) == 1 else None
    alpha = alpha_of(next(iter(scales)), rank) if rank is not None and len(scales) == 1 else None
    return {
        "ss_network_module": _NETWORKS[next(iter(components.values())).format.name],
        "ss_network_dim": "Dynamic" if rank is None else str(rank),
        "ss_network_alpha": "Dynamic" if alpha is None else str(alpha),
    }


# The tensors of a module ----------------------------------------------------------------------------------------------


def _kohya_tensors(format: Format, module: Module) -> dict[str, Array]:
    """Return the tensors of a module as LyCORIS names and shapes them.

    An alpha of 0 would be read as none; then the factors have the scale.
    """
    arrays, rank = module.arrays, format.rank_of(module.arrays)
    if rank is None or not alpha_of(module.scale, rank):
        module = format.rescaled(module, 1.0)
        arrays = module.arrays
    rank = rank or max(arrays["a"].shape)
    alpha = {"alpha": np.asarray(alpha_of(module.scale, rank), np.float32)}
    if format.name == "LOHA":
        matrices = {field: array.reshape(len(array), -1) for field, array in arrays.items()}
        return alpha | {ending: matrices[field] for field, ending in format.endings.items()}
    if format.name == "LOKR":
        second = {"lokr_w2_a": arrays["b"], "lokr_w2_b": arrays["a"]} if "b" in arrays else {"lokr_w2": arrays["a"]}
        return alpha | {"lokr_w1": arrays["w1"], **second}
    tensors = {"lora_down.weight": arrays["a"], "lora_up.weight": arrays["b"]}
    if "m" in arrays:
        tensors["dora_scale"] = arrays["m"].reshape(-1, *(1 for _ in arrays["a"].shape[1:]))
    return alpha | tensors


def _peft_tensors(format: Format, module: Module) -> dict[str, Array]:
    """Return the tensors of a module as HF PEFT names and shapes them."""
    arrays = module.arrays
    if format.name == "LOKR":
        second = {"lokr_w2_a": arrays["b"], "lokr_w2_b": arrays["a"]} if "b" in arrays else {"lokr_w2": arrays["a"]}
        return {"lokr_w1": arrays["w1"], **second}
    shapes = format.expected_shapes(arrays)
    return {format.endings[field]: array.reshape(shapes.get(field, array.shape)) for field, array in arrays.items()}


# The file -------------------------------------------------------------------------------------------------------------


def _write(
    path: Path,
    components: Components,
    names: Mapping[tuple[str, str], str],
    tensors_of: TensorsOf,
    dtype: Any,
    metadata: Mapping[str, str],
) -> None:
    """Write the tensors of all modules; `names` are those of modules in the file."""

    def tensors(component: str, module: str, own: Module) -> dict[str, Array]:
        made = tensors_of(components[component].format, own)
        return {f"{names[component, module]}.{ending}": tensor for ending, tensor in made.items()}

    @functools.lru_cache(maxsize=1)  # the tensors of a module follow each other in the file
    def read(component: str, module: str) -> dict[str, Array]:
        made = tensors(component, module, components[component].modules[module])
        return cast({name: tensor for name, tensor in made.items() if name not in alphas}, dtype)

    forms: dict[str, tuple[tuple[int, ...], Any]] = {}
    where: dict[str, tuple[str, str]] = {}
    alphas: dict[str, Array] = {}  # which follow from shapes and scales
    for component, module in names:
        for name, tensor in tensors(component, module, components[component].outlines[module]).items():
            where[name] = (component, module)
            forms[name] = (tensor.shape, tensor.dtype if dtype is None else dtype)
            if name.endswith(".alpha"):
                alphas[name], forms[name] = tensor, (tensor.shape, tensor.dtype)
    with written_file(path) as new:
        write_safetensors(
            new, forms, lambda name: alphas[name] if name in alphas else read(*where[name])[name], metadata
        )
