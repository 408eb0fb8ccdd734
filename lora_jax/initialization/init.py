"""Fresh adapters for a plan."""

from typing import Any

import jax

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import unpacked
from lora_jax.core.paths import flatten_with_names, path_key
from lora_jax.core.targets import Plan
from lora_jax.sharding.adapters import adapter_shardings
from lora_jax.sharding.devices import on_mesh


def init(key: jax.Array, params: Any, plan: Plan, shardings: Any = None) -> dict[str, Adapter]:
    """`{path: adapter}` for every target of a plan; applying them changes nothing yet.

    Each weight's randomness comes from the key and a hash of its path alone: the same on every host, and the same
    when other weights join or leave the plan. Also runs under `jax.jit`, `jax.vmap` and `jax.eval_shape`, with the
    plan closed over.

    Args:
        shardings: where they go, as `lora.adapter_shardings` gives it: each device makes its own part. Without, they
            go on the mesh that the planned weights are on, by the default policy, if they are on one.

    Raises:
        LoraError: `params` lack a planned path, or have another shape there.
    """
    if not isinstance(plan, Plan):
        raise LoraError(f"init takes a plan, found a {type(plan).__name__}: make it with lora.plan(fn, params, ...).")
    names, leaves, _ = flatten_with_names(params)
    shapes = {name: tuple(leaf.shape) for name, leaf in zip(names, leaves, strict=True) if name in plan}
    for path, target in plan.items():
        if shapes.get(path) != target.shape:
            found = f"shape {list(shapes[path])}" if path in shapes else "no such path"
            raise LoraError(
                f"the plan was made for {path!r} of shape {list(target.shape)}, but these parameters have {found}. "
                "Plan again with these parameters: lora.plan(fn, params, ..., rules=...)."
            )

    weights: dict[str, Any] = {
        name: leaf if plan[name].rule.reads_weight else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in zip(names, leaves, strict=True)
        if name in plan
    }
    read = {path: leaf for path, leaf in weights.items() if plan[path].rule.reads_weight}

    def start(key: jax.Array, read: dict[str, jax.Array]) -> dict[str, Adapter]:
        given = weights | read
        return {path: t.rule.init(path_key(key, path), unpacked(given[path]), t.axes) for path, t in plan.items()}

    if shardings is None and on_mesh({path: leaf for path, leaf in zip(names, leaves, strict=True) if path in plan}):
        shardings = adapter_shardings(plan, params)
    return start(key, read) if shardings is None else jax.jit(start, out_shardings=shardings)(key, read)
