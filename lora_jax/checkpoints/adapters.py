"""Save and load adapters: their arrays, and beside them the kind, axes and scale of each as JSON.

A saved folder is loaded without a plan or rules, and nothing in it is executed.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax.adapters  # noqa: F401 (registers the kinds of this library)
from lora_jax.checkpoints.arrays import (
    check_arrays,
    damaged,
    format_of,
    read_arrays,
    read_description,
    read_folder,
    write,
)
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import TAKEN_BY_A_STEP, check_adapter_dict, check_folder, check_kept, named_arrays
from lora_jax.core.arrays import describe, refuse_spread
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.kinds import KINDS, kind_name
from lora_jax.core.layout import field_names

FORMAT = 1
DESCRIPTION = "description"  # the folder beside the arrays
SAVED = format_of(DESCRIPTION, "adapters")


def save(folder: str | Path, adapters: Mapping[str, Adapter], others: Mapping[str, Any] | None = None) -> None:
    """Write adapters, and other arrays that were trained beside them, as one folder.

    The folder is written under a hidden name and changes places with the one that is there when complete: a process
    that is killed leaves that one, and of two that save to one place the later one stays. Of several processes of JAX
    one calls this, or each: none waits for the others.

    Args:
        folder: to write; replaced if it holds saved adapters and nothing else. A link to a folder stays one.
        adapters: `{path: adapter}`.
        others: nested dicts of arrays, such as a new classification head.

    Raises:
        LoraError: the folder holds something else, which is named and left alone, or it cannot be written; `others` are
            not dicts of arrays; an array is spread over several hosts. Then nothing has changed.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lora
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"w": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 1.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.checkpoint.save(f"{folder}/adapters", adapters, {"head": jnp.zeros(3)})
    ...     lora.checkpoint.load(f"{folder}/adapters")
    ({'w': LoraAdapter(a 4x2, b 2x3)}, {'head': Array([0., 0., 0.], dtype=float32)})
    """
    call = "save(folder, adapters, others)"
    check_folder(call, folder)
    check_adapter_dict(call, adapters, "; other arrays go into `others`")
    for path, adapter in adapters.items():
        check_kept(named_arrays(path, adapter), TAKEN_BY_A_STEP)
    arrays = {"adapters": {path: adapter.arrays() for path, adapter in adapters.items()}, "others": dict(others or {})}
    check_arrays(arrays, "", " beside adapters")
    refuse_spread(arrays)
    description = {
        "format": FORMAT,
        "adapters": {path: describe_adapter(adapter) for path, adapter in adapters.items()},
        "arrays": jax.tree.map(describe, arrays),
    }
    write(Path(folder), arrays, SAVED, description)


def load(folder: str | Path) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """Load what `save` wrote.

    Returns:
        The adapters, `{path: adapter}`, and the other arrays. They are tied to no device, like new ones.

    Raises:
        LoraError: no such folder; not written by `save`; written by a newer version; damaged; of an unknown kind.
    """
    called = "adapters saved by lora_jax.checkpoint.save, nor checkpoints of lora.Checkpoints"
    check_folder("load(folder)", folder)
    if Path(folder, "adapter_config.json").is_file():
        raise LoraError(f"{folder} holds adapters of HF PEFT: lora.load_peft(folder, params, key_map) loads these.")
    return read_folder(Path(folder), SAVED, called, _read)


def _read(folder: Path) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """Return the adapters and the other arrays of a folder."""
    description = read_description(folder, DESCRIPTION, FORMAT)
    for path, facts in _of_each_adapter(folder, description).items():
        _check_facts(folder, path, facts, description["arrays"]["adapters"][path])
    arrays = jax.tree.map(jnp.asarray, read_arrays(folder, description["arrays"]))
    adapters = {path: rebuild(path, facts, arrays["adapters"][path]) for path, facts in description["adapters"].items()}
    return adapters, arrays["others"]


def _of_each_adapter(folder: Path, description: Any) -> dict[str, Any]:
    """Return what a description says of each adapter, if it has arrays for the same ones."""
    facts, arrays = description.get("adapters"), description.get("arrays")
    if not isinstance(facts, dict) or not isinstance(arrays, dict) or not isinstance(arrays.get("adapters"), dict):
        raise damaged(folder, DESCRIPTION, "it has no adapters and arrays")
    for path in (*facts, *arrays["adapters"]):
        if not (path in facts and path in arrays["adapters"]):
            raise damaged(folder, DESCRIPTION, f"it has {path!r} among its adapters or its arrays alone")
    if not isinstance(arrays.get("others"), dict):
        raise damaged(folder, DESCRIPTION, "it says nothing of other arrays")
    return facts


def _check_facts(folder: Path, path: str, facts: Any, arrays: Any) -> None:
    """Raise if a description lacks a fact or an array that an adapter of its kind has."""
    if not isinstance(facts, dict) or not isinstance(facts.get("kind"), str) or not isinstance(arrays, dict):
        raise damaged(folder, DESCRIPTION, f"it does not say of which kind {path!r} is")
    if facts["kind"] not in KINDS:
        return  # which has an error of its own
    needed = [
        field.name
        for field in dataclasses.fields(KINDS[facts["kind"]])  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    known = {*facts, *arrays, *(["ratio"] if "scale" in facts else [])}  # of folders older than `ratio`
    if missing := [name for name in needed if name not in known]:
        raise damaged(folder, DESCRIPTION, f"{path!r} of kind {facts['kind']!r} lacks {missing[0]!r}")


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Return the kind of an adapter and its static fields, for JSON."""
    facts = {name: getattr(adapter, name) for name in field_names(adapter, static=True)}
    try:
        json.dumps(facts)
    except TypeError as error:
        raise LoraError(
            f"{type(adapter).__name__} has a static field that is no JSON, {error}: keep numbers, strings "
            "and tuples of these there."
        ) from None
    return {"kind": kind_name(adapter), **facts}


def rebuild(path: str, facts: dict[str, Any], arrays: dict[str, jax.Array]) -> Adapter:
    """Return the adapter with this description and these arrays."""
    kind = facts["kind"]
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise LoraError(
            f"{path!r} is an adapter of kind {kind!r}; this version knows {known}: update lora_jax, or import the "
            "module that registers the kind."
        )
    static = {name: facts[name] for name in field_names(KINDS[kind], static=True) if name in facts}
    static = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in static.items()}
    static["axes"] = KernelAxes(*map(tuple, static["axes"]))
    if "scale" in facts and "ratio" in field_names(KINDS[kind], static=False):  # of folders older than `ratio`
        arrays = {"ratio": jnp.asarray([facts["scale"], 1], jnp.float32)} | arrays
    return KINDS[kind](**arrays, **static)
