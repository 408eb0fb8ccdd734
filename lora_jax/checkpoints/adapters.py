"""Adapters on disk, with orbax: their arrays, and beside them what each is (kind, axes, scale), as JSON.

A saved folder needs no plan and no rules to be read back, and nothing in it is executed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax.adapters  # noqa: F401 (registers the kinds of this library)
from lora_jax.checkpoints import arrays as saving
from lora_jax.core.adapter import KINDS, Adapter, kind_name
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.layout import field_names

FORMAT = 1
WHAT = "description"


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
    folder = Path(folder).absolute()
    saving.refuse_other_things(folder, WHAT, "adapters")
    arrays = {"adapters": {path: adapter.arrays() for path, adapter in adapters.items()}, "others": dict(others or {})}
    saving.check_arrays(arrays, "", " beside adapters")
    description = {
        "format": FORMAT,
        "adapters": {path: describe_adapter(adapter) for path, adapter in adapters.items()},
        "arrays": jax.tree.map(saving.describe_shape, arrays),
    }
    saving.write(folder, arrays, WHAT, description)


def load(folder: str | Path) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """The adapters that `save` wrote, and the other arrays: `(adapters, others)`.

    Raises:
        LoraError: no such folder; not written by `save`; written by a newer version; a kind that is not known.
    """
    folder = Path(folder).absolute()
    if not saving.holds(folder, WHAT):
        raise LoraError(f"{folder} holds no adapters saved by lora_jax.checkpoint.save.{saving.missing(folder, WHAT)}")
    description = saving.read_description(folder, WHAT, FORMAT)
    arrays = jax.tree.map(jnp.asarray, saving.read_arrays(folder, description["arrays"]))  # tied to no device, like new
    adapters = {
        path: _rebuild(path, facts, arrays["adapters"][path]) for path, facts in description["adapters"].items()
    }
    return adapters, arrays["others"]


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """What an adapter is beside its arrays, for JSON."""
    return {"kind": kind_name(adapter), **{name: getattr(adapter, name) for name in field_names(adapter, static=True)}}


def _rebuild(path: str, facts: dict[str, Any], arrays: dict[str, jax.Array]) -> Adapter:
    kind = facts["kind"]
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise LoraError(
            f"{path!r} is an adapter of kind {kind!r}; this version knows {known}: update lora_jax, or import the "
            "module that registers the kind."
        )
    static = {name: facts[name] for name in field_names(KINDS[kind], static=True)}
    static = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in static.items()}
    static["axes"] = KernelAxes(*map(tuple, static["axes"]))
    return KINDS[kind](**arrays, **static)
