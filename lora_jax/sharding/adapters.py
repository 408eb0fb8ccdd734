"""Partition specs of adapters, derived from those of the weights that they adapt.

Each array of an adapter has some of W's axes (its layout) and is split along these as W is; its rank is never split.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax import P
from jax.sharding import Mesh, NamedSharding

from lora_jax.core.adapter import Adapter, is_adapter
from lora_jax.core.argument_checks import check_adapter_dict, refuse
from lora_jax.core.errors import LoraError
from lora_jax.core.partition import (
    BATCH_AXES,
    check_divisible,
    described_mesh,
    device_ids,
    full_spec,
    names_of,
)
from lora_jax.core.paths import flatten_with_names, nearest
from lora_jax.core.targets import Plan, abstract_adapters
from lora_jax.sharding.devices import sharding_of

CALL = "adapter_specs(base, adapters, mesh)"
Policy = Callable[[str, P], P]  # (path, spec of W) -> the spec that the adapter's arrays follow


def adapter_specs(
    base: Any,
    adapters: Plan | Mapping[str, Adapter],
    mesh: Mesh | None = None,
    policy: Literal["tensor", "replicate", "inherit"] | Policy = "tensor",
    batch_axes: Sequence[str] = BATCH_AXES,
) -> dict[str, Adapter]:
    """Return the adapters' tree with a `PartitionSpec` in the place of each array.

    Where W is split over a tensor axis, so are A (along W's inputs) and B (along its outputs): the low-rank products
    then need no collectives beside those of W's own product. Where W is split over an axis that also splits the batch
    (fsdp), the adapters are replicated: they are too small to be worth gathering for every use.

    Args:
        base: the placement of the weights, in a tree like the parameters': arrays on the mesh, `NamedSharding`s,
            `PartitionSpec`s (None is `P()`), or Flax's boxes with partitioning metadata. For Linen also
            `nn.get_partition_spec(variables)["params"]`, for NNX `nnx.get_partition_spec(params)`.
        adapters: a plan, or `{path: adapter}`.
        mesh: needed where `base` holds specs only.
        policy: "tensor" follows W along all mesh axes but `batch_axes`; "replicate" along none; "inherit" along all; or
            a function of (path, spec of W) that returns the spec, over W's axes, which the adapter follows.
        batch_axes: the names of the mesh axes that split the batch.

    Returns:
        `{path: adapter}` with specs for arrays.

    Raises:
        LoraError: a weight has no placement, or is on another mesh; a spec names an axis that the mesh lacks, or splits
            an axis unevenly.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((8, 4))}
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((1, 8)), rules={"w": lora.Lora(rank=2)})
    >>> specs = lora.adapter_specs({"w": jax.P("fsdp", "tensor")}, plan, jax.make_mesh((1, 1), ("fsdp", "tensor")))
    >>> specs["w"].a == jax.P(None, None), specs["w"].b == jax.P(None, "tensor")
    (True, True)
    """
    return _mesh_and_specs(base, adapters, mesh, policy, batch_axes)[1]


def adapter_shardings(
    base: Any,
    adapters: Plan | Mapping[str, Adapter],
    mesh: Mesh | None = None,
    policy: Literal["tensor", "replicate", "inherit"] | Policy = "tensor",
    batch_axes: Sequence[str] = BATCH_AXES,
) -> dict[str, Adapter]:
    """Return `adapter_specs` as `NamedSharding`s: for `lora.init`, `jax.device_put`, `jax.jit`, `lora.Checkpoints`.

    Args:
        base, adapters, mesh, policy, batch_axes: as of `adapter_specs`.

    Returns:
        `{path: adapter}` with shardings for arrays.

    Raises:
        LoraError: what `adapter_specs` raises.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, mesh = {"w": jnp.ones((8, 4))}, jax.make_mesh((1, 1), ("fsdp", "tensor"))
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((1, 8)), rules={"w": lora.Lora(rank=2)})
    >>> shardings = lora.adapter_shardings({"w": jax.P("fsdp", "tensor")}, plan, mesh)
    >>> shardings["w"].b == jax.NamedSharding(mesh, jax.P(None, "tensor"))
    True
    """
    mesh, specs = _mesh_and_specs(base, adapters, mesh, policy, batch_axes)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _mesh_and_specs(
    base: Any,
    adapters: Plan | Mapping[str, Adapter],
    mesh: Mesh | None,
    policy: str | Policy,
    batch_axes: Sequence[str],
) -> tuple[Any, dict[str, Adapter]]:
    """Return the mesh that the base is on, and the adapters' specs on it."""
    if isinstance(base, Plan) or (base and isinstance(base, Mapping) and all(map(is_adapter, base.values()))):
        refuse(CALL, "base", base, "the parameters, or where they are")
    if not isinstance(adapters, Plan):
        check_adapter_dict(CALL, adapters)
    follow = _policy(policy, tuple(batch_axes))
    places = _places(base)
    mesh = _mesh(mesh, {path: places[path] for path in adapters if path in places})
    abstract = abstract_adapters(adapters) if isinstance(adapters, Plan) else adapters
    found = {}
    for path in adapters:
        if path not in places:
            near = ", ".join(map(repr, nearest(path, places)))
            raise LoraError(
                f"there is no place for {path!r} in the base; the nearest paths are {near}. Give a tree like the "
                "parameters', with a PartitionSpec, a NamedSharding or an array on the mesh for each."
            )
        adapter = abstract[path]
        shape = adapter.kernel_shape()
        spec = full_spec(path, follow(path, _spec(path, places[path], mesh)), len(shape), mesh)
        what = f"{path!r} of shape {list(shape)} ({adapter.axes})"
        otherwise = "leave it whole in the base's spec, or give a policy that does: policy=lambda path, spec: ..."
        check_divisible(what, shape, spec, mesh, otherwise)
        found[path] = adapter.specs(spec)
    return mesh, found


def _policy(policy: str | Policy, batch_axes: tuple[str, ...]) -> Policy:
    """Return the function of (path, spec of W) that a policy stands for."""

    def tensor(_: str, spec: P) -> P:
        return P(*(tuple(name for name in names_of(entry) if name not in batch_axes) or None for entry in spec))

    known: dict[str, Policy] = {"tensor": tensor, "replicate": lambda *_: P(), "inherit": lambda _, spec: spec}
    if callable(policy):
        return policy
    if policy not in known:
        raise LoraError(f"the policy is {policy!r}, expected one of {', '.join(map(repr, known))}, or a function.")
    return known[policy]


def _places(base: Any) -> dict[str, Any]:
    """Return, for each path of the base, its array, sharding, spec, box or None."""

    def is_place(node: Any) -> bool:
        return node is None or isinstance(node, P | jax.sharding.Sharding) or _boxed(node)

    names, leaves, _ = flatten_with_names(base, is_leaf=is_place)
    return dict(zip(names, map(_unboxed_if_placed, leaves), strict=True))


def _unboxed_if_placed(place: Any) -> Any:
    """Return the array in a box if it is on a mesh already, where its own sharding counts and no logical name."""
    inside = getattr(place, "value", None) if _boxed(place) else None
    return inside if isinstance(sharding_of(inside), NamedSharding) else place


def _boxed(node: Any) -> bool:
    """Return whether a node is a box of Flax Linen with partitioning metadata."""
    return hasattr(node, "get_partition_spec") and hasattr(node, "unbox")


def _spec(path: str, place: Any, mesh: Mesh) -> P:
    """Return the spec of one weight, and check that it is on this mesh."""
    if place is None:
        return P()
    if isinstance(place, P):
        return place
    if _boxed(place):
        return place.get_partition_spec()
    sharding = sharding_of(place)
    if not isinstance(sharding, NamedSharding):
        found = f"is on {sharding}" if sharding is not None else f"is a {type(place).__name__} without a sharding"
        raise LoraError(
            f"the base weight {path!r} {found}, not on the mesh {dict(mesh.shape)}: place it by "
            "jax.device_put(params, shardings), or give its PartitionSpec."
        )
    if sharding.mesh.shape_tuple != mesh.shape_tuple or device_ids(sharding.mesh) != device_ids(mesh):
        raise LoraError(
            f"the base weight {path!r} is on the mesh {described_mesh(sharding.mesh)}, the adapters are to go on "
            f"{described_mesh(mesh)}: both have to be on one mesh. Move one by jax.device_put."
        )
    return sharding.spec


def _mesh(mesh: Mesh | None, places: Mapping[str, Any]) -> Any:
    """Return the mesh: the given one, else that of the base, else the one in context."""
    if mesh is not None:
        return mesh
    for place in places.values():
        if isinstance(sharding := sharding_of(place), NamedSharding):
            return sharding.mesh
    context = jax.sharding.get_mesh()
    if not context.empty:
        return context
    raise LoraError("partition specs say nothing of a mesh: give one, as in adapter_specs(specs, plan, mesh).")
