"""Folders of HF PEFT by their modules, one of which is in memory at a time: for conversions, without a model."""

import functools
from pathlib import Path

from lora_jax.checkpoints.atomic_dir import written
from lora_jax.checkpoints.reading import identity, of_one_save
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array
from lora_jax.interop.module_adapters import Lazy, ModuleAdapters, key_map_of, outline
from lora_jax.interop.peft.config import entries_of, read_config
from lora_jax.interop.peft.contents import Contents, sort_tensors
from lora_jax.interop.peft.experts import names_in_files
from lora_jax.interop.peft.files import CONFIG, WEIGHTS, format_of, places_of_tensors, write_config
from lora_jax.interop.peft.formats.format import Arrays, Config, Module
from lora_jax.interop.peft.shared_outer import is_stacked
from lora_jax.interop.peft.tensor_names import PREFIX, names_as_peft_has_them
from lora_jax.interop.safetensors_index import DTYPES, read
from lora_jax.interop.safetensors_writer import write_safetensors

ABOUT = {"base_model_name_or_path": None, "task_type": None}


@of_one_save
def read_peft(folder: Path) -> ModuleAdapters | None:
    """Return the adapters of a folder, or None if it holds what is not of modules alone, or not told by its tensors.

    Those have to be read as a whole: `lora_jax.interop.peft.load.load_by_module`.

    Raises:
        LoraError: as `load_peft`.
    """
    before = identity(folder)
    config = read_config(folder / CONFIG)
    places = places_of_tensors(folder / WEIGHTS)
    names = names_as_peft_has_them(places, config.format.shared_tensors, folder / WEIGHTS)
    outlines = {names[name]: outline(place.shape, DTYPES[place.dtype]) for name, place in places.items()}
    if any(is_stacked(name, array.ndim) for name, array in outlines.items()):
        return None
    found = sort_tensors(outlines, config, folder)
    if not _is_of_modules_alone(found, config):
        return None
    tensors = {id(array): name for name, array in outlines.items()}  # what each outline is of
    theirs = {own: name for name, own in names.items()}

    def make(module: str) -> Module:
        if identity(folder) != before:
            raise LoraError(f"{folder} was replaced while it was read: call this again.")
        arrays, scale = found.modules[module]
        own: Arrays = {}
        for field, array in arrays.items():
            place = places[theirs[tensors[id(array)]]]
            own[field] = read(folder, place, DTYPES[place.dtype]).reshape(place.shape)
        return Module(own, scale)

    kinds = {
        name: config.format.module_kind(config, name, module.arrays, outlines) for name, module in found.modules.items()
    }
    return ModuleAdapters(config.format, Lazy([*found.modules], make), found.modules, kinds, {})


def _is_of_modules_alone(found: Contents, config: Config) -> bool:
    beside = (found.biases, found.rows, found.whole, found.shared)
    told = not (config.target_parameters or config.start or config.replicated or config.tokens)
    return told and config.format.is_written and not any(beside) and not config.format.needs_model


def write_peft(folder: Path, found: ModuleAdapters) -> None:
    """Write adapters as a folder of HF PEFT, one module at a time.

    Raises:
        LoraError: the folder cannot be written, or holds something else; nothing has changed then.
    """
    if found.format.shared_tensors:
        raise LoraError(f"{folder}: {found.format.name} has tensors that all modules share: use lora.save_peft.")
    key_map, shapes = key_map_of(found)
    matches = key_map.match(shapes)
    of_experts = {name: match for name, match in matches.items() if match.entry.is_of_experts}
    names = names_in_files(of_experts, list(of_experts))
    entries = entries_of(found.format, found.outlines, matches, "none", None) | ABOUT

    def tensors_of(name: str, module: Module) -> dict[str, Array]:
        tensors = found.format.tensors_of(matches[name], module.arrays)
        return {f"{PREFIX}{names.get(name, name)}.{ending}": tensor for ending, tensor in tensors.items()}

    @functools.lru_cache(maxsize=1)  # the tensors of a module follow each other in the file
    def read_tensors_of(name: str) -> dict[str, Array]:
        return tensors_of(name, found.modules[name])

    outlines = {name: tensors_of(name, module) for name, module in found.outlines.items()}
    modules = {tensor: name for name, tensors in outlines.items() for tensor in tensors}
    forms = {name: (tensor.shape, tensor.dtype) for tensors in outlines.values() for name, tensor in tensors.items()}
    with written(folder, format_of(WEIGHTS)) as new:
        write_safetensors(new / WEIGHTS, forms, lambda name: read_tensors_of(modules[name])[name], {"format": "pt"})
        write_config(new, entries)
