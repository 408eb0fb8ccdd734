"""Trainable tokens: rows of tables that were trained, read and written."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.interop.key_map import Array, KeyMap, ParameterMatch
from lora_jax.interop.peft.formats.format import Config


def adapters_of_rows(
    matches: Mapping[str, ParameterMatch], tables: Mapping[str, Array], config: Config
) -> dict[str, Adapter]:
    """Return the trained rows of tables, by their tensors' names, as adapters of the parameters.

    Raises:
        LoraError: a parameter is no table, or has no such rows.
    """
    adapters: dict[str, Adapter] = {}
    for path, match in matches.items():
        name = next((name for name in match.tensors().values() if name in tables), None)
        if name is None:
            continue
        indices, values = config.tokens_of(name.removesuffix(".weight")), tables[name]
        rows = _axis_of_rows(match)
        if len(match.words) != 2 or match.unstacked or rows not in match.words:
            raise LoraError(f"{path!r} of shape {list(match.shape)} is no table, and the file holds rows of it.")
        axis = match.words.index(rows)
        size, d = match.shape[axis], match.shape[1 - axis]
        if values.shape != (len(indices), d) or len({*indices}) < len(indices) or not indices or max(indices) >= size:
            raise LoraError(
                f"{short(name)} has {list(values.shape)} as rows {short(list(indices))}, expected as many different "
                f"rows, of those of {path!r} of shape {list(match.shape)}: another model, or another key map."
            )
        adapters[path] = RowsAdapter(jnp.asarray(values), match.axes, indices, size, axis)
    return adapters


def rows_to_tensors(rows: Mapping[str, RowsAdapter], key_map: KeyMap) -> tuple[dict[str, Array], dict[str, list[int]]]:
    """Return the trained rows by the names of their tensors, and which rows they are by the names of modules.

    Raises:
        LoraError: torch has no such rows of a parameter.
    """
    tensors, indices = {}, {}
    for path, match in key_map.match({path: adapter.kernel_shape() for path, adapter in rows.items()}).items():
        if match.names.keys() != {()} or match.words[rows[path].axis] != _axis_of_rows(match):
            raise LoraError(f"{path!r} is no table of which torch has rows by the key map: merge it instead.")
        name = match.names[()]
        tensors[f"{name}.token_adapter.trainable_tokens_delta"] = np.asarray(jax.device_get(rows[path].values))
        indices[name] = list(rows[path].indices)
    return tensors, indices


def _axis_of_rows(match: ParameterMatch) -> str:
    """Return which axis of a table torch has first: the entries of an embedding, the outputs of a head."""
    return "in" if match.entry.kind == "embedding" else "out"
