"""`lora-jax`: adapters and published weights from the command line, without a model.

lora-jax inspect runs/sentiment/adapters --plot deltas.png
lora-jax verify runs/sentiment/peft --base MiniLM-L6
lora-jax merge MiniLM-L6 runs/sentiment/peft merged
lora-jax convert runs/llama/adapters for-vllm --to vllm --key-map llama
lora-jax compose both style:0.7 facts:-0.3
lora-jax plan SmolLM2-135M --modules ".*self_attn.*" --rank 16
lora-jax diff base tuned adapters --energy 0.95
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checkpoint, key_maps
from lora_jax.adapters.combine import combine
from lora_jax.adapters.lora import LoraAdapter
from lora_jax.checkpoints.failures import first_line
from lora_jax.checkpoints.replaceable import check_target
from lora_jax.cli.spectrum import low_rank
from lora_jax.cli.summary import summarize
from lora_jax.core.adapter import Adapter
from lora_jax.core.axes import KernelAxes
from lora_jax.core.errors import LoraError
from lora_jax.core.paths import nearest
from lora_jax.core.text import count, printable, size
from lora_jax.interop.key_map import Entry, KeyMap
from lora_jax.interop.merge_checkpoint import check_checkpoint, merge_checkpoint, read_tensors
from lora_jax.interop.model_config import model_facts
from lora_jax.interop.name_templates import literal
from lora_jax.interop.peft.dtypes import in_fp32
from lora_jax.interop.peft.load import CONFIG, load_by_module
from lora_jax.interop.peft.save import save_peft
from lora_jax.interop.peft.tied_tables import Tied
from lora_jax.interop.safetensors_index import Tensor

try:
    import tyro

    from lora_jax.cli.output import draw_spectra, print_json, print_table, progress_bar, say
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed, which the command line needs: pip install 'lora_jax[cli]'")

Folder = Annotated[Path, tyro.conf.Positional]


def inspect(adapters: Folder, /, plot: Path | None = None, json: bool = False) -> int:
    """Show the rank and scale of adapters, and the norm and effective rank of each weight's change.

    Example: lora-jax inspect runs/sentiment/adapters --plot deltas.png

    Args:
        adapters: a folder of lora_jax.checkpoint.save, or of HF PEFT.
        plot: also draw the norms and effective ranks as bars, into this PNG.
        json: print JSON instead of the table.
    """
    rows = summarize(adapters)
    if plot is not None:
        draw_spectra(rows, plot)
    if json:
        print_json([row._asdict() | {"spectrum": row.spectrum._asdict()} for row in rows])
        return 0
    header = ["weight", "kind", "inputs, outputs", "matrices", "rank", "scale", "norm", "effective rank"]
    cells = [
        [r.weight, r.kind, list(r.shape), r.matrices, r.rank, f"{r.scale:.4g}",
         f"{r.spectrum.norm:.4g}", f"{r.spectrum.effective_rank:.2f}"]
        for r in rows
    ]  # fmt: skip
    print_table(header, cells, right=5)
    say(f"{len(rows)} weights adapted, {sum(r.parameters for r in rows):,} parameters.")
    return 0


def verify(adapters: Folder, /, base: Path | None = None, tied: Tied = "refuse", json: bool = False) -> int:
    """Check that adapters are sound: finite, with an effect, and fitting a base. Exits with 1 if not.

    Example: lora-jax verify runs/sentiment/peft --base MiniLM-L6

    Args:
        adapters: a folder of lora_jax.checkpoint.save, or of HF PEFT.
        base: a folder with the base's safetensors, for adapters of HF PEFT: each needs its tensor there.
        tied: as of `merge`, for a base with one tensor for the table of tokens and the head.
        json: print JSON instead of text.
    """
    problems = [
        printable(
            f"{row.weight}: {'does not change anything' if row.spectrum.finite else 'holds a NaN or an infinity'}"
        )
        for row in summarize(adapters)
        if not row.spectrum.norm > 0
    ]
    if base is not None:
        try:
            check_checkpoint(base, adapters, tied=tied)
        except LoraError as error:
            problems.append(str(error))
    if json:
        print_json({"sound": not problems, "problems": problems})
    else:
        print("\n".join(problems) or printable(f"{adapters} is sound."))
    return 1 if problems else 0


def merge(base: Folder, adapters: Folder, output: Folder, /, tied: Tied = "refuse", json: bool = False) -> int:
    """Merge adapters of HF PEFT into the weights of a Hugging Face model on disk, in little memory.

    Example: lora-jax merge MiniLM-L6 runs/sentiment/peft merged

    Args:
        base: a folder with model.safetensors, or an index and its shards.
        adapters: a folder of HF PEFT, as lora_jax.save_peft writes it.
        output: a new folder for the merged model.
        tied: of adapters of the table of tokens alone, where the base has one tensor for it and the head: refuse them;
            untie, which writes a head of its own; or change both.
        json: print the rounding loss of each tensor as JSON.
    """
    with progress_bar("merging") as progress:
        losses = merge_checkpoint(base, adapters, output, tied=tied, progress=progress)
    if json:
        print_json(losses)
        return 0
    worst = sorted(losses.items(), key=lambda item: (-item[1], item[0]))[:5]
    print_table(["most is lost to rounding in", "of the change"], [[n, f"{x:.2%}"] for n, x in worst], right=1)
    say(f"{len(losses)} tensors merged into {output}.")
    return 0


def convert(
    adapters: Folder,
    output: Folder,
    /,
    to: Literal["peft", "vllm", "loralib", "orbax"] = "peft",
    key_map: Literal["bert", "gpt2", "llama", "gemma", "vit", "vit_4", "t5"] | None = None,
    stacked: bool = False,
    prefix: str = "",
    tied: Tied = "refuse",
    json: bool = False,
) -> int:
    """Write adapters in another format.

    Example: lora-jax convert runs/llama/adapters for-vllm --to vllm --key-map llama --stacked

    Args:
        adapters: a folder of lora_jax.checkpoint.save, or of HF PEFT.
        output: a new folder.
        to: HF PEFT; the part of it that vLLM reads (one rank, one scale); loralib's names; or the orbax folder of
            lora_jax.checkpoint, in which adapters from PEFT have its module names as their paths.
        key_map: for adapters of lora_jax.checkpoint.save: the table from their paths to torch's modules.
        stacked: whether their layers are stacked along a first axis.
        prefix: what torch's names begin with beyond those of the table, such as "bert.".
        tied: "both" writes an adapter of the table of tokens for the head too, for programs that have one table.
        json: print JSON instead of text.
    """
    check_target(output, None)
    if (adapters / CONFIG).exists():
        found, others, table = load_by_module(adapters)
        if to == "orbax":  # from which training goes on
            found, others = in_fp32((found, others))
    else:
        found, others = checkpoint.load(adapters)
        if key_map is None and to != "orbax":
            raise LoraError(f"{adapters} has paths of JAX: say which torch modules they are, such as --key-map llama.")
        table = getattr(key_maps, (key_map or "bert").upper())
        table = (table.stacked() if stacked else table).under(name=prefix)
    if to == "orbax":
        checkpoint.save(output, found, others)
    else:
        save_peft(output, found, table, others=others, profile=to, tied=tied)
    return _print_written(output, {path: _rank(adapter) for path, adapter in found.items()}, json)


def compose(output: Folder, parts: Annotated[tuple[str, ...], tyro.conf.Positional], /, json: bool = False) -> int:
    """Write the weighted sum of adapters of HF PEFT, exactly: its rank is the sum of their ranks.

    It is computed in fp32, and written in the widest dtype of its parts.

    Example: lora-jax compose both style:0.7 facts:-0.3

    Args:
        output: a new folder of HF PEFT.
        parts: folders of HF PEFT, each with ":" and its weight, or with the weight 1.
        json: print JSON instead of text.
    """
    check_target(output, None)
    sums, table, dtypes = [], KeyMap(), []
    for part in parts:
        folder, weight = _weighted(part)
        adapters, others, own = load_by_module(folder)
        if others:
            raise LoraError(f"{folder} also holds {next(iter(others))!r} whole, which no sum of adapters expresses.")
        dtypes += [array.dtype for array in jax.tree.leaves(adapters)]
        sums.append(({path: adapter.to_lora() or adapter for path, adapter in in_fp32(adapters).items()}, weight))
        table += own
    combined = combine(sums)
    save_peft(output, combined, table, dtype=jnp.result_type(*dtypes))
    return _print_written(output, {path: _rank(adapter) for path, adapter in combined.items()}, json)


def plan(base: Folder, /, modules: str, rank: int = 8, json: bool = False) -> int:
    """Show what adapters for some modules of a model would cost: parameters, memory, and FLOPs for each token.

    Example: lora-jax plan SmolLM2-135M --modules ".*self_attn.*" --rank 16

    Args:
        base: a folder with model.safetensors, or an index and its shards. Only the headers are read.
        modules: a regular expression for whole names of modules, as model.layers.0.self_attn.q_proj.
        rank: of the adapters.
        json: print JSON instead of the table.
    """
    places = read_tensors(base).places
    rows: list[dict[str, Any]] = []
    for module in _modules(base, places, modules):
        shape = places[f"{module}.weight"].shape
        if rank > min(shape):
            raise LoraError(
                f"{printable(module)} of shape {list(shape)}: rank {rank} is above {min(shape)}, give it at most that."
            )
        rows.append(
            {"module": module, "shape": list(shape), "parameters": rank * sum(shape), "flops": 2 * rank * sum(shape)}
        )
    if json:
        print_json(rows)
        return 0
    cells = [
        [r["module"], r["shape"], f"{r['parameters']:,}", size(4 * r["parameters"]), count(r["flops"])] for r in rows
    ]
    print_table(["module", "shape", "parameters", "bytes", "FLOPs a token"], cells, right=3)
    total, whole = sum(r["parameters"] for r in rows), sum(int(np.prod(place.shape)) for place in places.values())
    print(
        f"{len(rows)} modules: {total:,} parameters beside {whole:,} ({total / (total + whole):.2%}), "
        f"{size(4 * total)}."
    )
    return 0


def diff(
    before: Folder,
    after: Folder,
    output: Folder,
    /,
    rank: int | None = None,
    energy: float | None = None,
    modules: str = r".*",
    rest: bool = False,
    json: bool = False,
) -> int:
    """Extract adapters from two versions of a model: the nearest to the change of each module.

    Example: lora-jax diff base tuned adapters --rank 16

    Args:
        before: a folder with safetensors.
        after: the same model with other weights.
        output: a new folder of HF PEFT.
        rank: of the adapters.
        energy: or the share of each change's squared norm to hold, such as 0.95, with as small a rank as that takes.
        modules: a regular expression for whole names of the modules that get adapters, if they changed.
        rest: go on if other tensors changed too, though the adapters lack their changes.
        json: print JSON instead of the table.
    """
    check_target(output, None)
    old, new = read_tensors(before), read_tensors(after)
    if list(old) != list(new) and sorted(old) != sorted(new):
        other = sorted(set(old) ^ set(new))[0]
        raise LoraError(f"only one of {before} and {after} has {other!r}: they are not versions of one model.")
    kind = "conv1d" if model_facts(before).get("model_type") == "gpt2" else "linear"
    chosen = dict.fromkeys(_modules(before, old.places, modules))
    entries, adapters, rows, left = [], {}, [], []
    for name, change in _changes(before, after, old, new):
        module = name.removesuffix(".weight")
        if module not in chosen:
            left.append(name)
            continue
        a, b, share = low_rank(change if kind == "conv1d" else change.T, rank, energy)
        entries.append(Entry(literal(module), literal(module), "in out", kind))
        adapters[module] = LoraAdapter(jnp.asarray(a), jnp.asarray(b), KernelAxes((), (0,), (1,)), 1.0)
        rows.append([module, list(change.shape), a.shape[1], f"{share:.2%}"])
    if left and not rest:
        raise LoraError(f"{len(left)} other tensors changed too, {left[0]!r} first. To go on without them: --rest.")
    if not adapters:
        raise LoraError(f"no module that {modules!r} matches has changed.")
    save_peft(output, adapters, KeyMap(*entries))
    if not json:
        print_table(["module", "shape", "rank", "of the change"], rows, right=2)
    return _print_written(output, {path: _rank(adapter) for path, adapter in adapters.items()}, json)


# What the commands share ----------------------------------------------------------------------------------------------


def _rank(adapter: Adapter) -> int | None:
    """Return the rank of an adapter, or None if it has no factors."""
    return adapter.a.shape[-1] if isinstance(adapter, LoraAdapter) else None


def _print_written(output: Path, ranks: Mapping[str, int | None], as_json: bool) -> int:
    """Print where adapters were written, and return the exit code."""
    if as_json:
        print_json({"output": str(output), "ranks": ranks})
    else:
        say(f"{len(ranks)} adapters written to {output}.")
    return 0


def _modules(base: Path, places: Mapping[str, Tensor], pattern: str) -> list[str]:
    """Return the modules that have a matrix and whose whole name matches.

    Raises:
        LoraError: there are none, or the pattern is no regular expression.
    """
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise LoraError(f"{pattern!r} is no regular expression: {error}.") from error
    matrices = [name.removesuffix(".weight") for name, place in places.items()
                if name.endswith(".weight") and len(place.shape) == 2]  # fmt: skip
    found = [module for module in matrices if matches(module)]
    if not found:
        raise LoraError(
            f"{pattern!r} matches no module of {base} with a matrix; a pattern stands for a whole name, and the "
            f"nearest are {', '.join(nearest(pattern, matrices, n=3)) or 'none'}."
        )
    return found


def _changes(
    before: Path, after: Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the name and the change in fp32 of each tensor that differs."""
    for name in old:
        w0, w1 = (np.asarray(tensors[name], np.float32) for tensors in (old, new))
        if w0.shape != w1.shape:
            raise LoraError(f"{name!r} has shape {list(w0.shape)} in {before}, and {list(w1.shape)} in {after}.")
        if not np.array_equal(w0, w1):
            yield name, w1 - w0


def _weighted(part: str) -> tuple[Path, float]:
    """Split `folder:0.7` into the folder and its weight; a folder alone has the weight 1."""
    name, colon, weight = part.rpartition(":")
    if not colon:
        return Path(part), 1.0
    try:
        return Path(name), float(weight)
    except ValueError as error:
        raise LoraError(f"{part!r}: expected a folder and a weight, such as {name}:0.7.") from error


DESCRIPTION = "Adapters and published weights from the command line, without a model."
COMMANDS: dict[str, Callable[..., int]] = {
    "inspect": inspect,
    "verify": verify,
    "merge": merge,
    "convert": convert,
    "compose": compose,
    "plan": plan,
    "diff": diff,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return the exit code: 0, or 1 after a line on stderr that says what is wrong."""
    try:
        code = int(
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="lora-jax", description=DESCRIPTION, args=arguments)
        )
        sys.stdout.flush()
        return code
    except LoraError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # such as a full disk that the output goes to
        print(f"error: {first_line(error)}", file=sys.stderr)
        with contextlib.suppress(OSError):  # what is left of the output would be tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
