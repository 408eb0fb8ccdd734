"""All parameters of a model as the tensors of the same model in torch."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.core.arrays import is_key, refuse_spread
from lora_jax.core.errors import LoraError
from lora_jax.core.packed import is_packed
from lora_jax.core.paths import flatten_with_names, is_array, nearest
from lora_jax.interop.key_map import Array, KeyMap, ParameterMatch, parts_by_tensor
from lora_jax.interop.peft.full_weights import joined


def to_torch(params: Any, key_map: KeyMap, *, ignore: str = "") -> dict[str, Array]:
    """Return the tensors of a torch model by their names, from the parameters of the same model in JAX.

    Kernels are transposed, heads joined, stacked layers taken apart, and parameters that torch has in one tensor put
    together, as the key map says; dtypes stay. It is the inverse of `lora.bases.from_torch`. With `safetensors.numpy.
    save_file` a merged model becomes a file that torch loads.

    A head that is tied to a table is no parameter, and no tensor: what ties them in torch, such as `from_pretrained` of
    transformers, takes the table's. `load_state_dict` with `strict=True` asks for it under both names.

    Args:
        params: arrays in any pytree, such as the result of `lora.merge`.
        key_map: from parameters to modules.
        ignore: a regular expression for the paths of parameters that torch's model does not have.

    Returns:
        `{name: array}` of NumPy, in the order of the parameters. The arrays are copies.

    Raises:
        LoraError: a parameter has no entry in the key map, is packed, traced, a shape alone, or spread over several
            hosts; parts of a tensor are missing.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("layers/kernel", "layers.{i}", "i in out"))
    >>> tensors = lora.to_torch({"layers": {"kernel": jnp.zeros((4, 2, 3))}}, key_map)
    >>> [*tensors], tensors["layers.0.weight"].shape
    (['layers.0.weight', 'layers.1.weight', 'layers.2.weight', 'layers.3.weight'], (3, 2))
    """
    names, leaves, _ = flatten_with_names(params)
    kept = {name: leaf for name, leaf in zip(names, leaves, strict=True) if not _is_ignored(name, ignore)}
    for name, leaf in kept.items():
        _check_leaf(name, leaf)
    refuse_spread(kept)
    matches = key_map.match({name: tuple(leaf.shape) for name, leaf in kept.items()}, strict=False)
    _check_that_all_match([*kept], matches, key_map)
    groups = parts_by_tensor(matches)
    _check_parts(groups, key_map)
    arrays = {name: np.asarray(jax.device_get(leaf)) for name, leaf in kept.items()}
    return {name: np.array(joined(name, parts, arrays), order="C") for name, parts in groups.items()}


def _is_ignored(path: str, ignore: str) -> bool:
    try:
        return bool(re.fullmatch(ignore, path))
    except (re.error, TypeError) as error:
        raise LoraError(f"ignore={ignore!r} is not a regular expression: {error}.") from None


def _check_leaf(path: str, leaf: Any) -> None:
    """Raise unless a parameter is an array whose numbers are at hand."""
    if is_packed(leaf):
        raise LoraError(
            f"{path!r} is packed, a {type(leaf).__name__}, and torch's tensors are arrays: dequantize the base first, "
            "lora.to_torch(lora.bases.dense(params), key_map)."
        )
    if isinstance(leaf, jax.core.Tracer):
        raise LoraError(f"{path!r} is traced, and tensors of torch are numbers: call lora.to_torch outside jax.jit.")
    if isinstance(leaf, jax.ShapeDtypeStruct) or not is_array(leaf):
        found = "a shape alone" if is_array(leaf) else f"a {type(leaf).__name__}"
        raise LoraError(f"{path!r} is {found}, expected an array: lora.to_torch takes the parameters themselves.")
    if is_key(leaf):
        raise LoraError(f"{path!r} is a random key, which torch's model does not have: leave it out, ignore={path!r}.")


def _check_that_all_match(paths: list[str], matches: Mapping[str, ParameterMatch], key_map: KeyMap) -> None:
    """Raise if the key map has no entry for a parameter."""
    if left := [path for path in paths if path not in matches]:
        known = nearest(left[0], [entry.path for entry in key_map.entries], n=3)
        raise LoraError(
            f"the key map has no entry for {left[0]!r}, nor for {len(left) - 1} more parameters; the nearest are "
            f"{', '.join(map(repr, known)) or 'none'}. Add one, such as key_map + key_maps.KeyMap(key_maps.linear("
            '"layer_{i}/query/kernel", "encoder.layer.{i}.self.query")); or, if the model in torch has no such '
            f"parameter, say so: lora.to_torch(params, key_map, ignore={re.escape(left[0])!r})."
        )


def _check_parts(groups: Mapping[str, list[ParameterMatch]], key_map: KeyMap) -> None:
    """Raise if a tensor consists of several parameters, and not all of them are there."""
    for name, parts in groups.items():
        own, known = parts[0].entry, [match.entry.part for match in parts]
        for entry in key_map.entries if own.part is not None else ():
            if entry.name == own.name and entry.part is not None and entry.part not in known:
                raise LoraError(
                    f"{name!r} holds several parameters, of which {entry.path!r} is missing: give all of them."
                )
