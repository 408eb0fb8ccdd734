"""Fresh adapters for a plan, as its rules draw them."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import check_is, check_key
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import unpacked
from lora_jax.core.paths import flatten_with_names, path_key
from lora_jax.core.targets import Plan
from lora_jax.sharding.adapters import adapter_shardings
from lora_jax.sharding.devices import on_mesh

CALL = "init(key, params, plan)"


def init(key: jax.Array, params: Any, plan: Plan, shardings: Any = None) -> dict[str, Adapter]:
    """Return a fresh adapter for every target of a plan; applying them changes nothing yet.

    The random numbers of each adapter depend on the key and a hash of its path alone: they are the same on every host,
    and stay the same when other weights join or leave the plan. Also runs under `jax.jit`, `jax.vmap` and
    `jax.eval_shape`, with the plan closed over.

    Args:
        key: of the random numbers, a `jax.random.key` (or an old-style `PRNGKey`).
        params: the parameters that the plan was made for, or others of the same shapes.
        plan: as of `lora.plan`.
        shardings: of the adapters, as `lora.adapter_shardings` returns them: each device makes its own part. Without,
            adapters of weights on a mesh are sharded over it by the default policy of `lora.adapter_shardings`.

    Returns:
        `{path: adapter}`, in the order of the plan.

    Raises:
        LoraError: `key` is no random key, or `plan` no plan; `params` lack a planned path, or have another shape there.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((6, 4)), "bias": jnp.zeros(4)}, jnp.ones((1, 6))
    >>> plan = lora.plan(lambda p, x: x @ p["w"] + p["bias"][None], params, x, rules={"w": lora.Lora(rank=2)})
    >>> lora.init(jax.random.key(0), params, plan)
    {'w': LoraAdapter(a 6x2, b 2x4)}
    """
    check_key(CALL, key)
    check_is(CALL, "plan", plan, Plan, "a plan: make it with lora.plan(fn, params, *args, rules={...})")
    names, leaves, _ = flatten_with_names(params)
    weights = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name in plan}
    _check_shapes(plan, weights)
    read = {path: leaf for path, leaf in weights.items() if plan[path].rule.reads_weight}
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in weights.items() if path not in read}

    def draw(key: jax.Array, read: dict[str, Any]) -> dict[str, Adapter]:
        given = shapes | read
        drawn = {path: t.rule.init(path_key(key, path), unpacked(given[path]), t.axes) for path, t in plan.items()}
        return jax.tree.map(jnp.asarray, drawn)

    if shardings is None and on_mesh(weights):
        shardings = adapter_shardings(params, plan)
    return draw(key, read) if shardings is None else jax.jit(draw, out_shardings=shardings)(key, read)


def _check_shapes(plan: Plan, weights: dict[str, Any]) -> None:
    """Raise if a planned weight is missing or has another shape."""
    for path, target in plan.items():
        shape = tuple(weights[path].shape) if path in weights else None
        if shape != target.shape:
            found = "no such path" if shape is None else f"shape {list(shape)}"
            raise LoraError(
                f"the plan was made for {path!r} of shape {list(target.shape)}, but these parameters have {found}. "
                "Plan again with these parameters: lora.plan(fn, params, ..., rules=...)."
            )
