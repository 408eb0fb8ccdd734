"""Which parameter of a model each adapter of a folder with `target_parameters` is of.

PEFT names the module that holds the parameter, and not the parameter. Of several that one module holds, such as
`experts.gate_up_proj` and `experts.down_proj`, the shapes of the model's tensors tell which is which.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.peft.contents import WRAPPED
from lora_jax.interop.peft.experts_apart import Shapes, fused_shape
from lora_jax.interop.peft.formats.format import Config, Module

_MOST = 6  # parameters of one module


class OfExperts(NamedTuple):
    """The parameter that an adapter is of."""

    name: str
    kind: str  # "experts", or "experts_transposed" of [experts, in, out]
    sizes: tuple[int, int, int]  # experts, inputs and outputs


def parameters_of_modules(
    modules: Mapping[str, Module], config: Config, shapes: Shapes, folder: Path
) -> dict[str, OfExperts]:
    """Return the parameters of experts by the names of their adapters, those of a module from the innermost one on.

    Args:
        shapes: of the tensors of the model, in which experts may have tensors of their own.

    Raises:
        LoraError: the model has no such parameters, or of other shapes; the shapes do not tell which is which.
    """
    if not config.target_parameters:
        return {}
    wrappers: dict[str, list[str]] = {}
    for name in modules:
        module = name[: name.index(WRAPPED)] if name.endswith(WRAPPED) else name
        if f"{module}.weight" not in shapes:
            wrappers.setdefault(module, []).append(name)
    found: dict[str, OfExperts] = {}
    for module, names in wrappers.items():
        names.sort(key=len, reverse=True)
        known = _parameters(module, config.target_parameters, shapes)
        if not known:
            targets = ", ".join(map(short, config.target_parameters[:4]))
            raise LoraError(
                f"{folder} adapts {targets}, and its tensors do not tell of which parameter they are, since the model "
                f"has no such one in {short(module)}: it is for another model, or one with other names, into which it "
                "is merged with a key map: lora.load_peft(folder, params, key_map), and then lora.merge_checkpoint("
                "source, adapters, target, key_map, others=others)."
            )
        if config.start is not None:
            raise LoraError(f"{folder} has experts that began with {config.start!r}, which PEFT has for layers alone.")
        readings = [*_readings([modules[name] for name in names], known)] if len(known) == len(names) <= _MOST else []
        if len(readings) != 1:
            why = "more than one way" if readings else "no way"
            raise LoraError(
                f"{folder} has {len(names)} adapter(s) of parameters of {short(module)}, which by their shapes are "
                f"{why} those of {', '.join(f'{name} {list(shape)}' for name, shape in known.items())}: load them with "
                "a key map, adapters, others = lora.load_peft(folder, params, key_map), and merge these: "
                "lora.merge_checkpoint(source, adapters, target, key_map, others=others)."
            )
        found |= zip(names, readings[0], strict=True)
    return found


def _parameters(module: str, targets: Sequence[str], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the targets that a module holds."""
    found: dict[str, tuple[int, ...]] = {}
    for target in targets:
        name = f"{module}.{target.rpartition('.')[2]}"
        shape = shapes.get(name) or fused_shape(name, shapes)
        if f".{name}".endswith(f".{target}") and shape is not None and len(shape) == 3:
            found[name] = shape
    return found


def _readings(modules: Sequence[Module], known: Mapping[str, tuple[int, ...]]) -> Iterator[list[OfExperts]]:
    """Yield all ways in which modules can be of these parameters; torch has all of a module one way round."""
    for kind in ("experts", "experts_transposed"):
        sizes = {
            name: (n, *((second, first) if kind == "experts" else (first, second)))
            for name, (n, first, second) in known.items()
        }
        for names in permutations(known):
            if all(_fits(module, sizes[name]) for module, name in zip(modules, names, strict=True)):
                yield [OfExperts(name, kind, sizes[name]) for name in names]


def _fits(module: Module, sizes: tuple[int, int, int]) -> bool:
    a, b = module.arrays["a"], module.arrays["b"]
    experts, inputs, outputs = sizes
    return a.ndim == b.ndim == 2 and a.shape[1] == inputs and len(b) == outputs and len(a) % experts == 0
