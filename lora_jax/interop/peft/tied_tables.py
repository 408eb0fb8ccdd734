"""Tables that are the head as well: which adapters of them are for both ends, and which for one.

In HF PEFT an adapter of an embedding is for its lookup alone, also in a model that ties its head to it, and one of the
head for the head alone. An adapter here, or one tensor of a file, is for both. What PEFT changes at both ends are rows
(`trainable_token_indices`), the table that is saved beside an adapter, and, with `ensure_weight_tying`, all that it
saves twice, once for each end.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from lora_jax.core.errors import LoraError, short
from lora_jax.core.targets import Plan
from lora_jax.interop.entries import Entry
from lora_jax.interop.key_map import Array, KeyMap, ParameterMatch
from lora_jax.interop.peft.contents import Contents
from lora_jax.interop.peft.formats.format import Module
from lora_jax.interop.peft.parameters import shapes_of
from lora_jax.interop.peft.to_modules import TorchModules

Tied = Literal["refuse", "both", "untie"]
HEADS = ("lm_head", "embed_out", "proj_out", "decoder")  # how torch's models call a head that can be tied


def check_tied(tied: str) -> None:
    """Raise if it is none of the choices."""
    if tied not in ("refuse", "both", "untie"):
        raise LoraError(f"tied={tied!r}: expected 'refuse', 'both' or 'untie'.")


def is_head(tensor: str) -> bool:
    """Return whether a tensor is the weight of a head by its name."""
    return tensor.removesuffix(".weight").rpartition(".")[2] in HEADS


def heads_like_tables(contents: Contents) -> dict[str, str]:
    """Return `{head: table}`, by the names of their tensors, of heads that are changed just as a table is."""
    found = {}
    for head in [f"{name}.weight" for name in contents.modules] + [*contents.whole]:
        if not is_head(head):
            continue
        module, whole = head.removesuffix(".weight"), contents.whole.get(head)
        for table in [f"{name}.weight" for name in contents.modules] + [*contents.whole]:
            other, own = contents.modules.get(table.removesuffix(".weight")), contents.modules.get(module)
            if table == head or (other is None) != (own is None):
                continue
            same_base = head not in contents.whole or _are_equal(whole, contents.whole.get(table))
            if same_base and (own is None or other is None or _are_one_product(other, own)):
                found[head] = table
    return found


def without_copies(contents: Contents, matches: Mapping[str, ParameterMatch]) -> tuple[Contents, dict[str, str]]:
    """Return the contents without those of heads that no parameter is, and that are changed just as a table is.

    Returns:
        The contents, and `{head: table}` of the heads that were left out.
    """
    own = {name: None for match in matches.values() for name in match.tensors().values()}
    copies = {head: table for head, table in heads_like_tables(contents).items() if head not in own and table in own}
    modules = {name: module for name, module in contents.modules.items() if f"{name}.weight" not in copies}
    whole = {name: tensor for name, tensor in contents.whole.items() if name not in copies}
    return contents._replace(modules=modules, whole=whole), copies


def refuse_what_is_of_one_end(
    contents: Contents,
    matches: Mapping[str, ParameterMatch],
    copies: Mapping[str, str],
    plan_or_params: Any,
    folder: Any,
) -> None:
    """Raise if the folder changes the lookups of a table alone, and the model has one parameter for both ends."""
    for path, match in matches.items():
        for name in match.tensors().values() if match.entry.kind == "embedding" else ():
            is_whole = name in contents.whole and name not in contents.wrapped
            if name in copies.values() or not (is_whole or name.removesuffix(".weight") in contents.modules):
                continue
            if why := _why_it_is_both_ends(match, matches, plan_or_params):
                raise LoraError(
                    f"{folder} changes the lookups of {short(name)} alone, as PEFT has it, and {path!r} is the head as "
                    f"well: {why}. One adapter of it changes both ends, which is another model. Give the model a head "
                    "of its own that begins as a copy of the table; or have both ends changed: load_peft(..., "
                    "tied='both')."
                )


def refuse_ends_that_differ(
    contents: Contents, matches: Mapping[str, ParameterMatch], copies: Mapping[str, str], folder: Any
) -> None:
    """Raise if the folder changes a table and its head, not alike, and the model has one parameter for both ends."""
    known = {name: path for path, match in matches.items() for name in match.tensors().values()}
    changed = [*(f"{name}.weight" for name in contents.modules), *contents.rows, *contents.whole]
    heads = [name for name in changed if is_head(name) and name not in known and name not in copies]
    tables = [name for name in changed if name in known and matches[known[name]].entry.kind == "embedding"]
    if heads and tables:
        raise LoraError(
            f"{folder} changes both {short(tables[0])} and {short(heads[0])}, and not alike, and the model has one "
            f"parameter for them, {known[tables[0]]!r}. A head that is tied to a table is no parameter of its own: "
            "give the model one that begins as a copy of the table, and load the folder with it among the parameters."
        )


def is_one_table_for_both(match: ParameterMatch, matches: Mapping[str, ParameterMatch]) -> bool:
    """Return whether a table may be the head as well, by the shapes of all parameters.

    It is the one with the most rows, there is no head [d, rows] beside it, and a layer makes outputs as wide as d.
    """
    d, rows = match.outputs, match.axes.fans(match.shape)[1]
    tables = [other for other in matches.values() if other.entry.kind == "embedding"]
    others = [other for other in matches.values() if other.entry.kind not in ("embedding", "array", "conv")]
    fans = [other.axes.fans(other.shape)[1:] for other in others]
    largest = all(other.axes.fans(other.shape)[1] <= rows for other in tables)
    return largest and (d, rows) not in fans and any(outputs == d for _, outputs in fans)


def _why_it_is_both_ends(
    match: ParameterMatch, matches: Mapping[str, ParameterMatch], plan_or_params: Any
) -> str | None:
    """Return how it is known that a table is the head as well, or None if it is not."""
    if isinstance(plan_or_params, Plan):
        uses = {use.axes: use.where for use in plan_or_params[match.path].uses}
        head = uses.get(match.axes.transpose())
        return None if head is None or match.axes not in uses else f"the plan has it in {head}"
    if is_one_table_for_both(match, matches):
        return "the parameters have no other head (a plan in their place shows how the program uses it)"
    return None


def _are_one_product(table: Module, head: Module) -> bool:
    """Return whether the factors of a head are those of a table, each as PEFT has them."""
    if table.arrays.keys() != {"a", "b"} or head.arrays.keys() != {"a", "b"} or table.scale != head.scale:
        return False
    return _are_equal(head.arrays["a"], table.arrays["b"].T) and _are_equal(head.arrays["b"], table.arrays["a"].T)


def _are_equal(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one.shape == other.shape and bool(np.array_equal(one, other))


# The way back ---------------------------------------------------------------------------------------------------------


def refuse_to_save_one_end(paths: Iterable[str], key_map: KeyMap, params: Any) -> None:
    """Raise if a change of one of these paths is of both ends in the program, and of the lookups alone in PEFT."""
    matches = {} if params is None else key_map.match(shapes_of(params), strict=False)
    for path in paths:
        match = matches.get(path)
        if match is not None and match.entry.kind == "embedding" and is_one_table_for_both(match, matches):
            raise LoraError(
                f"{path!r} may be the head as well, since the parameters have no other one, and PEFT has an adapter of "
                "a table for its lookups alone. Write it for both ends, save_peft(..., tied='both'), with which PEFT "
                "keeps them equal; or, if there is no head or torch has one of its own, for the lookups: tied='untie'."
            )


def with_heads(found: TorchModules, key_map: KeyMap) -> TorchModules:
    """Return the modules with the head that is tied to the table of tokens, if this has factors: the same, turned.

    Raises:
        LoraError: the table has lengths too, which the head has others of; the head is not known.
    """
    tables = [name for name, match in found.matches.items() if match.entry.kind == "embedding"]
    if not tables:
        return found
    table = max(tables, key=lambda name: found.matches[name].axes.fans(found.matches[name].shape)[1])
    arrays, scale = found.modules[table]
    if arrays.keys() != {"a", "b"}:
        raise LoraError(f"{table} has an adapter of {found.format.name}, which is no such one of the head: merge it.")
    head = head_of(key_map)
    if head.name in found.modules:
        raise LoraError(f"{head.name} has an adapter of its own, so it is not tied to {table}: leave tied='both' out.")
    rows, d = arrays["a"].shape[1], arrays["b"].shape[0]
    match = key_map.match({head.path: (d, rows)})[head.path]
    turned = Module({"a": np.ascontiguousarray(arrays["b"].T), "b": np.ascontiguousarray(arrays["a"].T)}, scale)
    return found._replace(modules={**found.modules, head.name: turned}, matches={**found.matches, head.name: match})


def head_of(key_map: KeyMap) -> Entry:
    """Return the entry of the head that a model can tie to its table.

    Raises:
        LoraError: there is none.
    """
    for entry in key_map.entries:
        if entry.kind == "linear" and is_head(entry.name) and "{" not in entry.path:
            return entry
    raise LoraError(
        "tied='both' writes an adapter of a table for the head too, and the key map does not say what torch calls it: "
        'add an entry such as key_maps.linear("lm_head/kernel", "lm_head").'
    )


def with_whole_heads(
    tensors: Mapping[str, Array], entries: Mapping[str, Any], key_map: KeyMap, found: TorchModules
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return what stands beside adapters, and the config, with the head of a table that was trained whole.

    Args:
        found: the modules with adapters, among which the head is already, if the table is.
    """
    told = [f"{name}.weight" for name in entries["modules_to_save"] or []]
    whole = [name for name in told if name in tensors and tensors[name].ndim == 2 and _is_table(name, key_map)]
    tied = [name for name, match in found.matches.items() if match.entry.kind == "embedding"]
    tensors, entries = dict(tensors), dict(entries)
    if whole:
        table = max(whole, key=lambda name: len(tensors[name]))
        head = head_of(key_map).name
        tensors[f"{head}.weight"] = tensors[table]
        entries["modules_to_save"] = sorted([*entries["modules_to_save"], head])
    return tensors, entries | ({"ensure_weight_tying": True} if whole or tied else {})


def _is_table(tensor: str, key_map: KeyMap) -> bool:
    """Return whether a tensor is a table by the key map."""
    tables = [entry.name for entry in key_map.entries if entry.kind == "embedding"]
    return tensor.removesuffix(".weight") in tables
