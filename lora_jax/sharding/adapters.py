"""Where adapters live on a mesh: their partition specs, from those of the weights beside them.

Each array of an adapter has some of W's axes (its layout) and follows W's spec along these; its rank is never split.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import P
from jax.sharding import Mesh, NamedSharding

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.partition import (
    BATCH_AXES,
    check_divisible,
    described_mesh,
    device_ids,
    full_spec,
    names_of,
    quoted_names,
    size_of,
)
from lora_jax.core.paths import flatten_with_names, nearest
from lora_jax.core.targets import Plan

Policy = Callable[[str, P], P]  # (path, spec of W) -> the spec that the adapter's arrays follow


def adapter_specs(
    adapters: Plan | Mapping[str, Adapter],
    base: Any,
    mesh: Mesh | None = None,
    policy: Literal["tensor", "replicate", "inherit"] | Policy = "tensor",
    batch_axes: Sequence[str] = BATCH_AXES,
) -> dict[str, Adapter]:
    """The adapters' tree with a `PartitionSpec` in the place of each array.

    Where W is split over a tensor axis, so are A (along W's inputs) and B (along its outputs): the small products then
    need no communication but what rides along with W's own. Where W is split over an axis that also splits the batch
    (fsdp), the adapters are whole: they are too small to be gathered again and again.

    Args:
        adapters: a plan, or `{path: adapter}`.
        base: where the weights are, in a tree like the parameters': arrays on the mesh, `NamedSharding`s,
            `PartitionSpec`s (None is `P()`), or Flax's boxes with partitioning metadata. For Linen also
            `nn.get_partition_spec(variables)["params"]`, for NNX `nnx.get_partition_spec(params)`.
        mesh: needed where `base` has no mesh of its own.
        policy: "tensor" follows W along all mesh axes but `batch_axes`; "replicate" along none; "inherit" along all; or
            a function of (path, spec of W) that returns the spec, over W's axes, which the adapter is to follow.
        batch_axes: the names of the mesh axes that split the batch.

    Raises:
        LoraError: a weight without a place, or on another mesh; a spec that names an axis which the mesh lacks, or
            splits an axis unevenly.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((8, 4))}
    >>> plan = lora.plan(lambda p, x: x @ p["w"], params, jnp.ones((1, 8)), rules={"w": lora.Lora(rank=2)})
    >>> specs = lora.adapter_specs(plan, {"w": jax.P("fsdp", "tensor")}, jax.make_mesh((1, 1), ("fsdp", "tensor")))
    >>> specs["w"].a == jax.P(None, None), specs["w"].b == jax.P(None, "tensor")
    (True, True)
    """
    return _placed(adapters, base, mesh, policy, batch_axes)[1]


def adapter_shardings(
    adapters: Plan | Mapping[str, Adapter],
    base: Any,
    mesh: Mesh | None = None,
    policy: Literal["tensor", "replicate", "inherit"] | Policy = "tensor",
    batch_axes: Sequence[str] = BATCH_AXES,
) -> dict[str, Adapter]:
    """`adapter_specs` as `NamedSharding`s: for `lora.init`, `jax.device_put`, `jax.jit` and `lora.Checkpoints`."""
    mesh, specs = _placed(adapters, base, mesh, policy, batch_axes)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _placed(
    adapters: Plan | Mapping[str, Adapter],
    base: Any,
    mesh: Mesh | None,
    policy: str | Policy,
    batch_axes: Sequence[str],
) -> tuple[Any, dict[str, Adapter]]:
    """The mesh, and the specs on it."""
    follow = _policy(policy, tuple(batch_axes))
    places = _places(base)
    mesh = _mesh(mesh, {path: places[path] for path in adapters if path in places})
    found = {}
    for path in adapters:
        if path not in places:
            near = ", ".join(map(repr, nearest(path, places)))
            raise LoraError(
                f"there is no place for {path!r} in the base; the nearest paths are {near}. Give a tree like the "
                "parameters', with a PartitionSpec, a NamedSharding or an array on the mesh for each."
            )
        adapter = _abstract(adapters, path)
        shape = adapter.kernel_shape()
        spec = full_spec(path, follow(path, _spec(path, places[path], mesh)), len(shape), mesh)
        what = f"{path!r} of shape {list(shape)} ({adapter.axes})"
        otherwise = "leave it whole in the base's spec, or give a policy that does: policy=lambda path, spec: ..."
        check_divisible(what, shape, spec, mesh, otherwise)
        found[path] = adapter.specs(spec)
    return mesh, found


def on_mesh(tree: Any) -> Any:
    """The mesh of several devices that a tree's arrays live on, if they do."""
    for leaf in jax.tree.leaves(tree):
        sharding = _sharding(leaf)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def check_together(trainable: Any, params: Any) -> None:
    """What is trained is on the devices that the base is on. What is tied to no device goes along with the rest.

    Raises:
        LoraError: which weight is elsewhere, and how to bring both together.
    """
    here = next(filter(None, map(_tied_to, jax.tree.leaves(trainable))), None)
    names, leaves, _ = flatten_with_names(params)
    for name, leaf in zip(names, leaves, strict=True):
        there = _tied_to(leaf)
        if here and there and here != there:
            raise LoraError(
                f"the base weight {name!r} is on the devices {list(there)}, but the adapters are on {list(here)}; "
                "bring them together: lora.init(key, params, plan) makes adapters where the base is, "
                "jax.device_put(adapters, lora.adapter_shardings(adapters, params)) moves them there."
            )


def _tied_to(leaf: Any) -> tuple[int, ...]:
    """The devices that an array has to stay on, in the order of its mesh."""
    if is_packed(leaf):
        leaf = next(iter(leaf.arrays().values()))
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.committed:
        return ()
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        return device_ids(sharding.mesh)
    devices: Any = sharding.device_set
    return tuple(sorted(device.id for device in devices))


def local_rows(sharding: NamedSharding, rows: int) -> slice:
    """Which rows of a batch of so many belong to this process's devices: all of them in a single process.

    Raises:
        LoraError: the mesh cannot split them evenly, or scatters the rows of a process.
    """
    entry = full_spec("the batch", sharding.spec, max(len(sharding.spec), 1), sharding.mesh)[0]
    parts = size_of(entry, sharding.mesh)
    if rows % parts:
        raise LoraError(
            f"a batch of {rows} rows cannot be split evenly over the mesh axes {quoted_names(entry)} of size {parts}: "
            f"give a multiple of {parts}."
        )
    own = NamedSharding(sharding.mesh, P(entry)).addressable_devices_indices_map((rows,))
    spans = sorted({index[0].indices(rows)[:2] for index in own.values() if index is not None})
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(spans)):
        raise LoraError(
            f"the devices of process {jax.process_index()} hold the rows {spans} of {rows}: make the mesh by "
            "jax.make_mesh, or put the axes that split the batch first, so that each process has one run of rows."
        )
    return slice(spans[0][0], spans[-1][1])


def shard_batch(batch: Any, sharding: NamedSharding, rows: int | None = None) -> Any:
    """This process's rows of a batch -> the whole batch, on the mesh.

    Args:
        batch: a pytree of NumPy arrays `[n, ...]`, the rows `local_rows(sharding, rows)` of the whole.
        sharding: of the whole batch, such as `NamedSharding(mesh, P("data"))` or `P(("data", "fsdp"), "sequence")`.
            Arrays with fewer axes than its spec take the first ones.
        rows: of the whole batch. Without it the processes ask each other for their sizes at every call.

    Raises:
        LoraError: processes with different numbers of rows; an axis that the mesh cannot split evenly, or that the
            spec splits and the mesh lacks.
    """
    leaves, tree = jax.tree.flatten(batch)
    sizes = {len(leaf) if getattr(leaf, "ndim", 0) else 0 for leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        found = [list(getattr(leaf, "shape", ())) for leaf in leaves]
        raise LoraError(f"the arrays of a batch share their first axis, the rows; found shapes {found}.")
    [here], mesh = sizes, sharding.mesh
    spec = full_spec("the batch", sharding.spec, max(len(sharding.spec), 1), mesh)
    if rows is None:
        parts = size_of(spec[0], mesh)
        own = local_rows(sharding, parts)
        _check_equal_over_processes(here)
        rows = here * parts // (own.stop - own.start)
    own = local_rows(sharding, rows)
    if here != own.stop - own.start:
        raise LoraError(
            f"process {jax.process_index()} gives {here} rows of the batch, expected {own.stop - own.start}: of all "
            f"{rows}, its devices hold {own.start} to {own.stop} (lora.local_rows)."
        )
    for leaf in leaves:
        for axis, names in list(enumerate(spec))[1 : leaf.ndim]:
            if leaf.shape[axis] % size_of(names, mesh):
                raise LoraError(
                    f"axis {axis} of the batch has size {leaf.shape[axis]}, which cannot be split evenly over the mesh "
                    f"axes {quoted_names(names)} of size {size_of(names, mesh)}: pad it."
                )
    placed = [
        jax.make_array_from_process_local_data(
            NamedSharding(mesh, P(*spec[: leaf.ndim])), leaf, (rows, *leaf.shape[1:])
        )
        for leaf in leaves
    ]
    return jax.tree.unflatten(tree, placed)


def _check_equal_over_processes(here: int) -> None:
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.int32(here))).reshape(-1).tolist()
    if len(set(sizes)) > 1:
        raise LoraError(
            f"the processes have {sizes} rows of the batch: every process gives an equal part. Drop what is left over "
            "at the end of an epoch, as grain's batch(..., drop_remainder=True) does."
        )


def _policy(policy: str | Policy, batch_axes: tuple[str, ...]) -> Policy:
    def tensor(_: str, spec: P) -> P:
        return P(*(tuple(name for name in names_of(entry) if name not in batch_axes) or None for entry in spec))

    known: dict[str, Policy] = {"tensor": tensor, "replicate": lambda *_: P(), "inherit": lambda _, spec: spec}
    if callable(policy):
        return policy
    if policy not in known:
        raise LoraError(f"the policy is {policy!r}, expected one of {', '.join(map(repr, known))}, or a function.")
    return known[policy]


def _places(base: Any) -> dict[str, Any]:
    """What a base says of each path: an array, a sharding, a spec, or None."""

    def is_place(node: Any) -> bool:
        return node is None or isinstance(node, P | jax.sharding.Sharding) or _boxed(node)

    names, leaves, _ = flatten_with_names(base, is_leaf=is_place)
    return dict(zip(names, leaves, strict=True))


def _boxed(node: Any) -> bool:
    """Flax's boxes around a Linen parameter say how it is partitioned."""
    return hasattr(node, "get_partition_spec") and hasattr(node, "unbox")


def _sharding(place: Any) -> Any:
    """The sharding of an array, if it has one. A tracer has none yet."""
    if isinstance(place, jax.core.Tracer):
        return None
    return place if isinstance(place, jax.sharding.Sharding) else getattr(place, "sharding", None)


def _spec(path: str, place: Any, mesh: Mesh) -> P:
    if place is None:
        return P()
    if isinstance(place, P):
        return place
    if _boxed(place):
        return place.get_partition_spec()
    sharding = _sharding(place)
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
    if mesh is not None:
        return mesh
    for place in places.values():
        if isinstance(sharding := _sharding(place), NamedSharding):
            return sharding.mesh
    context = jax.sharding.get_mesh()
    if not context.empty:
        return context
    raise LoraError("partition specs say nothing of a mesh: give one, as in adapter_specs(plan, specs, mesh).")


def _abstract(adapters: Plan | Mapping[str, Adapter], path: str) -> Adapter:
    return adapters[path].abstract() if isinstance(adapters, Plan) else adapters[path]
