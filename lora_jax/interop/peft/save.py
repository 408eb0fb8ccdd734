"""Adapters as a folder that HF PEFT reads, and whatever reads its files: the way of `load` back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.adapters.arguments import check_dtype
from lora_jax.adapters.full import FullAdapter
from lora_jax.adapters.token_rows import RowsAdapter
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import (
    A_KEY_MAP,
    TAKEN_BY_A_STEP,
    check_adapter_dict,
    check_folder,
    check_is,
    check_kept,
    named_arrays,
)
from lora_jax.core.arrays import refuse_spread
from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import flatten_with_names
from lora_jax.core.text import printable
from lora_jax.interop.key_map import Array, KeyMap
from lora_jax.interop.peft.biases import biases_to_tensors
from lora_jax.interop.peft.config import entries_of, with_more
from lora_jax.interop.peft.dtypes import cast, in_fp32
from lora_jax.interop.peft.experts import names_in_files
from lora_jax.interop.peft.files import LORALIB, WEIGHTS, format_of, write_folder
from lora_jax.interop.peft.full_weights import rest_of_modules, whole_to_tensors, with_base
from lora_jax.interop.peft.gains_of_biases import check_gains, is_gain_of_bias
from lora_jax.interop.peft.parameters import arrays_of
from lora_jax.interop.peft.profiles import FOR_SERVERS, PROFILES, Profile, for_loralib
from lora_jax.interop.peft.shared_outer import with_shared_outer
from lora_jax.interop.peft.tensor_names import PREFIX
from lora_jax.interop.peft.tied_tables import Tied, check_tied, refuse_to_save_one_end, with_heads, with_whole_heads
from lora_jax.interop.peft.to_modules import TorchModules, modules_to_save
from lora_jax.interop.peft.token_rows import rows_to_tensors


def save_peft(
    folder: str | Path,
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    others: Any = None,
    params: Any = None,
    profile: Profile = "peft",
    base_model: str | None = None,
    task_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    tied: Tied = "refuse",
) -> None:
    """Write adapters as a folder that HF PEFT reads, and whatever reads its files.

    Adapters that are all of DoRA, AdaLoRA, LoHa, LoKr, VeRA or (IA)^3 are written as these; others that are LoRA in
    another form are written as the LoRA that they are. `Rows` become PEFT's trainable tokens. `Full` of a bias becomes
    its `lora_bias` beside LoRA of that module, and other `Full` are written whole. Beside (IA)^3 of a module with a
    bias, PEFT scales the bias as well: an `Ia3Adapter` of the bias, as `load_peft` returns it, says the same here.

    The folder is written under a hidden name and changes places with the one that is there when complete: a process
    that is killed leaves that one, and of two that save to one place the later one stays. Of several processes of JAX
    one calls this, or each, with arrays that it holds whole.

    Args:
        folder: where to write; replaced if it holds such adapters and nothing else. A link to a folder stays one.
        adapters: `{path: adapter}`.
        key_map: from parameters to modules.
        others: `{path: array}`, or nested dicts, of what was trained whole: biases, a head, a table.
        params: parameters, only where a module holds several of them and not all have adapters, for which shapes will
            do unless they are of DoRA; and for `Full` that is written whole.
        profile: "vllm" and "sglang" have one rank and a scale of 1 for all, and no others. Joined experts are flat for
            "vllm", as its models with joined experts take them; modules of their own for "vllm-by-expert", as its other
            models do, and for "sglang", which has one outer factor for all where they share it. "loralib" names tensors
            as loralib does, with the scale in B, since it keeps none.
        base_model: name or folder of the model that the adapters are for, as transformers knows it.
        task_type: such as "SEQ_CLS" or "CAUSAL_LM", for the class that PEFT wraps the model in.
        config: further entries of the config that the tensors do not tell, such as "revision", "layer_replication" or,
            for adapters that began with PiSSA, "init_lora_weights".
        dtype: of the tensors, such as jnp.bfloat16; None keeps those of the arrays.
        tied: what becomes of an adapter of a table that the program has as the head too, and that PEFT would have for
            the lookups alone. "refuse" it if `params` show it; write it for "both" ends, which PEFT then keeps equal
            (`ensure_weight_tying`); or for the lookups alone, "untie". Trained rows are of both ends in PEFT too.

    Raises:
        LoraError: the key map lacks a path; the profile cannot express an adapter or the others, or one folder cannot
            hold them beside one another; parameters are missing; PEFT does not have an entry of the config, or it
            contradicts what is written; an array is spread over several hosts; the folder cannot be written, or holds
            something else, which is named and left alone. Then nothing has changed.

    >>> import jax.numpy as jnp, json, tempfile, lora_jax as lora
    >>> from pathlib import Path
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("up/kernel", "mlp.up"))
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"up/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 0.5)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_peft(f"{folder}/peft", adapters, key_map, task_type="CAUSAL_LM")
    ...     config = json.loads(Path(folder, "peft/adapter_config.json").read_text())
    >>> config["peft_type"], config["r"], config["target_modules"]
    ('LORA', 2, ['mlp.up'])
    """
    check_folder("save_peft(folder, adapters, key_map)", folder)
    folder = Path(folder).absolute()
    _check_profile(profile)
    check_target(folder, format_of(LORALIB if profile == "loralib" else WEIGHTS))
    files = _contents(adapters, key_map, others, params, profile, base_model, task_type, config, dtype, tied)
    write_folder(folder, *files)


def check_peft(
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    *,
    others: Any = None,
    params: Any = None,
    profile: Profile = "peft",
    base_model: str | None = None,
    task_type: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    tied: Tied = "refuse",
) -> None:
    """Raise what `save_peft` would raise of these adapters, and write nothing; arguments as there.

    Before a training, adapters of zeros will do, as `numpy.broadcast_to(0, shape)`, which take no memory.
    """
    _check_profile(profile)
    _contents(adapters, key_map, others, params, profile, base_model, task_type, config, dtype, tied)


def _contents(
    adapters: Mapping[str, Adapter],
    key_map: KeyMap,
    others: Any,
    params: Any,
    profile: str,
    base_model: str | None,
    task_type: str | None,
    config: Mapping[str, Any] | None,
    dtype: Any,
    tied: Tied,
) -> tuple[str, dict[str, Array], dict[str, Any] | None]:
    """Return the name of the file, its tensors, and the config beside it; arguments as of `save_peft`."""
    _check_types(adapters, key_map)
    whole = dict(zip(*flatten_with_names(others or {})[:2], strict=True))
    _check_call(adapters, whole, profile)
    check_tied(tied)
    if tied == "refuse":
        of_one_end = [path for path, adapter in adapters.items() if not isinstance(adapter, RowsAdapter)]
        refuse_to_save_one_end([*of_one_end, *whole], key_map, params)
    if dtype is not None:
        check_dtype("save_peft", dtype)
        adapters = in_fp32(dict(adapters))
    if profile == "loralib":
        if config:
            raise LoraError(f"profile='loralib' has no config, found config={short(dict(config))}: leave it out.")
        if tied == "both":
            raise LoraError("profile='loralib' has no tied heads: leave tied='both' out.")
        return LORALIB, cast(for_loralib(adapters, key_map, params), dtype), None
    tensors, entries = contents(
        adapters,
        whole,
        key_map,
        params,
        profile=profile,
        tied=tied,
        dtype=dtype,
        more=config or {},
        about={"base_model_name_or_path": base_model, "task_type": task_type},
    )
    return WEIGHTS, tensors, entries


def contents(
    adapters: Mapping[str, Adapter],
    whole: Mapping[str, Any],
    key_map: KeyMap,
    params: Any,
    *,
    profile: str,
    tied: Tied,
    dtype: Any,
    more: Mapping[str, Any],
    about: Mapping[str, Any],
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the tensors of a folder by their names in it, and the entries of its config.

    Args:
        whole: `{path: array}` of what was trained whole.
        more: further entries of the config, of the user.
        about: entries of the config about the model.

    Raises:
        LoraError: as `save_peft` does, of the adapters.
    """
    # 1. From adapters to modules, in the format that holds them all.
    full = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, FullAdapter)}
    rows = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, RowsAdapter)}
    gains = {path: adapter for path, adapter in adapters.items() if is_gain_of_bias(adapter)}
    apart = {**full, **rows, **gains}
    factored = {path: adapter for path, adapter in adapters.items() if path not in apart}
    found = FOR_SERVERS.get(profile, modules_to_save)(factored, key_map, params)
    check_gains(found, gains, key_map, params)
    if tied == "both":
        found = with_heads(found, key_map)
    # 2. From modules to tensors, and the config that follows from these.
    beside, entries = _beside(found, full, rows, whole, key_map, params)
    if tied == "both":
        beside, entries = with_whole_heads(beside, entries, key_map, found)
    shared, seed = found.format.shared_to_tensors([*factored.values()])
    entries |= {**seed, **about}
    entries = with_more(found.format, entries, more)
    own = with_shared_outer(_named(found)) if profile == "sglang" else _named(found)
    tensors = {PREFIX + name: tensor for name, tensor in cast(own | beside, dtype).items()}
    if found.format.keeps_shared(entries):
        tensors |= shared
    return tensors, entries


def _check_types(adapters: Any, key_map: Any) -> None:
    """Raise unless a call has its arguments in their order, and arrays that are still there."""
    call = "save_peft(folder, adapters, key_map)"
    check_adapter_dict(call, adapters)
    check_is(call, "key_map", key_map, KeyMap, A_KEY_MAP)
    for path, adapter in adapters.items():
        check_kept(named_arrays(path, adapter), TAKEN_BY_A_STEP)


def _check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise LoraError(f"profile={profile!r}: expected {', '.join(map(repr, PROFILES[:-1]))} or {PROFILES[-1]!r}.")


def _check_call(adapters: Mapping[str, Adapter], whole: Mapping[str, Any], profile: str) -> None:
    """Raise what is wrong with a call whatever the adapters hold."""
    if whole and profile != "peft":
        raise LoraError(
            f"profile={profile!r} has no place for others, found {', '.join(map(printable, whole))}: "
            "merge these instead."
        )
    if not adapters:
        raise LoraError("there are no adapters to save.")
    refuse_spread({**adapters, **whole})
    apart = [path for path, a in adapters.items() if isinstance(a, FullAdapter | RowsAdapter) or is_gain_of_bias(a)]
    if apart and (profile != "peft" or len(apart) == len(adapters)):
        why = f"profile={profile!r} has no place for it" if profile != "peft" else "PEFT has no folder of such alone"
        raise LoraError(f"{apart[0]!r} is a {type(adapters[apart[0]]).__name__}, and {why}: merge it instead.")


def _named(found: TorchModules) -> dict[str, Array]:
    """Return the tensors of all modules by the names that they have in a file."""
    experts = {name: match for name, match in found.matches.items() if match.entry.is_of_experts}
    files = names_in_files(experts, list(experts))
    return {
        f"{files.get(name, name)}.{ending}": tensor
        for name, module in found.modules.items()
        for ending, tensor in found.format.tensors_of(found.matches[name], module.arrays).items()
    }


def _beside(
    found: TorchModules,
    full: Mapping[str, FullAdapter],
    rows: Mapping[str, RowsAdapter],
    whole: Mapping[str, Any],
    key_map: KeyMap,
    params: Any,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the tensors of biases, of rows and of whole parameters, and the config of all.

    Raises:
        LoraError: the format has no place for some of them; parameters are missing.
    """
    format, modules, matches = found
    added: dict[str, Array] = {}
    if format.has_lora_bias:
        added, full = biases_to_tensors(full, key_map, params, modules, matches)
    base = arrays_of(params)
    whole = {**whole, **with_base(full, base, whole)}
    whole |= rest_of_modules(whole, base, key_map, modules)
    tensors, bias, modules_to_save = whole_to_tensors(whole, key_map, modules)
    if not format.has_biases and bias != "none":
        raise LoraError(f"PEFT keeps no biases beside {format.name}: merge them, or train LoRA with them.")
    if not format.has_rows and rows:
        raise LoraError(f"PEFT keeps no rows of tables beside {format.name}: merge {next(iter(rows))!r} instead.")
    tables, indices = rows_to_tensors(rows, key_map)
    entries = entries_of(format, modules, matches, bias, modules_to_save)
    entries |= ({"lora_bias": True} if added else {}) | ({"trainable_token_indices": indices} if indices else {})
    return added | tables | tensors, entries
