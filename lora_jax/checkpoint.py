"""Adapters on disk, with orbax: their arrays, and beside them what each is (kind, axes, scale), as JSON.

A saved folder needs no plan and no rules to be read back, and nothing in it is executed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import KINDS
from lora_jax.adapters.base import Adapter, field_names
from lora_jax.axes import KernelAxes
from lora_jax.errors import LoraError
from lora_jax.folders import hidden, replace

FORMAT = 1


def save(folder: str | Path, adapters: Mapping[str, Adapter], others: Mapping[str, Any] | None = None) -> None:
    """Write adapters, and other arrays that were trained beside them, as one folder.

    The folder is written under a hidden name and renamed when complete, so a run that is killed leaves the one that
    was there before: under its own name or, killed between two renames, where the error of `load` says.

    Args:
        folder: where; replaced if it holds saved adapters.
        adapters: `{path: adapter}`.
        others: nested dicts of arrays, such as a new classification head.

    Raises:
        LoraError: the folder exists and holds something else; `others` hold something else. Nothing is written.
    """
    import orbax.checkpoint as ocp  # half a second that only those pay who save

    folder = Path(folder).absolute()
    if folder.exists() and not _holds_adapters(folder) and any(folder.iterdir()):
        raise LoraError(f"{folder} exists and holds no saved adapters; it is left as it is. Save to another folder.")
    arrays = {"adapters": {path: adapter.arrays() for path, adapter in adapters.items()}, "others": dict(others or {})}
    _check(arrays, "")
    description = {
        "format": FORMAT,
        "adapters": {path: describe_adapter(adapter) for path, adapter in adapters.items()},
        "arrays": jax.tree.map(_shape, arrays),
    }
    new = hidden(folder, "new")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(folder.parent.iterdir()):
        if leftover.name.startswith(new.name):  # orbax's own temporary folder has a longer name
            shutil.rmtree(leftover)
    if jax.process_count() > 1:
        arrays = jax.device_get(arrays)
    with _checkpointer() as checkpointer:
        parts = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), description=ocp.args.JsonSave(description))
        checkpointer.save(new, parts)
    replace(folder)


def load(folder: str | Path) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """The adapters that `save` wrote, and the other arrays: `(adapters, others)`.

    Raises:
        LoraError: no such folder; not written by `save`; written by a newer version; a kind that is not known.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    if not _holds_adapters(folder):
        old = hidden(folder, "old")
        hint = f" A save was interrupted: rename {old} to {folder}." if _holds_adapters(old) else ""
        raise LoraError(f"{folder} holds no adapters saved by lora_jax.checkpoint.save.{hint}")
    with _checkpointer() as checkpointer:
        parts = ocp.args.Composite(description=ocp.args.JsonRestore())
        description = checkpointer.restore(folder, parts).description
        if description.get("format") != FORMAT:
            found = description.get("format")
            raise LoraError(f"{folder} has format {found}, this version reads {FORMAT}: update lora_jax.")
        shapes = jax.tree.map(_abstract, description["arrays"])
        restored = checkpointer.restore(folder, ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes))).arrays
    arrays = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), restored)  # tied to no device, like new ones
    adapters = {
        path: _rebuild(path, facts, arrays["adapters"][path]) for path, facts in description["adapters"].items()
    }
    return adapters, arrays["others"]


def _checkpointer() -> Any:
    """Of this process alone: one of several may save or load without waiting for the others."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    i = jax.process_index()
    only = ocp.options.MultiprocessingOptions(primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"only_{i}")
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=only))
    return ocp.Checkpointer(handler, multiprocessing_options=only)


def _holds_adapters(folder: Path) -> bool:
    return (folder / "arrays").is_dir() and (folder / "description").is_dir()


def _check(node: Any, path: str) -> None:
    """Nested dicts with strings for keys, and arrays with something in them: what comes back as it went."""
    if isinstance(node, Mapping):
        for key, child in node.items():
            if not isinstance(key, str):
                raise LoraError(f"{path}: the key {key!r} is a {type(key).__name__}, expected a string.")
            _check(child, f"{path}/{key}" if path else key)
    elif not isinstance(node, jax.Array | np.ndarray) or jnp.issubdtype(node.dtype, jax.dtypes.extended):
        found = node.dtype if isinstance(node, jax.Array) else type(node).__name__
        raise LoraError(f"{path} is a {found}: only dicts of arrays of numbers are saved beside adapters.")
    elif node.size == 0:
        raise LoraError(f"{path} of shape {list(node.shape)} is empty, and cannot be saved.")


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """What an adapter is beside its arrays, for JSON."""
    kind = next(name for name, cls in KINDS.items() if cls is type(adapter))
    return {"kind": kind, **{name: getattr(adapter, name) for name in field_names(adapter, static=True)}}


def _rebuild(path: str, facts: dict[str, Any], arrays: dict[str, jax.Array]) -> Adapter:
    kind = facts["kind"]
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise LoraError(f"{path!r} is an adapter of kind {kind!r}; this version knows {known}: update lora_jax.")
    static = {name: facts[name] for name in field_names(KINDS[kind], static=True)}
    static = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in static.items()}
    static["axes"] = KernelAxes(*map(tuple, static["axes"]))
    return KINDS[kind](**arrays, **static)


def _shape(array: jax.Array) -> str:
    """`float32[384, 8]`: one JSON leaf."""
    return f"{array.dtype}{list(array.shape)}"


def _abstract(text: str) -> jax.ShapeDtypeStruct:
    dtype, _, dims = text.rstrip("]").partition("[")
    shape = tuple(int(n) for n in dims.split(",") if n.strip())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=here)
