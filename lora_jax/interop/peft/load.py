"""Adapters from a folder of HF PEFT, read in six stages from top to bottom of `load_peft` and `for_parameters`."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapters.arguments import check_dtype
from lora_jax.checkpoints.reading import of_one_save
from lora_jax.core.adapter import Adapter
from lora_jax.core.argument_checks import A_KEY_MAP, check_is
from lora_jax.core.errors import LoraError, short
from lora_jax.core.layout import of_weight
from lora_jax.core.paths import nearest
from lora_jax.core.targets import Plan
from lora_jax.core.text import listed
from lora_jax.interop.entries import Entry
from lora_jax.interop.key_map import Array, KeyMap, ParameterMatch, parts_by_tensor
from lora_jax.interop.name_templates import literal
from lora_jax.interop.peft.adapter_axes import with_axes
from lora_jax.interop.peft.biases import adapters_of_biases
from lora_jax.interop.peft.config import read_config
from lora_jax.interop.peft.contents import Contents, resolved, sort_tensors
from lora_jax.interop.peft.dtypes import widened
from lora_jax.interop.peft.experts_joined import with_experts_joined
from lora_jax.interop.peft.files import CONFIG, WEIGHTS, check_folder_of_peft, read_tensors
from lora_jax.interop.peft.formats.format import Config, Format, Modules
from lora_jax.interop.peft.from_modules import adapters_of, module_names, named_module
from lora_jax.interop.peft.full_weights import arrays_of_whole
from lora_jax.interop.peft.gains_of_biases import adapters_of_gains, check_that_biases_are_known
from lora_jax.interop.peft.module_prefixes import (
    Prefix,
    names_in_files,
    names_of_parameters,
    prefixes,
    the_only,
    with_their_names,
)
from lora_jax.interop.peft.parameters import shapes_of
from lora_jax.interop.peft.residual_bases import residuals, without_start
from lora_jax.interop.peft.target_parameters import parameters_of_modules
from lora_jax.interop.peft.tied_tables import (
    Tied,
    check_tied,
    heads_like_tables,
    is_head,
    refuse_ends_that_differ,
    refuse_what_is_of_one_end,
    without_copies,
)
from lora_jax.interop.peft.token_rows import adapters_of_rows

__all__ = ["CONFIG", "load_by_module", "load_peft"]


@of_one_save
def load_peft(
    folder: str | Path,
    plan_or_params: Any,
    key_map: KeyMap,
    *,
    dtype: Any = jnp.float32,
    tied: Tied = "refuse",
) -> tuple[dict[str, Adapter], dict[str, jax.Array]]:
    """Read the adapters of a folder that HF PEFT wrote, and the arrays that were trained whole.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        plan_or_params: a plan, for adapters of just the planned weights, with the plan's axes; or parameters (or their
            shapes), with the axes of the key map.
        key_map: from parameters to modules. The folder's names may begin with other parts that wrap a model, such as
            `language_model.`, where all of them become the model's in one way only.
        dtype: of the adapters, and of what else was trained. fp32 by default, also for files of bf16 or fp16, in which
            Adam's updates vanish; None keeps the file's.
        tied: what an adapter of an embedding alone becomes where the table is the head as well: in PEFT it is of the
            lookups alone, here of both ends. "refuse" it, or have it at "both" ends. A plan shows how the program uses
            a table; of parameters, a table is taken to be the head as well if they hold no other one.

    Returns:
        `(adapters, others)`. `{path: adapter}` is of the kind that the folder has, with `FullAdapter` for what is added
        to biases and `RowsAdapter` for trained tokens. `{path: array}` are biases, heads and tables that take the
        place of the parameters there. Adapters that started with PiSSA or OLoRA are for W less what they started with:
        these bases are among the others too, and take `params` with arrays. (The randomised SVD of "pissa_niter_4" is
        taken as the exact one, which it approximates.) With `layer_replication` the layers are those of the replicated
        model.

    Raises:
        LoraError: there is no such folder; a file is cut short or not of this format; the kind of adapter or an option
            is not one of this version's; the key map gives tensors to no parameter; factors lack their partners, have
            other ranks than the config says, or do not fit the parameters; an adapter of a table that is the head as
            well. Each is named, and nothing is returned.

    >>> import jax.numpy as jnp, tempfile, lora_jax as lora
    >>> key_map = lora.key_maps.KeyMap(lora.key_maps.linear("up/kernel", "mlp.up"))
    >>> axes = lora.KernelAxes(stack=(), inputs=(0,), outputs=(1,))
    >>> adapters = {"up/kernel": lora.LoraAdapter(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 0.5)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_peft(f"{folder}/peft", adapters, key_map)
    ...     lora.load_peft(f"{folder}/peft", {"up": {"kernel": jnp.ones((4, 3))}}, key_map)
    ({'up/kernel': LoraAdapter(a 4x2, b 2x3)}, {})
    """
    folder = Path(folder)
    check_folder_of_peft(folder)
    check_is("load_peft(folder, plan_or_params, key_map)", "key_map", key_map, KeyMap, A_KEY_MAP)
    check_tied(tied)
    if tied == "untie":
        raise LoraError("load_peft(tied='untie'): one parameter cannot be two; that is for merge_checkpoint.")
    if dtype is not None:
        check_dtype("load_peft", dtype)
    # 1. The config says of which kind the adapters are.
    config = read_config(folder / CONFIG)
    # 2. The tensors of the file, 3. grouped by modules.
    tensors = read_tensors(folder / WEIGHTS, config.format)
    contents = sort_tensors(tensors if dtype is None else _widened(tensors, config.format), config, folder)
    # 4. to 6. The parameters that these modules and tensors are, and their adapters.
    return for_parameters(contents, config, plan_or_params, key_map, folder, dtype=dtype, tied=tied)


def for_parameters(
    contents: Contents,
    config: Config,
    plan_or_params: Any,
    key_map: KeyMap,
    source: Path,
    *,
    dtype: Any,
    tied: Tied,
) -> tuple[dict[str, Adapter], dict[str, jax.Array]]:
    """Return the adapters of a model's parameters from what a file holds of torch's modules; as `load_peft`."""
    # 4. The parameters that these modules and tensors are.
    matches = key_map.match(shapes_of(plan_or_params), strict=False)
    contents, config = with_experts_joined(contents, config, matches, source)
    ways = prefixes(contents, names_of_parameters(matches))
    matches = with_their_names(matches, the_only(ways))
    contents, copies = without_copies(contents, matches)
    refuse_ends_that_differ(contents, matches, copies, source)
    if tied == "refuse":
        refuse_what_is_of_one_end(contents, matches, copies, plan_or_params, source)
    # 5. Adapters, and arrays that were trained whole.
    contents = resolved(contents, config, _fans(matches), source)
    if config.start is not None and config.format.start_in_factors:
        contents = contents._replace(modules=without_start(config.start, matches, contents.modules, plan_or_params))
    if config.format.scales_biases and isinstance(plan_or_params, Plan):
        check_that_biases_are_known(matches, contents.modules, key_map)
    adapters = _adapters(contents, matches, config, source)
    others = arrays_of_whole(matches, contents.whole)
    if dtype is not None:
        adapters = {path: _cast(adapter, dtype) for path, adapter in adapters.items()}
        others = jax.tree.map(lambda array: array.astype(dtype), others)
    # 6. Nothing may be left, neither of the source nor of the plan.
    _check_that_nothing_is_left(contents, matches, config, source, isinstance(plan_or_params, Plan), ways)
    if config.start is not None and not config.format.start_in_factors:
        others |= residuals(config.start, matches, contents.modules, plan_or_params)
    return (_along_plan(adapters, plan_or_params, source) if isinstance(plan_or_params, Plan) else adapters), others


def load_by_module(folder: Path) -> tuple[dict[str, Adapter], dict[str, Array], KeyMap]:
    """Read a folder without a model, by the names of torch's modules, in the dtypes of its file.

    Returns:
        `(adapters, others, key_map)`: the first two by the names of modules and tensors, and the key map back to these.

    Raises:
        LoraError: as `load_peft`; the tensors alone do not tell the adapters.
    """
    read = read_by_module(folder)
    return read.adapters, read.whole, read.key_map


class ByModule(NamedTuple):
    """What a folder holds, by the names of torch's modules and tensors."""

    adapters: dict[str, Adapter]
    whole: dict[str, Array]
    key_map: KeyMap  # from these names to the same names
    modules: Modules
    wrapped: Mapping[str, None]  # those of `whole` that are of modules inside adapted ones
    copies: dict[str, str]  # `{head: table}` of tensors: heads that are changed just as a table is
    start: str | None  # the start that changed the base of all adapters
    prefix: Prefix  # what these names begin with, in the place of what those of the model's files begin with


@of_one_save
def read_by_module(folder: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> ByModule:
    """Read all that a folder holds by the names of torch's modules.

    Args:
        shapes: of the tensors of the model that it is for, if these are at hand. Numbers are read as fp32 then.

    Raises:
        LoraError: as `load_peft`; the tensors do not tell the adapters.
    """
    config = read_config(folder / CONFIG)
    if why := _why_a_model_is_needed(config, weights=shapes is not None):
        raise LoraError(
            f"{folder} {why}: load it with a key map, lora.load_peft(folder, params, key_map), and go on "
            "with both of its results."
        )
    tensors = read_tensors(folder / WEIGHTS, config.format)
    contents = sort_tensors(tensors if shapes is None else _widened(tensors, config.format), config, folder)
    prefix = Prefix() if shapes is None else the_only(prefixes(contents, names_in_files(shapes)))
    theirs = {prefix.to_theirs(name): shape for name, shape in (shapes or {}).items()}
    fans = {name.removesuffix(".weight"): (shape[1], shape[0]) for name, shape in theirs.items() if len(shape) == 2}
    contents = resolved(contents, config, fans, folder)
    adapters, key_map = _adapters_by_module(contents, config, tensors, theirs, folder)
    copies = heads_like_tables(contents)
    return ByModule(adapters, contents.whole, key_map, contents.modules, contents.wrapped, copies, config.start, prefix)


def _adapters_by_module(
    contents: Contents,
    config: Config,
    tensors: Mapping[str, Array],
    tables: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> tuple[dict[str, Adapter], KeyMap]:
    """Return the adapters by the names of modules and tensors, and the key map back to these."""
    entries: list[Entry] = []
    shapes: dict[str, tuple[int, ...]] = {}
    experts = parameters_of_modules(contents.modules, config, tables, folder)
    for parameter, kind, sizes in experts.values():
        entries.append(Entry(literal(parameter), literal(parameter), "expert in out", kind))
        shapes[parameter] = sizes
    for name, module in contents.modules.items():
        if name in experts:
            continue
        kind = config.format.module_kind(config, name, module.arrays, tensors)
        entry, shapes[name] = named_module(config.format, name, kind, module.arrays)
        entries.append(entry)
    arrays = {name: tensor.shape for name, tensor in (contents.biases | contents.whole).items()}
    rows = {name.removesuffix(".weight"): name for name in contents.rows}
    for table, name in rows.items():
        if name not in tables:
            near = ", ".join(nearest(name, tables, n=3)) or "none"
            raise LoraError(f"{folder} holds rows of {short(name)}, no tensor of the model; the nearest are {near}.")
        if table in contents.modules:
            raise LoraError(f"{folder} holds rows of {short(name)} and factors of it; this version has one of them.")
    entries += [Entry(literal(module), literal(module), "in out", "embedding") for module in rows]
    key_map = KeyMap(*entries, *(Entry(literal(name), literal(name), "keep*", "array") for name in arrays))
    adapters = adapters_of(key_map.match(shapes), contents.modules, config, {})
    adapters |= adapters_of_rows(
        key_map.match({module: tables[name] for module, name in rows.items()}), contents.rows, config
    )
    return adapters | adapters_of_biases(key_map.match(arrays), contents.biases), key_map


def _fans(matches: Mapping[str, ParameterMatch]) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of modules, without those of a window."""
    found = {}
    for name, parts in parts_by_tensor(matches).items():
        if parts[0].entry.kind != "array":
            inputs = math.prod(parts[0].sizes_of("in"))
            found[name.removesuffix(parts[0].entry.suffix)] = (inputs, sum(part.outputs for part in parts))
    return found


def _widened(tensors: Mapping[str, Array], format: Format) -> dict[str, Array]:
    """Return the tensors in fp32 or wider, but for those that all modules share: they are compared as they are."""
    return {name: tensor if name in format.shared_tensors else widened(tensor) for name, tensor in tensors.items()}


def _adapters(
    contents: Contents, matches: Mapping[str, ParameterMatch], config: Config, folder: Path
) -> dict[str, Adapter]:
    """Return the adapters of weights, of biases and of rows of tables."""
    try:
        shared = config.format.shared_fields(config, contents.shared, contents.modules, matches)
    except LoraError as error:
        raise LoraError(f"{folder} {error}") from None
    adapters = adapters_of(matches, contents.modules, config, shared)
    biases = adapters_of_biases(matches, contents.biases)
    rows = adapters_of_rows(matches, contents.rows, config)
    if both := [path for path in rows if path in adapters]:
        raise LoraError(f"{folder} holds rows of {both[0]!r} and factors of it, and this version has one or the other.")
    if config.format.scales_biases:
        biases |= adapters_of_gains(matches, contents.modules)
    return adapters | biases | rows


def _cast(adapter: Adapter, dtype: Any) -> Adapter:
    """Return an adapter of this dtype, but for its scale, which stays in fp32."""
    arrays = of_weight(adapter.arrays(), adapter.layout)
    return dataclasses.replace(adapter, **{name: a.astype(dtype) for name, a in arrays.items()})  # type: ignore[type-var]


def _check_that_nothing_is_left(
    contents: Contents,
    matches: Mapping[str, ParameterMatch],
    config: Config,
    folder: Path,
    planned: bool,
    ways: Sequence[Prefix],
) -> None:
    """Raise if the key map gives a module or a tensor of the folder to no parameter."""
    modules = dict.fromkeys(module_names(matches, config))
    tensors = {name: path for path, match in matches.items() for name in match.tensors().values()}
    biases = [name for name, c in contents.biases.items() if c.any()]  # zeros are also there for modules without a bias
    left = [name for name in contents.modules if name not in modules]
    left += [name for name in (*biases, *contents.rows, *contents.whole) if name not in tensors]
    if not left:
        return
    known = [name for match in matches.values() for name in (*match.names.values(), *match.tensors().values())]
    where = "the planned weights" if planned else "the parameters"
    tied = ""
    if any(is_head(name) for name in left):
        tied = (
            " A head that is tied to a table is no parameter of its own: for what is changed of the head alone, give "
            "the model one that begins as a copy of the table."
        )
    hint = "Plan these too, or give the parameters in the plan's place" if planned else "Mend the key map"
    under = 'names that only begin with something else are met by key_map.under(name="bert.")'
    if ways:
        maps = " or ".join(f"lora.load_peft(folder, params, {way.of_key_map()})" for way in ways[:4])
        under = f"these names only begin with something else, and are met by {maps}"
    raise LoraError(
        f"{folder} holds {len(left)} module(s) or tensor(s) that the key map gives to none of {where}:\n"
        f"{_with_nearest(left, known)}\n"
        f"{hint}; {under}.{tied}"
    )


def _with_nearest(names: Sequence[str], known: Iterable[str]) -> str:
    """Return names on lines of their own, each with those that are most like it."""
    known = [*known]
    lines = [f"{short(name)}; nearest: {', '.join(nearest(name, known, n=2)) or 'none'}" for name in names[:8]]
    return listed([*lines, *names[8:]])


def _along_plan(adapters: Mapping[str, Adapter], plan: Plan, folder: Path) -> dict[str, Adapter]:
    """Return the adapters with the axes of the plan, which has to have one for each of its weights."""
    if missing := [path for path in plan if path not in adapters]:
        raise LoraError(
            f"{folder} holds no factors for {missing[0]!r} of the plan, and {len(missing) - 1} more: plan the "
            f"weights that it has, which are {', '.join(sorted(adapters)[:8]) or 'none'}."
        )
    return {path: with_axes(adapter, plan[path].axes, path, "the plan") for path, adapter in adapters.items()}


def _why_a_model_is_needed(config: Config, weights: bool) -> str:
    """Return what the tensors of a folder do not tell, empty if they tell all; `weights` are those of its model."""
    if config.target_parameters and not weights:
        return f"adapts {config.target_parameters[0]}, and its tensors do not tell of which parameter they are"
    if config.start and not weights:
        return f"is for a base without what {config.start!r} began with"
    if config.replicated:
        return "is for a model that has layers of its base several times"
    if config.tokens and not weights:
        return "has rows of tables, and its tensors do not tell the sizes of these"
    return config.format.needs_model or ("" if weights else config.format.needs_shapes)
