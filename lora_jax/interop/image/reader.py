"""Read adapters of image models: files of kohya's sd-scripts, LyCORIS, diffusers and ComfyUI."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.image.forms import Form, Shape, form_of
from lora_jax.interop.image.joined import own_ranks, part_of
from lora_jax.interop.image.metadata import metadata_of, options_of
from lora_jax.interop.image.names import COMPONENTS, DENOISERS, ModuleNames, Target, TensorName, parse
from lora_jax.interop.image.tensors import arrays_of, forms_of_arrays
from lora_jax.interop.key_map import Array
from lora_jax.interop.module_adapters import Lazy, ModuleAdapters, outline
from lora_jax.interop.peft.files import CONFIG, WEIGHTS
from lora_jax.interop.peft.formats.format import Config, Format, Module
from lora_jax.interop.peft.formats.registry import FORMATS, LORA
from lora_jax.interop.peft.options import LIMIT
from lora_jax.interop.safetensors_index import DTYPES, Tensor, header, read

DIFFUSERS = "pytorch_lora_weights.safetensors"  # the file in a folder that diffusers wrote
ENDING = ".safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")


class Group(NamedTuple):
    """The tensors that a file has under one name of a module."""

    name: TensorName  # of one of them
    places: dict[str, Tensor]  # by arrays


class _Source(NamedTuple):
    """Where the arrays of a module of the model come from."""

    group: Group
    form: Form
    format: str  # that they are read in
    window: Shape | None
    scale: float
    target: Target
    own_rank: slice  # of the whole factors, those of this module


def file_of(path: str | Path) -> Path:
    """Return the file of a path, which may be a folder that diffusers wrote."""
    path = Path(path)
    return path / DIFFUSERS if path.is_dir() else path


def groups_of(path: Path) -> dict[str | None, dict[str, Group]]:
    """Return the modules of each component of a file, by their names in it.

    Raises:
        LoraError: it cannot be read, or holds a tensor that is none of an adapter that this version reads.
    """
    if not os.path.lexists(path):
        raise LoraError(f"there is no {path}.")
    if path.name == WEIGHTS and os.path.lexists(path.with_name(CONFIG)):  # the names are those of ComfyUI's files, too
        raise LoraError(
            f"{path} is one of the files of a folder of PEFT, and its scales are in the other one, {CONFIG}: give the "
            f"folder, lora.load_peft({short(str(path.parent))}, params, key_map)."
        )
    found: dict[str | None, dict[str, Group]] = {}
    for tensor, place in header(path).items():
        try:
            name = parse(tensor)
        except LoraError as error:
            raise LoraError(f"{path} {error}") from None
        expected = DTYPES if name.array == "alpha" else _FLOATS
        if place.dtype not in expected:
            raise LoraError(
                f"{path}: {short(tensor)} is of {place.dtype}, expected a floating dtype of 16 bits or more."
            )
        groups = found.setdefault(name.component, {})
        places = groups.setdefault(name.module, Group(name, {})).places
        if name.array in places:
            raise LoraError(f"{path} holds {short(tensor)}, and the same under another name.")
        places[name.array] = place
    return found


def modules_of_tensors(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the modules of a model and their windows, by the names and shapes of its tensors in torch.

    >>> modules_of_tensors({"conv_in.weight": (8, 4, 3, 3), "proj.weight": (8, 8), "proj.bias": (8,)})
    {'conv_in': (3, 3), 'proj': ()}
    """
    weights = {name: shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1}
    return {name.removesuffix(".weight"): tuple(shape[2:]) for name, shape in weights.items()}


def read_image(path: Path, modules: Mapping[str, Shape] | None = None, *, component: str = "unet") -> ModuleAdapters:
    """Return the adapters of one component of a file, each module read when it is asked for.

    Args:
        path: the file, or a folder that diffusers wrote.
        modules: the model's modules, with the window of each that is a convolution and `()` of the others. Without
            them only files with whole names of modules can be read, such as those of diffusers. `modules_of_tensors`
            has them of a published model.
        component: "unet" or "transformer", "text_encoder", "text_encoder_2" or "text_encoder_3".

    Raises:
        LoraError: there is no such file, or it is damaged; it has nothing of this component, or of modules that the
            model does not have; tensors are of a kind that this version does not have, lack their partners, or do not
            fit one another.
    """
    check_component(component)
    path = file_of(path)
    groups = groups_of(path)
    own = groups.get(None if component in DENOISERS else component)
    if own is None:
        known = ", ".join(repr(name or DENOISERS[0]) for name in groups) or "nothing"
        raise LoraError(f"{path} has no adapters of {component!r}: it holds {known}, so component= is one of these.")
    sources = _sources(path, own, modules)
    format = FORMATS[_common_format(path, sources)]
    config = options_of(metadata_of(path), component, _own_format(sources, format), path)
    outlines: dict[str, Module] = {}
    for module, source in sources.items():
        sources[module] = source = source._replace(format=format.name, scale=_scale(path, module, source, config))
        try:
            outlines[module] = _outline(source)
            why = None if format.is_low_rank else format.problem(outlines[module].arrays)
        except LoraError as error:
            raise _of_module(path, source, error) from None
        if why:
            raise _of_module(path, source, why)
    _check_ranks(path, outlines, config)

    def make(module: str) -> Module:
        source = sources[module]
        tensors = {name: _tensor(path, place) for name, place in source.group.places.items() if name != "alpha"}
        arrays = arrays_of(tensors, source.window, source.format)
        return Module(part_of(arrays, source.target.part, source.target.parts, source.own_rank), source.scale)

    kinds = {name: _kind(module.arrays) for name, module in outlines.items()}
    return ModuleAdapters(format, Lazy([*outlines], make), outlines, kinds, {})


def check_component(component: str) -> None:
    """Raise unless this is the name of a component."""
    if component not in COMPONENTS:
        raise LoraError(f"component={component!r}, expected one of {', '.join(map(repr, COMPONENTS))}.")


def _of_module(path: Path, source: _Source, why: Any) -> LoraError:
    return LoraError(f"{path}: {short(source.group.name.module)} {why}.")


def _sources(path: Path, groups: Mapping[str, Group], modules: Mapping[str, Shape] | None) -> dict[str, _Source]:
    """Return where the arrays of each module of the model come from; their scales are not told yet."""
    names = None if modules is None else ModuleNames(modules)
    sources: dict[str, _Source] = {}
    for group in groups.values():
        try:
            targets = _targets(group.name, names)
            window = None if modules is None else modules[targets[0].module]
            form = form_of({name: p.shape for name, p in group.places.items() if name != "alpha"}, window)
        except LoraError as error:
            raise LoraError(f"{path}: {short(group.name.module)} {str(error).rstrip('.')}.") from None
        format = LORA.name if len(targets) > 1 and form.format == "LOKR" else form.format
        ranks = _own_ranks(path, group, len(targets))
        for target, own_rank in zip(targets, ranks, strict=True):
            if target.module in sources:
                other = sources[target.module].group.name.module
                raise LoraError(f"{path}: {short(group.name.module)} and {short(other)} are of one module.")
            sources[target.module] = _Source(group, form, format, window, 1.0, target, own_rank)
    return sources


def _targets(name: TensorName, names: ModuleNames | None) -> list[Target]:
    """Return the modules that a name is of."""
    if names is not None:
        return names.targets(name)
    if name.is_underscored:
        raise LoraError(
            "is a name whose dots became underscores, and only the model tells where they were: read it with a key "
            "map, lora.load_image(path, params, key_map), or with the folder of the model, --base FOLDER"
        )
    return [Target(name.module)]


def _common_format(path: Path, sources: Mapping[str, _Source]) -> str:
    """Return the format of all modules: their own, or LoRA's where they are of several kinds."""
    found = {source.format: module for module, source in sources.items()}
    if len(found) == 1:
        return next(iter(found))
    if "DORA" in found:
        other = next(module for format, module in found.items() if format != "DORA")
        raise LoraError(
            f"{path}: {short(found['DORA'])} has lengths of its outputs (DoRA), and {short(other)} has none, and this "
            "version has one kind for all modules of a file: merge it where it was trained."
        )
    return LORA.name


def _own_format(sources: Mapping[str, _Source], format: Format) -> Format:
    """Return the format that a file of diffusers says it has: LoKr's also of convolutions, which are LoRA here."""
    is_lokr = any(name.startswith("lokr_") for source in sources.values() for name in source.group.places)
    return FORMATS["LOKR"] if is_lokr else format


# Scales ---------------------------------------------------------------------------------------------------------------


def _scale(path: Path, module: str, source: _Source, config: Config | None) -> float:
    """Return the scale: alpha / rank by the tensor alpha, else by diffusers' options, else 1; alpha 0 stands for 1."""
    rank, place = source.form.rank, source.group.places.get("alpha")
    if config is not None and place is None:
        return config.scale_of(module)
    if rank is None or place is None:
        return 1.0
    if math.prod(place.shape) != 1:
        raise _of_module(path, source, f"has an alpha of shape {list(place.shape)}, expected one number")
    alpha = float(read(path.parent, place, DTYPES[place.dtype])[0])
    if not abs(alpha / rank) < LIMIT:
        raise _of_module(path, source, f"has alpha {alpha}, expected a finite number of fp32")
    return (alpha / rank) or 1.0


def _check_ranks(path: Path, outlines: Mapping[str, Module], config: Config | None) -> None:
    """Raise where a module has another rank than diffusers' options say, by which its scale was computed."""
    if config is None:
        return
    for module, (arrays, _) in outlines.items():
        rank = config.format.rank_of(arrays) if "w1" in arrays or config.format.is_low_rank else None
        if rank is not None and rank != config.rank_of(module):
            raise LoraError(
                f"{path}: {short(module)} has rank {rank}, by its metadata {config.rank_of(module)}: the two do not "
                "belong together."
            )


def _own_ranks(path: Path, group: Group, parts: int) -> list[slice]:
    """Return which of the rank's entries each of several joined modules has."""
    if parts == 1 or "up" not in group.places:
        return [slice(None)] * parts
    return own_ranks(_tensor(path, group.places["up"]), group.places["down"].shape[1], parts)


# Arrays ---------------------------------------------------------------------------------------------------------------


def _tensor(path: Path, place: Tensor) -> Array:
    """Return a tensor of a file; those of fp64 in fp32."""
    tensor = read(path.parent, place, DTYPES[place.dtype]).reshape(place.shape)
    return tensor.astype(np.float32) if place.dtype == "F64" else tensor


def _dtype(place: Tensor) -> Any:
    return np.float32 if place.dtype == "F64" else DTYPES[place.dtype]


def _outline(source: _Source) -> Module:
    """Return the outline of a module of the model."""
    places = {name: place for name, place in source.group.places.items() if name != "alpha"}
    shapes = {name: place.shape for name, place in places.items()}
    dtypes = {name: _dtype(place) for name, place in places.items()}
    found = forms_of_arrays(shapes, dtypes, source.window, source.format)
    arrays = {field: outline(form.shape, form.dtype) for field, form in found.items()}
    return Module(part_of(arrays, source.target.part, source.target.parts, source.own_rank), source.scale)


def _kind(arrays: Mapping[str, Array]) -> str:
    """Return the kind of a module by its arrays, all of which are those of a linear layer or have a window."""
    return "conv" if max(array.ndim for array in arrays.values()) > 2 else "linear"
