"""From tensors to modules: what each tensor of a folder is, and whether the folder has all that its config says."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array
from lora_jax.interop.peft.dtypes import times
from lora_jax.interop.peft.formats.format import Arrays, Config, Module, Modules

_BIAS = ".lora_B.bias"
_ROWS = ".token_adapter.trainable_tokens_delta"
WRAPPED = ".base_layer"  # PEFT's name for a module inside an adapted one


class Contents(NamedTuple):
    """The tensors of a folder, by what they are."""

    modules: Modules
    biases: dict[str, Array]  # what is added to biases, by the names of these
    rows: dict[str, Array]  # the trained rows of tables, by the names of these
    whole: dict[str, Array]  # tensors that were trained whole, by their names
    shared: dict[str, Array]  # tensors that all modules use, by their full names
    wrapped: dict[str, None]  # those of `whole` that belong to the module inside an adapted one


def sort_tensors(tensors: Mapping[str, Array], config: Config, folder: Path) -> Contents:
    """Group tensors by modules, and tell them from those of biases, of tables and of whole parameters.

    Raises:
        LoraError: a tensor is of another kind of adapter; a module lacks arrays, or its arrays do not fit one another;
            the folder lacks some of what its config says that it has.
    """
    arrays: dict[str, Arrays] = {}
    added: dict[str, Array] = {}
    contents = Contents({}, {}, {}, {}, {}, {})
    for name, tensor in tensors.items():
        if not {*config.format.of_training}.isdisjoint(name.split(".")):
            continue
        if config.lora_bias and name.endswith(_BIAS):
            added[name.removesuffix(_BIAS)] = tensor
        elif config.tokens and name.endswith(_ROWS):
            contents.rows[f"{name.removesuffix(_ROWS)}.weight"] = tensor
        elif name in config.format.shared_tensors:
            contents.shared[name] = tensor
        elif (of_module := _field_of(name, config, folder)) is None:
            plain = name.replace(f"{WRAPPED}.", ".")
            contents.whole[plain] = tensor
            if plain != name:
                contents.wrapped[plain] = None
        else:
            module, field = of_module
            if field in arrays.setdefault(module, {}):
                raise LoraError(f"{folder} holds {short(name)}, and the same under another name.")
            arrays[module][field] = tensor
    for module, own in arrays.items():
        if why := config.format.problem(own):
            raise LoraError(f"{folder}: {short(module)} {why}.")
        contents.modules[module] = Module(own, config.scale_of(module.replace(WRAPPED, "")))
    for module, c in added.items():
        if module not in contents.modules:
            raise LoraError(f"{folder} holds a lora_B.bias of {short(module)}, and no factors.")
        contents.biases[f"{module}.bias"] = times(c, contents.modules[module].scale)
    _check_that_nothing_is_missing(contents, config, folder)
    return contents


def resolved(contents: Contents, config: Config, fans: Mapping[str, tuple[int, int]], folder: Path) -> Contents:
    """Return the contents with the arrays of all modules by the fields of adapters, as their format makes them.

    Args:
        fans: inputs and outputs of the modules that are known.

    Raises:
        LoraError: a module's arrays do not fit the config or the module.
    """
    modules = {}
    for name, (arrays, scale) in contents.modules.items():
        own = name.replace(WRAPPED, "")
        if config.format.needs_shapes and own not in fans:
            modules[name] = Module(arrays, scale)  # of no parameter, which is an error by itself
            continue
        try:
            with np.errstate(all="ignore"):  # numbers that are not finite stay so, as those of other kinds
                modules[name] = Module(config.format.resolved(config, own, arrays, fans.get(own)), scale)
        except LoraError as error:
            raise LoraError(f"{folder}: {short(name)} {error}.") from None
    return contents._replace(modules=modules)


def _field_of(name: str, config: Config, folder: Path) -> tuple[str, str] | None:
    """Return the module and the field that a tensor is of, or None."""
    try:
        return config.format.field_of(name)
    except LoraError as error:
        raise LoraError(f"{folder} holds {short(name)}, {error}.") from None


def _check_that_nothing_is_missing(contents: Contents, config: Config, folder: Path) -> None:
    """Raise if the folder lacks some of what its config says: its file was cut, or is of another adapter."""
    left = dict.fromkeys(config.target_modules)
    for module in contents.modules:
        own = module.replace(WRAPPED, "")
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", own))):
            left.pop(own[start:], None)
    if left:
        raise LoraError(
            f"{folder} holds no factors for {short(next(iter(left)))}, which its config has among target_modules: the "
            "two files do not belong together. If it was trained without, take that name out of adapter_config.json."
        )
    if not contents.modules:
        raise LoraError(f"{folder} holds no factors of any module.")
    for option, is_said, found in [
        ("lora_bias", config.lora_bias, contents.biases),
        ("trainable_token_indices", config.tokens, contents.rows),
    ]:
        if is_said and not found:
            raise LoraError(f"{folder} holds none of what its config has {option} for: the two do not belong together.")
