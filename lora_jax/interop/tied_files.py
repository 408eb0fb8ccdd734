"""Published models whose files hold one tensor for the table of tokens and for the head: what a change of one end is.

PEFT changes the lookups of such a table alone, or the head alone. One tensor cannot hold both: the change is refused,
made at both ends, or the files get a head of their own, which begins as a copy of the table.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.core.errors import LoraError, short
from lora_jax.interop.model_config import CONFIG, model_facts
from lora_jax.interop.peft.tied_tables import HEADS, Tied, is_head
from lora_jax.interop.safetensors_index import INDEX, Tensor
from lora_jax.interop.safetensors_writer import framed
from lora_jax.interop.tensor_changes import Change, Changes

_HEAD = "lm_head.weight"
# Types of models of transformers whose head is `lm_head` with the table's own weight, and nothing else that depends on
# `tie_word_embeddings`.
_UNTIED_BY_CONFIG = """
    cohere falcon gemma gemma2 gemma3_text gpt2 gpt_neo gptj granite llama mistral mixtral olmo olmo2 opt phi phi3 qwen2
    qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2
"""
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
_TABLES = ("embed_tokens", "wte", "shared", "word_embeddings", "embed_in", "tok_embeddings")


class Tie(NamedTuple):
    """One table that is the head as well."""

    table: str  # the name of its tensor
    head: str | None  # the name that the head would have, if the library knows the architecture
    is_stored: bool  # whether the files hold the head too, as a copy


def tie_of(source: Path, tensors: Mapping[str, Tensor]) -> Tie | None:
    """Return what the files of a model tie, by its config and its tensors, or None.

    A config that says nothing of it is of a class that ties by default, or has no head.
    """
    facts = model_facts(source)
    says, entries = facts.get("tie_word_embeddings"), facts.get("vocab_size")
    tables = [
        name
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and not is_head(name)
        if (tensor.shape[0] == entries if entries else name.split(".")[-2] in _TABLES)
    ]
    tables.sort(key=lambda name: name.split(".")[-2] not in _TABLES)
    if not tables or says is False:
        return None
    stored = next((name for name in tensors if is_head(name) and tensors[name].shape == tensors[tables[0]].shape), None)
    classes = facts.get("architectures")
    has_head = isinstance(classes, list) and any(str(name).endswith(_WITH_HEAD) for name in classes)
    if says is None and (stored is not None or not has_head):
        return None
    is_known = facts.get("model_type") in _UNTIED_BY_CONFIG.split() and tables[0].count(".") > 1
    return Tie(tables[0], stored or (_HEAD if is_known else None), stored is not None)


class Untied(NamedTuple):
    """What else is written where a head gets a tensor of its own."""

    added: dict[str, Tensor]  # new tensors, each with the place of the one that it begins as a copy of


def shapes_with_head(tie: Tie | None, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors, with that of a head that is tied to one of them."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return shapes if tie is None else {f"{name}.weight": shapes[tie.table] for name in HEADS} | shapes


def settled(
    source: Path,
    tie: Tie | None,
    tensors: Mapping[str, Tensor],
    changes: Changes,
    copies: Mapping[str, str],
    tied: Tied,
) -> tuple[Changes, Untied | None]:
    """Return the changes as the files can hold them, and, if they are untied for it, what that adds.

    Args:
        tie: what the files tie.
        copies: `{head: table}` of heads that change just as a table does.

    Raises:
        LoraError: a change of one end, and `tied` is "refuse", or what it asks for cannot be.
    """
    if tie is None:
        return changes, None
    head = next((name for name in changes if is_head(name)), tie.head)
    if copies.get(head or "") == tie.table:
        changes = {name: change for name, change in changes.items() if name != head}
        return _at_both_ends(changes, tie), None
    at_table, at_head = changes.get(tie.table), changes.get(head or "")
    of_one_end = [tie.table] * (at_table is not None and (at_table.is_of_one_end or bool(at_head and at_head.rows)))
    of_one_end += [head or ""] * (at_head is not None)
    if not of_one_end:
        return _at_both_ends(changes, tie), None
    if tied == "refuse":
        raise _refusal(source, tie, of_one_end[0])
    if tied == "both":
        if len(of_one_end) > 1:
            raise LoraError(
                f"{source} has one tensor for {tie.table!r} and the head, and both have changes of their own: "
                "write a head of its own, tied='untie'."
            )
        changes = {name: change for name, change in changes.items() if name != head}
        return _at_both_ends(changes | {tie.table: _with_shared(at_head or at_table, at_table)}, tie), None
    if tie.head is None or head is None:
        raise LoraError(
            f"{source} ties {tie.table!r} to the head in a way that this version cannot take apart in files, since it "
            f"does not know what {short(str(model_facts(source).get('model_type')))} calls the head: save the model "
            "with tie_word_embeddings=False in transformers, and merge into that; or have both ends changed: "
            "tied='both'."
        )
    table = tensors[tie.table]
    head_change = _with_shared(at_head or Change(table.shape), at_table)
    if head_change.base is not None or head_change.rows or head_change.is_of_one_end:
        changes = changes | {head: head_change}
    return changes, Untied({} if tie.is_stored else {head: table})


def write_untied(new: Path, untied: Untied | None) -> None:
    """Change the config and the index of the written files to those of a model with a head of its own."""
    if untied is None:
        return
    _rewrite(new / CONFIG, model_facts(new) | {"tie_word_embeddings": False})
    if untied.added and (new / INDEX).exists():
        index = json.loads((new / INDEX).read_bytes())
        total = index.get("metadata", {}).get("total_size")
        for name, tensor in untied.added.items():
            index["weight_map"][name] = tensor.file
            if isinstance(total, int):
                total += tensor.size
                index["metadata"]["total_size"] = total
        _rewrite(new / INDEX, index)


def header_with(path: Path, added: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """Return the header of a file with further tensors behind its own, and how long its own header is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(length))
    at = size - 8 - length
    for name, tensor in added.items():
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    return framed(entries), 8 + length


def _at_both_ends(changes: Changes, tie: Tie) -> Changes:
    """Return the changes with that of the table for the copy of it that is the head."""
    if tie.is_stored and tie.head is not None and tie.table in changes:
        return changes | {tie.head: changes[tie.table]}
    return changes


def _with_shared(change: Change | None, table: Change | None) -> Change:
    """Return the change of a head with what torch has at both ends: a new table, and its trained rows."""
    assert change is not None
    if table is None or change is table:
        return change
    if change.base is None and table.base_is_shared:
        change = change._replace(base=table.base)
    return change._replace(rows=change.rows or table.rows)


def _refusal(source: Path, tie: Tie, name: str) -> LoraError:
    end, other = ("lookups", "head") if name == tie.table else ("head", "lookups")
    return LoraError(
        f"{source} has one tensor, {tie.table!r}, for the lookups of tokens and for the head, and the adapters change "
        f"the {end} alone, as PEFT has it; in one tensor the {other} would change too. Choose: tied='untie' writes a "
        "head of its own, so that the merged model is the adapted one; tied='both' changes both ends, which is right "
        "for adapters that were trained in a program that has one table for both."
    )


def _rewrite(path: Path, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
