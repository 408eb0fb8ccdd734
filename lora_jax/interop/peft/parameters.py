"""Parameters as a user gives them: a plan, a tree of shapes, or a tree of arrays."""

from typing import Any

import jax

from lora_jax.core.paths import flatten_with_names, is_array
from lora_jax.core.targets import Plan


def shapes_of(plan_or_params: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the planned weights, or of all parameters, by their paths."""
    if isinstance(plan_or_params, Plan):
        return {path: target.shape for path, target in plan_or_params.items()}
    names, leaves, _ = flatten_with_names(plan_or_params)
    return {name: tuple(leaf.shape) for name, leaf in zip(names, leaves, strict=True) if hasattr(leaf, "shape")}


def arrays_of(params: Any) -> dict[str, Any]:
    """Return the parameters that are arrays, not shapes alone, by their paths."""
    names, leaves, _ = flatten_with_names({} if params is None else params)
    return {
        name: leaf
        for name, leaf in zip(names, leaves, strict=True)
        if is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
    }
