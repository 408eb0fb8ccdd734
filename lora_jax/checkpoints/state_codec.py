"""A training state as a checkpoint holds it, arrays by path and a description as JSON, and back.

The description says what the adapters and the base were, and has a checksum of each array.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.checkpoints.adapters import describe_adapter
from lora_jax.checkpoints.fingerprint import checksums, differences, plain_data
from lora_jax.core.adapter import is_adapter
from lora_jax.core.arrays import describe, is_key
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.version import __version__

FORMAT = 1


# Arrays ---------------------------------------------------------------------------------------------------------------


def state_arrays(state: Any) -> dict[str, jax.Array]:
    """Return `{path: array}` of all leaves of a state.

    Raises:
        LoraError: a leaf is not an array.
    """
    names, leaves, _ = flatten_with_names(state)
    found = dict(zip(names, leaves, strict=True))
    for name, leaf in found.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise LoraError(
                f"{name} of the state is a {type(leaf).__name__}, expected an array: keep it outside of the state, or "
                "make it one with jnp.asarray."
            )
    return {name: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for name, leaf in found.items()}


def place_like(found: Any, leaf: jax.Array) -> jax.Array:
    """Return a restored array where a leaf of the given state is, and a random key if that is one.

    It is tied to no device if the leaf is not.

    Raises:
        LoraError: it has another shape or dtype.
    """
    if isinstance(found, np.ndarray):
        found = jnp.asarray(found)
    if is_key(leaf):
        found = jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf))
    if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
        raise LoraError(f"it has {describe(found)} in the place of {describe(leaf)}")
    return jax.device_put(found, leaf.sharding) if leaf.committed else found


def fits(saved: str, leaf: jax.Array) -> bool:
    """Whether an array that was saved with this checksum has the shape and dtype of a leaf."""
    return not differences({"": saved}, {"": describe(leaf)})


# What is written ------------------------------------------------------------------------------------------------------


def encode_state(
    state: Any,
    step: int,
    metrics: Mapping[str, Any],
    position: Any,
    rules: Mapping[str, str],
    base: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of a checkpoint and its description.

    Args:
        state: that is saved.
        step: of the state.
        metrics: of which the scalars are noted.
        position: of the data: JSON or bytes.
        rules: `{path: rule}` of the adapters, as text.
        base: the fingerprint of the frozen parameters.

    Returns:
        `{path: array}` as orbax is to write it, and the description for JSON.

    Raises:
        LoraError: the position is neither JSON nor bytes; a leaf of the state is not an array.
    """
    leaves = state_arrays(state)
    facts = {
        "format": FORMAT,
        "version": __version__,
        "step": step,
        "metrics": _scalars(metrics),
        "position": _encode_position(position),
        "adapters": describe_adapters(state, rules),
        "base": base,
        "arrays": checksums(leaves),
    }
    return _arrays_to_write(leaves), {"sha256": digest(facts), "facts": facts}


def describe_adapters(state: Any, rules: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what each adapter of a state is, by its path: kind, axes, scale, and the rule that made it."""
    nodes = jax.tree.leaves_with_path(getattr(state, "trainable", state), is_leaf=is_adapter)
    found = {}
    for keys, node in nodes:
        if is_adapter(node):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            rule = rules.get(getattr(keys[-1], "key", path)) if keys else None
            found[path] = json.loads(json.dumps(describe_adapter(node))) | _scale_of(node) | {"rule": rule}
    return found


def _scale_of(adapter: Any) -> dict[str, float]:
    """Return the scale of an adapter that has one, so that no run goes on with another alpha."""
    ratio = adapter.arrays().get("ratio")
    known = isinstance(ratio, jax.Array | np.ndarray) and ratio.shape == (2,)
    return {"scale": float(np.divide(*np.asarray(ratio)))} if known else {}


def digest(facts: dict[str, Any]) -> str:
    """Return the hash of a description, which shows whether it was edited."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def decode_description(found: Any, where: str) -> dict[str, Any]:
    """Return the facts in the description of a checkpoint.

    Args:
        found: the description as it was read.
        where: which checkpoint it is of, for messages.

    Raises:
        LoraError: it has another format than this version's.
        ValueError: it was edited. If it is damaged, errors of other types.
    """
    facts = found["facts"]
    if found["sha256"] != digest(facts):
        raise ValueError("its description was edited")
    if facts["format"] != FORMAT:
        raise LoraError(
            f"{where} has format {facts['format']} of lora_jax {facts['version']}, this version reads {FORMAT}: update "
            "lora_jax."
        )
    return facts


def decode_position(saved: dict[str, Any]) -> Any:
    """Return the position of the data that was saved: JSON or bytes."""
    return base64.b64decode(saved["base64"]) if "base64" in saved else saved["json"]


def _arrays_to_write(leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Copy the arrays to this host, which takes half as long as leaving that to orbax.

    Of random keys the data is written. Empty arrays are left out, and what is spread over several hosts stays as it is.
    """
    arrays = {path: plain_data(leaf) for path, leaf in leaves.items() if leaf.size}
    return arrays | jax.device_get({path: array for path, array in arrays.items() if array.is_fully_addressable})


def _encode_position(position: Any) -> dict[str, Any]:
    """Return the position of the data as JSON.

    Raises:
        LoraError: it is neither bytes, nor a value that JSON gives back unchanged.
    """
    if isinstance(position, bytes):
        return {"base64": base64.b64encode(position).decode()}
    try:
        if json.loads(json.dumps(position)) == position:
            return {"json": position}
        problem = "JSON gives it back as something else"
    except (TypeError, ValueError) as error:
        problem = str(error)
    raise LoraError(
        f"the position {position!r} cannot be saved: {problem}. Give bytes, or dicts with strings for keys, lists, "
        "numbers and strings."
    )


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics that are numbers or None, as Python's; what else there is, such as a text, is left out."""
    found = jax.device_get({name: value for name, value in metrics.items() if is_scalar(value)})
    return {name: None if value is None else float(value) for name, value in found.items()}


def is_scalar(value: Any) -> bool:
    """Whether a metric is one number, or None where it was not measured."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
        return value.shape == () and real
    return value is None or (hasattr(value, "__float__") and getattr(value, "shape", ()) == ())
