"""Published files with a tensor for each expert and projection, where torch has one parameter for all experts.

torch's parameter is a stack of experts, and joins projections along their outputs: `experts.gate_up_proj` of shape
[experts, 2 * inner, d] is `experts.{e}.gate_proj.weight` and, below it, `experts.{e}.up_proj.weight`, each [inner, d].
"""

from collections.abc import Mapping
from itertools import count, takewhile

Shapes = Mapping[str, tuple[int, ...]]  # by the names of tensors

# The projections that each parameter joins, in their order; files have other names for the same ones.
_PROJECTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
# What files call the module that holds the experts, where they call it otherwise than torch does.
_OTHER_NAMES = {".mlp.experts": ".block_sparse_moe.experts"}


def names_apart(parameter: str, shapes: Shapes) -> list[tuple[str, ...]]:
    """Return, for each expert, the names of the tensors that a parameter consists of; none if files do not have them.

    >>> names = [f"h.experts.{e}.{name}_proj.weight" for e in range(2) for name in ("gate", "up")]
    >>> names_apart("h.experts.gate_up_proj", dict.fromkeys(names, (3, 2)))[1]
    ('h.experts.1.gate_proj.weight', 'h.experts.1.up_proj.weight')
    """
    module, _, last = parameter.rpartition(".")
    modules = [module]
    modules += [module.removesuffix(ours) + theirs for ours, theirs in _OTHER_NAMES.items() if module.endswith(ours)]
    for where in modules:
        for projections in _PROJECTIONS.get(last, ()):
            experts = (_names(where, expert, projections) for expert in count())
            if found := list(takewhile(lambda own: all(name in shapes for name in own), experts)):
                return found
    return []


def fused_shape(parameter: str, shapes: Shapes) -> tuple[int, ...] | None:
    """Return the shape [experts, out, in] of the parameter that these tensors are, or None."""
    experts = names_apart(parameter, shapes)
    kinds = [tuple(shapes[name] for name in own) for own in experts]
    if not kinds or any(kind != kinds[0] for kind in kinds) or any(len(shape) != 2 for shape in kinds[0]):
        return None
    inputs = kinds[0][0][1]
    return (len(experts), sum(outputs for outputs, _ in kinds[0]), inputs)


def _names(module: str, expert: int, projections: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{module}.{expert}.{projection}.weight" for projection in projections)
