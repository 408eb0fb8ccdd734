"""A packed base on disk, with orbax: its arrays, and beside them what each packed weight is, as JSON.

Nothing in a saved folder is executed: a kind of packed weights is found by its name in a table.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.bases.int8_fp8 import EightBits
from lora_jax.bases.nf4 import Nf4Weight
from lora_jax.bases.placement import place
from lora_jax.checkpoints import arrays as saving
from lora_jax.core.arrays import describe
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, is_packed
from lora_jax.core.paths import flatten_with_names

FORMAT = 1
WHAT = "base"
KINDS: dict[str, type[Packed]] = {"nf4": Nf4Weight, "eight_bits": EightBits}


def save(folder: str | Path, params: Any) -> None:
    """Write parameters, packed or not, as one folder, which `load` gives back bit by bit.

    The folder is written under a hidden name and renamed when complete, so a run that is killed leaves the one that
    was there before. Where on a mesh a weight was is not written.

    Args:
        folder: where; replaced if it holds a saved base.
        params: nested dicts of arrays and packed weights.

    Raises:
        LoraError: the folder exists and holds something else; `params` hold something else, or what is spread over
            several hosts. Nothing is written.
    """
    folder = Path(folder).absolute()
    saving.refuse_other_things(folder, WHAT, "base")
    arrays = jax.tree.map(lambda leaf: leaf.arrays() if is_packed(leaf) else leaf, params, is_leaf=is_packed)
    saving.check_arrays(arrays, "")
    names, leaves, _ = flatten_with_names(arrays)
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise LoraError(f"{name!r} is spread over several hosts: save the base before it is placed on their mesh.")
    arrays = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), arrays)
    saving.write(folder, arrays, WHAT, {"format": FORMAT, "params": _described(params, "")})


def load(folder: str | Path, shardings: Any = None) -> Any:
    """The parameters that `save` wrote: nested dicts of arrays and packed weights.

    Args:
        shardings: as of `lora.bases.place`; without, the arrays are tied to no device. They are on the host at first.

    Raises:
        LoraError: no such folder; not written by `save`, or by a newer version; damaged; a kind of packed weights
            that is not known; `shardings` of other parameters.
    """
    folder = Path(folder).absolute()
    if not saving.holds(folder, WHAT):
        raise LoraError(f"{folder} holds no base saved by lora.bases.save.{saving.interrupted(folder, WHAT)}")
    try:
        described = saving.read_description(folder, WHAT, FORMAT)["params"]
        params = _rebuilt(described, saving.read_arrays(folder, _shapes(described)), "")
    except LoraError:
        raise
    except Exception as error:  # whatever a damaged file makes of it
        raise LoraError(f"{folder} cannot be loaded: {str(error)[:300]}. If it is damaged, save it again.") from error
    return jax.tree.map(jnp.asarray, params) if shardings is None else place(params, shardings)


# In the description, a dict is one of ours, a string an array, a list a packed weight: its kind, facts and arrays -----


def _described(node: Any, path: str) -> Any:
    if isinstance(node, Mapping):
        return {key: _described(child, f"{path}/{key}" if path else key) for key, child in node.items()}
    if not is_packed(node):
        return describe(node)
    kind = next((name for name, cls in KINDS.items() if cls is type(node)), None)
    if kind is None:
        raise LoraError(f"{path!r} is a {type(node).__name__}; those that can be saved are {', '.join(KINDS)}.")
    facts = {
        name: getattr(node, name) for name, default in _facts(type(node)).items() if getattr(node, name) != default
    }
    arrays = {name: describe(array) for name, array in node.arrays().items()}
    return [kind, {name: _as_json(fact) for name, fact in facts.items()}, arrays]


def _shapes(described: Any) -> Any:
    """The tree of the arrays."""
    if isinstance(described, dict):
        return {key: _shapes(child) for key, child in described.items()}
    return described if isinstance(described, str) else described[2]


def _rebuilt(described: Any, arrays: Any, path: str) -> Any:
    if isinstance(described, dict):
        return {key: _rebuilt(child, arrays[key], f"{path}/{key}" if path else key) for key, child in described.items()}
    if isinstance(described, str):
        return arrays
    kind, facts, _ = described
    if kind not in KINDS or (unknown := [name for name in facts if name not in _facts(KINDS[kind])]):
        found = repr(kind) if kind not in KINDS else f"{kind!r} with {', '.join(unknown)}"
        raise LoraError(f"{path!r} is packed as {found}; this version knows {', '.join(KINDS)}: update lora_jax.")
    parts = dict.fromkeys(KINDS[kind].parts) | arrays
    w = KINDS[kind](**parts, **{name: _from_json(fact) for name, fact in facts.items()})
    if jax.eval_shape(lambda w: w.dense(), w).shape != w.shape:
        raise ValueError(f"the arrays of {path!r} do not fit what it says of them")
    return w


def _facts(kind: type[Packed]) -> dict[str, Any]:
    """The fields that say what a weight is, and not where, with their defaults."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return {field.name: field.default for field in fields if field.metadata.get("static") and field.name != "used"}


def _as_json(fact: Any) -> Any:
    """Tuples are lists; a dtype is a dict with its name."""
    if isinstance(fact, tuple | list):
        return [_as_json(part) for part in fact]
    if fact is None or isinstance(fact, bool | int | float | str):
        return fact
    return {"dtype": str(jnp.dtype(fact))}


def _from_json(fact: Any) -> Any:
    if isinstance(fact, list):
        return tuple(_from_json(part) for part in fact)
    return jnp.dtype(fact["dtype"]) if isinstance(fact, dict) else fact
