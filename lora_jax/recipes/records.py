"""What is kept of a training run beside its checkpoints: its settings, a line for each step, and a picture of them.

config.toml    the settings, as `lora-jax train --config` reads them
log.jsonl      a JSON object for each step, and for each evaluation
curves.png     the loss over the steps
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TextIO

from lora_jax.checkpoints.atomic_dir import written_file
from lora_jax.core.errors import LoraError
from lora_jax.core.untrusted import open_file
from lora_jax.recipes.options import Options, check_names, expected_type

CONFIG, LOG, CURVES = "config.toml", "log.jsonl", "curves.png"
MEASURE = "eval_loss"  # the loss of held-out examples, in the log and of checkpoints
PLACES = ("model", "data", "output", "eval_data", "merged", "date")  # what a config has beside the options

# What may be another when a run goes on, as it does not change what is trained; over another mesh, and without remat,
# sums are rounded in another way.
FREE = ("samples", "output", "mesh", "remat", "log_to")

# Settings -------------------------------------------------------------------------------------------------------------


def write_config(path: Path, options: Options, places: Mapping[str, str]) -> None:
    """Write all settings of a run, and of what it is."""
    values = {**places, **dataclasses.asdict(options)}
    with written_file(path) as new:
        lines = (f"{name} = {_toml(value)}\n" for name, value in values.items())
        new.write_text("".join(lines), encoding="utf-8")


def _toml(value: str | float) -> str:
    """Return a value as TOML has it. JSON has it alike, but for DEL; and it would escape an emoji as UTF-16."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML or YAML file by their names, which may be written with hyphens.

    Raises:
        LoraError: the file cannot be read, or names something that is no setting.
    """
    with open_file(path) as file:
        text = file.read().decode(errors="replace")
    try:
        values = _yaml(path, text) if path.suffix in (".yaml", ".yml") else tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise LoraError(f"{path} is no TOML: {error}.") from None
    if not isinstance(values, dict):
        raise LoraError(f"{path} holds no names with values.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    check_names(values, PLACES)
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            raise LoraError(f"{path}: {name} is {value!r}, expected text, a number, true or false.")
        if name in PLACES:
            kind, said = (bool, "true or false") if name == "merged" else (str, "text")
            expected = None if isinstance(value, kind) else said
        else:
            expected = expected_type(name, value) and expected_type(name, _number(value))  # YAML reads 1e-3 as text
        if expected:
            raise LoraError(f"{path}: {name} is {value!r}, expected {expected}.")
    return values


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_date(path: Path) -> datetime | None:
    """Return the day on which the run was begun whose settings a file holds; None if they are of no run.

    Raises:
        LoraError: as `read_config`; the date is none.
    """
    text = read_config(path).get("date")
    if text is None:
        return None
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        raise LoraError(f"{path}: date is {text!r}, expected the day on which the run was begun: 2026-01-31.") from None


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise LoraError(f"{path} is YAML, for which PyYAML is needed: pip install pyyaml. Or write TOML.") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LoraError(f"{path} is no YAML: {error}.") from None


def check_same(path: Path, options: Options, places: Mapping[str, str]) -> None:
    """Check that a run that is to go on has the settings that it began with.

    Raises:
        LoraError: it has others, which are named.
    """
    before, now = read_config(path), {**places, **dataclasses.asdict(options)}
    changed = [name for name in now if name not in FREE and name in before and before[name] != now[name]]
    if changed:
        lines = "; ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in changed)
        raise LoraError(f"{path.parent} was begun with other settings: {lines}. Give the same, or another folder.")


# Steps ----------------------------------------------------------------------------------------------------------------


class Log:
    """The lines of a run. Those of steps that it takes again, after it was broken off, are taken out.

    Args:
        folder: of the run; None to keep nothing.
        step: the last step that was taken before; 0 to begin, with what is measured before the first.

    Attributes:
        lines: all of them.
        again: those that were taken out.
        first: the step of the first line that is to come, or one before it.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self.again: list[dict[str, Any]] = []
        self.first = step + 1 if step else 0
        self._file: TextIO | None = None
        if folder is None:
            return
        path = folder / LOG
        for line in read_log(path) if path.exists() else []:
            (self.lines if line["step"] < self.first else self.again).append(line)
        with written_file(path) as new:
            new.write_text("".join(f"{json.dumps(line)}\n" for line in self.lines), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def add(self, line: dict[str, Any]) -> None:
        """Add a line, which has the step."""
        self.lines.append(line)
        if self._file is not None:
            print(json.dumps(line), file=self._file, flush=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; of a process that was killed the last one may be cut off, and is left out."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of steps and of held-out examples into a PNG file."""
    try:
        import matplotlib
    except ImportError:
        raise LoraError("curves need matplotlib, which is not installed: pip install 'lora_jax[cli]'.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [line for line in lines if "loss" in line]
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], color="#9dbcd8", label="batches")
    if held_out := [line for line in lines if MEASURE in line]:
        points = [line["step"] for line in held_out], [line[MEASURE] for line in held_out]
        axes.plot(*points, color="#c44e52", marker="o", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    try:
        with written_file(path) as new:
            figure.savefig(new, dpi=120, format="png")
    finally:
        plt.close(figure)
