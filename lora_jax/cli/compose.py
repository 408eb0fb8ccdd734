"""The command that merges adapters into one: `compose`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from lora_jax.algebra.compose import compose as composed
from lora_jax.algebra.compress import compress
from lora_jax.algebra.truncation import Truncation
from lora_jax.bases.lazy import from_torch
from lora_jax.bases.open_files import open_safetensors
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.cli.folders import (
    NO_NAMES,
    OWN,
    PEFT,
    Component,
    Model,
    NameOptions,
    Names,
    format_in,
    read_adapters,
    table_of,
)
from lora_jax.cli.output import print_json, print_table, say
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import LoraError, short
from lora_jax.core.layout import of_weight
from lora_jax.core.packed import unpacked
from lora_jax.interop.conversions import About
from lora_jax.interop.key_map import KeyMap
from lora_jax.interop.peft.dtypes import in_fp32
from lora_jax.interop.peft.files import CONFIG
from lora_jax.interop.peft.options import Options
from lora_jax.interop.peft.save import save_peft

EXAMPLE = "lora-jax compose style:0.7 facts:-0.3 both"


@dataclass(frozen=True)
class Truncated:
    """How small the result becomes. A sum alone needs none of these.

    Args:
        rank: of the adapters.
        energy: or the share of each change's squared norm to hold, such as 0.95, with as small a rank as that takes.
        iterations: of a randomised decomposition to a rank, which is much faster for large matrices.
    """

    rank: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    energy: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    iterations: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None


LIMITS = Annotated[Truncated, tyro.conf.arg(name="")]  # without a prefix of their own
AS_IT_IS = Truncated()


class Part(NamedTuple):
    """A folder that is merged, and its weight."""

    folder: Path
    weight: float
    format: str
    adapters: dict[str, Adapter]  # in fp32
    key_map: KeyMap
    dtypes: list[Any]  # of its files
    config: dict[str, Any]  # what a folder of PEFT says of its model


def compose(
    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER:WEIGHT ... OUTPUT")],
    /,
    method: Annotated[str, tyro.conf.arg(metavar="METHOD")] = "sum",
    density: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None,
    majority: Literal["total", "frequency"] = "total",
    limits: LIMITS = AS_IT_IS,
    seed: int = 0,
    compat: Annotated[Literal["peft"] | None, tyro.conf.arg(metavar="peft")] = None,
    base: Model = None,
    component: Component = "unet",
    any_base: bool = False,
    dry_run: bool = False,
    names: NameOptions = NO_NAMES,
    json: bool = False,
) -> int:
    """Merge adapters: by default to their weighted sum, exactly, whose rank is the sum of their ranks.

    It is computed in fp32 or better, and written for HF PEFT in the widest dtype of its parts.

    Example: lora-jax compose style:0.7 facts:-0.3 both

    Args:
        folders: adapters of any format, all of which name their modules or none, each with ":" and its weight, or with
            the weight 1; and at last a new folder, for HF PEFT.
        method: sum; magnitude_prune, dare, ties, dare_ties, knots_ties or knots_dare_ties, which take a density and a
            rank or an energy (knots only if it is to be smaller); or, with --compat peft, the combination_type of its
            add_weighted_adapter.
        density: the share of entries that a method keeps, such as 0.5.
        majority: the sign that ties elects: of the sum, or the one that more adapters have.
        limits: as below.
        seed: of what is drawn at random: the entries that dare keeps.
        compat: peft for what HF PEFT computes.
        base: the folder of the model, for GGUF and files of image models, and for sums of adapters whose change depends
            on its weights, as DoRA's.
        component: of an image model, whose adapters are merged.
        any_base: merge adapters whose configs name different bases.
        dry_run: compute and print everything, and write nothing.
        json: print JSON instead of text.
    """
    if len(folders) < 2:
        raise LoraError(f"give the folders that are to be added up, and at last the output: {EXAMPLE}.")
    output = Path(folders[-1])
    if _is_weighted(folders[-1]):
        raise LoraError(f"the output comes last, and {output} is a part: {EXAMPLE}.")
    check_target(output, None)
    parts = [*_read(folders[:-1], names, About(base, component))]
    shared = _shared_config(parts, any_base)
    key_map = KeyMap()
    for part in parts:
        key_map += part.key_map
    merged, left = _merge(
        parts, base, key_map,
        method=method, density=density, majority=majority, rank=limits.rank, energy=limits.energy,
        iterations=limits.iterations, key=jax.random.key(seed), compat=compat,
    )  # fmt: skip
    if not dry_run:
        save_peft(output, merged, key_map, dtype=jnp.result_type(*(dtype for part in parts for dtype in part.dtypes)),
                  base_model=shared["base_model_name_or_path"], task_type=shared["task_type"])  # fmt: skip
    _print(None if dry_run else output, merged, left, json)
    return 0


# What is read ---------------------------------------------------------------------------------------------------------


def _read(given: Sequence[str], names: Names, about: About) -> Iterator[Part]:
    """Yield the parts, which are of one format."""
    of_peft = None
    for folder, weight in map(_weighted, given):
        format = format_in(folder, None)
        contents = read_adapters(folder, None, about)
        if of_peft not in (None, contents.key_map is not None):
            raise LoraError(
                f"{folder} is of another format than the parts before it, with other names for the same weights: "
                "convert it first."
            )
        of_peft = contents.key_map is not None
        if contents.others:
            other = next(iter(contents.others))
            raise LoraError(f"{folder} also holds {other!r} whole, which no sum of adapters expresses.")
        dtypes = [
            array.dtype for one in contents.adapters.values() for array in of_weight(one.arrays(), one.layout).values()
        ]
        config = dict(Options(folder / CONFIG).entries) if format == PEFT else {}
        adapters = in_fp32(contents.adapters)
        yield Part(folder, weight, format, adapters, table_of(folder, contents, names), dtypes, config)


def _shared_config(parts: Sequence[Part], any_base: bool) -> dict[str, str | None]:
    """Return what the configs of all parts say alike of their model, and None for what they do not say so.

    Raises:
        LoraError: two of them name different bases.
    """
    found: dict[str, str | None] = {}
    for name in ("base_model_name_or_path", "task_type"):
        said = {part.folder: value for part in parts if (value := part.config.get(name))}
        values = [*dict.fromkeys(map(str, said.values()))]
        found[name] = values[0] if len(values) == 1 else None
        if name == "base_model_name_or_path" and len(values) > 1 and not any_base:
            one, *_, other = said
            raise LoraError(
                f"{one} was trained on {short(said[one])} and {other} on {short(said[other])}: changes of different "
                "bases do not add up. If these are the same weights: --any-base."
            )
    return found


def _weighted(part: str) -> tuple[Path, float]:
    """Split `folder:0.7` into the folder and its weight; a folder alone has the weight 1."""
    name, colon, weight = part.rpartition(":")
    if not colon:
        return Path(part), 1.0
    try:
        return Path(name), float(weight)
    except ValueError as error:
        raise LoraError(f"{part!r}: expected a folder and a weight, such as {name}:0.7.") from error


def _is_weighted(part: str) -> bool:
    return re.fullmatch(r".*:[+-]?[0-9.]+(e[+-]?[0-9]+)?", part, re.DOTALL | re.IGNORECASE) is not None


# What is made of it ---------------------------------------------------------------------------------------------------


def _merge(
    parts: Sequence[Part], base: Path | None, key_map: KeyMap, *, method: str, **options: Any
) -> tuple[dict[str, Adapter], dict[str, Truncation]]:
    """Return the merged adapters, and what is left of those that were truncated."""
    left: dict[str, Truncation] = {}
    pairs = [(part.adapters, part.weight) for part in parts]
    if base is not None and any(part.format not in (PEFT, OWN) for part in parts):
        # It was to read them with. Its weights are needed only where a change depends on them.
        depends = any(one.to_lora() is None for part in parts for one in part.adapters.values())
        base = base if depends and method == "sum" else None
    if base is None:
        return composed(pairs, method, report=left.__setitem__, **options), left
    if method != "sum":
        raise LoraError(f"--base is for --method sum, which {method!r} is not: leave it out.")
    rank, energy = options.pop("rank"), options.pop("energy")
    tensors, merged = open_safetensors(base), dict[str, Adapter]()
    for path in dict.fromkeys(
        path for adapters, _ in pairs for path in adapters
    ):  # with one weight in memory at a time
        own = [({path: adapters[path]}, weight) for adapters, weight in pairs if path in adapters]
        shape = own[0][0][path].kernel_shape()
        stored = from_torch(tensors, {path: jax.ShapeDtypeStruct(shape, jnp.float32)}, key_map, ignore=".*")
        merged |= composed(own, method, params={path: jnp.asarray(unpacked(stored[path].read()))}, **options)
    if rank is not None or energy is not None:
        merged = compress(merged, rank=rank, energy=energy, report=left.__setitem__)
    return merged, left


def _print(output: Path | None, merged: Mapping[str, Adapter], left: Mapping[str, Truncation], as_json: bool) -> None:
    ranks = {path: one.a.shape[-1] if hasattr(one, "a") else None for path, one in merged.items()}
    if as_json:
        kept = {path: found.energy for path, found in left.items()}
        print_json({"output": None if output is None else str(output), "ranks": ranks, "kept": kept})
        return
    if left or output is None:
        shares = {path: f"{left[path].energy:.2%}" if path in left else "-" for path in merged}
        rows = [[path, "-" if ranks[path] is None else ranks[path], shares[path]] for path in merged]
        print_table(["module", "rank", "of the change"], rows, right=2)
    say(f"{len(merged)} adapters {'would be written' if output is None else f'written to {output}'}.")
