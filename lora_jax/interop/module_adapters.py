"""Adapters by the modules of torch's models: what files of all formats hold, whoever reads or writes them.

A format of files is a reader that returns `ModuleAdapters` and a writer that takes them; neither knows of parameters,
of plans or of key maps. Between these and our adapters are `module_adapters` and `for_parameters`:

    adapters -> module_adapters(adapters, key_map) -> the writer of a format
    the reader of a format -> for_parameters(found, params, key_map) -> adapters

and a reader before a writer converts one format into another, one module in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.arguments import check_dtype
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import A_KEY_MAP, check_adapter_dict, check_is
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.interop.key_map import Array, KeyMap
from lora_jax.interop.peft import load
from lora_jax.interop.peft.contents import Contents
from lora_jax.interop.peft.expert_projections import of_all_experts as of_all_experts  # part of this common ground
from lora_jax.interop.peft.expert_projections import of_each_expert as of_each_expert
from lora_jax.interop.peft.formats.format import Config, Format, Module
from lora_jax.interop.peft.formats.registry import LORA
from lora_jax.interop.peft.from_modules import adapters_of, named_module
from lora_jax.interop.peft.tied_tables import Tied, check_tied
from lora_jax.interop.peft.to_modules import modules_to_save, torch_modules


class ModuleAdapters(NamedTuple):
    """The adapters of a model by the names of torch's modules, such as "model.layers.0.self_attn.q_proj".

    Arrays have torch's layout and the names of our fields: of LoRA a [r, in] and b [out, r], so that
    W' = W + scale * b @ a; of DoRA also m [out]; of experts in one parameter, which goes by that parameter's name,
    a [experts * r, in] and b [out, r * experts], as HF PEFT has them: see `of_each_expert`.
    """

    format: Format  # of all of them
    modules: Mapping[str, Module]  # each is made or read when it is asked for: ask once, and hold none longer
    outlines: Mapping[str, Module]  # the same with zeros in the place of the numbers, which take no memory
    kinds: Mapping[str, str]  # of each module, a key of entries.MODULE_KINDS
    experts: Mapping[str, int]  # how many, of modules that are experts in one parameter


class Lazy(Mapping[str, Module]):
    """Modules that are made one at a time, when they are asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Module]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Module:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def outline(shape: Sequence[int], dtype: Any) -> Array:
    """Return an array of zeros with one number in memory."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def outlined(modules: Mapping[str, Module]) -> dict[str, Module]:
    """Return the outlines of modules that are in memory."""
    return {
        name: Module({field: outline(array.shape, array.dtype) for field, array in module.arrays.items()}, module.scale)
        for name, module in modules.items()
    }


def module_adapters(
    call: str,
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    params: Any = None,
    formats: Sequence[str] = (LORA.name,),
) -> ModuleAdapters:
    """Return adapters by torch's modules: in their own format if it is one of these, else as the LoRA that they are.

    Args:
        call: such as "save_gguf(path, adapters, key_map)", for messages.
        adapters: `{path: adapter}`.
        key_map: from parameters to modules.
        params: parameters, only where a module holds several of them and not all have adapters.
        formats: names of `peft.formats` that the files have a place for.

    Raises:
        LoraError: arguments in another order; an adapter that is none of these formats; no adapters; the key map lacks
            a path; an array is spread over several hosts.
    """
    check_adapter_dict(call, adapters)
    check_is(call, "key_map", key_map, KeyMap, A_KEY_MAP)
    if not adapters:
        raise LoraError(f"{call}: there are no adapters.")
    refuse_spread(dict(adapters))
    found = modules_to_save(adapters, key_map, params) if [*formats] != [LORA.name] else None
    if found is None or found.format.name not in formats:
        found = torch_modules(adapters, key_map, params, LORA)
    kinds = {name: found.matches[name].entry.kind for name in found.modules}
    experts = {name: match.experts for name, match in found.matches.items() if match.entry.is_of_experts}
    return ModuleAdapters(found.format, found.modules, outlined(found.modules), kinds, experts)


def for_parameters(
    found: ModuleAdapters,
    plan_or_params: Any,
    key_map: KeyMap,
    source: Path,
    *,
    dtype: Any = jnp.float32,
    tied: Tied = "refuse",
) -> dict[str, Adapter]:
    """Return the adapters of a model's parameters; arguments and errors as of `load_peft`.

    Args:
        found: what a file holds.
        source: the file, for messages.
    """
    check_is("key_map", "key_map", key_map, KeyMap, A_KEY_MAP)
    check_tied(tied)
    if dtype is not None:
        check_dtype("load", dtype)
    contents = Contents(dict(found.modules), {}, {}, {}, {}, {})
    config = _config(found.format)
    return load.for_parameters(contents, config, plan_or_params, key_map, source, dtype=dtype, tied=tied)[0]


def mapped(found: ModuleAdapters, change: Callable[[Module], Module]) -> ModuleAdapters:
    """Return the adapters with each module changed when it is asked for, and its outline likewise."""

    def make(name: str) -> Module:
        return change(found.modules[name])

    outlines = {name: outlined({name: change(module)})[name] for name, module in found.outlines.items()}
    return found._replace(modules=Lazy([*found.modules], make), outlines=outlines)


def key_map_of(found: ModuleAdapters) -> tuple[KeyMap, dict[str, tuple[int, ...]]]:
    """Return the key map from the modules' names to themselves, and the shapes of their weights by these names."""
    entries, shapes = [], {}
    for name, (arrays, _) in found.outlines.items():
        entry, shapes[name] = named_module(found.format, name, found.kinds[name], arrays, found.experts.get(name))
        entries.append(entry)
    return KeyMap(*entries), shapes


def by_module(found: ModuleAdapters) -> tuple[dict[str, Adapter], KeyMap]:
    """Return the adapters without a model, by the names of their modules, and the key map back to these."""
    key_map, shapes = key_map_of(found)
    return adapters_of(key_map.match(shapes), dict(found.modules), _config(found.format), {}), key_map


def _config(format: Format) -> Config:
    """Return the config of a file that has none: ranks and scales are those of its arrays."""
    return Config(format, 0, 1.0, False, False, {}, {}, (), (), False, False, (), says_ranks=False)
