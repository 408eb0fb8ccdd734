"""Adapters from the files of HF PEFT: `adapter_config.json` beside `adapter_model.safetensors`.

Files are not trusted: nothing in them is executed, no name in them becomes a path, and what is not understood is
refused by name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.vera import shared_projections
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.core.paths import nearest
from lora_jax.core.targets import Plan
from lora_jax.interop.key_map import Array, Entry, KeyMap, Placed, groups_of
from lora_jax.interop.peft.config_read import Config, read_config
from lora_jax.interop.peft.formats import Arrays, Module, field_of, inputs_of, outputs_of, problem, rank_of
from lora_jax.interop.peft.from_modules import adapters_of, biases_of, others_of, rows_of, shapes_of, turned
from lora_jax.interop.peft.residual_bases import residuals

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LONGEST = 1000  # characters of a name
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")  # [r, inputs] and [outputs, r], which all of VeRA shares


class Contents(NamedTuple):
    """The tensors of a file."""

    modules: dict[str, Module]
    biases: dict[str, Array]  # what is added to biases, by the names of these
    rows: dict[str, Array]  # what some rows of tables are now, by the names of these
    whole: dict[str, Array]


def load_peft(
    folder: str | Path, plan_or_params: Any, key_map: KeyMap
) -> tuple[dict[str, Adapter], dict[str, jax.Array]]:
    """The adapters of a folder that HF PEFT wrote, and the arrays that were trained whole: `(adapters, others)`.

    Args:
        plan_or_params: a plan, for adapters of just the planned weights, with the plan's axes; or parameters (or their
            shapes), with the axes of the key map.
        key_map: from parameters to modules.

    Returns:
        `{path: adapter}`, of the kind that the folder has, with `FullAdapter` for what is added to biases and
        `RowsAdapter` for trained tokens; and `{path: array}` of biases, heads and tables to put in the place of the
        parameters there. Adapters that started with PiSSA or OLoRA are for W less what they started with: these bases
        are among the latter, and take `params` with arrays. (The randomised SVD of "pissa_niter_4" is taken as the
        exact one, near which it is.) With `layer_replication` the layers are those of the replicated model.

    Raises:
        LoraError: no such folder; a file that is cut short or not of this format; a kind of adapter, or an option that
            this version lacks; tensors that the key map gives to no parameter, factors without their partners, ranks
            other than those of the config, shapes that do not fit: each is named, and nothing is returned.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    tensors = _read(folder / WEIGHTS)
    contents = _sort(tensors, config, folder)
    shapes = shapes_of(plan_or_params)
    placed = key_map.place(shapes, strict=False)
    _check_targets(folder, config, contents)
    widths = _widths(tensors, placed, contents.modules, config, folder) if config.kind == "VERA" else None
    adapters, used = adapters_of(placed, contents.modules, config, widths)
    changed, met = biases_of(placed, contents.biases)
    rows, seen = rows_of(placed, contents.rows, config)
    others, taken = others_of(placed, contents.whole)
    nothing = {name: None for name, c in contents.biases.items() if not c.any()}  # also of modules without a bias
    used |= met | seen | taken | nothing
    if unmatched := [name for names in contents for name in names if name not in used]:
        raise LoraError(_unmatched(folder, unmatched, placed, isinstance(plan_or_params, Plan)))
    if both := [path for path in rows if path in adapters]:
        raise LoraError(f"{folder} holds rows of {both[0]!r} and factors of it, and this version has one or the other.")
    adapters |= changed | rows
    if config.start is not None:
        others |= residuals(config.start, placed, groups_of(placed), contents.modules, plan_or_params)
    if isinstance(plan_or_params, Plan):
        if missing := [path for path in plan_or_params if path not in adapters]:
            raise LoraError(
                f"{folder} holds no factors for {missing[0]!r} of the plan, and {len(missing) - 1} more: plan the "
                f"weights that it has, which are {', '.join(sorted(adapters)[:8]) or 'none'}."
            )
        adapters = {
            path: turned(adapter, plan_or_params[path].axes, path, "the plan") for path, adapter in adapters.items()
        }
    return adapters, others


def _read(path: Path) -> dict[str, Array]:
    """The tensors of a file, by their names without the prefix. The header is checked before anything is read."""
    from lora_jax.interop._safetensors import SafetensorError, load_file

    if not path.is_file():
        torch = path.with_name("adapter_model.bin")
        hint = f" {torch.name} is a pickle, which may run any code: save it again as safetensors." * torch.is_file()
        raise LoraError(f"there is no {path}.{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise LoraError(f"{path} cannot be read: {str(error)[:200]}.") from error
    foreign = next((name for name in tensors if not name.startswith(PREFIX) and name not in PROJECTIONS), None)
    if foreign is not None:
        raise LoraError(f"{path} holds {short(foreign)}, expected names that begin with {PREFIX!r}.")
    for name, tensor in tensors.items():
        if len(name) > LONGEST:
            raise LoraError(f"{path} holds a name of {len(name):,} characters, expected at most {LONGEST}.")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise LoraError(f"{path}: {short(name)} is of {tensor.dtype}, expected a floating dtype.")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _sort(tensors: Mapping[str, Array], config: Config, folder: Path) -> Contents:
    """The arrays of each module, and the tensors that are whole."""
    found: dict[str, Arrays] = {}
    added: dict[str, Array] = {}
    rows: dict[str, Array] = {}
    whole: dict[str, Array] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".lora_B.bias")
        table = name.removesuffix(".token_adapter.trainable_tokens_delta")
        if config.lora_bias and module != name:
            added[module] = tensor
        elif config.tokens and table != name:
            rows[f"{table}.weight"] = tensor
        elif config.kind != "VERA" or name not in PROJECTIONS:
            try:
                of_module = field_of(config.kind, name)
            except LoraError as error:
                raise LoraError(f"{folder} holds {short(name)}, {error}.") from None
            if of_module is None:
                whole[name.replace(".base_layer.", ".")] = tensor
            elif of_module[1] in found.setdefault(of_module[0], {}):
                raise LoraError(f"{folder} holds {short(name)}, and the same under another name.")
            else:
                found[of_module[0]][of_module[1]] = tensor
    modules = {}
    for name, arrays in found.items():
        if why := problem(config.kind, arrays):
            raise LoraError(f"{folder}: {short(name)} {why}.")
        modules[name] = Module(arrays, config.scale_of(name.replace(".base_layer", "")))
    if foreign := [name for name in added if name not in modules]:
        raise LoraError(f"{folder} holds a lora_B.bias of {short(foreign[0])}, and no factors.")
    biases = {f"{name}.bias": c * np.asarray(modules[name].scale, c.dtype) for name, c in added.items()}
    return Contents(modules, biases, rows, whole)


def _widths(
    tensors: Mapping[str, Array],
    placed: Mapping[str, Placed],
    modules: Mapping[str, Module],
    config: Config,
    folder: Path,
) -> tuple[int, int]:
    """The inputs and outputs of VeRA's projections: those of the largest modules. A folder may hold them too."""
    found = [tensors[name] for name in PROJECTIONS if name in tensors]
    if not found:
        inputs = [
            place.axes.fans(place.shape)[1]
            for place in placed.values()
            if any(name in modules for name in place.names.values())
        ]
        return max(inputs, default=1), max(outputs_of("VERA", module.arrays) for module in modules.values())
    ranks = {name: rank_of("VERA", module.arrays) for name, module in modules.items()}
    if len(found) == 2 and all(array.ndim == 2 and array.size for array in found):
        (rank, inputs), (outputs, _) = (array.shape for array in found)
        if set(ranks.values()) == {rank}:
            shared = shared_projections(config.seed, rank, inputs, outputs)
            if all(np.array_equal(one, ours.T.astype(one.dtype)) for one, ours in zip(found, shared, strict=True)):
                return inputs, outputs
    raise LoraError(
        f"{folder} holds vera_A and vera_B other than those that projection_prng_key={config.seed} stands for, and "
        "this version keeps the key alone: merge that adapter in PEFT."
    )


def load_by_module(folder: Path) -> tuple[dict[str, Adapter], dict[str, Array], KeyMap]:
    """Adapters and others of a folder by torch's own names, where no model is at hand; and the key map back."""
    config = read_config(folder / CONFIG)
    why = (
        f"adapts {config.target_parameters[0]}, and its tensors do not tell of which parameter they are"
        if config.target_parameters
        else f"is for a base without what {config.start!r} began with"
        if config.start
        else "is for a model that has layers of its base several times"
        if config.replicated
        else "has shared projections, and its tensors do not tell the inputs of its modules"
        if config.kind == "VERA"
        else "has rows of tables, and its tensors do not tell the sizes of these"
        if config.tokens
        else None
    )
    if why is not None:
        raise LoraError(f"{folder} {why}: load it with a key map, lora.load_peft(folder, params, key_map).")
    tensors = _read(folder / WEIGHTS)
    contents = _sort(tensors, config, folder)
    _check_targets(folder, config, contents)
    entries, shapes = [], {}
    for name, module in contents.modules.items():
        is_table = f"{name}.lora_embedding_A" in tensors
        a = next(iter(module.arrays.values()))
        kind = "embedding" if is_table else "conv" if a.ndim > 2 else "conv1d" if config.transposed else "linear"
        entries.append(Entry(name, name, "window* in out" if kind == "conv" else "in out", kind))
        shapes[name] = (*a.shape[2:], inputs_of(config.kind, module.arrays), outputs_of(config.kind, module.arrays))
    arrays = {name: tensor.shape for name, tensor in (contents.biases | contents.whole).items()}
    key_map = KeyMap(*entries, *(Entry(name, name, "keep*", "array") for name in arrays))
    adapters, _ = adapters_of(key_map.place(shapes), contents.modules, config)
    added, _ = biases_of(key_map.place(arrays), contents.biases)
    return adapters | added, contents.whole, key_map


def _check_targets(folder: Path, config: Config, contents: Contents) -> None:
    """A file that lacks some of what the config says it has was cut, or is of another adapter."""
    modules = [f".{module.replace('.base_layer', '')}" for module in contents.modules]
    for target in config.target_modules:
        if not any(module.endswith(f".{target}") for module in modules):
            raise LoraError(
                f"{folder} holds no factors for {short(target)}, which its config has among target_modules: the two "
                "files do not belong together."
            )
    if not modules:
        raise LoraError(f"{folder} holds no factors of any module.")
    for option, is_said, found in [
        ("lora_bias", config.lora_bias, contents.biases),
        ("trainable_token_indices", config.tokens, contents.rows),
    ]:
        if is_said and not found:
            raise LoraError(f"{folder} holds none of what its config has {option} for: the two do not belong together.")


def _unmatched(folder: Path, names: Sequence[str], placed: Mapping[str, Placed], planned: bool) -> str:
    known = [name for place in placed.values() for name in (*place.names.values(), *place.tensors().values())]
    listed = "\n".join(
        f"  {short(name)}; nearest: {', '.join(nearest(name, known, n=2)) or 'none'}" for name in names[:8]
    )
    more = f"\n  and {len(names) - 8} more" if len(names) > 8 else ""
    where = "the planned weights" if planned else "the parameters"
    hint = "Plan these too, or give the parameters in the plan's place" if planned else "Mend the key map"
    return (
        f"{folder} holds {len(names)} module(s) or tensor(s) that the key map gives to none of {where}:\n"
        f"{listed}{more}\n"
        f'{hint}; names that only begin with something else are met by key_map.under(name="bert.").'
    )
