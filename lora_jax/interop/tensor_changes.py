"""What adapters, arrays that were trained whole, or a folder of HF PEFT make of each tensor of a published model.

W' is W, or the array that takes its place, plus s B A and what else is added, with its rows scaled to DoRA's lengths,
and at last with trained rows in their places. All arrays here are as torch has them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.ia3 import Gains
from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import flatten_with_names
from lora_jax.interop.entries import MODULE_KINDS
from lora_jax.interop.key_map import Array, KeyMap, parts_by_tensor
from lora_jax.interop.peft.formats.registry import LORA
from lora_jax.interop.peft.full_weights import joined
from lora_jax.interop.peft.load import read_by_module
from lora_jax.interop.peft.parameters import arrays_of, shapes_of
from lora_jax.interop.peft.residual_bases import first_factors
from lora_jax.interop.peft.tied_tables import is_one_table_for_both
from lora_jax.interop.peft.to_modules import modules_to_save, torch_modules
from lora_jax.interop.peft.token_rows import rows_to_tensors


class Start(NamedTuple):
    """What an adapter began with as a part of W, which is taken off: the factors of W are made when it is read."""

    name: str  # "pissa" or "olora"
    kind: str  # of the module
    rank: int
    scale: float


class Change(NamedTuple):
    """What becomes of a tensor."""

    shape: tuple[int, ...]  # that the tensor has to have
    factors: tuple[tuple[Array, Array], ...] = ()  # L [rows, r] and R [r, columns] of each matrix that it consists of
    lengths: Array | None = None  # [rows]: DoRA's lengths, to which the rows of W + L R are scaled
    delta: Array | None = None  # what is added entry by entry
    base: Array | None = None  # what takes the place of W before anything is added
    base_is_shared: bool = False  # whether torch has this base at both ends of a tied table
    rows: Mapping[int, Array] = MappingProxyType({})  # of a table, trained; torch has them at both ends
    start: Start | None = None
    inputs_first: bool = False  # whether it is of experts [in, out] where others are [out, in]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes that its parts say the tensor to have."""
        return [self.shape, *(array.shape for array in (self.delta, self.base) if array is not None)]

    @property
    def is_of_one_end(self) -> bool:
        """Return whether it changes a table without the head that is tied to it, or the head alone."""
        own_base = self.base is not None and not self.base_is_shared
        return bool(self.factors) or self.lengths is not None or self.delta is not None or own_base


Changes = dict[str, Change]  # by the names of tensors


def changes_of_adapters(adapters: Mapping[str, Adapter], others: Any, key_map: KeyMap, params: Any) -> Changes:
    """Return what adapters and arrays that were trained whole make of each tensor.

    Raises:
        LoraError: an adapter or an array is not finite; as `torch_modules`.
    """
    whole = dict(zip(*flatten_with_names(others or {})[:2], strict=True))
    for path, adapter in adapters.items():
        for name, array in adapter.arrays().items() if isinstance(adapter, Adapter) else ():
            _check_finite(f"the adapter for {path!r} in its array {name!r}", array)
    for path, array in whole.items():
        _check_finite(f"others[{path!r}]", array)
    full = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, FullAdapter)}
    rows = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, RowsAdapter)}
    factored = {path: adapter for path, adapter in adapters.items() if path not in full and path not in rows}
    if gains := [path for path, adapter in factored.items() if isinstance(adapter, Gains)]:
        raise LoraError(
            f"{gains[0]!r} has factors of W itself, which are merged in memory alone: lora.to_torch(lora.merge(params, "
            "adapters), key_map) are the tensors to write."
        )
    changes = _low_rank(factored, key_map, params) if factored else {}

    deltas = {path: np.asarray(jax.device_get(adapter.delta)) for path, adapter in full.items()}
    for name, delta in _tensors(deltas, key_map, params, zeros=True).items():
        changes[name] = changes.get(name, Change(delta.shape))._replace(delta=np.asarray(delta, np.float32))
    for name, base in _tensors(whole, key_map, params, zeros=False).items():
        changes[name] = changes.get(name, Change(base.shape))._replace(base=base)
    matches = key_map.match({path: adapter.kernel_shape() for path, adapter in rows.items()})
    for path, adapter in rows.items():
        tensors, indices = rows_to_tensors({path: adapter}, key_map)
        [tensor], [own] = tensors.values(), indices.values()
        name = matches[path].tensors()[()]
        shape = (adapter.size, tensor.shape[1])
        changes[name] = changes.get(name, Change(shape))._replace(rows=dict(zip(own, tensor, strict=True)))
    for name, change in changes.items():
        if change.lengths is not None and change.delta is not None:
            raise LoraError(f"{name!r} has DoRA and a change of all its entries: merge one of them after the other.")
    return changes


def changes_of_folder(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Changes, dict[str, str]]:
    """Return what a folder of HF PEFT makes of each tensor, and `{head: table}` of heads that it changes as a table.

    Args:
        shapes: of the model's tensors.

    Raises:
        LoraError: as `load_peft`; the names of the tensors alone do not tell what they are of; some are not finite.
    """
    read = read_by_module(folder, shapes)
    changes = changes_of_adapters(read.adapters, {}, read.key_map, None)
    for name, base in read.whole.items():
        _check_finite(f"{folder} in {name!r}", base)
        known = changes.get(name, Change(base.shape))
        changes[name] = known._replace(base=base, base_is_shared=name in read.wrapped)
    if read.start is not None:
        kinds = {entry.path: entry for entry in read.key_map.entries}
        for module, (arrays, scale) in read.modules.items():
            name, kind = module + kinds[module].suffix, kinds[module].kind
            changes[name] = changes[name]._replace(start=Start(read.start, kind, len(arrays["a"]), scale))
    ours = read.prefix.to_ours
    changes = {ours(name): change for name, change in changes.items()}
    # PEFT has a lora_bias of all modules, and zeros where a module has no bias.
    empty = [name for name, change in changes.items() if name not in shapes and _is_zero(change)]
    copies = {ours(head): ours(table) for head, table in read.copies.items()}
    return {name: change for name, change in changes.items() if name not in empty}, copies


def with_start(name: str, change: Change, weight: Callable[[], Array]) -> Change:
    """Return the change with what the adapter began with taken off: W - s B0 A0 + s B A.

    Args:
        weight: returns W, which is read for this alone.
    """
    if change.start is None:
        return change
    start, kind, rank, scale = change.start
    w = np.asarray(weight() if change.base is None else change.base, np.float32)
    a, b = first_factors(start, name, kind, w if kind == "conv1d" else w.T, rank, scale)
    taken = (a, scale * b) if kind == "conv1d" else (scale * b.T, a.T)
    [(left, right)] = change.factors
    joined_factors = np.concatenate([left, -taken[0]], axis=1), np.concatenate([right, taken[1]])
    return change._replace(factors=(joined_factors,), start=None)


def _low_rank(adapters: Mapping[str, Adapter], key_map: KeyMap, params: Any) -> Changes:
    """Return what adapters add to each tensor; kinds that are LoRA in another form are taken as LoRA."""
    found = modules_to_save(adapters, key_map, params)
    if not found.format.is_low_rank:
        found = torch_modules(adapters, key_map, params, LORA)
    changes = {}
    for name, module in found.modules.items():
        match = found.matches[name]
        a, b, lengths = module.arrays["a"], module.arrays["b"], module.arrays.get("m")
        if lengths is not None and match.entry.kind not in ("linear", "conv"):
            raise LoraError(
                f"{match.path!r} has DoRA on a {match.entry.kind}, whose lengths run along its columns: load the model "
                "and merge with lora.merge."
            )
        with np.errstate(over="ignore"):
            scaled = np.asarray(b, np.float32) * np.float32(module.scale)
        if not np.isfinite(scaled).all():
            raise LoraError(f"the adapter for {match.path!r} is beyond fp32 once it has its scale {module.scale:g}.")
        change = _change(match.entry.kind, np.asarray(a, np.float32), scaled, match.experts)
        lengths = None if lengths is None else np.asarray(lengths, np.float32)
        turned = match.entry.kind == "experts_transposed"
        changes[name + match.entry.suffix] = change._replace(lengths=lengths, inputs_first=turned)
    return changes


def _change(kind: str, a: Array, b: Array, experts: int) -> Change:
    """Return the products of torch's A and s B of a module that are added to its tensor."""
    window = a.shape[2:]
    a2 = a.reshape(experts, a.shape[0] // experts, -1)
    b2 = np.moveaxis(b.reshape(b.shape[0], -1, experts), -1, 0)
    axes = MODULE_KINDS[kind].axes.split()
    inputs_first = axes.index("in") < axes.index("out")
    factors = tuple((a_.T, b_.T) if inputs_first else (b_, a_) for a_, b_ in zip(a2, b2, strict=True))
    inner = (a.shape[1], b.shape[0]) if inputs_first else (b.shape[0], a.shape[1])
    return Change((*((experts,) if "expert" in axes else ()), *inner, *window), factors)


def _tensors(arrays: Mapping[str, Any], key_map: KeyMap, params: Any, zeros: bool) -> dict[str, Array]:
    """Return the tensors that consist of these arrays of parameters.

    Args:
        params: parameters or their shapes, or None, for tensors of which some parts are among the arrays and others
            are not: those are zero, or else the parameters themselves.

    Raises:
        LoraError: parts of a tensor are not known.
    """
    if not arrays:
        return {}
    matches = key_map.match({path: tuple(np.shape(array)) for path, array in arrays.items()})
    known = {} if params is None else key_map.match(shapes_of(params), strict=False)
    groups, own = parts_by_tensor(known | matches), arrays_of(params)
    tensors = {}
    for name in (name for match in matches.values() for name in match.tensors().values()):
        parts, filled = groups[name], dict(arrays)
        for match in parts:
            if match.path not in filled and zeros:
                filled[match.path] = np.zeros(match.shape, np.float32)
            elif match.path not in filled and match.path in own:
                filled[match.path] = own[match.path]
        known_parts = [match.path for match in parts if match.path in filled]
        is_whole = parts[0].entry.part is None or [match.entry.part for match in parts] == [*range(len(parts))]
        if len(known_parts) < len(parts) or not is_whole:
            raise LoraError(
                f"{name} holds several parameters, of which only {', '.join(map(repr, known_parts))} are known. Give "
                "all parameters: params=params."
            )
        tensors[name] = joined(name, parts, filled)
    return tensors


def with_rows_in_base(name: str, change: Change) -> Change:
    """Return a change in which trained rows stand alone, or are in the table that takes the place of W.

    Raises:
        LoraError: there is no such row; the table has another change too.
    """
    if change.rows and (change.factors or change.delta is not None):
        raise LoraError(f"{name!r} has trained rows and another change: merge one of them after the other.")
    if not change.rows or change.base is None:
        return change
    if max(change.rows) >= len(change.base):
        raise LoraError(f"{name!r} has a trained row {max(change.rows)}, and the table in its place is of fewer rows.")
    base = change.base.astype(np.float32)
    for i, row in change.rows.items():
        base[i] = row
    return change._replace(base=base, rows={})


def has_one_table_for_both(key_map: KeyMap, params: Any) -> bool:
    """Return whether a program of these parameters has one table for the lookups of tokens and for the head."""
    matches = {} if params is None else key_map.match(shapes_of(params), strict=False)
    tables = [match for match in matches.values() if match.entry.kind == "embedding"]
    return any(is_one_table_for_both(match, matches) for match in tables)


def _check_finite(what: str, array: Any) -> None:
    if not np.isfinite(np.asarray(jax.device_get(array))).all():
        raise LoraError(
            f"{what} holds NaN or infinity, and so would the merged weight: go back to a step before the training "
            "diverged."
        )


def _is_zero(change: Change) -> bool:
    """Return whether it adds nothing but zeros."""
    only = not change.factors and change.base is None and not change.rows and change.delta is not None
    return only and not np.any(change.delta)
