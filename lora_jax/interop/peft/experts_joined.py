"""Modules of each expert and projection in a file, for models that have all experts of a layer in one parameter.

Adapters of older models, of vLLM and of SGLang have `experts.3.gate_proj`, where transformers' models of today have
`experts.gate_up_proj`: see `expert_projections` for what becomes of their factors.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import ParameterMatch
from lora_jax.interop.peft.common_rank import one_rank_for_all, padded
from lora_jax.interop.peft.contents import Contents
from lora_jax.interop.peft.expert_projections import PROJECTIONS, have_one_a, of_all_experts, together, without_one
from lora_jax.interop.peft.formats.format import Arrays, Config, Module, Modules

_NUMBERED = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
_SAME = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # as Mixtral's files call them
_JOINED = re.compile(r".*\.experts\.(gate_up_proj|up_proj|down_proj)")

Layer = dict[str, dict[int, str]]  # of each projection, the modules by the numbers of their experts


def with_experts_joined(
    contents: Contents, config: Config, matches: Mapping[str, ParameterMatch], source: Path
) -> tuple[Contents, Config]:
    """Return what a file holds with all experts of a layer together, where the model has them so.

    Args:
        matches: of the model's parameters.
        source: the file, for messages.

    Raises:
        LoraError: some experts of a layer have factors and others have none, or have them of other shapes.
    """
    layers = _layers(contents.modules)
    ours = [name for match in matches.values() for name in match.names.values()]
    lasts = {found[1]: None for name in ours if (found := _JOINED.fullmatch(name)) is not None}
    if not layers or not lasts or config.format.name != "LORA" or any(map(_NUMBERED.fullmatch, ours)):
        return contents, config
    modules = {name: module for name, module in contents.modules.items() if _NUMBERED.fullmatch(name) is None}
    for parent, layer in layers.items():
        # A model that was renamed since has its experts where the others are.
        where = parent.replace(".block_sparse_moe.experts", ".mlp.experts")
        first = "gate_up_proj" if "gate_up_proj" in lasts else "up_proj"
        for last in (first, "down_proj"):
            parts = [part for part in PROJECTIONS[last] if part in layer]
            own = {part: _stacked(contents.modules, layer[part], config, source) for part in parts}
            if own:
                modules[f"{where}.{last}"] = Module(_joined(own, PROJECTIONS[last]), 1.0)
        if left := [part for part in layer if part not in (*PROJECTIONS[first], "down_proj")]:
            raise LoraError(
                f"{source} holds {short(layer[left[0]][min(layer[left[0]])])}, and the model's experts have no "
                f"{left[0]}: mend the key map."
            )
    return contents._replace(modules=modules), config._replace(says_ranks=False)


def _layers(modules: Modules) -> dict[str, Layer]:
    """Return the modules of single experts by the module that holds them."""
    layers: dict[str, Layer] = {}
    for name in modules:
        if (found := _NUMBERED.fullmatch(name)) is not None:
            layer = layers.setdefault(found[1], {})
            layer.setdefault(_SAME.get(found[3], found[3]), {})[int(found[2])] = name
    return layers


def _stacked(modules: Modules, names: Mapping[int, str], config: Config, source: Path) -> Arrays:
    """Return a [experts, r, in] and b [experts, out, r] of one projection, with a scale of 1 and the largest rank."""
    if sorted(names) != [*range(len(names))]:
        missing = next(i for i in range(len(names)) if i not in names)
        raise LoraError(
            f"{source} holds factors of {short(names[min(names)])} and none of expert {missing}, and the model has all "
            "experts in one parameter: load it into a model that has each by itself."
        )
    own = {name: modules[name] for _, name in sorted(names.items())}
    for name, module in own.items():
        rank = config.format.rank_of(module.arrays)
        if config.says_ranks and rank != config.rank_of(name):
            raise LoraError(f"{source}: {short(name)} has rank {rank}, by the config {config.rank_of(name)}.")
    largest = one_rank_for_all(own, {}, "a layer's experts have")
    alike = [padded(config.format.rescaled(module, 1.0).arrays, largest) for module in own.values()]
    if len({(one["a"].shape, one["b"].shape) for one in alike}) > 1:
        raise LoraError(f"{source} holds experts of different shapes, as {short(names[0])}: they are of no one layer.")
    return {x: np.stack([one[x] for one in alike]) for x in "ab"}


def _joined(found: Mapping[str, Arrays], parts: tuple[str, ...]) -> Arrays:
    """Return a [experts * r, in] and b [out, r * experts] of the parameter that has these projections."""
    known = next(iter(found.values()))
    halves = [found[part] if part in found else without_one(known) for part in parts]
    ranks, shapes = [len(half["a"][0]) for half in halves], [half["a"].shape[::2] for half in halves]
    if shapes.count(shapes[0]) < len(shapes):
        raise LoraError(f"experts have gates of {shapes[0]} and projections of {shapes[-1]} experts and inputs.")
    return of_all_experts(together(halves, len({*ranks}) == 1 and have_one_a(halves)))
