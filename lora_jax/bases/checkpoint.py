"""Save and load a packed base with orbax: its arrays, and beside them a description of each packed weight as JSON.

Nothing in a saved folder is executed: the class of a packed weight is looked up by name in `PACKED_CLASSES`. Packed
arrays of 4 bits are written as bytes, two numbers in each.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.bases.host import HostArray
from lora_jax.bases.int8_fp8 import EightBits
from lora_jax.bases.nf4 import Nf4Weight
from lora_jax.bases.nf4_layouts import from_bytes, of_format_1, to_bytes
from lora_jax.bases.placement import place
from lora_jax.checkpoints import arrays as saving
from lora_jax.core.arrays import describe
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import Packed, is_packed
from lora_jax.core.paths import flatten_with_names

FORMAT = 2  # 1 had NF4 weights with blocks along their last axes
WHAT = "base"
SAVED = saving.format_of(WHAT, "base")
PACKED_CLASSES: dict[str, type[Packed]] = {"nf4": Nf4Weight, "eight_bits": EightBits, "host": HostArray}
EARLIER_NAMES = {"unpacked": "value_dtype", "view": "deferred"}  # of fields, in folders of earlier versions


def save(folder: str | Path, params: Any) -> None:
    """Write parameters, packed or not, to one folder, from which `load` reads them back bit by bit.

    The folder is written under a hidden name and changes places with the one that is there when complete: a run that is
    killed leaves that one, and of two that save to one place the later one stays. Shardings are not written.

    Args:
        folder: where to write; replaced if it holds a saved base and nothing else. A link to a folder stays one.
        params: nested dicts of arrays and packed weights.

    Raises:
        LoraError: the folder holds something else, which is named and left alone, or it cannot be written; `params`
            hold a leaf that cannot be saved, or an array that is spread over several hosts. Then nothing has changed.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lora
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.bases.save(f"{folder}/base", {"layer": {"w": jnp.ones((8, 4)), "bias": jnp.zeros(4)}})
    ...     lora.bases.load(f"{folder}/base")["layer"]["w"].shape
    (8, 4)
    """
    arrays = jax.tree.map(lambda leaf: _on_disk(leaf) if is_packed(leaf) else leaf, params, is_leaf=is_packed)
    saving.check_arrays(arrays, "")
    names, leaves, _ = flatten_with_names(arrays)
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise LoraError(f"{name!r} is spread over several hosts: save the base before it is placed on their mesh.")
    arrays = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), arrays)
    saving.write(Path(folder), arrays, SAVED, {"format": FORMAT, "params": _described(params, "")})


def load(folder: str | Path, shardings: Any = None) -> Any:
    """Read the parameters that `save` wrote: nested dicts of arrays and packed weights.

    The arrays are read into the host's memory first.

    Args:
        folder: a folder that `save` wrote.
        shardings: as in `lora.bases.place`; without it, the arrays are committed to no device.

    Returns:
        Nested dicts, as they were saved.

    Raises:
        LoraError: there is no such folder; it was not written by `save`, or by a newer version; it is damaged; a packed
            weight is of an unknown class; `shardings` do not have the paths of the parameters.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lora
    >>> base = lora.bases.quantize({"w": jnp.ones((64, 4))}, {"w": lora.bases.Nf4()})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.bases.save(f"{folder}/base", base)
    ...     again = lora.bases.load(f"{folder}/base")
    >>> bool((again["w"].codes == base["w"].codes).all())
    True
    """
    params = saving.read_folder(Path(folder), SAVED, "base saved by lora.bases.save", _read)
    return jax.tree.map(jnp.asarray, params) if shardings is None else place(params, shardings)


def _on_disk(w: Packed) -> dict[str, jax.Array]:
    """Return the packed arrays of a weight, those of 4 bits as bytes."""
    return {name: to_bytes(array) if array.dtype == jnp.uint4 else array for name, array in w.arrays().items()}


def _read(folder: Path) -> Any:
    """Return the parameters of a folder, as NumPy's."""
    description = saving.read_description(folder, WHAT, FORMAT, earliest=1)
    described = description["params"]
    arrays = saving.read_arrays(folder, _shapes(described))
    return _rebuilt(described, arrays, "", description["format"])


# A description is nested as the parameters are: a dict for a dict, a string for an array ("float32[384, 8]"), and for a
# packed weight a list of three: the name of its class, its static fields, and the descriptions of its arrays on disk.


def _described(node: Any, path: str) -> Any:
    """Return the description of a tree of parameters."""
    if isinstance(node, Mapping):
        return {key: _described(child, f"{path}/{key}" if path else key) for key, child in node.items()}
    if not is_packed(node):
        return describe(node)
    kind = next((name for name, cls in PACKED_CLASSES.items() if cls is type(node)), None)
    if kind is None:
        raise LoraError(
            f"{path!r} is a {type(node).__name__}; those that can be saved are {', '.join(PACKED_CLASSES)}."
        )
    defaults = _saved_fields(type(node))
    fields = {name: getattr(node, name) for name, default in defaults.items() if getattr(node, name) != default}
    arrays = {name: describe(array) for name, array in jax.eval_shape(_on_disk, node).items()}
    return [kind, {name: _as_json(value) for name, value in fields.items()}, arrays]


def _shapes(described: Any) -> Any:
    """Return the tree of the arrays' descriptions."""
    if isinstance(described, dict):
        return {key: _shapes(child) for key, child in described.items()}
    return described if isinstance(described, str) else described[2]


def _rebuilt(described: Any, arrays: Any, path: str, format: int) -> Any:
    """Return the parameters, from their description and arrays."""
    if isinstance(described, dict):
        return {
            key: _rebuilt(child, arrays[key], f"{path}/{key}" if path else key, format)
            for key, child in described.items()
        }
    if isinstance(described, str):
        return arrays
    kind, fields, _ = described
    fields = {EARLIER_NAMES.get(name, name): value for name, value in fields.items()}
    cls = PACKED_CLASSES.get(kind)
    unknown = [name for name in fields if cls is not None and name not in _saved_fields(cls)]
    if cls is None or unknown:
        found = repr(kind) if cls is None else f"{kind!r} with {', '.join(unknown)}"
        known = ", ".join(PACKED_CLASSES)
        raise LoraError(f"{path!r} is packed as {found}; this version knows {known}: update lora_jax.")
    fields = {name: _from_json(value) for name, value in fields.items()}
    w = _of_arrays(cls, arrays, fields, format)
    if jax.eval_shape(lambda w: w.dense(), w).shape != w.shape:
        raise ValueError(f"the arrays of {path!r} do not fit what it says of them")
    return w


def _of_arrays(cls: type[Packed], arrays: Any, fields: dict[str, Any], format: int) -> Packed:
    """Return the packed weight of arrays as they are on disk."""
    if cls is not Nf4Weight:
        return cls(**dict.fromkeys(cls.parts) | arrays, **fields)
    if format == 1:
        return of_format_1(arrays, fields)
    return Nf4Weight(**dict.fromkeys(cls.parts) | arrays | {"codes": from_bytes(arrays["codes"])}, **fields)


def _saved_fields(cls: type[Packed]) -> dict[str, Any]:
    """Return the static fields of a class and their defaults, without the sharding."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = [field for field in fields if field.metadata.get("static")]
    return {field.name: field.default for field in static if field.name != "compute_sharding"}


def _as_json(value: Any) -> Any:
    """Encode a static field: tuples as lists, a dtype as a dict with its name."""
    if isinstance(value, tuple | list):
        return [_as_json(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"dtype": str(jnp.dtype(value))}


def _from_json(value: Any) -> Any:
    """Invert `_as_json`."""
    if isinstance(value, list):
        return tuple(_from_json(part) for part in value)
    return jnp.dtype(value["dtype"]) if isinstance(value, dict) else value
