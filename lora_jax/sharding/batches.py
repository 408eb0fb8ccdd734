"""Batches on a mesh: which rows a process loads, how they become arrays of the whole batch, and how these are split."""

import itertools
from typing import Any

import jax
import numpy as np
from jax import P
from jax.sharding import NamedSharding

from lora_jax.core.errors import LoraError
from lora_jax.core.partition import full_spec, names_of, quoted_names, size_of
from lora_jax.sharding.devices import on_mesh
from lora_jax.sharding.unbatched import is_unbatched


def local_rows(sharding: NamedSharding, rows: int) -> slice:
    """Return which rows of a batch this process's devices hold: all of them in a single process.

    Args:
        sharding: of the whole batch; the first entry of its spec splits the rows.
        rows: of the whole batch.

    Returns:
        The rows, as a slice of those of the whole batch.

    Raises:
        LoraError: the mesh cannot split the rows evenly; the rows of this process are not contiguous.

    >>> import jax, lora_jax as lora
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> lora.local_rows(jax.NamedSharding(mesh, jax.P("data")), rows=32)
    slice(0, 32, None)
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
    """Make the whole batch, as arrays on the mesh, from each process's own rows.

    Args:
        batch: a pytree of NumPy arrays `[n, ...]`: this process's rows, `local_rows(sharding, rows)` of the whole.
        sharding: of the whole batch, such as `NamedSharding(mesh, P("data"))` or `P(("data", "fsdp"), "sequence")`.
            Arrays with fewer axes than its spec has entries use the first entries. What is marked as
            `lora.Unbatched(...)` is the same in every process, and is put on every device.
        rows: of the whole batch. Without it, the processes exchange their numbers of rows at every call.

    Returns:
        The same tree of arrays `[rows, ...]` with this sharding.

    Raises:
        LoraError: the processes have different numbers of rows; an axis cannot be split evenly; the spec names an axis
            that the mesh lacks.

    >>> import jax, numpy as np, lora_jax as lora
    >>> sharding = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P("data"))
    >>> batch = lora.shard_batch({"x": np.ones((4, 3)), "y": np.zeros(4)}, sharding)
    >>> batch["x"].shape, batch["y"].sharding == sharding
    ((4, 3), True)
    """
    nodes, tree = jax.tree.flatten(batch, is_leaf=is_unbatched)
    leaves = [node for node in nodes if not is_unbatched(node)]
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

    def placed(node: Any) -> Any:
        if is_unbatched(node):
            whole = NamedSharding(mesh, P())
            return jax.tree.map(lambda a: jax.make_array_from_process_local_data(whole, a, np.shape(a)), node)
        place = NamedSharding(mesh, P(*spec[: node.ndim]))
        return jax.make_array_from_process_local_data(place, node, (rows, *node.shape[1:]))

    return jax.tree.unflatten(tree, list(map(placed, nodes)))


def _check_equal_over_processes(here: int) -> None:
    """Check that every process has this number of rows."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.int32(here))).reshape(-1).tolist()
    if len(set(sizes)) > 1:
        raise LoraError(
            f"the processes have {sizes} rows of the batch: every process gives an equal part. Drop what is left over "
            "at the end of an epoch, as grain's batch(..., drop_remainder=True) does."
        )


def combined_sharding(batch: Any) -> NamedSharding | None:
    """Return one sharding for all arrays of a batch: the mesh axes that split them, by position of the array's axis.

    It is the sharding with the most parts (of several, that of the first array), extended by what the other arrays are
    split over along axes that it leaves whole. Nothing is added that uses a mesh axis twice. Mesh axes of size 1 are
    left out, and so is what is marked to be no batch. None if no array is on a mesh of several devices.
    """
    leaves = [leaf for leaf in jax.tree.leaves(batch, is_leaf=is_unbatched) if not is_unbatched(leaf)]
    found = [leaf.sharding for leaf in leaves if on_mesh(leaf) is not None]
    if not found:
        return None
    largest = max(found, key=lambda sharding: size_of(_all_names(_entries(sharding)), sharding.mesh))
    entries = _entries(largest)
    for sharding in found:
        if sharding.mesh == largest.mesh:
            entries = _extended(entries, _entries(sharding))
    while entries and not entries[-1]:
        entries.pop()
    return NamedSharding(largest.mesh, P(*(entry or None for entry in entries)))


def _entries(sharding: NamedSharding) -> list[tuple[str, ...]]:
    """Return the mesh axes in each entry of a spec, without those of size 1."""
    sizes = sharding.mesh.shape
    return [tuple(name for name in names_of(entry) if sizes[name] > 1) for entry in sharding.spec]


def _all_names(entries: list[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(entries))


def _extended(entries: list[tuple[str, ...]], others: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the entries, with those of the others where there is none and no mesh axis would be used twice."""
    entries = [*entries, *[()] * (len(others) - len(entries))]
    for i, other in enumerate(others):
        if not entries[i] and not set(other) & set(_all_names(entries)):
            entries[i] = other
    return entries
